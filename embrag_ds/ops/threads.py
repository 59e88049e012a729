"""Numba loops on as many threads as torch uses or would, which may be called from several Python threads.

A loop that is not on the disk yet is compiled by a process of its own, and loaded from there as later processes do. A
process that compiles a parallel loop runs other machine code than those that load it. Numba compiles the loop's body by
itself, and again as a part of the function around it. Where both are in memory, the first runs; only the second is kept
on the disk. Their sums differ in the last digits. So a first start would differ from later ones, and a training that is
resumed from one that is not.
"""

from __future__ import annotations

import atexit
import base64
import fcntl
import importlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from threading import Lock, local
from typing import Any

import numba
import numpy as np
from numba.core import event
from numba.core.registry import cpu_target

from embrag_ds import children
from embrag_ds.ops.cores import told_or_available

logger = logging.getLogger(__name__)

_MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
_THREAD_SAFE = ("omp", "tbb")
_SECONDS_BETWEEN_LOOKS = 0.2
_ALL_TAKEN = 1 << 62
_starting = Lock()
_of_thread = local()


class _Loop:
    """Decorator that compiles a loop, which any Python thread may call.

    Sums may be reassociated and contracted, but NaN and infinity are honoured. Of the processes on a machine, one has
    the loop compiled for a kind of arguments, and the others load what is kept.
    """

    def __init__(self, loop: Callable[..., None], **options: bool):
        self._compiled: Any = _cached(loop, options)
        self.compile: Callable[[Any], Any] = self._compiled.compile
        """Compiles the loop in this process, for a numba signature, or loads it."""
        self._compiled.compile = partial(_compile_once, self._compiled, self.compile)
        self.__doc__ = loop.__doc__

    def _run(self, *arguments: Any) -> None:
        try:
            self._compiled(*arguments)
        except OSError as fault:  # by now the loop is compiled, but the disk had no room to keep it
            logger.info("numba cannot keep %s compiled: %s", self._compiled.py_func.__name__, fault)
            self._compiled(*arguments)


class ParallelLoop(_Loop):
    """Decorator that compiles a loop over ``numba.prange`` and runs it with :func:`thread_count` threads.

    Ranks on one machine share its cores by that number, where numba would take them all.
    """

    def __init__(self, loop: Callable[..., None]):
        super().__init__(loop, parallel=True)

    def __call__(self, *arguments: Any) -> None:
        with _exclusive():
            numba.set_num_threads(min(_MOST_THREADS, getattr(_of_thread, "loops", thread_count())))
            self._run(*arguments)


class WorkerLoop(_Loop):
    """Decorator that compiles a function of the number of workers, a counter int64 [1] of work that is taken, and more.

    It runs once for each worker, each on a thread of its own, and all have the same counter, 0 at first. If one fails,
    or on Ctrl-C, the counter becomes so large that the others find no more work. A large loop is compiled in two thirds
    of the time that numba takes for the same function around a loop over ``numba.prange``.
    """

    def __init__(self, loop: Callable[..., None]):
        super().__init__(loop, nogil=True)

    def __call__(self, workers: int, *arguments: Any, watch: Callable[[int], None] | None = None) -> None:
        """Run the loop; ``watch`` is called with the counter several times a second."""
        taken = np.zeros(1, dtype=np.int64)
        if workers == 1 and watch is None:
            self._run(1, taken, *arguments)
            return
        with ThreadPoolExecutor(workers) as threads:
            running = {threads.submit(self._run, workers, taken, *arguments) for _ in range(workers)}
            try:
                while running:
                    done, running = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                    for each in done:
                        each.result()
                    if watch is not None:
                        watch(int(taken[0]))
            except BaseException:
                taken[0] = _ALL_TAKEN
                raise


def load_numba() -> None:
    """Load what numba loads before its first loop: a quarter of a second, best spent where a program waits."""
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def thread_count() -> int:
    """Threads that torch uses, if it is imported; else those that it would, by ``OMP_NUM_THREADS`` or the cores.

    Imputation on a CPU does without torch, whose import takes as long as many a run.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return told_or_available()


def _cached(loop: Callable[..., None], options: dict[str, bool]) -> Any:
    """The loop for numba to compile at its first call, kept on the disk where there is a place for it."""
    jit = partial(numba.njit, fastmath={"reassoc", "contract", "nsz", "arcp"}, **options)
    try:
        return jit(cache=True)(loop)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written to
        _say_that_nothing_is_kept()
        return jit()(loop)


class _NotKept(Exception):
    """A loop is not on the disk."""


def _compile_once(loop: Any, compile_or_load: Callable[[Any], Any], signature: Any) -> Any:
    """Load ``loop`` from the disk, after it has been compiled by another process, which no other one asks meanwhile.

    It is compiled here where it cannot be kept, or where that process fails.
    """
    folder = loop.stats.cache_path
    if folder is None:
        return compile_or_load(signature)
    with _alone(folder, loop.py_func.__name__):
        _of_thread.only_loads = True
        try:
            return compile_or_load(signature)
        except _NotKept:
            pass
        finally:
            _of_thread.only_loads = False
        if not _compiled_elsewhere(loop, signature):
            logger.debug("%s is compiled by this process", loop.py_func.__name__)
        return compile_or_load(signature)


def _compiled_elsewhere(loop: Any, signature: Any) -> bool:
    """Have the loop of a numba dispatcher compiled and kept for ``signature`` by another process, and wait for it.

    Whether that process did so: it may not find the loop, and it may be killed.
    """
    function = loop.py_func
    request = pickle.dumps((function.__module__, function.__qualname__, signature))
    return _compiler().asked(base64.b64encode(request))


@cache
def _compiler() -> _Compiler:
    return _Compiler()


class _Compiler:
    """The process that compiles, from the first request to the end of this one; several threads may ask."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process = children.started(
            __name__,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a loop that cannot be compiled is compiled here, too, and says why
        )
        atexit.register(self.close)

    def asked(self, request: bytes) -> bool:
        """Whether the process has done as the line ``request`` asks."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with self._lock, suppress(OSError):
            stdin.write(request + b"\n")
            stdin.flush()
            return stdout.readline() == b"done\n"
        return False

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._process.communicate()


def serve() -> None:
    """Compile the loops that standard input names, one a line, until its end."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a module prints is no answer
    for line in sys.stdin.buffer:
        try:
            module, name, signature = pickle.loads(base64.b64decode(line))
            getattr(importlib.import_module(module), name).compile(signature)
            answer = b"done\n"
        except Exception:  # whoever asked compiles the loop itself, and meets the fault there
            answer = b"failed\n"
        answers.write(answer)


@contextmanager
def _alone(folder: str | None, name: str) -> Iterator[None]:
    """Hold the lock ``name`` of numba's folder, if there is a folder and its file system has locks."""
    descriptor = None
    with suppress(OSError):
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            descriptor = os.open(Path(folder) / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


class _Announcement(event.Listener):
    """Listener that announces the first loop to be compiled; a loop that is loaded from the disk is no such event."""

    def on_start(self, event: event.Event) -> None:
        """Say so before numba begins, and stop it where the loop should be loaded only."""
        _say_that_it_compiles()
        if getattr(_of_thread, "only_loads", False):
            raise _NotKept

    def on_end(self, event: event.Event) -> None:
        """Do nothing: every loop has an end."""


@cache
def _say_that_it_compiles() -> None:
    logger.info("compiling loops for this processor, about a minute of one core in all; numba keeps them where it can")


event.register("numba:compile", _Announcement())


@contextmanager
def undivided() -> Iterator[None]:
    """Context in which torch divides no operation of this Python thread, while compiled loops keep their threads.

    Torch divides an operation among its threads, and rounds differently at the edges of their parts. Without that, the
    numbers are the same for any number of threads.
    """
    import torch

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
    threads, torch = thread_count(), sys.modules.get("torch")
    numba.set_num_threads(1)
    if torch is not None:
        # Numba's start sets OpenMP's number of threads to that of all cores, and torch uses the same OpenMP.
        torch.set_num_threads(threads)
    layer = numba.threading_layer()
    if layer in _THREAD_SAFE:
        return nullcontext()
    logger.info("numba's threading layer is %s, on which threads take turns; with tbb or OpenMP they need not", layer)
    return Lock()
