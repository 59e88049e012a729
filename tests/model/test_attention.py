"""Choice of the fastest attention by measuring, with a stand-in for the GPU's clock."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator

import pytest
import torch
from torch._functorch import partitioners
from torch.nn.attention import SDPBackend, sdpa_kernel

from embrag_ds.model.attention import FUSED, KEPT_BY_COMPILER, forget_attention, prefer_fastest_attention
from embrag_ds.model.transformer import Block, rotary_angles

CPU = torch.device("cpu")
SHAPE = (4, 30, 2, 8)


@pytest.fixture(autouse=True)
def _torchs_own_order() -> Iterator[None]:
    if torch.cuda.is_available():  # there torch settles its order at the first call
        one = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
        torch.nn.functional.scaled_dot_product_attention(one, one, one)
    before = torch._C._get_sdp_priority_order()
    yield
    forget_attention()
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def clock(**times: float):
    """Measurement that knows these kernels and no others."""
    names = {kernel: name for name, kernel in FUSED.items()}

    def milliseconds(kernel: SDPBackend) -> float:
        if names[kernel] not in times:
            raise RuntimeError("No available kernel. Aborting execution.")
        return times[names[kernel]]

    return milliseconds


def order() -> list[int]:
    return torch._C._get_sdp_priority_order()


@pytest.mark.parametrize(
    "times",
    [{"cudnn": 1.0, "flash": 2.0, "efficient": 3.0}, {"efficient": 1.0, "cudnn": 9.0}, {"flash": 1, "cudnn": 2}],
)
def test_the_fastest_comes_first_and_one_line_states_it(
    times: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = prefer_fastest_attention(SHAPE, torch.bfloat16, CPU, clock(**times))
    fastest = min(times, key=lambda name: times[name])
    assert found == fastest and order()[0] == int(FUSED[fastest])
    (line,) = caplog.messages
    assert line.startswith(f"attention: {fastest}, ") and all(f"{name} {ms:.2f}" in line for name, ms in times.items())
    for name, enabled in (("flash", torch.backends.cuda.flash_sdp_enabled), ("cudnn", torch._C._get_cudnn_sdp_enabled)):
        assert enabled() == (name in times)
    assert torch.backends.cuda.math_sdp_enabled()


def test_a_later_choice_replaces_an_earlier_one() -> None:
    prefer_fastest_attention(SHAPE, torch.bfloat16, CPU, clock(flash=1, efficient=2))
    prefer_fastest_attention(SHAPE, torch.bfloat16, CPU, clock(efficient=1, cudnn=2))
    assert order()[:2] == [int(FUSED["efficient"]), int(FUSED["cudnn"])]


def test_compiled_code_gets_a_kernel_that_it_runs_once() -> None:
    found = prefer_fastest_attention(SHAPE, torch.bfloat16, CPU, clock(cudnn=1, flash=2, efficient=3), compiled=True)
    assert found == "flash" and not torch._C._get_cudnn_sdp_enabled()


def test_the_compiler_stores_what_these_kernels_return() -> None:
    """torch names the operations that compiled code never repeats in the backward pass; cuDNN's is not among them."""
    source = inspect.getsource(partitioners)
    kept = {name for name in FUSED if f"aten._scaled_dot_product_{name}_attention," in source}
    assert kept == set(KEPT_BY_COMPILER)


def test_nothing_changes_where_there_is_nothing_to_choose(caplog: pytest.LogCaptureFixture) -> None:
    before = order()
    with caplog.at_level(logging.INFO):
        assert prefer_fastest_attention(SHAPE, torch.float32, CPU) is None
        assert prefer_fastest_attention(SHAPE, torch.float32, CPU, clock(flash=1)) is None
        assert prefer_fastest_attention(SHAPE, torch.float32, CPU, clock()) is None
    assert order() == before and not caplog.messages


def test_compiled_code_takes_it_without_a_break() -> None:
    prefer_fastest_attention(SHAPE, torch.bfloat16, CPU, clock(flash=1, cudnn=2))
    block, angles = Block(16, 2, 4, 0.0), rotary_angles(torch.linspace(0, 1, 30), 8)
    x = torch.randn(4, 30, 16)
    whole = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x, angles), block(x, angles))
    torch._dynamo.reset()


@pytest.mark.gpu
def test_on_a_gpu_the_choice_is_a_kernel_that_runs() -> None:
    found = prefer_fastest_attention((8, 930, 4, 64), torch.bfloat16, torch.device("cuda"))
    assert found in FUSED
    query = torch.randn(8, 4, 930, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(mixed, expected, atol=2e-2, rtol=2e-2)
    mixed.sum().backward()
