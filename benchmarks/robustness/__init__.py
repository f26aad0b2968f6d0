"""Which objective erases, and how far from the oracle: objectives × data × training seeds through teach, fit, attack, audit."""
