"""Li and Stephens copying model over retrieved haplotypes: posterior copying probabilities and match lengths.

In this hidden Markov model a query haplotype is an imperfect copy of its K neighbours, one at a time. The source is Li
& Stephens 2003, Genetics 165:2213. Mismatch: at a typed site where neighbour and query differ, the emission factor is
``exp(-mismatch_nats)`` instead of 1. Recombination: before each site, with probability ``recombination``, the copied
neighbour is drawn anew, neighbour k with probability ``prior[k]``. That prior depends on the place along the window.
The forward-backward algorithm gives the posterior probability that each neighbour is the one being copied.

Forward and backward probabilities are normalised at every site, so nothing underflows. Three back ends compute the same
function and its gradients: numba loops (CPU), CUDA kernels (GPU with CuPy), and torch operations elsewhere. See
:mod:`embrag_ds.ops.li_stephens_numba` and :mod:`embrag_ds.ops.li_stephens_cuda`.

Three letters beside those of :mod:`embrag_ds.data.tokens`. C: chains, a multiple of B; chain c models query haplotype
``c % B``. G: places along a window, each with a prior of its own. M: typed sites of a row that are :class:`Near`, in or
next to the core. All T typed sites of a window are observations, but posteriors are returned at those M only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrag_ds.ops import cuda, li_stephens_numba
from embrag_ds.ops.li_stephens_cuda import CudaPosterior, cuda_match_lengths
from embrag_ds.ops.li_stephens_numba import LEAST_RECOMBINATION, MOST_MISMATCH_NATS, MOST_PRIOR_NATS


@dataclass(frozen=True)
class Near:
    """The M typed sites of each row at which posteriors are returned: ``count`` of them, from ``first[b]`` on.

    ``first`` int64 [B] lies on the device. ``start`` and ``stop`` are the least first site of a row and the end of the
    last one, known to the host.
    """

    first: Tensor
    count: int
    start: int
    stop: int

    @classmethod
    def same(cls, first: int, count: int, rows: int, device: torch.device) -> Near:
        """``count`` sites from ``first`` on, the same in each of the ``rows``."""
        return cls(torch.full((rows,), first, device=device), count, first, first + count)

    def of(self, values: Tensor) -> Tensor:
        """Rows of the M sites among those of all sites: [C, T, ...] to [C, M, ...], for a multiple C of B."""
        places = self.first[:, None] + torch.arange(self.count, device=self.first.device)
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, places.repeat(len(values) // len(places), 1)]


def mismatches(alleles: Tensor, place: Tensor, ids: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
    """Mismatch indicators: where neighbours differ from the query at its typed sites, bool [B, T, K].

    ``alleles`` uint8 [sites, H] are those of the reference, and ``place`` int64 [B, T] its rows at the typed sites.
    ``ids`` int64 [B, K] are the neighbours and ``tokens`` int64 [B, T] the query's alleles; MASK differs from none. Row
    b has ``count[b]`` (int64 [B]) typed sites; the rest of it is padding, and False in the result.
    """
    if alleles.device.type == "cpu":
        out = np.empty((*place.shape, ids.shape[1]), dtype=np.bool_)
        li_stephens_numba.mismatches(*(each.contiguous().numpy() for each in (alleles, place, ids, tokens, count)), out)
        return torch.from_numpy(out)
    valid = torch.arange(place.shape[1], device=ids.device) < count[:, None]
    # An allele and its opposite add up to 1, and MASK (2) with either to more. In bytes, since there are B T K of them.
    there = alleles[place[:, :, None], ids[:, None, :]]
    return (there.add_(tokens.to(torch.uint8)[:, :, None]) == 1).logical_and_(valid[:, :, None])


def count_by_place(rows: Tensor, place: Tensor, places: int) -> Tensor:
    """Number of true entries at each place: bool [B, T, K] to float32 [B, G, K], for G = ``places``.

    ``place`` int64 [B, T] is the place of each typed site. On a CPU, a numba loop adds the bytes, because a product
    of matrices would first convert all of them to floats.
    """
    if rows.device.type != "cpu":
        belongs = place[:, None] == torch.arange(places, device=rows.device)[:, None]
        return belongs.float() @ rows.float()  # exact: sums of zeros and ones
    total = np.zeros((rows.shape[0], places, rows.shape[2]), dtype=np.float32)
    li_stephens_numba.add_by_place(rows.contiguous().view(torch.uint8).numpy(), place.contiguous().numpy(), total)
    return torch.from_numpy(total)


def copying_backend(device: torch.device) -> str:
    """Name of the back end of :func:`copying_posterior` on ``device``: ``compiled``, ``cuda kernel`` or ``torch``."""
    if device.type == "cpu":
        return "compiled"
    return "cuda kernel" if device.type == "cuda" and cuda.available() else "torch"


def copying_posterior(
    mismatch: Tensor,
    mismatch_nats: Tensor,
    recombination: Tensor,
    prior: Tensor,
    near: Near | None = None,
    place: Tensor | None = None,
) -> Tensor:
    """Posterior copying probabilities at the typed sites ``near``, or at all, float32 [C, M, K], summing to 1 over K.

    ``mismatch`` bool [B, T, K] marks where a neighbour differs. ``mismatch_nats`` float32 [C, T], not negative, is the
    loss of log-probability at a mismatch, capped at 60. ``recombination`` float32 [C, T] is the probability of a
    recombination before each site, at least 1e-8; the first one is ignored. ``prior`` float32 [B, G, K], positive and
    summing to 1 over K, is the probability of each neighbour after a recombination, at each of G places along a window.
    ``place`` int64 [B, T], in [0, G), is the place of each typed site. A recombination just before site t draws from
    ``prior[b, place[b, t]]``, and the first site draws from that of its own place. Without ``place`` all sites have the
    place 0. CUDA kernels read a prior again wherever the place changes, so places should follow one another.
    Differentiable in ``mismatch_nats``, ``recombination`` and ``prior``.
    """
    way = copying_backend(mismatch.device)
    if way == "torch":
        return posterior_torch(mismatch, mismatch_nats, recombination, prior, near, place)
    mismatch_nats, recombination = bounded(mismatch_nats, recombination)
    near = near or _all_sites(mismatch)
    place = _one_place(mismatch) if place is None else place
    if way == "cuda kernel":
        where = near.first, near.count, near.start, near.stop
        return CudaPosterior.apply(mismatch, torch.exp(-mismatch_nats), recombination, prior, place, *where)
    return _CompiledPosterior.apply(mismatch, mismatch_nats, recombination, prior, place, near.first, near.count)


def posterior_torch(
    mismatch: Tensor,
    mismatch_nats: Tensor,
    recombination: Tensor,
    prior: Tensor,
    near: Near | None = None,
    place: Tensor | None = None,
) -> Tensor:
    """:func:`copying_posterior` in plain torch operations, one step per site, differentiated by autograd."""
    mismatch_nats, recombination = bounded(mismatch_nats, recombination)
    chains = len(mismatch_nats) // len(mismatch)
    place = _one_place(mismatch) if place is None else place
    mismatch, prior, place = mismatch.repeat(chains, 1, 1), prior.repeat(chains, 1, 1), place.repeat(chains, 1)
    rows = torch.arange(len(prior), device=prior.device)
    emission = torch.where(mismatch, torch.exp(-mismatch_nats)[..., None], 1.0).unbind(1)
    stay = (1 - recombination)[..., None].unbind(1)
    jump = recombination[..., None].unbind(1)
    first = prior[rows, place[:, 0]] * emission[0]
    forward = [first / first.sum(-1, keepdim=True)]
    for site in range(1, len(emission)):
        moved = (jump[site] * prior[rows, place[:, site]] + stay[site] * forward[-1]) * emission[site]
        forward.append(moved / moved.sum(-1, keepdim=True))
    backward = [torch.ones_like(emission[0])]
    for site in range(len(emission) - 1, 0, -1):
        seen = backward[-1] * emission[site]
        total = (prior[rows, place[:, site]] * seen).sum(-1, keepdim=True)
        backward.append(jump[site] + stay[site] * seen / total)
    near = near or _all_sites(mismatch)
    both = near.of(torch.stack(forward, 1)) * near.of(torch.stack(backward[::-1], 1))
    return both / both.sum(-1, keepdim=True)


def _all_sites(mismatch: Tensor) -> Near:
    return Near.same(0, mismatch.shape[1], len(mismatch), mismatch.device)


def _one_place(mismatch: Tensor) -> Tensor:
    return torch.zeros(mismatch.shape[:2], dtype=torch.int64, device=mismatch.device)


def bounded(mismatch_nats: Tensor, recombination: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments of the copying model within bounds that keep every state above the smallest float32."""
    return mismatch_nats.clamp_max(MOST_MISMATCH_NATS), recombination.clamp_min(LEAST_RECOMBINATION)


def recombination_prior(distance: Tensor, barred: Tensor | None = None) -> Tensor:
    """Prior after a recombination from a ``distance`` in nats, both float32 [B, G, K]; it sums to 1 over K.

    No neighbour counts as further than :data:`MOST_PRIOR_NATS` from the nearest one. Those ``barred``, bool [B, K],
    have no probability at any site, and their ``distance`` is overwritten.
    """
    if barred is not None:
        distance.masked_fill_(barred[:, None], torch.inf)
    nearest = distance.detach().amin(-1, keepdim=True)
    limited = torch.minimum(distance, nearest + MOST_PRIOR_NATS)
    if barred is not None:
        limited.masked_fill_(barred[:, None], torch.inf)
    return torch.softmax(-limited, dim=-1)


def _arguments(
    mismatch: Tensor, mismatch_nats: Tensor, recombination: Tensor, prior: Tensor, place: Tensor
) -> list[np.ndarray]:
    """First arguments of the numba loops, with the ratio ``exp(-mismatch_nats)`` in place of the nats."""
    numbers = (torch.exp(-mismatch_nats.detach()), recombination.detach(), prior.detach())
    given = mismatch, *(each.float() for each in numbers), place
    return [each.contiguous().numpy() for each in given]


class _CompiledPosterior(torch.autograd.Function):
    """Posterior copying probabilities float32 [C, M, K] by the numba loops, for bounded arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        mismatch: Tensor,
        mismatch_nats: Tensor,
        recombination: Tensor,
        prior: Tensor,
        place: Tensor,
        first: Tensor,
        count: int,
    ) -> Tensor:
        posterior = torch.empty(len(mismatch_nats), count, mismatch.shape[2], dtype=torch.float32)
        given = _arguments(mismatch, mismatch_nats, recombination, prior, place)
        li_stephens_numba.forward_backward(*given, first.numpy(), posterior.numpy())
        # Saved as tensors, so that autograd raises an error if one is modified in place before the backward pass.
        ctx.save_for_backward(mismatch, mismatch_nats, recombination, prior, place, posterior)
        ctx.first = first
        return posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        *inputs, posterior = (each.detach() for each in ctx.saved_tensors)
        _, mismatch_nats, _, prior, _ = inputs
        ratio_gradient = np.zeros(mismatch_nats.shape, dtype=np.float32)
        prior_gradient = np.zeros((len(mismatch_nats), *prior.shape[1:]), dtype=np.float32)
        found = ratio_gradient, np.zeros_like(ratio_gradient), prior_gradient
        given = (*_arguments(*inputs), ctx.first.numpy(), posterior.numpy())
        li_stephens_numba.adjoint(*given, gradient.float().contiguous().numpy(), *found)
        # d exp(-mismatch_nats) / d mismatch_nats = -exp(-mismatch_nats)
        nats_gradient = -torch.from_numpy(ratio_gradient) * torch.exp(-mismatch_nats)
        of_queries = torch.from_numpy(prior_gradient).unflatten(0, (-1, len(prior))).sum(0)
        return None, nats_gradient, torch.from_numpy(found[1]), of_queries, None, None, None


def match_lengths(mismatch: Tensor, position: Tensor, count: Tensor, near: Near | None = None) -> Tensor:
    """Length of each neighbour's match with the query around the sites ``near``, or all, in cM, float32 [B, M, K].

    A match reaches from the nearest mismatch at or left of the site to the nearest at or right of it. Without such a
    mismatch it ends at the first or the last typed site. ``mismatch`` bool [B, T, K]; ``position`` [B, T] in cM. Row b
    has ``count[b]`` (int64 [B]) typed sites; the rest of it is padding.
    """
    ends = torch.cat([position[:, :1], position.gather(1, (count - 1).clamp_min(0)[:, None])], dim=1)
    way = copying_backend(mismatch.device)
    near = near or _all_sites(mismatch)
    if way == "cuda kernel":
        return cuda_match_lengths(mismatch, position, ends, near.first, near.count)
    if way == "compiled":
        lengths = np.empty((len(mismatch), near.count, mismatch.shape[2]), dtype=np.float32)
        places = (each.float().contiguous().numpy() for each in (position, ends))
        li_stephens_numba.match_lengths(mismatch.contiguous().numpy(), *places, near.first.numpy(), lengths)
        return torch.from_numpy(lengths)
    place = position.float()[..., None].expand(mismatch.shape)
    left = torch.where(mismatch, place, ends[:, :1, None]).cummax(1).values
    right = torch.where(mismatch, place, ends[:, 1:, None]).flip(1).cummin(1).values.flip(1)
    return (near.of(right) - near.of(left)).clamp_min(0)
