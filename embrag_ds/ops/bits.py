"""Bit-packed alleles: eight haplotypes to a byte, the lowest bit first.

All packing and unpacking of alleles is done here, on numpy arrays and on torch tensors. Only the functions on tensors
import torch, so reading and scoring files does without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def pack_host(alleles: np.ndarray) -> np.ndarray:
    """Pack alleles 0 or 1, uint8 [..., H], into bits, uint8 [..., ceil(H / 8)]."""
    return np.packbits(alleles, axis=-1, bitorder="little")


def unpack_host(packed: np.ndarray, first: int, last: int) -> np.ndarray:
    """Unpack a range of haplotypes of bits uint8 [..., ceil(H / 8)].

    Returns the alleles of haplotypes ``first`` to ``last`` (exclusive), uint8 [..., last - first].
    """
    start = first // 8
    # With a count the result is contiguous where ``first`` begins a byte, which compiled loops rely on for their speed.
    bits = np.unpackbits(packed[..., start : -(-last // 8)], axis=-1, count=last - 8 * start, bitorder="little")
    return bits[..., first - 8 * start :]


def unpack_chosen(packed: np.ndarray, haplotypes: np.ndarray) -> np.ndarray:
    """Unpack selected haplotypes of bits uint8 [..., ceil(H / 8)].

    ``haplotypes`` int64 [n] are their numbers. Returns alleles uint8 [..., n]. It is the faster way where n is far
    below H.
    """
    return (packed[..., haplotypes >> 3] >> (haplotypes & 7).astype(np.uint8)) & 1


def unpack_samples(packed: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Unpack both haplotypes of selected samples of bits uint8 [S, ceil(H / 8)].

    ``samples`` int64 [N] are their numbers; sample i has the haplotypes 2 i and 2 i + 1, which share a byte. Returns
    alleles uint8 [2N, S], contiguous. Of ``packed`` only these samples' bytes are read.
    """
    both = np.ascontiguousarray(np.take(packed, samples >> 2, axis=1).T)
    first = (2 * (samples & 3)).astype(np.uint8)
    shifts = first[:, None] + np.arange(2, dtype=np.uint8)
    return ((both[:, None] >> shifts[:, :, None]) & 1).reshape(2 * len(samples), len(packed))


def unpack(packed: Tensor, count: int) -> Tensor:
    """Unpack a tensor of bits uint8 [n, ceil(H / 8)].

    Returns the alleles of the first ``count`` haplotypes, uint8 [n, count].
    """
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts).bitwise_and_(1)
    return bits.flatten(-2)[:, :count]


def pack(alleles: Tensor) -> Tensor:
    """Pack a tensor of alleles 0 or 1, uint8 [n, H], into bits, uint8 [n, ceil(H / 8)]; inverse of :func:`unpack`."""
    import torch

    padded = torch.nn.functional.pad(alleles, (0, -alleles.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=alleles.device)
    return (padded.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
