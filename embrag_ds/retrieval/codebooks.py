"""Codebooks of allele embeddings, one per window, and the reference cache that holds them.

A *generation* is one numbered snapshot of the embedding layer. The layer acts on each site alone, and reference
haplotypes have no masked sites. So a window is described without loss by its *codebook* C [L, 2, D], the embeddings of
both alleles at every site. The embedding of a reference haplotype is a gather from it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition, get_native_id
from typing import Any, Protocol

import torch
from torch import Tensor

from embrag_ds.data.tokens import ALT, REF
from embrag_ds.data.windows import Window
from embrag_ds.retrieval.schedule import Generation, RefreshSchedule
from embrag_ds.runtime.streams import SideStream, StreamReads, hand_over, host_buffer, mark_current, thread_start
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline

ALLELES = 2
Encoder = Callable[[int, Tensor], Tensor]
"""Function of a window's number and tokens int64 [R, L] to embeddings [R, L, D]."""


@dataclass(frozen=True)
class WindowCodebook:
    """Codebook and site weights of one window in one generation, on the device.

    ``codebook`` [L, 2, D] covers the core's sites, and is None in mode ``token``. ``weights`` float32 [L] cover all
    sites of the window: what a mismatch at a site adds to a distance.
    """

    codebook: Tensor | None
    weights: Tensor
    generation: Generation


class CodebookSource(Protocol):
    """Source of a batch's codebook: the cache, a snapshot, or the live embedding layer."""

    def code(self, window: int, step: int) -> WindowCodebook:
        """Codebook and weights that batches of ``window`` at training step ``step`` use."""
        ...


def site_weights(codebook: Tensor) -> Tensor:
    """Weight of a mismatch at each site in a distance, float32 [L], from a ``codebook`` [L, 2 or V, D].

    It is ``w_l = ||e_l(ALT) - e_l(REF)||^2``, the squared distance of the embeddings of the two alleles.
    """
    difference = codebook[:, ALT].float() - codebook[:, REF].float()
    return difference.square().sum(-1)


@torch.no_grad()
def encode_window(encoder: Encoder, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codebook [L, 2, D] of a window's core, and weights float32 [L] of all its sites, without gradients."""
    tokens = torch.arange(REF, ALT + 1, device=device)[:, None].expand(ALLELES, len(window))
    codebook = encoder(window.index, tokens).transpose(0, 1)
    return codebook[window.core].contiguous(), site_weights(codebook)


class _Buffer:
    """Codebooks and weights of all windows in one generation, in host memory (pinned for a CUDA device)."""

    def __init__(self, windows: list[Window], dims: int, dtype: torch.dtype, device: torch.device):
        cores = [window.core_stop - window.core_start for window in windows]
        sizes = sum(cores) * ALLELES * dims * dtype.itemsize, sum(map(len, windows)) * 4
        codes, weights = (host_buffer(size, device) for size in sizes)
        self.bytes = codes.nbytes + weights.nbytes
        self.codebooks = [
            part.view(-1, ALLELES, dims)
            for part in codes[: sizes[0]].view(dtype).split([core * ALLELES * dims for core in cores])
        ]
        self.weights = list(weights[: sizes[1]].view(torch.float32).split(list(map(len, windows))))
        self.reads = StreamReads(device)


class ReferenceCache:
    """Double-buffered cache of the codebooks of all windows: one generation is read while the next is encoded.

    Generation g lies in buffer g mod 2 and replaces generation g - 2. That one is no longer read then, because g is
    begun after the publication of g - 1, when all earlier batches have been built.
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
        """``dims`` is D; ``asynchronous`` encodes on a thread and CUDA stream of its own."""
        self._windows = windows
        self._device = device
        self.schedule = schedule
        self._timeline = timeline
        copies = 1 if schedule.config is None else 2  # with a single generation no second buffer is needed
        self._buffers = [_Buffer(windows, dims, dtype, device) for _ in range(copies)]
        self._side = SideStream(device)
        self._encoded: dict[int, Future[None]] = {}
        self._begun = Condition()
        self._closed = False
        start = thread_start() if device.type == "cuda" else _yield_to_training
        self._thread = ThreadPoolExecutor(1, "reference-refresh", start) if asynchronous else None
        self.refresh_seconds = 0.0

    @property
    def host_bytes(self) -> int:
        """Size in bytes of the buffers in host memory (pinned for a CUDA device)."""
        return sum(buffer.bytes for buffer in self._buffers)

    def begin(self, generation: Generation, encoder: Encoder, finished: Callable[[], None] = lambda: None) -> None:
        """Encode every window with ``encoder`` into the generation's buffer, and call ``finished`` at the end.

        Both run on the cache's CUDA stream, after the work that is queued on the current one now.
        An asynchronous cache encodes on its refresh thread; an exception there is raised by :meth:`raise_failure` and
        by every :meth:`code` of that generation. Otherwise the encoding is done, and raises, before this returns.
        """
        ready = mark_current(self._device)

        def encode() -> None:
            self._encode(generation, encoder, finished, ready)

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

    def _encode(self, generation: Generation, encoder: Encoder, finished: Callable[[], None], ready: Any) -> None:
        began = time.monotonic()
        buffer = self._buffers[generation.number % len(self._buffers)]
        buffer.reads.wait()
        with self._side as side:
            side.wait_for_main(ready)
            with self._timeline.phase("refresh"):
                for window in self._windows:
                    codebook, weights = encode_window(encoder, window, self._device)
                    buffer.codebooks[window.index].copy_(codebook, non_blocking=True)
                    buffer.weights[window.index].copy_(weights, non_blocking=True)
                finished()
            done = side.event()
        if done is not None:
            done.synchronize()
        self.refresh_seconds = time.monotonic() - began

    def raise_failure(self) -> None:
        """Raise the exception that ended an encoding on the refresh thread, if there was one."""
        for future in list(self._encoded.values()):
            if future.done():
                future.result()

    def code(self, window: int, step: int) -> WindowCodebook:
        """Codebook and weights of the generation in use at ``step``, copied to the device.

        Waits until the generation is encoded. Raises the exception that ended its encoding, and RuntimeError if the
        cache is closed meanwhile.
        """
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
        buffer.reads.mark()
        return WindowCodebook(*copies, generation)

    def close(self) -> None:
        """End all waiting calls of :meth:`code` with an error, and stop the refresh thread."""
        with self._begun:
            self._closed = True
            self._begun.notify_all()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)


def _yield_to_training() -> None:
    """Give the calling thread the lowest scheduling priority, on Linux, so that training on the CPU comes first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)


class EqualWeights:
    """Codebook source of mode ``token``: weight 1 at every site, so distances are plain Hamming distances."""

    def __init__(self, windows: list[Window], device: torch.device):
        self._weights = torch.ones(max(map(len, windows)), device=device)
        self._windows = windows

    def code(self, window: int, step: int) -> WindowCodebook:
        return WindowCodebook(None, self._weights[: len(self._windows[window])], Generation(0, 0, 0))


class SnapshotCodebooks:
    """Codebook source for imputation: one snapshot of the embedding layer, encoded window by window on demand.

    Only the latest window is held, because imputation visits every window once. An instance serves one thread, on any
    of its CUDA streams.
    """

    def __init__(self, encoder: Encoder, windows: list[Window], device: torch.device):
        self._encoder = encoder
        self._windows = windows
        self._device = device
        self._latest: tuple[int, WindowCodebook, Any] | None = None

    def code(self, window: int, step: int) -> WindowCodebook:
        if self._latest is None or self._latest[0] != window:
            encoded = encode_window(self._encoder, self._windows[window], self._device)
            code = WindowCodebook(*encoded, Generation(0, 0, 0))
            self._latest = window, code, mark_current(self._device)
            return code
        _, code, encoded_at = self._latest
        hand_over((each for each in (code.codebook, code.weights) if each is not None), encoded_at)
        return code


class LiveCodebooks:
    """Codebook source of encoding ``live``: the current embedding layer, encoded anew for every batch.

    The current CUDA stream must already wait for the optimiser's last step.
    """

    def __init__(self, encoder: Encoder, windows: list[Window], device: torch.device):
        self._encoder = encoder
        self._windows = windows
        self._device = device

    def code(self, window: int, step: int) -> WindowCodebook:
        encoded = encode_window(self._encoder, self._windows[window], self._device)
        return WindowCodebook(*encoded, Generation(step, step, step))
