"""Imputation network and its losses, on torch tensors only.

Of ``embrag_ds``, this package imports ``ops``, ``data``, :mod:`embrag_ds.retrieval.batch` and the shared top-level
modules.
"""
