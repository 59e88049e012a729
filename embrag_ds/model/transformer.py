"""A pre-norm transformer encoder with rotary positions in centimorgans."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from embrag_ds.model.recompute import computed_again, not_kept, through

_SHORTEST_CM, _LONGEST_CM = 0.02, 40.0


Recompute = Callable[..., Tensor]
"""(block, x, angles) -> block(x, angles); the backward pass has only the arguments and computes the rest again."""


def rotary_angles(position: Tensor, head_dims: int) -> Tensor:
    """Cosines and sines [L, head_dims / 2, 2] for positions [L] in cM (RoPE, Su et al. 2021).

    The wavelengths form a geometric ladder, so attention sees genetic distances on every scale from
    between neighbouring sites to across the window.
    """
    ladder = torch.logspace(math.log10(_SHORTEST_CM), math.log10(_LONGEST_CM), head_dims // 2, device=position.device)
    angles = position.float()[:, None] * (2 * math.pi / ladder)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def rotated_heads(qkv: Tensor, angles: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, L, heads, head_dims] of ``qkv`` [B * L, 3 * D], the former two rotated by ``angles``
    [L, head_dims / 2, 2].

    ``qkv`` is overwritten, and autograd is told. It should be no view: autograd copies the gradient of a view's base.
    """
    shape = (-1, len(angles), 3, heads, 2 * angles.shape[1])
    if torch.compiler.is_compiling():  # it fuses real operations, and knows no complex ones
        query, key, value = qkv.view(shape).unbind(2)
        return _rotate(query, angles), _rotate(key, angles), value
    return _RotatedHeads.apply(qkv, angles, shape).view(shape).unbind(2)


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles[:, None].unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)


class _RotatedHeads(torch.autograd.Function):
    """Rotates where the projection has written: nothing is copied, and the backward pass needs the angles only."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angles: Tensor, shape: tuple[int, ...]) -> Tensor:
        turns = torch.view_as_complex(angles)[:, None, None]
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(turns)
        ctx.shape = shape
        _turn(qkv.view(shape)[:, :, :2], turns)
        return qkv

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (turns,) = ctx.saved_tensors
        # A copy: others may hold the gradient that came in.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        _turn(gradient.view(ctx.shape)[:, :, :2], turns.conj())
        return gradient, None, None


def _turn(heads: Tensor, turns: Tensor) -> None:
    """Multiply pairs of the last dimension by complex ``turns``, in place."""
    pairs = heads.float().unflatten(-1, (-1, 2))  # of float32 a view, of anything else a copy
    torch.view_as_complex(pairs).mul_(turns)
    if heads.dtype != pairs.dtype:
        heads.copy_(pairs.flatten(-2))


class Block(nn.Module):
    """Attention and feed-forward, each after its norm and added back.

    Of its activations only ten times its input is kept for the backward pass: the input itself, queries, keys and
    values, what attention makes of them, the input of the second norm, and the feed-forward's hidden layer (four).
    """

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

    def forward(self, x: Tensor, angles: Tensor, recompute_projections: bool = False) -> Tensor:
        """[B, L, D] -> [B, L, D]; ``angles`` [L, head_dims / 2, 2].

        With ``recompute_projections`` queries, keys, values and hidden layer are not kept, but three times ``x`` is,
        and their projections are done again.
        """
        recompute = recompute_projections and torch.is_grad_enabled()
        x = x + self._drop(self._attend(x, angles, recompute))
        if recompute:
            return x + self._drop(computed_again(self._feed_forward, x))
        return x + self._drop(through(gelu, self.ffn_out, through(self.ffn_norm, self.ffn_in, x)))

    def _attend(self, x: Tensor, angles: Tensor, recompute: bool) -> Tensor:
        rows = x.flatten(0, 1)  # a projection of [B, L, D] would be a view
        qkv = through(self.attention_norm, self.qkv, rows)
        query, key, value = self._rotated(qkv, angles)
        if recompute and not torch.compiler.is_compiling():  # it has no hooks
            source = rows.detach()

            def again() -> Tensor:
                qkv = self.qkv(self.attention_norm(source))
                self._rotated(qkv, angles)
                return qkv

            with not_kept(qkv, again):
                mixed = scaled_dot_product_attention(query, key, value)
        else:
            mixed = scaled_dot_product_attention(query, key, value)
        return self.attention_out(mixed.transpose(1, 2).flatten(-2))

    def _rotated(self, qkv: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, L, head_dims], rotated where they lie."""
        query, key, value = rotated_heads(qkv, angles, self.heads)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn_out(gelu(self.ffn_in(self.ffn_norm(x))))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """Blocks and a final norm: [B, L, D] -> [B, L, D].

    ``recompute``, where it is set, runs the first ``recomputed`` blocks (None: all) so that they keep their input only;
    ``recompute_projections`` is for the others.
    """

    def __init__(self, dims: int, layers: int, heads: int, ffn_multiple: int, dropout: float):
        super().__init__()
        self.head_dims = dims // heads
        self.recompute: Recompute | None = None
        self.recomputed: int | None = None
        self.recompute_projections = False
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
                x = block(x, angles, self.recompute_projections)
        return self.norm(x)
