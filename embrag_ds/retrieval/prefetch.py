"""Batches built ahead of the training step, on one thread of the rank's own process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.collate import receive

_LOOK_EVERY_S = 0.5


class Prefetcher:
    """Batches number ``first`` to ``stop - 1`` in order, up to ``depth`` of them built before they are asked for.

    With ``depth`` 0 every batch is built when it is asked for, in the caller's thread: the synchronous twin. What
    fails in the thread is raised by the next :meth:`next`.
    """

    def __init__(self, build: Callable[[int], Batch], first: int, stop: int, depth: int):
        self._build = build
        self._numbers = iter(range(first, stop))
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(max(depth, 1))
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.waited_seconds = 0.0
        if depth > 0:
            self._thread = threading.Thread(target=self._run, name="retrieval-prefetch", daemon=True)
            self._thread.start()

    def next(self) -> Batch:
        """The next batch, usable on the current stream."""
        began = time.monotonic()
        made = self._build(next(self._numbers)) if self._thread is None else self._take(self._thread)
        self.waited_seconds += time.monotonic() - began
        if isinstance(made, BaseException):
            raise made
        return receive(made)

    def close(self) -> None:
        """Stop the thread; a batch under construction is finished first."""
        self._stopping.set()
        while self._thread is not None and self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(timeout=0.05)

    def _take(self, thread: threading.Thread) -> Batch | BaseException:
        while True:
            with suppress(queue.Empty):
                return self._ready.get(timeout=_LOOK_EVERY_S)
            if not thread.is_alive() and self._ready.empty():
                raise RuntimeError("the prefetch thread has ended without a word")

    def _run(self) -> None:
        try:
            for number in self._numbers:
                made = self._build(number)
                while not self._offer(made):
                    if self._stopping.is_set():
                        return
                if self._stopping.is_set():
                    return
        except BaseException as fault:  # whatever it is, the training thread must hear of it
            while not self._offer(fault) and not self._stopping.is_set():
                pass

    def _offer(self, item: Batch | BaseException) -> bool:
        try:
            self._ready.put(item, timeout=_LOOK_EVERY_S / 10)
        except queue.Full:
            return False
        return True
