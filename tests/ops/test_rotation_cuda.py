"""CUDA kernels that rotate queries and keys, compiled for the host, against complex numbers; and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from embrag_ds.model.transformer import rotary_angles, rotated_heads
from embrag_ds.ops import cuda, rotation_cuda

KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
SHAPES = pytest.mark.parametrize(("rows", "sites", "heads", "width"), [(1, 1, 1, 2), (3, 5, 2, 6), (2, 9, 5, 4)])


@pytest.fixture
def on_the_host(kernels_on_host: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The host's kernels in place of a GPU's; the list names those that were launched."""
    launched: list[str] = []
    launch = cuda.Kernel.launch

    def noted(kernel: cuda.Kernel, *given: Any) -> None:
        launched.append(kernel._name)
        launch(kernel, *given)

    monkeypatch.setattr(cuda.Kernel, "launch", noted)
    monkeypatch.setattr(cuda, "TILE_THREADS", 4)
    monkeypatch.setattr(rotation_cuda, "serves", lambda qkv: True)
    return launched


def case(rows: int, sites: int, heads: int, width: int, kind: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    maker = torch.Generator().manual_seed(sites)
    qkv = torch.randn(rows * sites, 3 * heads * width, generator=maker).to(kind)
    gradients = [torch.randn(rows, sites, heads, width, generator=maker).to(kind) for _ in range(3)]
    return qkv, rotary_angles(torch.linspace(-1, 2, sites), width), gradients


def passes(qkv: Tensor, angles: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Queries, keys, values and the gradient of ``qkv``."""
    leaf = qkv.clone().requires_grad_()
    parts = rotated_heads(leaf * 1, angles, gradients[0].shape[2])
    (gradient,) = torch.autograd.grad(parts, leaf, gradients)
    return [*(each.detach() for each in parts), gradient]


@KINDS
@SHAPES
def test_values_and_gradients_are_those_of_complex_numbers(
    on_the_host: list[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    sites: int,
    heads: int,
    width: int,
    kind: torch.dtype,
) -> None:
    qkv, angles, gradients = case(rows, sites, heads, width, kind)
    # As attention returns them, in another order of dimensions than they are stored in.
    strided = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in gradients]
    mine = passes(qkv, angles, strided)
    number = {torch.float32: "float", torch.bfloat16: "bfloat16"}[kind]
    assert on_the_host == [f"rotate_{number}", f"gather_{number}"]
    monkeypatch.setattr(rotation_cuda, "serves", lambda qkv: False)
    for one, other in zip(mine, passes(qkv, angles, gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if kind == torch.float32 else 8e-3, atol=1e-6)


def test_bf16_is_rounded_as_torch_rounds_it(on_the_host: list[str]) -> None:
    """Cosine 1 and sine 0, and values between two numbers of bf16, infinite and not a number."""
    angles = torch.tensor([1.0, 2.0**-9]).expand(1, 1, 2).contiguous()  # a sum that lies between two numbers
    values = torch.tensor([1.0, 1.0, 257.0, -1.0, 3e38, 1e38, torch.inf, 1.0, torch.nan, 2.0]).to(torch.bfloat16)
    qkv = torch.zeros(5, 1, 3, 1, 2, dtype=torch.bfloat16)
    qkv[:, 0, 0, 0] = values.view(5, 2)
    a, b = values.view(5, 2).float().unbind(1)
    rotation_cuda.rotate(qkv, angles)
    expected = torch.stack([a - b * 2.0**-9, a * 2.0**-9 + b], dim=1).to(torch.bfloat16)
    assert torch.equal(qkv[:, 0, 0, 0].isnan(), expected.isnan())
    assert torch.equal(qkv[:, 0, 0, 0].nan_to_num(), expected.nan_to_num())


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize(("rows", "sites", "heads", "width"), [(3, 5, 2, 6), (2, 930, 4, 64)])
def test_on_the_gpu_they_are_those_of_the_cpu(rows: int, sites: int, heads: int, width: int, kind: torch.dtype) -> None:
    qkv, angles, gradients = case(rows, sites, heads, width, kind)
    there = passes(qkv.cuda(), angles.cuda(), [each.cuda() for each in gradients])
    assert rotation_cuda.serves(qkv.cuda())
    for one, other in zip(there, passes(qkv, angles, gradients), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5 if kind == torch.float32 else 8e-3, atol=1e-5)
