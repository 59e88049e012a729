"""The neighbours' alleles in a window's core, as whatever mixes them reads them fastest.

Most sites of a panel are rare, so most neighbours carry REF: a mean of alleles over K neighbours is the sum over
the few that carry ALT. On a CPU the neighbours are therefore kept as lists of carriers, made from lists that a window's
queries share. And between two typed sites few haplotypes differ at all: where the queries of a batch are typed at the
same, not too many sites, weights are summed per distinct sequence and the sequences are what carries ALT, as in Beagle
(Browning et al. 2018, Am. J. Hum. Genet. 103:338). A GPU reads all K alleles at once. All say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.ops import cuda, dosage_numba
from embrag_ds.ops.dosage_cuda import CudaDosage

_WORD = 64
_LEAST_RUN = 12
"""Sites between two typed ones, on average, from which sequences are faster than lists of carriers."""


@dataclass(frozen=True)
class FlankingSites:
    """Between which typed sites the core's sites lie: ``left`` and ``right`` int64 [B, L], flanking among the N that a
    posterior has, and ``share`` float32 [B, L], the weight of the right one."""

    left: Tensor
    right: Tensor
    share: Tensor


def interpolated(posterior: Tensor, flanking: FlankingSites) -> Tensor:
    """Posteriors [B, N, K] carried to the sites between, [B, K, L]."""
    rows = torch.arange(len(posterior), device=posterior.device)[:, None]
    left, right = posterior[rows, flanking.left], posterior[rows, flanking.right]
    return torch.lerp(left, right, flanking.share[..., None]).transpose(1, 2)


@dataclass(frozen=True)
class DenseAlleles:
    """All of them: ``all`` uint8 [B, K, L]."""

    all: Tensor


@dataclass(frozen=True)
class Carriers:
    """Who carries ALT: row b's carriers of site l, numbers below ``k``, are ``members`` int32 [B, n] from
    ``offset`` int32 [B, L + 1] at l to that at l + 1. The same as :class:`DenseAlleles`, on a CPU."""

    offset: Tensor
    members: Tensor
    k: int

    @property
    def lists(self) -> tuple[np.ndarray, ...]:
        """As the compiled loops take them."""
        return self.offset.numpy(), self.members.numpy().view(np.uint32)


@dataclass(frozen=True)
class Sequences:
    """What the neighbours ``ids`` int64 [B, K] carry in each of ``blocks``. The same as :class:`DenseAlleles`, on a
    CPU."""

    ids: Tensor
    blocks: Blocks

    @property
    def lists(self) -> tuple[np.ndarray, ...]:
        """As the compiled loops take them."""
        blocks = self.blocks
        return self.ids.numpy(), blocks.sequence, blocks.count, blocks.bounds, blocks.start, blocks.who


Neighbours = DenseAlleles | Carriers | Sequences


def expected_allele(neighbours: Neighbours, posterior: Tensor, flanking: FlankingSites) -> Tensor:
    """Expected allele of the copied haplotype, float32 [B, L]; ``posterior`` [B, N, K]. Differentiable in it."""
    if not isinstance(neighbours, DenseAlleles):
        return _ListedDosage.apply(posterior, neighbours, flanking)
    if posterior.is_cuda and cuda.available():
        return CudaDosage.apply(posterior, neighbours.all, flanking.left, flanking.right, flanking.share)
    return (interpolated(posterior, flanking) * neighbours.all).sum(1)


def alt_share(neighbours: Neighbours) -> Tensor:
    """How many of the neighbours carry ALT, float32 [B, L]."""
    if isinstance(neighbours, DenseAlleles):
        return neighbours.all.sum(1, dtype=torch.int32) / neighbours.all.shape[1]
    if isinstance(neighbours, Carriers):
        return torch.diff(neighbours.offset, dim=1) / neighbours.k
    ids = neighbours.ids
    shape = len(ids), len(neighbours.blocks.start) - 1
    nowhere = torch.zeros(shape, dtype=torch.int64)
    equal = torch.full((len(ids), 1, ids.shape[1]), 1 / ids.shape[1])
    return expected_allele(neighbours, equal, FlankingSites(nowhere, nowhere, torch.zeros(shape)))


def dense_alleles(neighbours: Neighbours) -> Tensor:
    """All of their alleles, uint8 [B, K, L]."""
    if isinstance(neighbours, DenseAlleles):
        return neighbours.all
    if isinstance(neighbours, Sequences):
        blocks, ids = neighbours.blocks, neighbours.ids.numpy()
        spelt = [
            words[sequence[ids]][..., None] >> np.arange(stop - first, dtype=np.uint64)
            for words, sequence, (first, stop) in zip(
                blocks.words, blocks.sequence, pairwise(blocks.bounds), strict=True
            )
        ]
        return torch.from_numpy((np.concatenate(spelt, axis=-1) & np.uint64(1)).astype(np.uint8))
    offsets, lists = neighbours.offset.numpy(), neighbours.members.numpy()
    found = np.zeros((len(offsets), neighbours.k, offsets.shape[1] - 1), dtype=np.uint8)
    for row, (offset, members) in enumerate(zip(offsets, lists, strict=True)):
        found[row, members[: offset[-1]], np.repeat(np.arange(found.shape[2]), np.diff(offset))] = 1
    return torch.from_numpy(found)


@dataclass(frozen=True)
class Blocks:
    """Distinct sequences of alleles in blocks of neighbouring sites, from ``bounds`` int64 [G + 1] to the next.

    Haplotype h carries number ``sequence`` uint32 [G, H], the first ``count`` int64 [G] are spelt by ``words`` uint64
    [G, H], and those with ALT at a site are ``who`` uint32 from ``start`` uint64 [L + 1] on.
    """

    bounds: np.ndarray
    sequence: np.ndarray
    words: np.ndarray
    count: np.ndarray
    start: np.ndarray
    who: np.ndarray

    @classmethod
    def made(cls, by_site: np.ndarray, cuts: np.ndarray) -> Blocks:
        """Blocks of alleles [L, H] that begin at 0, at ``cuts``, and where one would be longer than a word."""
        runs = np.unique(np.concatenate([[0], cuts, [len(by_site)]]))
        bounds = np.concatenate([*(np.arange(*run, _WORD) for run in pairwise(runs)), [len(by_site)]])
        shape = len(bounds) - 1, by_site.shape[1]
        sequence, words = np.empty(shape, dtype=np.uint32), np.empty(shape, dtype=np.uint64)
        count = np.empty(shape[0], dtype=np.int64)
        start = np.zeros(len(by_site) + 1, dtype=np.uint64)
        dosage_numba.number_sequences(by_site, bounds, sequence, words, count, start[1:])
        start = start.cumsum(dtype=np.uint64)
        who = np.empty(int(start[-1]), dtype=np.uint32)
        dosage_numba.list_sequences(words, count, bounds, start, who)
        return cls(bounds, sequence, words, count, start, who)


class _ListedDosage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, posterior: Tensor, neighbours: Carriers | Sequences, flanking: FlankingSites) -> Tensor:
        between = [each.detach().contiguous() for each in (flanking.left, flanking.right, flanking.share)]
        ctx.save_for_backward(*between)
        ctx.lists = neighbours.lists
        ctx.shape = posterior.shape
        mix, ctx.adjoint = _LOOPS[type(neighbours)]
        dosage = np.empty(flanking.share.shape, dtype=np.float32)
        mix(posterior.detach().contiguous().numpy(), *ctx.lists, *(each.numpy() for each in between), dosage)
        return torch.from_numpy(dosage)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        posterior_gradient = np.zeros(ctx.shape, dtype=np.float32)
        between = (each.numpy() for each in ctx.saved_tensors)
        ctx.adjoint(gradients[0].float().contiguous().numpy(), *ctx.lists, *between, posterior_gradient)
        return torch.from_numpy(posterior_gradient), None, None


_LOOPS: dict[type, tuple[Any, Any]] = {
    Carriers: (dosage_numba.mix, dosage_numba.mix_adjoint),
    Sequences: (dosage_numba.mix_sequences, dosage_numba.mix_sequences_adjoint),
}


class WindowAlleles:
    """Alleles of all reference haplotypes in a window's core; ``by_haplotype`` uint8 [H, L]."""

    def __init__(self, by_site: Tensor):
        """``by_site`` uint8 [L, H]."""
        on_cpu = by_site.device.type == "cpu"
        # Whole rows of it are gathered on a GPU, hardly any on a CPU.
        self.by_haplotype = by_site.T if on_cpu else by_site.T.contiguous()
        self._by_site = by_site.numpy() if on_cpu else None
        self._lists: _Lists | None = None
        self._blocks: tuple[bytes, Blocks] | None = None

    def of(self, ids: Tensor, cuts: np.ndarray | None = None) -> Neighbours:
        """Those of the neighbours ``ids`` int64 [B, K], all of a row different.

        ``cuts`` int64: the sites from which on a posterior may lie between other typed sites, the same for all rows;
        None where every row has its own.
        """
        if self._by_site is None:
            return DenseAlleles(self.by_haplotype[ids])
        if cuts is not None and len(self._by_site) >= _LEAST_RUN * len(cuts):
            if self._blocks is None or self._blocks[0] != cuts.tobytes():
                self._blocks = cuts.tobytes(), Blocks.made(self._by_site, cuts)
            return Sequences(ids.contiguous(), self._blocks[1])
        lists = self._lists
        if lists is None or lists.k != ids.shape[1]:
            lists = self._lists = _Lists.made(self._by_site, ids.shape[1])
        offset = np.empty((len(ids), len(self._by_site) + 1), dtype=np.int32)
        # As many as there can be, and one to write to in vain; what is never written to takes no memory.
        members = np.empty((len(ids), lists.most + 1), dtype=np.int32)
        of_window = (self._by_site, lists.listed, lists.start, lists.who.view(np.uint32))
        dosage_numba.list_neighbours(*of_window, ids.contiguous().numpy(), offset, members)
        return Carriers(torch.from_numpy(offset), torch.from_numpy(members), lists.k)


@dataclass(frozen=True)
class _Lists:
    """Carriers of ALT among all haplotypes: those of the sites ``listed`` bool [L], which have ``k`` at most, are
    ``who`` from ``start`` int64 [L + 1] on; of the others the k neighbours are looked through. ``most`` is how many
    carriers k neighbours can be, over all sites."""

    k: int
    listed: np.ndarray
    start: np.ndarray
    who: np.ndarray
    most: int

    @classmethod
    def made(cls, by_site: np.ndarray, k: int) -> _Lists:
        copies = np.count_nonzero(by_site.view(np.bool_), axis=1)
        listed = copies <= k
        start = np.concatenate([[0], np.where(listed, copies, 0).cumsum()])
        who = np.empty(start[-1], dtype=np.int32)
        dosage_numba.list_carriers(by_site, start, who)
        return cls(k, listed, start, who, int(np.minimum(copies, k).sum()))
