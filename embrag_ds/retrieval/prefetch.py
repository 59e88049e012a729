"""Prefetching of batches ahead of the training step, on one thread of the rank's own process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.collate import receive
from embrag_ds.runtime.streams import hand_over, thread_start

_LOOK_EVERY_S = 0.5


class Prefetcher:
    """Prefetcher of batches number ``first`` to ``stop - 1``, in order, with a queue of ``depth`` finished ones.

    ``build`` makes a batch from its number, on the prefetch thread. With ``depth`` 0 there is no thread, and
    :meth:`next` builds the batch itself. :meth:`close` calls ``finish``, to close what ``build`` takes from.
    ``waited_seconds`` is the total time spent in :meth:`next`.
    """

    def __init__(
        self, build: Callable[[int], Batch], first: int, stop: int, depth: int, finish: Callable[[], None] | None = None
    ):
        self._build = build
        self._finish = finish
        self._numbers = iter(range(first, stop))
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(max(depth, 1))
        self._stopping = threading.Event()
        self._start = thread_start()
        self._last: Any = None  # the CUDA event after the last batch that the thread built
        self._thread: threading.Thread | None = None
        self.waited_seconds = 0.0
        if depth > 0:
            self._thread = threading.Thread(target=self._run, name="retrieval-prefetch", daemon=True)
            self._thread.start()

    def next(self) -> Batch:
        """Return the next batch, usable on the current stream, waiting until it is built.

        Raises the exception that ``build`` raised for it, and RuntimeError if the prefetch thread died.
        """
        began = time.monotonic()
        made = self._build(next(self._numbers)) if self._thread is None else self._take(self._thread)
        self.waited_seconds += time.monotonic() - began
        if isinstance(made, BaseException):
            raise made
        return receive(made)

    def close(self) -> None:
        """Stop the thread, after the batch that it is building.

        The current stream waits for the batches that were not taken, so that what they use may be freed.
        """
        self._stopping.set()
        while self._thread is not None and self._thread.is_alive():
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self._thread.join(timeout=0.05)
        hand_over((), self._last)
        if self._finish is not None:
            self._finish()

    def _take(self, thread: threading.Thread) -> Batch | BaseException:
        """Next item of the queue, while the thread lives or items are left."""
        while True:
            with suppress(queue.Empty):
                return self._ready.get(timeout=_LOOK_EVERY_S)
            if not thread.is_alive() and self._ready.empty():
                raise RuntimeError("the prefetch thread has ended without a word")

    def _run(self) -> None:
        try:
            self._start()
            for number in self._numbers:
                made = self._build(number)
                self._last = made.ready
                while not self._offer(made):
                    if self._stopping.is_set():
                        return
                if self._stopping.is_set():
                    return
        except BaseException as fault:  # also SystemExit: it is raised on the training thread
            while not self._offer(fault) and not self._stopping.is_set():
                pass

    def _offer(self, item: Batch | BaseException) -> bool:
        """Try for a short time to put ``item`` into the queue; False if it stayed full."""
        try:
            self._ready.put(item, timeout=_LOOK_EVERY_S / 10)
        except queue.Full:
            return False
        return True
