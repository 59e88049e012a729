"""Evaluation: imputed files scored against a truth (numpy only)."""
