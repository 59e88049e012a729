"""Ploidy along the sites, recorded call by call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.data.ploidy import Ploidy, PloidyRecorder
from embrag_ds.variants.genotypes import DIPLOID, HAPLOID, UNKNOWN

CODES = {"H": HAPLOID, "D": DIPLOID, "?": UNKNOWN, "M": DIPLOID}
"""Calls, "M" being a missing one that is written as if diploid."""


def recorded(columns: list[str]) -> Ploidy | None:
    """Ploidy of samples given as a text of codes each, one a site."""
    recorder = PloidyRecorder(len(columns))
    for calls in zip(*columns, strict=True):
        ploidy = np.array([CODES[call] for call in calls], dtype=np.uint8)
        missing = np.repeat([call in "?M" for call in calls], 2)
        recorder.add(ploidy if (ploidy != DIPLOID).any() else None, missing if missing.any() else None)
    return recorder.result()


def slow(columns: list[str]) -> list[list[bool]]:
    """Whether each sample is haploid, site by site."""
    known = "".join(columns).replace("?", "").replace("M", "")
    others = "H" if set(known) == {"H"} else "D"
    found = []
    for calls in columns:
        own = [call for call in calls if call in "HD"]
        now = own[0] if own else others
        haploid = []
        for call in calls:
            now = call if call in "HD" else now
            haploid.append(now == "H")
        found.append(haploid)
    return [list(row) for row in zip(*found, strict=True)]


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.text("HD?M", min_size=n, max_size=n), min_size=1, max_size=4)))
def test_ranges_equal_a_loop_over_sites(columns: list[str]) -> None:
    ranges, expected = recorded(columns), slow(columns)
    if ranges is None:
        assert not np.array(expected).any()
        return
    np.testing.assert_array_equal(ranges.at(np.arange(len(expected))), expected)
    assert ranges.start[0] == 0 and (np.diff(ranges.start) > 0).all()
    assert (ranges.haploid[1:] != ranges.haploid[:-1]).any(axis=1).all()


@pytest.mark.parametrize(
    ("columns", "start", "haploid"),
    [
        # A male and a female over PAR1, X and PAR2.
        (["DDHHHDD", "DDDDDDD"], [0, 2, 5], [[False, False], [True, False], [False, False]]),
        # Missing calls of the male, of unknown ploidy or written as if diploid.
        (["D?HM?HD", "DDDDDDD"], [0, 2, 6], [[False, False], [True, False], [False, False]]),
        (["??H", "DDD"], [0], [[True, False]]),
        # Without any known ploidy, all samples are like the others.
        (["HHH", "???"], [0], [[True, True]]),
        (["HHD", "???"], [0, 2], [[True, False], [False, False]]),
    ],
)
def test_ranges(columns: list[str], start: list[int], haploid: list[list[bool]]) -> None:
    found = recorded(columns)
    assert found is not None
    assert (found.start.tolist(), found.haploid.tolist()) == (start, haploid)


@pytest.mark.parametrize("columns", [["DDD"], ["DMD", "?DD"], ["???"], ["MM", "??"]])
def test_nobody_is_haploid(columns: list[str]) -> None:
    assert recorded(columns) is None


@pytest.mark.parametrize("samples", [1, 7, 8, 9])
def test_saved_ranges_load_as_they_were(tmp_path: Path, samples: int) -> None:
    haploid = np.random.default_rng(1).random((3, samples)) < 0.5
    Ploidy(np.array([0, 4, 9]), haploid).save(tmp_path / "ploidy.npz")
    loaded = Ploidy.load(tmp_path / "ploidy.npz", samples)
    assert (loaded.start.tolist(), loaded.haploid.tolist()) == ([0, 4, 9], haploid.tolist())
