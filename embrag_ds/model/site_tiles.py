"""The transformer along a core that is longer than those it was trained on, in tiles of the trained length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from embrag_ds.data.windows import cut_evenly
from embrag_ds.model.compiled import CoreInputs
from embrag_ds.retrieval.batch import SiteTensors


@dataclass(frozen=True)
class SiteTiles:
    """Tiles of at most ``sites`` sites that overlap by ``overlap``; a site is computed in the one it lies deeper in.

    ``encode`` gives the codebook [L, 2, D] of the reference at some sites. As in a window, positions count from the
    tile's centre.
    """

    sites: int
    overlap: int
    encode: Callable[[SiteTensors], Tensor]

    def __call__(self, function: Callable[[CoreInputs], tuple[Tensor, ...]], given: CoreInputs) -> list[Tensor]:
        """``function(given)``, whose tensors [B, L] have the sites of ``given``."""
        made = []
        for start, stop, first, last in self.cut(len(given.position)):
            here = given.sites(start, stop)
            position = here.position - (here.position[0] + here.position[-1]) / 2
            here = here._replace(position=position)
            if here.codebook is not None:
                here = here._replace(codebook=self.encode(SiteTensors(position, here.site_frequency)))
            made.append([each[:, first - start : last - start] for each in function(here)])
        return [torch.cat(parts, dim=1) for parts in zip(*made, strict=True)]

    def cut(self, length: int) -> list[tuple[int, int, int, int]]:
        """Tiles of ``length`` sites: begin and end of each, and of the sites it is for."""
        runs, half = cut_evenly(length, self.sites, self.overlap), self.overlap // 2
        bounds = [0, *(start + half for start, _ in runs[1:]), length]
        return [(*run, *own) for run, own in zip(runs, pairwise(bounds), strict=True)]
