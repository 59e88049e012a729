"""Imports are not interrupted by the search for garbage, and everything else is as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from embrag_ds.runtime.imports import uncollected


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_searched_inside_and_later_only_what_is_new() -> None:
    with uncollected():
        assert not gc.isenabled()
        kept = [[] for _ in range(100)]
    assert gc.isenabled() and gc.get_freeze_count() >= len(kept)


def test_it_is_on_again_after_a_failure_and_off_where_it_was_off() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()
