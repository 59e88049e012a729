"""Bit-packed alleles, eight haplotypes a byte, lowest bit first: the only packing and unpacking.

torch is imported where it is needed: reading and scoring files do without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def pack_host(alleles: np.ndarray) -> np.ndarray:
    """Alleles 0 or 1, uint8 [..., H], as bits uint8 [..., ceil(H / 8)]."""
    return np.packbits(alleles, axis=-1, bitorder="little")


def unpack_host(packed: np.ndarray, first: int, last: int) -> np.ndarray:
    """Haplotypes ``first`` to ``last`` (exclusive) of bits uint8 [..., W]: uint8 [..., last - first]."""
    start = first // 8
    bits = np.unpackbits(packed[..., start : -(-last // 8)], axis=-1, bitorder="little")
    return bits[..., first - 8 * start : last - 8 * start]


def unpack_chosen(packed: np.ndarray, haplotypes: np.ndarray) -> np.ndarray:
    """Some haplotypes, by number int64 [n], of bits uint8 [..., W]: uint8 [..., n]. For few of many."""
    return (packed[..., haplotypes >> 3] >> (haplotypes & 7).astype(np.uint8)) & 1


def unpack(packed: Tensor, count: int) -> Tensor:
    """Bits uint8 [n, W], lowest first, as uint8 [n, count]."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts).bitwise_and_(1)
    return bits.flatten(-2)[:, :count]


def pack(alleles: Tensor) -> Tensor:
    """The inverse of :func:`unpack`: uint8 [n, H] as bits uint8 [n, ceil(H / 8)]."""
    import torch

    padded = torch.nn.functional.pad(alleles, (0, -alleles.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=alleles.device)
    return (padded.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
