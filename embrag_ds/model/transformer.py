"""A pre-norm transformer encoder with rotary positions in centimorgans."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

_SHORTEST_CM, _LONGEST_CM = 0.02, 40.0


Recompute = Callable[..., Tensor]
"""(block, x, angles) -> block(x, angles); the backward pass has only the arguments and computes the rest again."""


def rotary_angles(position: Tensor, head_dims: int) -> Tensor:
    """Complex rotations [L, head_dims / 2] for positions [L] in cM (RoPE, Su et al. 2021).

    The wavelengths form a geometric ladder, so attention sees genetic distances on every scale from
    between neighbouring sites to across the window.
    """
    ladder = torch.logspace(math.log10(_SHORTEST_CM), math.log10(_LONGEST_CM), head_dims // 2, device=position.device)
    angles = position.float()[:, None] * (2 * math.pi / ladder)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotate queries or keys [B, heads, L, head_dims] by ``angles`` [L, head_dims / 2]."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2).to(heads.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each after its norm and added back."""

    def __init__(self, dims: int, heads: int, ffn_multiple: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(dims)
        self.qkv = nn.Linear(dims, 3 * dims)
        self.attention_out = nn.Linear(dims, dims)
        self.ffn_norm = nn.LayerNorm(dims)
        self.ffn_in = nn.Linear(dims, ffn_multiple * dims)
        self.ffn_out = nn.Linear(ffn_multiple * dims, dims)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self._drop(self._attend(self.attention_norm(x), angles))
        return x + self._drop(self.ffn_out(gelu(self.ffn_in(self.ffn_norm(x)))))

    def _attend(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # A copy: the view would keep all three for the backward pass.
        value = value.contiguous()
        mixed = scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value)
        return self.attention_out(mixed.transpose(1, 2).flatten(-2))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """Blocks and a final norm: [B, L, D] -> [B, L, D].

    ``recompute``, where it is set, runs the first ``recomputed`` blocks (None: all) so that they keep their input only.
    """

    def __init__(self, dims: int, layers: int, heads: int, ffn_multiple: int, dropout: float):
        super().__init__()
        self.head_dims = dims // heads
        self.recompute: Recompute | None = None
        self.recomputed: int | None = None
        self.blocks = nn.ModuleList(Block(dims, heads, ffn_multiple, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dims)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """``x`` [B, L, D]; ``position`` [L] in cM."""
        angles = rotary_angles(position, self.head_dims)
        recomputed = len(self.blocks) if self.recomputed is None else self.recomputed
        for place, block in enumerate(self.blocks):
            if self.recompute is not None and place < recomputed and torch.is_grad_enabled():
                x = self.recompute(block, x, angles)
            else:
                x = block(x, angles)
        return self.norm(x)
