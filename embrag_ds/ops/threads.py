"""Parallel numba loops that respect torch's number of threads and may be called from several Python threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from threading import Lock, local
from typing import Any

import numba
import torch

logger = logging.getLogger(__name__)

_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
_THREAD_SAFE = ("omp", "tbb")
_starting = Lock()
_of_thread = local()


class ParallelLoop:
    """Decorator that compiles a loop over ``numba.prange`` and runs it with as many threads as torch uses.

    Ranks on one machine share its cores by torch's setting (``OMP_NUM_THREADS``), which numba ignores. Any Python
    thread may call the loop. Sums may be reassociated and contracted, but NaN and infinity are honoured.
    """

    def __init__(self, loop: Callable[..., None]):
        self._compiled: Any = _cached(loop)
        self.__doc__ = loop.__doc__

    def __call__(self, *arguments: Any) -> None:
        with _exclusive():
            numba.set_num_threads(min(_MOST_THREADS, getattr(_of_thread, "loops", torch.get_num_threads())))
            try:
                self._compiled(*arguments)
            except OSError as fault:  # by now the loop is compiled, but the disk had no room to keep it
                logger.info("numba cannot keep %s compiled: %s", self._compiled.py_func.__name__, fault)
                self._compiled(*arguments)


def _cached(loop: Callable[..., None]) -> Any:
    """The loop for numba to compile at its first call, kept on the disk where there is a place for it."""
    jit = partial(numba.njit, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
    try:
        return jit(cache=True)(loop)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written to
        _say_that_nothing_is_kept()
        return jit()(loop)


@contextmanager
def undivided() -> Iterator[None]:
    """Context in which torch divides no operation of this Python thread, while compiled loops keep their threads.

    Torch divides an operation among its threads, and rounds differently at the edges of their parts. Without that, the
    numbers are the same for any number of threads.
    """
    threads = torch.get_num_threads()
    _of_thread.loops = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del _of_thread.loops


@cache
def _say_that_nothing_is_kept() -> None:
    logger.info("no folder for compiled code: every run compiles its loops anew; set NUMBA_CACHE_DIR to a folder")


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
