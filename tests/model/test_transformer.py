"""Transformer block against plain operations, and the memory that it stores for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from embrag_ds.model.transformer import Block, rotary_angles, rotated_heads

DIMS, HEADS, SITES, HAPLOTYPES = 32, 4, 50, 6
KeptBytes = Callable[[Callable[[], Tensor]], int]


def plainly_rotated(heads: Tensor, angles: Tensor) -> Tensor:
    """Pairs [a, b] of the last dimension as a + ib, times cos + i sin, one number at a time."""
    columns = []
    for pair in range(heads.shape[-1] // 2):
        a, b = heads[..., 2 * pair].float(), heads[..., 2 * pair + 1].float()
        cosine, sine = angles[:, pair, 0, None], angles[:, pair, 1, None]
        columns += [a * cosine - b * sine, a * sine + b * cosine]
    return torch.stack(columns, dim=-1).to(heads.dtype)


def plain(block: Block, x: Tensor, angles: Tensor) -> Tensor:
    """The block in plain operations."""
    query, key, value = block.qkv(block.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
    turned = (plainly_rotated(query, angles), plainly_rotated(key, angles), value)
    mixed = scaled_dot_product_attention(*(each.transpose(1, 2).contiguous() for each in turned))
    x = x + block.attention_out(mixed.transpose(1, 2).flatten(-2))
    return x + block.ffn_out(gelu(block.ffn_in(block.ffn_norm(x))))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(3)
    return Block(DIMS, HEADS, ffn_multiple=4, dropout=0.0)


@pytest.fixture
def angles() -> Tensor:
    return rotary_angles(torch.linspace(-1, 2, SITES), DIMS // HEADS)


def test_angles_turn_once_a_wavelength() -> None:
    """Two wavelengths: 0.02 and 40 cM."""
    turned = rotary_angles(torch.tensor([0.0, 0.005, 0.02, 10.0]), 4)
    expected = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0]])  # 10 cM are 500 turns of the first
    torch.testing.assert_close(turned[:, 0], expected.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(turned[:, 1, 1], torch.tensor([0.0, 0.000785, 0.00314, 1.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_heads_are_rotated_in_place_and_back(angles: Tensor, kind: torch.dtype) -> None:
    leaf = torch.randn(HAPLOTYPES, SITES, 3, HEADS, DIMS // HEADS, dtype=kind)
    one, other = (leaf.clone().requires_grad_() for _ in range(2))
    written = one * 1  # a leaf must not be written to
    turned = rotated_heads(written, angles, HEADS)
    assert all(each.untyped_storage().data_ptr() == written.untyped_storage().data_ptr() for each in turned)
    query, key, value = other.unbind(2)
    expected = (plainly_rotated(query, angles), plainly_rotated(key, angles), value)
    gradients = torch.randn(3, *value.shape, dtype=kind)
    for mine, theirs in zip(turned, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    sum((each * gradient).sum() for each, gradient in zip(turned, gradients, strict=True)).backward()
    sum((each * gradient).sum() for each, gradient in zip(expected, gradients, strict=True)).backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.fixture
def leaf() -> Tensor:
    return torch.randn(HAPLOTYPES * SITES, 3 * DIMS, requires_grad=True)


def plainly_rotated_all(qkv: Tensor, angles: Tensor) -> Tensor:
    """``qkv`` [B * L, 3 * D] with its queries and keys rotated, out of place."""
    query, key, value = qkv.view(HAPLOTYPES, SITES, 3, HEADS, -1).unbind(2)
    return torch.stack([plainly_rotated(query, angles), plainly_rotated(key, angles), value], dim=2).view(qkv.shape)


def test_rotating_values_that_autograd_has_saved_is_an_error(leaf: Tensor, angles: Tensor) -> None:
    """Autograd raises an error in place of wrong gradients; also for a leaf, whose own values are lost."""
    projection = leaf * 1
    square = projection.square()  # keeps the projection
    query, _, _ = rotated_heads(projection, angles, HEADS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + query.sum()).backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        rotated_heads(leaf, angles, HEADS)
    with pytest.raises(RuntimeError, match="inplace an input that is a view"):
        rotated_heads((leaf * 1).view(HAPLOTYPES, SITES, 3, HEADS, -1), angles, HEADS)


def test_what_is_rotated_has_the_gradients_of_what_it_is_now(leaf: Tensor, angles: Tensor) -> None:
    weights = torch.randn(2, *leaf.shape)
    projection = leaf * 1
    turned = torch.stack(rotated_heads(projection, angles, HEADS), dim=2).view(leaf.shape)
    # One use of the returned parts, and one of the given tensor.
    (mine,) = torch.autograd.grad((turned * weights[0] + projection * weights[1]).sum(), leaf)
    expected = plainly_rotated_all(leaf, angles)
    torch.testing.assert_close(projection, expected)
    (theirs,) = torch.autograd.grad((expected * weights.sum(0)).sum(), leaf)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_one_part_alone_has_its_gradient(leaf: Tensor, angles: Tensor, used: int) -> None:
    weights = torch.randn(HAPLOTYPES, SITES, HEADS, DIMS // HEADS)
    (mine,) = torch.autograd.grad((rotated_heads(leaf * 1, angles, HEADS)[used] * weights).sum(), leaf)
    expected = plainly_rotated_all(leaf, angles).view(HAPLOTYPES, SITES, 3, HEADS, -1)[:, :, used]
    (theirs,) = torch.autograd.grad((expected * weights).sum(), leaf)
    torch.testing.assert_close(mine, theirs)


def test_gradients_that_come_in_are_left_as_they_are(leaf: Tensor, angles: Tensor) -> None:
    projection = leaf * 1
    rotated_heads(projection, angles, HEADS)
    given = torch.randn(projection.shape)
    before = given.clone()
    (mine,) = torch.autograd.grad(projection, leaf, given)
    assert torch.equal(given, before)
    (theirs,) = torch.autograd.grad(plainly_rotated_all(leaf, angles), leaf, before)
    torch.testing.assert_close(mine, theirs)
    parts = rotated_heads(leaf * 1, angles, HEADS)
    gradients = [torch.randn(parts[0].shape) for _ in parts]
    kept = [each.clone() for each in gradients]
    torch.autograd.grad(parts, leaf, gradients)
    assert all(torch.equal(one, other) for one, other in zip(gradients, kept, strict=True))


@pytest.mark.parametrize("recompute_projections", [False, True])
def test_a_block_rotates_no_view(block: Block, angles: Tensor, recompute_projections: bool) -> None:
    """Autograd would copy the gradient of the view's base."""
    made = block(torch.randn(HAPLOTYPES, SITES, DIMS, requires_grad=True), angles, recompute_projections)
    seen, ahead = set(), [made.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [each for each, _ in node.next_functions]
    names = {each.name() for each in seen}
    assert "_RotatedHeadsBackward" in names and "CopySlices" not in names


@pytest.mark.parametrize("recompute_projections", [False, True])
def test_a_block_is_what_it_is_written_out(block: Block, angles: Tensor, recompute_projections: bool) -> None:
    x = torch.randn(HAPLOTYPES, SITES, DIMS)
    gradient = torch.randn_like(x)
    found = []
    for way in (lambda *given: block(*given, recompute_projections), lambda *given: plain(block, *given)):
        given = x.clone().requires_grad_()
        made = way(given, angles)
        (made * gradient).sum().backward()
        assert given.grad is not None
        found.append([made.detach(), given.grad, *(each.grad.clone() for each in block.parameters())])
        block.zero_grad()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("recompute_projections", "times"), [(False, 10), (True, 3)])
def test_how_many_times_its_input_a_block_keeps(
    block: Block, angles: Tensor, kept_bytes: KeptBytes, recompute_projections: bool, times: int
) -> None:
    x = torch.randn(HAPLOTYPES, SITES, DIMS, requires_grad=True)
    size = x.numel() * x.element_size()
    parameters = sum(each.numel() * each.element_size() for each in block.parameters())
    # In addition, the logarithms of attention's sums, one per head, and the moments of the norms.
    beside = 4 * HAPLOTYPES * SITES * (HEADS + 4)
    kept = kept_bytes(lambda: block(x, angles, recompute_projections))
    assert times * size <= kept <= times * size + parameters + beside + angles.nbytes
    assert kept_bytes(lambda: plain(block, x, angles)) >= 16 * size


def test_recomputing_projections_takes_seven_twelfths_of_a_forward_pass(
    block: Block, angles: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed's ZeRO-3 leaves its own function in the process, which computes the last projection again too.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    operations = []
    for recompute_projections in (False, True):
        with FlopCounterMode(display=False) as counter:
            x = torch.randn(HAPLOTYPES, SITES, DIMS, requires_grad=True)
            block(x, angles, recompute_projections).sum().backward()
        operations.append(counter.get_total_flops())
    assert operations[1] - operations[0] == 2 * HAPLOTYPES * SITES * DIMS * (3 + 4) * DIMS


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_projections_are_in_the_precision_they_were(block: Block, angles: Tensor, autocast: bool) -> None:
    x = torch.randn(HAPLOTYPES, SITES, DIMS)
    if not autocast:
        block, x = block.to(torch.bfloat16), x.to(torch.bfloat16)
    gradients = []
    for recompute in (False, True):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made = block(given, angles, recompute)
        made.float().square().sum().backward()
        gradients.append([given.grad, *(each.grad for each in block.parameters())])
        block.zero_grad(set_to_none=True)
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_block_is_the_same_without_gradients(block: Block, angles: Tensor, without: type) -> None:
    x = torch.randn(HAPLOTYPES, SITES, DIMS)
    with without():
        torch.testing.assert_close(block(x, angles), plain(block, x, angles), atol=1e-5, rtol=1e-5)
