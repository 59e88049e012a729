"""What the processor can compute fast."""

from __future__ import annotations

import torch


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16; without the instructions it is some 20 times slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
