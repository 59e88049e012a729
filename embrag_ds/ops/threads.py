"""Threads of the loops that numba compiles for CPUs."""

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
    """A compiled loop over ``numba.prange``, run by as many threads as torch uses; any Python thread may call it.

    Several ranks on a machine share its cores by torch's setting (``OMP_NUM_THREADS``), of which numba knows nothing.
    """

    def __init__(self, loop: Callable[..., None]):
        self._compiled: Any = numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})(
            loop
        )
        self.__doc__ = loop.__doc__

    def __call__(self, *arguments: Any) -> None:
        with _alone():
            numba.set_num_threads(min(_MOST_THREADS, torch.get_num_threads()))
            self._compiled(*arguments)


def _alone() -> AbstractContextManager[Any]:
    """Excludes other threads where numba's threading layer would abort the process on meeting two of them."""
    with _starting:
        return _turns()


@cache
def _turns() -> AbstractContextManager[Any]:
    """Start numba's threads; a lock unless their layer is safe for several callers."""
    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    # Starting them sets OpenMP's number of threads, which is torch's as well, to that of all cores.
    torch.set_num_threads(threads)
    layer = numba.threading_layer()
    if layer in _THREAD_SAFE:
        return nullcontext()
    logger.info("numba's threading layer is %s, on which threads take turns; with tbb or OpenMP they need not", layer)
    return Lock()
