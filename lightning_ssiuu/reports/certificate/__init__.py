"""The certificate of a deletion: what was deleted from which model, how it was tested, and what came of it."""
