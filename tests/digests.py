"""Digests of the files that a compiled loop is made of."""

from __future__ import annotations

import hashlib
from pathlib import Path

import embrag_ds

SHARED = ("compiled/functions", "compiled/instructions", "compiled/parts")
"""Modules that all loops with a digest call."""


def digest_of(room: str, *names: str) -> str:
    """First twelve digits of the SHA-256 of the shared modules and of those of a ``room``, in this order."""
    root = Path(embrag_ds.__file__).parent
    modules = (*SHARED, *(f"{room}/{name}" for name in names))
    text = b"".join((root / f"{module}.py").read_bytes() for module in modules)
    return hashlib.sha256(text).hexdigest()[:12]
