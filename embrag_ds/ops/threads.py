"""Parallel numba loops that respect torch's number of threads and may be called from several Python threads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Lock
from typing import Any

import numba
import torch

logger = logging.getLogger(__name__)

_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
_THREAD_SAFE = ("omp", "tbb")
_starting = Lock()


class ParallelLoop:
    """Decorator that compiles a loop over ``numba.prange`` and runs it with as many threads as torch uses.

    Ranks on one machine share its cores by torch's setting (``OMP_NUM_THREADS``), which numba ignores. Any Python
    thread may call the loop. Sums may be reassociated and contracted, but NaN and infinity are honoured.
    """

    def __init__(self, loop: Callable[..., None]):
        self._compiled: Any = numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})(
            loop
        )
        self.__doc__ = loop.__doc__

    def __call__(self, *arguments: Any) -> None:
        with _exclusive():
            numba.set_num_threads(min(_MOST_THREADS, torch.get_num_threads()))
            self._compiled(*arguments)


def _exclusive() -> AbstractContextManager[Any]:
    """Context of one call of a loop: a lock if numba's threading layer aborts the process on concurrent calls."""
    with _starting:
        return _layer_lock()


@cache
def _layer_lock() -> AbstractContextManager[Any]:
    """Start numba's threads, and return a lock unless their threading layer is safe for several callers."""
    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    # Numba's start sets OpenMP's number of threads to that of all cores, and torch uses the same OpenMP.
    torch.set_num_threads(threads)
    layer = numba.threading_layer()
    if layer in _THREAD_SAFE:
        return nullcontext()
    logger.info("numba's threading layer is %s, on which threads take turns; with tbb or OpenMP they need not", layer)
    return Lock()
