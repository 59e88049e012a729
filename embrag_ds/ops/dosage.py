"""Copied dosage: the posterior-weighted mean of the neighbours' alleles at every site of a window's core.

The alleles of the K neighbours are held in one of four forms, which all give the same dosages:

* :class:`DenseAlleles`, a table of all K alleles, which a GPU reads fastest.
* :class:`Carriers`, lists of the neighbours that carry ALT, on a CPU. Most sites of a panel are rare, so the mean over
  K neighbours is a sum over few carriers. The lists are made from those of the whole panel, which queries share.
* :class:`Sequences`, the distinct allele sequences of a block of sites, on a CPU. Between two typed sites few
  haplotypes differ, so weights are summed per sequence first (Browning et al. 2018, Am. J. Hum. Genet. 103:338). This
  form needs queries that are typed at the same few sites.
* :class:`~embrag_ds.ops.dosage_shared.SharedAlleles`, one table for all queries. They copy from the same haplotypes and
  are typed at the same sites.

Two letters beside those of :mod:`embrag_ds.data.tokens`. M: typed sites in or next to the core, at which posteriors are
given. G: blocks of sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.ops import cuda, dosage_numba
from embrag_ds.ops.bits import pack_host
from embrag_ds.ops.dosage_cuda import CudaDosage
from embrag_ds.ops.dosage_numba import Numbered
from embrag_ds.ops.dosage_shared import SharedAlleles, shared_dosage

_LEAST_SITES_PER_CUT = 12
"""Mean number of sites between two typed ones from which sequences are faster than lists of carriers."""


@dataclass(frozen=True)
class FlankingSites:
    """The two typed sites that flank each site of the core, and the weight of the right one in an interpolation.

    ``left`` and ``right`` int64 [B, L] are indices into the M typed sites of a posterior. ``share`` float32 [B, L], in
    [0, 1], is the weight of the right one.
    """

    left: Tensor
    right: Tensor
    share: Tensor


def interpolated(posterior: Tensor, flanking: FlankingSites) -> Tensor:
    """Interpolate posteriors [B, M, K] linearly from the typed sites to all sites of the core, [B, K, L]."""
    rows = torch.arange(len(posterior), device=posterior.device)[:, None]
    left, right = posterior[rows, flanking.left], posterior[rows, flanking.right]
    return torch.lerp(left, right, flanking.share[..., None]).transpose(1, 2)


@dataclass(frozen=True)
class DenseAlleles:
    """Alleles of the neighbours as a table: ``all`` uint8 [B, K, L]."""

    all: Tensor


@dataclass(frozen=True)
class Carriers:
    """Alleles of the neighbours as lists of ALT carriers, on a CPU.

    The neighbours of row b that carry ALT at site l are ``members[b, offset[b, l] : offset[b, l + 1]]``. ``members``
    int32 [B, n] are indices below ``k``, the number of neighbours; ``offset`` is int32 [B, L + 1]. The entries after
    the last carrier of a row are undefined.
    """

    offset: Tensor
    members: Tensor
    k: int

    @property
    def lists(self) -> tuple[np.ndarray, ...]:
        """The arrays in the order of the parameters of :func:`embrag_ds.ops.dosage_numba.mix`, without a copy."""
        return self.offset.numpy(), self.members.numpy().view(np.uint32)


@dataclass(frozen=True)
class Sequences:
    """Alleles of the neighbours as numbers of distinct sequences, on a CPU.

    ``ids`` int64 [B, K] are reference haplotypes, and ``blocks`` holds the sequence that each carries in every block.
    """

    ids: Tensor
    blocks: Blocks

    @property
    def lists(self) -> tuple[np.ndarray, ...]:
        """The arrays in the order of the parameters of :func:`embrag_ds.ops.dosage_numba.mix_sequences`."""
        blocks = self.blocks
        return self.ids.numpy(), blocks.sequence, blocks.count, blocks.bounds, blocks.start, blocks.who


Neighbours = DenseAlleles | Carriers | Sequences | SharedAlleles
"""Alleles of the K neighbours of B query haplotypes at the L sites of a core, in any of the four forms."""


def expected_allele(neighbours: Neighbours, posterior: Tensor, flanking: FlankingSites) -> Tensor:
    """Expected allele of the copied haplotype at every site of the core, float32 [B, L].

    ``posterior`` float32 [B, M, K] is interpolated between the ``flanking`` typed sites; its weights need not sum to 1.
    Differentiable in ``posterior`` only.
    """
    if isinstance(neighbours, SharedAlleles):
        return shared_dosage(neighbours, posterior, flanking.left[0], flanking.right[0], flanking.share[0])
    if not isinstance(neighbours, DenseAlleles):
        return _ListedDosage.apply(posterior, neighbours, flanking)
    if posterior.is_cuda and cuda.available():
        return CudaDosage.apply(posterior, neighbours.all, flanking.left, flanking.right, flanking.share)
    return (interpolated(posterior, flanking) * neighbours.all).sum(1)


def dense_alleles(neighbours: Neighbours) -> Tensor:
    """Write the alleles of any form out as a table, uint8 [B, K, L]; those that all rows share are one row."""
    if isinstance(neighbours, DenseAlleles):
        return neighbours.all
    if isinstance(neighbours, SharedAlleles):
        return neighbours.blocks.transpose(0, 1).flatten(1)[None, :, neighbours.place]
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
    """Distinct allele sequences of all reference haplotypes in blocks of consecutive sites.

    Block g holds the sites ``bounds[g]`` to ``bounds[g + 1]`` (int64 [G + 1]), at most 64. ``sequence`` uint32 [G, H]
    is the number of the sequence that each haplotype carries. A block has ``count`` int64 [G] sequences, whose alleles
    are the bits of ``words`` uint64 [G, H], the first site lowest. The sequences with ALT at site l are
    ``who[start[l] : start[l + 1]]``, ``who`` uint32 and ``start`` uint64 [L + 1].
    """

    bounds: np.ndarray
    sequence: np.ndarray
    words: np.ndarray
    count: np.ndarray
    start: np.ndarray
    who: np.ndarray

    @classmethod
    def made(cls, by_site: np.ndarray, cuts: np.ndarray) -> Blocks:
        """Cut alleles uint8 [L, H] into blocks at the sites ``cuts`` and wherever a block would exceed 64 sites."""
        packed = pack_host(by_site)
        numbered = Numbered.made(packed.__getitem__, len(by_site), by_site.shape[1], cuts)
        start = np.concatenate([np.zeros(1, dtype=np.uint64), numbered.carrying.cumsum(dtype=np.uint64)])
        who = np.empty(int(start[-1]), dtype=np.uint32)
        dosage_numba.list_sequences(numbered.words, numbered.count, numbered.bounds, start, who)
        return cls(numbered.bounds, numbered.sequence, numbered.words, numbered.count, start, who)


class _ListedDosage(torch.autograd.Function):
    """Copied dosage by the numba loops: posterior float32 [B, M, K] to dosage float32 [B, L]."""

    @staticmethod
    def forward(ctx: Any, posterior: Tensor, neighbours: Carriers | Sequences, flanking: FlankingSites) -> Tensor:
        sites = [each.detach().contiguous() for each in (flanking.left, flanking.right, flanking.share)]
        ctx.save_for_backward(*sites)
        ctx.lists = neighbours.lists
        ctx.shape = posterior.shape
        mix, ctx.adjoint = _LOOPS[type(neighbours)]
        dosage = np.empty(flanking.share.shape, dtype=np.float32)
        mix(posterior.detach().contiguous().numpy(), *ctx.lists, *(each.numpy() for each in sites), dosage)
        return torch.from_numpy(dosage)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        posterior_gradient = np.zeros(ctx.shape, dtype=np.float32)
        sites = (each.numpy() for each in ctx.saved_tensors)
        ctx.adjoint(gradients[0].float().contiguous().numpy(), *ctx.lists, *sites, posterior_gradient)
        return torch.from_numpy(posterior_gradient), None, None


_LOOPS: dict[type, tuple[Any, Any]] = {
    Carriers: (dosage_numba.mix, dosage_numba.mix_adjoint),
    Sequences: (dosage_numba.mix_sequences, dosage_numba.mix_sequences_adjoint),
}


class WindowAlleles:
    """Alleles of all reference haplotypes in a window's core, from which :meth:`of` selects neighbours.

    ``by_haplotype`` uint8 [H, L] is the table itself. On a CPU, lists of carriers and blocks of sequences are made when
    first needed and kept for later batches of the window.
    """

    def __init__(self, by_site: Tensor):
        """``by_site`` uint8 [L, H] is kept, not copied, and must not change."""
        on_cpu = by_site.device.type == "cpu"
        # A GPU gathers whole rows of the transposed table; on a CPU few rows are read, so a view is enough.
        self.by_haplotype = by_site.T if on_cpu else by_site.T.contiguous()
        self._by_site = by_site.numpy() if on_cpu else None
        self._lists: _Lists | None = None
        self._blocks: tuple[bytes, Blocks] | None = None
        self._shared: tuple[bytes, SharedAlleles] | None = None

    def of(self, ids: Tensor, cuts: np.ndarray | None = None) -> Neighbours:
        """Alleles of the neighbours ``ids`` int64 [B, K], which must be distinct within a row.

        ``cuts`` int64 are the sites of the core that directly follow a typed site. They are None where the rows are not
        all typed at the same sites. The form is :class:`DenseAlleles` on a GPU. On a CPU it is :class:`Sequences` where
        ``cuts`` are few, and :class:`Carriers` elsewhere.
        """
        if self._by_site is None:
            return DenseAlleles(self.by_haplotype[ids])
        if cuts is not None and len(self._by_site) >= _LEAST_SITES_PER_CUT * len(cuts):
            if self._blocks is None or self._blocks[0] != cuts.tobytes():
                self._blocks = cuts.tobytes(), Blocks.made(self._by_site, cuts)
            return Sequences(ids.contiguous(), self._blocks[1])
        lists = self._lists
        if lists is None or lists.k != ids.shape[1]:
            lists = self._lists = _Lists.made(self._by_site, ids.shape[1])
        offset = np.empty((len(ids), len(self._by_site) + 1), dtype=np.int32)
        # The largest possible number of carriers, and one slot that the loop may write and discard. The system
        # allocates pages when they are written, so the unused rest takes no memory.
        members = np.empty((len(ids), lists.most + 1), dtype=np.int32)
        of_window = (self._by_site, lists.listed, lists.start, lists.who.view(np.uint32))
        dosage_numba.list_neighbours(*of_window, ids.contiguous().numpy(), offset, members)
        return Carriers(torch.from_numpy(offset), torch.from_numpy(members), lists.k)

    def shared(self, cuts: np.ndarray) -> SharedAlleles:
        """Alleles of all reference haplotypes, for queries that copy from all; ``cuts`` as in :meth:`of`."""
        if self._shared is None or self._shared[0] != cuts.tobytes():
            self._shared = cuts.tobytes(), SharedAlleles.made(self.by_haplotype, cuts)
        return self._shared[1]


@dataclass(frozen=True)
class _Lists:
    """ALT carriers among all reference haplotypes, for selecting ``k`` neighbours.

    ``listed`` bool [L] are the sites with at most ``k`` carriers. Those of site l are ``who[start[l] : start[l + 1]]``,
    ``who`` int32 and ``start`` int64 [L + 1]. At other sites the alleles of the k neighbours are read instead. ``most``
    is the largest number of carriers that k neighbours can have, summed over sites.
    """

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
