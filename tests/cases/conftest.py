"""Fixtures of the cases: one cache for all, and a model that is read once."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator

import pytest

from embrag_ds.imputation import impute
from tests.cases.files import Cases


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    """The commands, run on small files."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impute, "read_export", functools.lru_cache(impute.read_export))
        yield Cases(tmp_path_factory.mktemp("cases"))
    signal.signal(signal.SIGTERM, before)
