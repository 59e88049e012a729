"""Numerical kernels on numpy arrays and torch tensors, with CPU (numba), CUDA (CuPy) and torch back ends.

A module such as ``dosage`` is the interface; ``dosage_numba`` and ``dosage_cuda`` implement it. This package imports no
other package of ``embrag_ds``.
"""
