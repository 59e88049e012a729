"""Pre-norm transformer encoder with rotary positions in centimorgans."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from embrag_ds.model.numbers import LONGEST_ROTARY_CM, SHORTEST_ROTARY_CM
from embrag_ds.model.recompute import not_kept, through
from embrag_ds.ops import rotation_cuda

_DECADES = math.log10(SHORTEST_ROTARY_CM), math.log10(LONGEST_ROTARY_CM)

Recompute = Callable[..., Tensor]
"""Function of (block, x, ...) to ``block(x, ...)`` that stores only its arguments for the backward pass."""


def rotary_angles(position: Tensor, head_dims: int) -> Tensor:
    """Cosines and sines float32 [L, head_dims / 2, 2] of rotary positions [L] in cM (RoPE, Su et al. 2021).

    The wavelengths form a geometric sequence from 0.02 to 40 cM, for genetic distances on every scale from adjacent
    sites to the whole window.
    """
    ladder = torch.logspace(*_DECADES, head_dims // 2, device=position.device)
    angles = position.float()[:, None] * (2 * math.pi / ladder)
    if torch.compiler.is_compiling():  # it fuses no complex operations
        return torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def rotated_heads(qkv: Tensor, angles: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, L, heads, head_dims] of ``qkv`` [B * L, 3 * D], with queries and keys rotated.

    ``angles`` [L, head_dims / 2, 2] are those of :func:`rotary_angles`. ``qkv`` is overwritten and marked as modified,
    so autograd raises RuntimeError if its old values are needed, if it is a leaf, or if it is a view.
    """
    shape = (-1, len(angles), 3, heads, 2 * angles.shape[1])
    if torch.compiler.is_compiling():  # likewise
        query, key, value = qkv.view(shape).unbind(2)
        return _rotate(query, angles), _rotate(key, angles), value
    _, query, key, value = _RotatedHeads.apply(qkv, angles, shape)
    return query, key, value


def _rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of the last dimension of ``heads`` [B, L, heads, head_dims], out of place."""
    real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles[:, None].unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)


class _RotatedHeads(torch.autograd.Function):
    """In-place rotation of queries and keys, without a copy; only the angles are saved for the backward pass.

    It returns the given tensor and its three parts. So the backward pass receives the gradients of the parts, which are
    rotated while they are put together. No tensor that may be used elsewhere is written to.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angles: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(angles)
        ctx.set_materialize_grads(False)
        ctx.shapes = qkv.shape, shape
        parts = qkv.detach().view(shape)
        if rotation_cuda.serves(qkv):
            rotation_cuda.rotate(parts, angles)
        else:
            _turn(parts[:, :, :2], torch.view_as_complex(angles)[:, None, None])
        return qkv, *parts.unbind(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        given_shape, parted = ctx.shapes
        whole, *parts = gradients
        if whole is not None:
            between = whole.view(parted).unbind(2)
            parts = [one if other is None else one + other for one, other in zip(between, parts, strict=True)]
        given = next(each for each in parts if each is not None)
        query, key, value = (torch.zeros_like(given) if each is None else each for each in parts)
        if rotation_cuda.serves(given):
            made = rotation_cuda.rotated_back(query, key, value, angles)
        else:
            made = torch.stack([query, key, value], dim=2)
            _turn(made[:, :, :2], torch.view_as_complex(angles)[:, None, None].conj())
        return made.view(given_shape), None, None


def _turn(heads: Tensor, turns: Tensor) -> None:
    """Multiply pairs of the last dimension, as complex numbers, by ``turns``, in place."""
    pairs = heads.float().unflatten(-1, (-1, 2))  # a view of float32, but a copy of other types
    torch.view_as_complex(pairs).mul_(turns)
    if heads.dtype != pairs.dtype:
        heads.copy_(pairs.flatten(-2))


class Block(nn.Module):
    """Pre-norm transformer block: attention and feed-forward, each with a residual connection.

    The activations stored for the backward pass are ten times as large as the input, for ``ffn_multiple`` 4. They are
    the input, queries, keys and values, the output of attention, the input of the second norm, and the hidden layer
    (four).
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

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        recompute_projections: bool = False,
        length: int | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Output [B, L, D] for the input ``x`` [B, L, D]; ``angles`` [L, head_dims / 2, 2].

        Sites from ``length`` on are padding, to which no site attends. With ``recompute_projections``, queries, keys,
        values and hidden layer are computed again in the backward pass. What is stored is then three times as large as
        ``x``. The output may be of the n sites alone that are ``wanted`` bool [B, L], row by row, [n, D].
        """
        recompute = recompute_projections and torch.is_grad_enabled()
        own = x if wanted is None else x[wanted]
        x = own + self._drop(self._attend(x, angles, recompute, length, wanted))
        if recompute:
            return x + self._drop(checkpoint(self._feed_forward, x, use_reentrant=False, preserve_rng_state=False))
        return x + self._drop(through(gelu, self.ffn_out, through(self.ffn_norm, self.ffn_in, x)))

    def _attend(
        self, x: Tensor, angles: Tensor, recompute: bool, length: int | None, wanted: Tensor | None = None
    ) -> Tensor:
        rows = x.flatten(0, 1)  # the projection of [B, L, D] would be a view, see rotated_heads
        qkv = through(self.attention_norm, self.qkv, rows)
        query, key, value = self._rotated(qkv, angles)
        if length is not None:
            key, value = key[:, :, :length], value[:, :, :length]
        if wanted is not None:
            rows_of = zip(query, key, value, wanted, strict=True)
            found = [scaled_dot_product_attention(q[None, :, sites], k[None], v[None])[0] for q, k, v, sites in rows_of]
            return self.attention_out(torch.cat(found, dim=1).transpose(0, 1).flatten(1))
        if recompute and not torch.compiler.is_compiling():  # torch.compile does not support saved-tensor hooks
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
        """Queries, keys and values [B, heads, L, head_dims] as views of ``qkv``, which is rotated in place."""
        query, key, value = rotated_heads(qkv, angles, self.heads)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn_out(gelu(self.ffn_in(self.ffn_norm(x))))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """Transformer encoder of ``layers`` blocks and a final norm, from [B, L, D] to [B, L, D].

    ``recompute``, if set, runs the first ``recomputed`` blocks (None: all) and stores their inputs only. The other
    blocks run with ``recompute_projections``.
    """

    def __init__(self, dims: int, layers: int, heads: int, ffn_multiple: int, dropout: float):
        super().__init__()
        self.head_dims = dims // heads
        self.recompute: Recompute | None = None
        self.recomputed: int | None = None
        self.recompute_projections = False
        self.blocks = nn.ModuleList(Block(dims, heads, ffn_multiple, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dims)

    def forward(self, x: Tensor, position: Tensor, length: int | None = None, wanted: Tensor | None = None) -> Tensor:
        """Encode ``x`` [B, L, D] of sites at ``position`` [L] in cM; those from ``length`` on are padding.

        Without gradients the result may be of the n sites alone that are ``wanted`` bool [B, L], row by row, [n, D].
        """
        angles = rotary_angles(position, self.head_dims)
        recomputed = len(self.blocks) if self.recomputed is None else self.recomputed
        for place, block in enumerate(self.blocks):
            if self.recompute is not None and place < recomputed and torch.is_grad_enabled():
                x = self.recompute(block, x, angles, False, length)
            else:
                last = place == len(self.blocks) - 1
                x = block(x, angles, self.recompute_projections, length, wanted if last else None)
        return self.norm(x)
