"""The transformer along a core that is longer than those it was trained on, in tiles of the trained length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from embrag_ds.data.windows import cut_tiles
from embrag_ds.model.compiled import CoreInputs
from embrag_ds.retrieval.batch import SiteTensors


class Tile(NamedTuple):
    """Sites ``start`` to ``stop`` of a core, of which it is for those from ``first`` to ``last``.

    ``position`` float32 [L] counts from its centre, as in a window; ``codebook`` [L, 2, D] is that of the reference.
    """

    start: int
    stop: int
    first: int
    last: int
    position: Tensor
    codebook: Tensor

    @property
    def own(self) -> slice:
        """The sites that it is for, counted from its first."""
        return slice(self.first - self.start, self.last - self.start)


@dataclass(frozen=True)
class SiteTiles:
    """Tiles of at most ``sites`` sites that overlap by ``overlap``; a site is computed in the one it lies deeper in.

    ``encode`` gives the codebook [L, 2, D] of the reference at some sites.
    """

    sites: int
    overlap: int
    encode: Callable[[SiteTensors], Tensor]

    def __call__(self, function: Callable[[CoreInputs], tuple[Tensor, ...]], given: CoreInputs) -> list[Tensor]:
        """``function(given)``, whose tensors [B, L] have the sites of ``given``."""
        made = []
        for tile in self.of(SiteTensors(given.position, given.site_frequency)):
            here = given.sites(tile.start, tile.stop)._replace(position=tile.position, codebook=tile.codebook)
            made.append([each[:, tile.own] for each in function(here)])
        return [torch.cat(parts, dim=1) for parts in zip(*made, strict=True)]

    def of(self, core: SiteTensors) -> Iterator[Tile]:
        """Iterate over the tiles of a core's sites."""
        for start, stop, first, last in cut_tiles(len(core.position), self.sites, self.overlap):
            position = core.position[start:stop]
            position = position - (position[0] + position[-1]) / 2
            codebook = self.encode(SiteTensors(position, core.frequency[start:stop]))
            yield Tile(start, stop, first, last, position, codebook)
