"""Genotype imputation with retrieval from a reference panel, trained with DeepSpeed."""

__version__ = "0.1.0"
