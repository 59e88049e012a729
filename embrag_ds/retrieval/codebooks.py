"""The reference cache: what the embedding layer says of every window, as numbered generations.

A *generation* is one snapshot of the embedding layer. Because the layer is per site, a window of any
number of reference haplotypes is described losslessly by its *codebook* C [L, 2, D]: the embeddings of
both alleles at every site (a reference haplotype hides nothing). A reference embedding is a gather from it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition, get_ident, get_native_id
from typing import Any, Protocol

import torch
from torch import Tensor

from embrag_ds.data.tokens import ALT, REF
from embrag_ds.data.windows import Window
from embrag_ds.retrieval.schedule import Generation, RefreshSchedule
from embrag_ds.runtime.streams import SideStream, host_buffer, mark_current
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline

ALLELES = 2
Encoder = Callable[[int, Tensor], Tensor]
"""(window, tokens int64 [R, L]) -> embeddings [R, L, D]."""


@dataclass(frozen=True)
class WindowCodebook:
    """What one generation says of a window, on the device.

    ``codebook`` [L, 2, D] of the core's sites (None in mode ``token``) and ``weights`` float32 [L] of all the
    window's: what disagreement at a site adds to a distance.
    """

    codebook: Tensor | None
    weights: Tensor
    generation: Generation


class CodebookSource(Protocol):
    """Where a batch's codebook comes from: the cache, or the live embedding layer."""

    def code(self, window: int, step: int) -> WindowCodebook:
        """What the batches of ``step`` use of ``window``."""
        ...


def site_weights(codebook: Tensor) -> Tensor:
    """w_l = ||e_l(ALT) - e_l(REF)||^2, float32 [L]: what disagreement at site l adds to a distance."""
    difference = codebook[:, ALT].float() - codebook[:, REF].float()
    return difference.square().sum(-1)


@torch.no_grad()
def encode_window(encoder: Encoder, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codebook [L, 2, D] of a window's core and weights [L] of its sites: both alleles at every site."""
    tokens = torch.arange(REF, ALT + 1, device=device)[:, None].expand(ALLELES, len(window))
    codebook = encoder(window.index, tokens).transpose(0, 1)
    return codebook[window.core].contiguous(), site_weights(codebook)


class _Buffer:
    """One generation's codebooks and weights of all windows, in (pinned) host memory."""

    def __init__(self, windows: list[Window], dims: int, dtype: torch.dtype, device: torch.device):
        cores = [window.core_stop - window.core_start for window in windows]
        codes = host_buffer(sum(cores) * ALLELES * dims * dtype.itemsize, device).view(dtype)
        weights = host_buffer(sum(map(len, windows)) * 4, device).view(torch.float32)
        self.codebooks = [
            part.view(-1, ALLELES, dims) for part in codes.split([core * ALLELES * dims for core in cores])
        ]
        self.weights = list(weights.split(list(map(len, windows))))
        self.bytes = codes.nbytes + weights.nbytes
        self.reads: dict[int, Any] = {}  # the last one of every thread


class ReferenceCache:
    """Codebooks of every window, double-buffered: readers use one generation while the next is encoded.

    Generation g lies in buffer g mod 2. Its predecessor but one is not read any more when it is begun: a
    generation is begun only after the one before it was published, at a step whose earlier batches are built.
    """

    def __init__(
        self,
        windows: list[Window],
        dims: int,
        dtype: torch.dtype,
        device: torch.device,
        schedule: RefreshSchedule,
        asynchronous: bool = False,
        timeline: Timeline = NO_TIMELINE,
    ):
        self._windows = windows
        self._device = device
        self.schedule = schedule
        self._timeline = timeline
        copies = 1 if schedule.config is None else 2  # one that never changes needs no back
        self._buffers = [_Buffer(windows, dims, dtype, device) for _ in range(copies)]
        self._side = SideStream(device)
        self._encoded: dict[int, Future[None]] = {}
        self._begun = Condition()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "reference-refresh", _yield_to_training) if asynchronous else None
        self.refresh_seconds = 0.0

    @property
    def host_bytes(self) -> int:
        """Host memory of both buffers (pinned on a CUDA machine)."""
        return sum(buffer.bytes for buffer in self._buffers)

    def begin(self, generation: Generation, encoder: Encoder, finished: Callable[[], None] = lambda: None) -> None:
        """Encode every window from ``encoder`` into the back buffer; ``finished`` is called at the end.

        On the refresh thread if there is one, otherwise before returning. A failure surfaces in
        :meth:`raise_failure` and in every :meth:`code` of that generation.
        """
        ready = mark_current(self._device)

        def encode() -> None:
            self._encode(generation, encoder, ready)
            finished()

        if self._thread is None:
            encode()
            future: Future[None] = Future()
            future.set_result(None)
        else:
            future = self._thread.submit(encode)
        with self._begun:
            self._encoded.pop(generation.number - 2, None)
            self._encoded[generation.number] = future
            self._begun.notify_all()

    def _encode(self, generation: Generation, encoder: Encoder, ready: Any) -> None:
        began = time.monotonic()
        buffer = self._buffers[generation.number % len(self._buffers)]
        for read in list(buffer.reads.values()):
            if read is not None:
                read.synchronize()
        with self._side as side:
            side.wait_for_main(ready)
            with self._timeline.phase("refresh"):
                for window in self._windows:
                    codebook, weights = encode_window(encoder, window, self._device)
                    buffer.codebooks[window.index].copy_(codebook, non_blocking=True)
                    buffer.weights[window.index].copy_(weights, non_blocking=True)
            done = side.event()
        if done is not None:
            done.synchronize()
        self.refresh_seconds = time.monotonic() - began

    def raise_failure(self) -> None:
        """Raise what went wrong on the refresh thread, if anything did."""
        for future in list(self._encoded.values()):
            if future.done():
                future.result()

    def code(self, window: int, step: int) -> WindowCodebook:
        """Copies, on the device, of what the generation in use at ``step`` says; waits until it is encoded."""
        generation = self.schedule.in_use(step)
        with self._begun:
            self._begun.wait_for(lambda: self._closed or generation.number in self._encoded)
            if generation.number not in self._encoded:
                raise RuntimeError("the reference cache was closed while a batch waited for it")
            encoded = self._encoded[generation.number]
        encoded.result()
        buffer = self._buffers[generation.number % len(self._buffers)]
        codebook, weights = buffer.codebooks[window], buffer.weights[window]
        with self._timeline.phase("h2d"):
            copies = (
                codebook.to(self._device, non_blocking=True, copy=True),
                weights.to(self._device, non_blocking=True, copy=True),
            )
        buffer.reads[get_ident()] = mark_current(self._device)
        return WindowCodebook(*copies, generation)

    def close(self) -> None:
        """Release whoever waits, and the refresh thread."""
        with self._begun:
            self._closed = True
            self._begun.notify_all()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)


def _yield_to_training() -> None:
    """Let this thread have the processor time that nobody else wants: a CPU's low-priority stream."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)


class EqualWeights:
    """Nothing is encoded: every site weighs the same, which makes the distance the plain Hamming distance."""

    def __init__(self, windows: list[Window], device: torch.device):
        self._weights = torch.ones(max(map(len, windows)), device=device)
        self._windows = windows

    def code(self, window: int, step: int) -> WindowCodebook:
        return WindowCodebook(None, self._weights[: len(self._windows[window])], Generation(0, 0, 0))


class SnapshotCodebooks:
    """One snapshot of the embedding layer, encoded window by window as batches come to them; nothing else is held.

    For imputation, which passes over every window once. An instance serves one thread.
    """

    def __init__(self, encoder: Encoder, windows: list[Window], device: torch.device):
        self._encoder = encoder
        self._windows = windows
        self._device = device
        self._latest: tuple[int, WindowCodebook] | None = None

    def code(self, window: int, step: int) -> WindowCodebook:
        if self._latest is None or self._latest[0] != window:
            encoded = encode_window(self._encoder, self._windows[window], self._device)
            self._latest = window, WindowCodebook(*encoded, Generation(0, 0, 0))
        return self._latest[1]


class LiveCodebooks:
    """The embedding layer as it is now, encoded anew for every batch (encoding ``live``)."""

    def __init__(self, encoder: Encoder, windows: list[Window], device: torch.device):
        self._encoder = encoder
        self._windows = windows
        self._device = device

    def code(self, window: int, step: int) -> WindowCodebook:
        encoded = encode_window(self._encoder, self._windows[window], self._device)
        return WindowCodebook(*encoded, Generation(step, step, step))
