"""Embedding RAG for genotype imputation, trained with DeepSpeed."""

__version__ = "0.1.0"
