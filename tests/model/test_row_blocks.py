"""Inference by blocks of rows: the same numbers with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

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
