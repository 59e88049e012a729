"""Threads of the loops that numba compiles for CPUs."""

from __future__ import annotations

from typing import Any

import numba
import torch

_MOST_THREADS: int = numba.get_num_threads()
parallel_loop: Any = numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})


def use_torch_threads() -> None:
    """Compiled loops know nothing of torch's setting; several ranks on a machine rely on it."""
    numba.set_num_threads(min(_MOST_THREADS, torch.get_num_threads()))
