"""Arithmetic on arrays: one front a function, its back ends named alike (imports nothing else of ours)."""
