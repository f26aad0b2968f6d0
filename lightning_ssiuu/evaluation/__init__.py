"""Scores and what they rest on: predictions, chance levels, utility, privacy, finished runs."""
