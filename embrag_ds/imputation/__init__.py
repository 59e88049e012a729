"""Imputation with an exported model (no DeepSpeed)."""
