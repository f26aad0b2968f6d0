"""Finished runs side by side: one row per method, its scores under every attack, and the oracle's beside them."""
