"""CUDA streams and pinned staging, timing of phases, and sampling of GPU and process memory.

Of ``embrag_ds``, this package imports :mod:`embrag_ds.errors` only.
"""
