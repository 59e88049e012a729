"""Retrieval of reference haplotypes for query haplotypes, and the cache of their embeddings.

Of ``embrag_ds``, this package imports ``ops``, ``runtime``, ``data`` and the shared top-level modules.
"""
