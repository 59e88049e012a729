"""The neighbours' alleles in a window's core, as whatever mixes them reads them fastest.

Most sites of a panel are rare, so most neighbours carry REF: a mean of alleles over K neighbours is the sum over
the few that carry ALT. On a CPU the neighbours are therefore kept as lists of carriers, made from lists that a window's
queries share; a GPU reads all K alleles at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.retrieval import compiled, kernels
from embrag_ds.retrieval.allele_kernels import CudaDosage


@dataclass(frozen=True)
class Places:
    """Between which typed sites the core's sites lie: ``left`` and ``right`` int64 [B, L], places among the N that a
    posterior has, and ``share`` float32 [B, L], the weight of the right one."""

    left: Tensor
    right: Tensor
    share: Tensor


def interpolated(posterior: Tensor, places: Places) -> Tensor:
    """Posteriors [B, N, K] carried to the sites between, [B, K, L]."""
    rows = torch.arange(len(posterior), device=posterior.device)[:, None]
    left, right = posterior[rows, places.left], posterior[rows, places.right]
    return torch.lerp(left, right, places.share[..., None]).transpose(1, 2)


@dataclass(frozen=True)
class Alleles:
    """All of them: ``all`` uint8 [B, K, L]."""

    all: Tensor

    def dosage(self, posterior: Tensor, places: Places) -> Tensor:
        """Expected allele of the copied haplotype, float32 [B, L]; ``posterior`` [B, N, K]. Differentiable in it."""
        if posterior.is_cuda and kernels.available():
            return CudaDosage.apply(posterior, self.all, places.left, places.right, places.share)
        return (interpolated(posterior, places) * self.all).sum(1)

    def share(self) -> Tensor:
        """How many of the neighbours carry ALT, float32 [B, L]."""
        return self.all.sum(1, dtype=torch.int32) / self.all.shape[1]

    def dense(self) -> Tensor:
        """uint8 [B, K, L]."""
        return self.all


@dataclass(frozen=True)
class Carriers:
    """Who carries ALT: row b's carriers of site l, numbers below ``k``, are ``members`` int32 [B, n] from
    ``offset`` int32 [B, L + 1] at l to that at l + 1. The same as :class:`Alleles`, on a CPU."""

    offset: Tensor
    members: Tensor
    k: int

    def dosage(self, posterior: Tensor, places: Places) -> Tensor:
        return _CarriedDosage.apply(posterior, self, places)

    def share(self) -> Tensor:
        return torch.diff(self.offset, dim=1) / self.k

    def dense(self) -> Tensor:
        found = np.zeros((len(self.offset), self.k, self.offset.shape[1] - 1), dtype=np.uint8)
        for row, (offset, members) in enumerate(zip(self.offset.numpy(), self.members.numpy(), strict=True)):
            found[row, members[: offset[-1]], np.repeat(np.arange(found.shape[2]), np.diff(offset))] = 1
        return torch.from_numpy(found)


class _CarriedDosage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, posterior: Tensor, carriers: Carriers, places: Places) -> Tensor:
        compiled.use_torch_threads()
        members = carriers.members.numpy().view(np.uint32)
        between = [each.contiguous().numpy() for each in (places.left, places.right, places.share.detach())]
        ctx.arguments = [carriers.offset.numpy(), members, *between]
        ctx.shape = posterior.shape
        dosage = np.empty(places.share.shape, dtype=np.float32)
        compiled.mix(posterior.detach().contiguous().numpy(), *ctx.arguments, dosage)
        return torch.from_numpy(dosage)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        compiled.use_torch_threads()
        slope = np.zeros(ctx.shape, dtype=np.float32)
        compiled.mix_adjoint(gradients[0].float().contiguous().numpy(), *ctx.arguments, slope)
        return torch.from_numpy(slope), None, None


class WindowAlleles:
    """Alleles of all reference haplotypes in a window's core; ``by_haplotype`` uint8 [H, L]."""

    def __init__(self, by_site: Tensor):
        """``by_site`` uint8 [L, H]."""
        on_cpu = by_site.device.type == "cpu"
        # Whole rows of it are gathered on a GPU, hardly any on a CPU.
        self.by_haplotype = by_site.T if on_cpu else by_site.T.contiguous()
        self._by_site = by_site.numpy() if on_cpu else None
        self._lists: _Lists | None = None

    def of(self, ids: Tensor) -> Alleles | Carriers:
        """Those of the neighbours ``ids`` int64 [B, K], all of a row different."""
        if self._by_site is None:
            return Alleles(self.by_haplotype[ids])
        lists = self._lists
        if lists is None or lists.k != ids.shape[1]:
            lists = self._lists = _Lists.made(self._by_site, ids.shape[1])
        offset = np.empty((len(ids), len(self._by_site) + 1), dtype=np.int32)
        # As many as there can be, and one to write to in vain; what is never written to takes no memory.
        members = np.empty((len(ids), lists.most + 1), dtype=np.int32)
        of_window = (self._by_site, lists.listed, lists.start, lists.who.view(np.uint32))
        compiled.use_torch_threads()
        compiled.list_neighbours(*of_window, ids.contiguous().numpy(), offset, members)
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
        compiled.use_torch_threads()
        compiled.list_carriers(by_site, start, who)
        return cls(k, listed, start, who, int(np.minimum(copies, k).sum()))
