"""The reference cache: what the embedding layer says of every window, as numbered generations.

A *generation* is one snapshot of the embedding layer. Because the layer is per site, a window of any
number of reference haplotypes is described losslessly by its *codebook* C [L, V, D]: the embedding of
every token at every site. A reference embedding is a gather from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from embrag_ds.data.tokens import ALT, REF, VOCAB
from embrag_ds.data.windows import Window
from embrag_ds.retrieval.settings import RefreshConfig

Encoder = Callable[[int, Tensor], Tensor]
"""(window, tokens int64 [R, L]) -> embeddings [R, L, D]."""


@dataclass(frozen=True)
class WindowCode:
    """What one generation says of a window.

    ``codebook`` [L, V, D] of the core's sites and ``weights`` float32 [L] of all the window's: what
    disagreement at a site adds to a distance. ``step`` is that of the snapshot.
    """

    codebook: Tensor
    weights: Tensor
    generation: int
    step: int


class ReferenceSource(Protocol):
    """Where a batch's codebook comes from: the cache, or the live embedding layer."""

    def code(self, window: int) -> WindowCode: ...


def site_weights(codebook: Tensor) -> Tensor:
    """w_l = ||e_l(ALT) - e_l(REF)||^2, float32 [L]: what disagreement at site l adds to a distance."""
    difference = codebook[:, ALT].float() - codebook[:, REF].float()
    return difference.square().sum(-1)


@torch.no_grad()
def encode_window(encoder: Encoder, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codebook [L, V, D] of a window's core and weights [L] of its sites: every token at every site."""
    tokens = torch.arange(VOCAB, device=device)[:, None].expand(VOCAB, len(window))
    codebook = encoder(window.index, tokens).transpose(0, 1)
    return codebook[window.core].contiguous(), site_weights(codebook)


class ReferenceCache:
    """Codebooks of every window under the current generation (encodings ``fixed`` and ``refresh``)."""

    def __init__(self, windows: list[Window], device: torch.device):
        self._windows = windows
        self._device = device
        self._encoded: list[tuple[Tensor, Tensor]] = []
        self.generation = -1
        self.step = -1

    def refresh(self, encoder: Encoder, step: int) -> None:
        """Encode every window from ``encoder`` and make that the next generation."""
        self._encoded = [encode_window(encoder, window, self._device) for window in self._windows]
        self.generation += 1
        self.step = step

    def code(self, window: int) -> WindowCode:
        return WindowCode(*self._encoded[window], self.generation, self.step)


class LiveReference:
    """The embedding layer as it is now, encoded anew for every batch (encoding ``live``)."""

    def __init__(self, encoder: Encoder, windows: list[Window], device: torch.device):
        self._encoder = encoder
        self._windows = windows
        self._device = device
        self._calls = 0

    def code(self, window: int) -> WindowCode:
        encoded = encode_window(self._encoder, self._windows[window], self._device)
        self._calls += 1
        return WindowCode(*encoded, self._calls - 1, self._calls - 1)


def refresh_due(step: int, schedule: RefreshConfig, steps_per_epoch: int) -> bool:
    """Whether the cache is re-encoded before step ``step``: a pure function of the step."""
    interval = schedule.every_steps or (schedule.every_epochs or 0) * steps_per_epoch
    return step > 0 and step % interval == 0
