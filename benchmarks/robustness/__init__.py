"""Which objective erases: objectives × data × training seeds from teaching to audit, beside the oracle."""
