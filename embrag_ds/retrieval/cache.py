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

from embrag_ds.data.tokens import VOCAB
from embrag_ds.retrieval.settings import RefreshConfig

Encoder = Callable[[int, Tensor], Tensor]
"""(window, tokens int64 [R, L]) -> embeddings [R, L, D]."""


@dataclass(frozen=True)
class WindowCode:
    """A window's codebook [L, V, D], the generation it belongs to and the step of its snapshot."""

    codebook: Tensor
    generation: int
    step: int


class ReferenceSource(Protocol):
    """Where a batch's codebook comes from: the cache, or the live embedding layer."""

    def code(self, window: int) -> WindowCode: ...


@torch.no_grad()
def encode_codebook(encoder: Encoder, window: int, sites: int, device: torch.device) -> Tensor:
    """A window's codebook [L, V, D]: every token, embedded at every site."""
    tokens = torch.arange(VOCAB, device=device)[:, None].expand(VOCAB, sites)
    return encoder(window, tokens).transpose(0, 1).contiguous()


class ReferenceCache:
    """Codebooks of every window under the current generation (encodings ``fixed`` and ``refresh``)."""

    def __init__(self, window_sites: list[int], device: torch.device):
        self._window_sites = window_sites
        self._device = device
        self._codebooks: list[Tensor] = []
        self.generation = -1
        self.step = -1

    def refresh(self, encoder: Encoder, step: int) -> None:
        """Encode every window from ``encoder`` and make that the next generation."""
        self._codebooks = [
            encode_codebook(encoder, window, sites, self._device)
            for window, sites in enumerate(self._window_sites)
        ]
        self.generation += 1
        self.step = step

    def code(self, window: int) -> WindowCode:
        return WindowCode(self._codebooks[window], self.generation, self.step)


class LiveReference:
    """The embedding layer as it is now, encoded anew for every batch (encoding ``live``)."""

    def __init__(self, encoder: Encoder, window_sites: list[int], device: torch.device):
        self._encoder = encoder
        self._window_sites = window_sites
        self._device = device
        self._calls = 0

    def code(self, window: int) -> WindowCode:
        codebook = encode_codebook(self._encoder, window, self._window_sites[window], self._device)
        self._calls += 1
        return WindowCode(codebook, self._calls - 1, self._calls - 1)


def refresh_due(step: int, schedule: RefreshConfig, steps_per_epoch: int) -> bool:
    """Whether the cache is re-encoded before step ``step``: a pure function of the step."""
    interval = schedule.every_steps or (schedule.every_epochs or 0) * steps_per_epoch
    return step > 0 and step % interval == 0
