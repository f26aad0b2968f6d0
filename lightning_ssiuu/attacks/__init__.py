"""Attacks on a finished model: what relearns, and what asks differently."""
