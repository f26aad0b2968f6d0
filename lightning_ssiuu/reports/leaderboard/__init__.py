"""Audits in a table: one row per method with its verdicts, its gap to the oracle, what it keeps and what it costs."""
