"""Blocks of rows: the same numbers with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from embrag_ds.model.compiled import CoreInputs
from embrag_ds.model.row_blocks import RowBlocks
from embrag_ds.ops.threads import undivided


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def core(rows: int, sites: int) -> CoreInputs:
    """Inputs whose evidence and dosage are random numbers."""
    generator = torch.Generator().manual_seed(3)
    shape = (rows, sites)
    number = torch.randn(shape, generator=generator)
    flags = torch.zeros(shape, dtype=torch.bool)
    tokens = torch.zeros(shape, dtype=torch.int64)
    line = torch.linspace(0, 1, sites)
    return CoreInputs(
        line, line, tokens, tokens, flags, number, number[:, None], number, number, evidence=(number, 2 * number)
    )


def predicted(given: CoreInputs) -> tuple[Tensor, Tensor]:
    """Functions that torch rounds differently at the edges of its threads' parts."""
    assert given.dosage is not None and given.evidence is not None
    return given.dosage.sigmoid() * given.position, given.evidence[1].log1p().nan_to_num()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_blocks_give_the_same_numbers_with_any_number_of_threads(threads: int, rows: int) -> None:
    given = core(rows, 1999)
    torch.set_num_threads(1)
    expected = RowBlocks()(predicted, given)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, predicted(given), strict=True))
    torch.set_num_threads(threads)
    blocks = RowBlocks()
    assert torch.get_num_threads() == threads
    with undivided():
        assert torch.get_num_threads() == 1
        found = blocks(predicted, given)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_blocks_have_the_callers_autocast_and_no_gradients() -> None:
    torch.set_num_threads(2)
    given = core(40, 8)
    weight = torch.ones(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = RowBlocks()(lambda block: (block.frequency @ weight,), given)
    assert found.dtype == torch.bfloat16 and not found.requires_grad and found.shape == (40, 8)


class _Network(torch.nn.Module):
    """Rows to numbers by two weights that are trained, one that is not used, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.second, self.unused, self.frozen = (
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((), (1999,), (3,), ())
        )
        self.frozen.requires_grad_(False)

    def forward(self, given: CoreInputs) -> Tensor:
        assert given.dosage is not None and given.evidence is not None
        return (self.first * given.dosage).sigmoid() * self.second + given.evidence[0].tanh() * self.frozen


def _gradients(way: Callable[[_Network, CoreInputs], Tensor], rows: int) -> list[Tensor]:
    """The result, then the gradients for weights and dosage, of a loss that is no plain sum of rows."""
    network = _Network()
    dosage = core(rows, 1999).frequency.clone().requires_grad_()
    made = way(network, core(rows, 1999)._replace(dosage=dosage))
    made.square().mean().log().backward()
    assert network.unused.grad is None and network.frozen.grad is None
    assert network.first.grad is not None and network.second.grad is not None and dosage.grad is not None
    return [made.detach(), network.first.grad, network.second.grad, dosage.grad]


@pytest.mark.parametrize("rows", [1, 16, 70])
def test_blocks_have_the_gradients_of_the_whole_and_the_same_with_any_number_of_threads(rows: int) -> None:
    whole = _gradients(lambda network, given: network(given), rows)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        divided = RowBlocks().differentiable
        with undivided():
            found.append(_gradients(lambda net, given, way=divided: way(net, given, net.parameters()), rows))
    for one, other in zip(found[0], whole, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    for each in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(each, found[0], strict=True))
