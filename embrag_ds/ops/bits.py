"""Bit-packed alleles, eight haplotypes a byte, lowest bit first: the only packing and unpacking."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_host(alleles: np.ndarray) -> np.ndarray:
    """Alleles 0 or 1, uint8 [..., H], as bits uint8 [..., ceil(H / 8)]."""
    return np.packbits(alleles, axis=-1, bitorder="little")


def unpack_host(packed: np.ndarray, first: int, last: int) -> np.ndarray:
    """Haplotypes ``first`` to ``last`` (exclusive) of bits uint8 [..., W]: uint8 [..., last - first]."""
    start = first // 8
    bits = np.unpackbits(packed[..., start : -(-last // 8)], axis=-1, bitorder="little")
    return bits[..., first - 8 * start : last - 8 * start]


def unpack(packed: Tensor, count: int) -> Tensor:
    """Bits uint8 [n, W], lowest first, as uint8 [n, count]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts).bitwise_and_(1)
    return bits.flatten(-2)[:, :count]


def pack(alleles: Tensor) -> Tensor:
    """The inverse of :func:`unpack`: uint8 [n, H] as bits uint8 [n, ceil(H / 8)]."""
    padded = torch.nn.functional.pad(alleles, (0, -alleles.shape[1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=alleles.device)
    return (padded.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
