"""Imports of large packages without Python's search for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Context for imports, which make a million objects and hardly any garbage.

    Python would search them all again and again, for a sixth of the time that importing torch and DeepSpeed takes. They
    are not searched later, either.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
