"""What the processor can compute fast, and its threads."""

from __future__ import annotations

import torch

from embrag_ds.errors import UserError


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16; without the instructions it is some 20 times slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_threads(number: int) -> None:
    """Let torch, and the compiled loops with it, use ``number`` threads; raises :class:`UserError` below 1."""
    if number < 1:
        raise UserError(f"--threads {number}: give at least 1")
    torch.set_num_threads(number)
