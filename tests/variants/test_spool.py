"""The spool, compared with an array in memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants import spool as spool_module
from embrag_ds.variants.spool import Spool


def write(spool: Spool, values: np.ndarray) -> int:
    """Spool ``values`` [R, N, C] as a reader does, each distinct entry of a page once; returns the number of pages."""
    seen: dict[tuple[float, ...], int] = {}
    pages = 1
    for row in values:
        if spool.new_page_if_full():
            seen.clear()
            pages += 1
        codes = []
        for entry in map(tuple, row.tolist()):
            if entry not in seen:
                seen[entry] = spool.add(entry)
            codes.append(seen[entry])
        spool.append(np.array(codes, dtype=spool.code_type))
    spool.finish()
    return pages


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(0, 40),
    entries=st.integers(1, 6),
    distinct=st.sampled_from([1, 3, 10_000]),
    page=st.sampled_from([1, 30, 1 << 16]),
)
def test_reads_what_was_written(tmp_path: Path, seed: int, rows: int, entries: int, distinct: int, page: int) -> None:
    """Rows come in any order, with any of the entries and columns, from pages of any size."""
    rng = np.random.default_rng(seed)
    values = rng.random((distinct, 3)).astype(np.float32)[rng.integers(distinct, size=(rows, entries))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module, "_PAGE_ENTRIES", page)
        patch.setattr(spool_module, "_READ_BYTES", page)
        with Spool(tmp_path, entries, 3) as spool:
            pages = write(spool, values)
            every = np.arange(rows)
            np.testing.assert_array_equal(spool.read(every, slice(0, 3)), values)
            for _ in range(3):
                chosen = rng.integers(rows, size=rng.integers(8)) if rows else every
                some = rng.integers(entries, size=rng.integers(1, 4))
                np.testing.assert_array_equal(
                    spool.read(chosen, slice(1, 3), some), values[chosen[:, None], some[None, :], 1:3]
                )
    if distinct == 10_000 and page == 1:
        assert pages >= rows // 4  # a page has room for four rows of new entries
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("entries", "code_type"), [(1, np.uint16), (16_384, np.uint16), (16_385, np.uint32)])
def test_codes_are_as_small_as_they_can_be(tmp_path: Path, entries: int, code_type: type) -> None:
    with Spool(tmp_path, entries, 1) as spool:
        assert spool.code_type == code_type
        values = np.arange(3 * entries, dtype=np.float32).reshape(3, entries, 1)
        write(spool, values)
        np.testing.assert_array_equal(spool.read(np.array([2, 0]), slice(0, 1)), values[[2, 0]])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot write scratch files .*XDG_CACHE_HOME"):
        Spool(tmp_path / "absent", 2, 1)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit files to ``size`` bytes inside ``with``: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((200, 500, 1)).astype(np.float32)
    with (
        largest_file(20_000),
        pytest.raises(UserError, match=r"cannot write scratch files \(File too large\); free some space"),
        Spool(tmp_path, 500, 1) as spool,
    ):
        write(spool, values)
    assert list(tmp_path.iterdir()) == []
