"""Copied dosage where all queries copy from the same haplotypes and are typed at the same sites, by matrix products.

Between two typed sites the flanking posteriors are the same for all sites. So the dosages of some consecutive sites are
two products, of posteriors [B, K] and alleles [K, sites], between which the sites interpolate. A GPU multiplies so many
numbers faster than it could look up those that are not 0.

Two letters beside those of :mod:`embrag_ds.data.tokens`. M: typed sites in or next to the core. G: blocks of sites.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_WIDTH = 32
"""Sites in a block at most. Sparse arrays have some 45 sites between two typed ones, dense ones some 15."""
_PART_BYTES = 1 << 27


@dataclass(frozen=True)
class SharedAlleles:
    """Alleles of K haplotypes, the same for all rows, in blocks of sites between two typed ones.

    ``blocks`` uint8 [G, K, 32] holds them; what lies beyond a block's last site is arbitrary. ``first`` int64 [G] is
    the first site of each block, and ``place`` int64 [L] that of each site among the 32 G of all blocks.
    """

    blocks: Tensor
    first: Tensor
    place: Tensor

    @classmethod
    def made(cls, by_haplotype: Tensor, cuts: np.ndarray) -> SharedAlleles:
        """Cut alleles uint8 [K, L] into blocks, at the sites ``cuts`` that directly follow a typed site."""
        sites, device = by_haplotype.shape[1], by_haplotype.device
        runs = np.unique(np.concatenate([[0], cuts, [sites]]))
        lengths = np.diff(runs)
        number = -(-lengths // _WIDTH)
        first = np.repeat(runs[:-1], number) + _WIDTH * (
            np.arange(number.sum()) - np.repeat(number.cumsum() - number, number)
        )
        of_block = np.minimum(first[:, None] + np.arange(_WIDTH), sites - 1)
        here = np.searchsorted(first, np.arange(sites), side="right") - 1
        place = here * _WIDTH + np.arange(sites) - first[here]
        index = torch.from_numpy(of_block.ravel()).to(device)
        blocks = by_haplotype.index_select(1, index).unflatten(1, (-1, _WIDTH)).transpose(0, 1).contiguous()
        return cls(blocks, torch.from_numpy(first).to(device), torch.from_numpy(place).to(device))


def shared_dosage(shared: SharedAlleles, posterior: Tensor, left: Tensor, right: Tensor, share: Tensor) -> Tensor:
    """Expected allele float32 [B, L] of posteriors float32 [B, M, K].

    ``left`` and ``right`` int64 [L] are the typed sites of the posterior that flank each site. ``share`` float32 [L] is
    the weight of the right one. Differentiable in ``posterior``.
    """
    of_block = 4 * shared.blocks.shape[1] * (_WIDTH + 2 * len(posterior))
    found: list[list[Tensor]] = [[], []]
    for part in torch.arange(len(shared.first), device=left.device).split(max(1, _PART_BYTES // of_block)):
        alleles = shared.blocks[part].to(posterior.dtype)
        for side, sums in zip((left, right), found, strict=True):
            sums.append(torch.bmm(posterior[:, side[shared.first[part]]].transpose(0, 1), alleles))
    before, after = (torch.cat(sums).transpose(0, 1).flatten(1).index_select(1, shared.place) for sums in found)
    return torch.lerp(before, after, share)
