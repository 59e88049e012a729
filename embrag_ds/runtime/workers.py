"""Worker processes that make numbered items ahead of their use: the items of a source without state.

An item depends on its number alone, so any number of workers gives the same items in the same order. Workers are forked
from a server process that has no threads, no CUDA context and no DeepSpeed; so they are safe beside all of these in the
process that takes the items. They end with it, however it ends.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import connection, forkserver, get_context, parent_process, resource_tracker
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from embrag_ds.runtime.processor import share_of_cores

Item = TypeVar("Item")
Made = TypeVar("Made", covariant=True)
_MOST_CHOSEN = 4
_CORES_PER_WORKER = 4


class Numbered(Protocol[Made]):
    """Source of items by number. It is pickled for every worker; an item must be a pure function of its number."""

    def __getitem__(self, number: int) -> Made:
        """Item number ``number``."""
        ...


def chosen_workers(device: torch.device) -> int:
    """Number of workers where the settings leave it open: none on a CPU, where they would take the step's cores.

    On a GPU machine it is a quarter of this rank's share of the cores, at most 4.
    """
    if device.type == "cpu":
        return 0
    return min(_MOST_CHOSEN, share_of_cores() // _CORES_PER_WORKER)


def start_server() -> None:
    """Start the server process that workers are forked from, without waiting for it to be ready.

    It imports torch, so that workers start at once. Ctrl-C does not reach it or its workers.
    """
    server = get_context("forkserver")
    server.set_forkserver_preload(["torch.utils.data"])
    resource_tracker.ensure_running()  # otherwise the next call starts it, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class InOrder(Generic[Item]):
    """Items number ``first`` to ``stop - 1`` of ``source``, taken in order, and made ahead by ``workers`` processes.

    Without workers :meth:`take` makes the item itself. One thread may take at a time.
    """

    def __init__(self, source: Numbered[Item], first: int, stop: int, workers: int):
        self._next = first
        if workers:
            start_server()
        loader: DataLoader[Any] = DataLoader(
            source,  # type: ignore[arg-type]  # Dataset is not a protocol
            batch_size=None,
            sampler=range(first, stop),
            num_workers=workers,
            collate_fn=_unchanged,
            multiprocessing_context="forkserver" if workers else None,
            worker_init_fn=_end_with_parent,
            # Without it the loader draws from torch's own generator, whose numbers belong to the training step.
            generator=torch.Generator(),
        )
        self._items: Any = iter(loader)
        self._workers = workers

    def take(self, number: int) -> Item:
        """Item number ``number``, which must be the next; waits until it is made.

        Raises what the source raised for it, with the worker's traceback in the message, and RuntimeError if a worker
        was killed.
        """
        assert number == self._next, (number, self._next)
        self._next += 1
        item: Item = next(self._items)
        return item

    def close(self) -> None:
        """End the workers."""
        if self._workers:
            # The loader would end them when it is collected, which the traceback of a fault puts off.
            self._items._shutdown_workers()


def _unchanged(item: Item) -> Item:
    return item


def _end_with_parent(worker: int) -> None:
    """Make this worker end when the process that takes its items does, even by SIGKILL and in the middle of a write."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
