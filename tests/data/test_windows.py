"""Windows: they cover every contig, overlap at most in pairs, and blend to one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.windows import Window, blend_weights, make_windows, read_windows, uncovered
from embrag_ds.errors import UserError
from embrag_ds.variants.sites import SiteTable


def sites_of(lengths: list[int], spacing: int = 10) -> SiteTable:
    """``lengths[i]`` sites on contig ``c<i>``, at ``spacing``, 2 ``spacing``, ... base pairs."""
    size = sum(lengths)
    return SiteTable(
        contigs=tuple(f"c{i}" for i in range(len(lengths))),
        contig_lengths=(0,) * len(lengths),
        contig=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        pos=np.concatenate([np.arange(1, n + 1) * spacing for n in lengths] or [np.empty(0)]).astype(np.int64),
        ref=["A"] * size,
        alt=["C"] * size,
        id=["."] * size,
    )


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    window = draw(st.integers(2, 40))
    overlap = draw(st.integers(0, window // 3))
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    return lengths, window, overlap, draw(st.integers(0, 60))


@settings(deadline=None)
@given(layouts())
def test_every_site_lies_in_one_or_two_cores(layout: tuple[list[int], int, int, int]) -> None:
    lengths, *shape = layout
    count = [0] * sum(lengths)
    windows = make_windows(sites_of(lengths), *shape)
    for window in windows:
        for site in range(window.core_start, window.core_stop):
            count[site] += 1
    assert set(count) <= {1, 2}
    assert uncovered(windows, len(count)) == 0


@settings(deadline=None)
@given(layouts())
def test_cores_keep_the_greatest_length_and_are_equally_long_on_a_contig(
    layout: tuple[list[int], int, int, int],
) -> None:
    lengths, window_sites, overlap, flank = layout
    sites = sites_of(lengths)
    sizes: dict[int, list[int]] = {}
    for window in make_windows(sites, window_sites, overlap, flank):
        sizes.setdefault(int(sites.contig[window.core_start]), []).append(window.core_stop - window.core_start)
    for contig, found in sizes.items():
        assert max(found) <= window_sites
        assert max(found) - min(found) <= 1
        assert len(found) == 1 or lengths[contig] > window_sites


@settings(deadline=None)
@given(layouts())
def test_windows_stay_on_their_contig_and_flanks_are_clipped_only_at_its_ends(
    layout: tuple[list[int], int, int, int],
) -> None:
    lengths, window_sites, overlap, flank = layout
    sites = sites_of(lengths)
    edges = np.cumsum([0, *lengths]).tolist()
    for place, window in enumerate(make_windows(sites, window_sites, overlap, flank)):
        contig = int(sites.contig[window.core_start])
        assert window.index == place
        assert set(sites.contig[window.start : window.stop].tolist()) == {contig}
        assert window.start == max(edges[contig], window.core_start - flank)
        assert window.stop == min(edges[contig + 1], window.core_stop + flank)
        everything = np.arange(len(sites))
        core = everything[window.start : window.stop][window.core]
        assert np.array_equal(core, everything[window.core_sites]) and len(core) > 0


@settings(deadline=None)
@given(layouts())
def test_consecutive_cores_share_the_overlap(layout: tuple[list[int], int, int, int]) -> None:
    lengths, window_sites, overlap, flank = layout
    sites = sites_of(lengths)
    windows = make_windows(sites, window_sites, overlap, flank)
    for left, right in pairwise(windows):
        if sites.contig[left.core_start] == sites.contig[right.core_start]:
            assert left.core_stop - right.core_start == overlap


def check_blend(windows: list[Window], size: int) -> None:
    total = np.zeros(size)
    covered = np.zeros(size, dtype=bool)
    for window, weight in zip(windows, blend_weights(windows), strict=True):
        assert len(weight) == window.core_stop - window.core_start
        assert (weight > 0).all() and (weight <= 1).all()
        total[window.core_sites] += weight
        covered[window.core_sites] = True
    assert np.allclose(total, covered, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(layouts())
def test_blend_weights_sum_to_one_at_every_site(layout: tuple[list[int], int, int, int]) -> None:
    lengths, *shape = layout
    check_blend(make_windows(sites_of(lengths), *shape), sum(lengths))


def test_blend_weights_ramp_from_the_left_window_to_the_right() -> None:
    left, right = blend_weights([Window(0, 0, 6, 0, 6), Window(1, 3, 9, 3, 9)])
    assert left == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])
    assert right == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def windows_file(folder: Path, text: str) -> Path:
    path = folder / "windows.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_windows_file_is_one_based_and_inclusive(tmp_path: Path) -> None:
    path = windows_file(tmp_path, "# cores\nc0 20 40\n\nc0\t31 100\nc1 10 10\n")
    windows = read_windows(path, sites_of([10, 5]), 2)
    cores = [(window.core_start, window.core_stop) for window in windows]
    assert cores == [(1, 4), (3, 10), (10, 11)]
    assert [(window.start, window.stop) for window in windows] == [(0, 6), (1, 10), (10, 13)]
    assert [window.index for window in windows] == [0, 1, 2]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
def test_a_windows_file_may_come_from_another_system(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "windows.txt"
    for content in (
        mark + b"c0 20 40 \r\n\r\n  # \xe9\r\nc0\t31\t100\t\r\n",
        mark + b"c0 20 40\rc0 31 99999999999999999999 \xe9\r",
    ):
        path.write_bytes(content)
        cores = [(window.core_start, window.core_stop) for window in read_windows(path, sites_of([10, 5]), 2)]
        assert cores == [(1, 4), (3, 10)]


def test_windows_without_a_site_are_left_out_and_numbers_stay_dense(tmp_path: Path) -> None:
    windows = read_windows(windows_file(tmp_path, "c0 1 9\nc0 11 19\nc0 20 30\nc0 31 39\nc0 50 60\n"), sites_of([9]), 0)
    assert [(window.index, window.core_start, window.core_stop) for window in windows] == [(0, 1, 3), (1, 4, 6)]


def test_sites_outside_every_core_are_counted(tmp_path: Path) -> None:
    windows = read_windows(windows_file(tmp_path, "c0 20 40\nc0 60 70\n"), sites_of([10]), 5)
    assert uncovered(windows, 10) == 5


@settings(deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=6))
def test_a_windows_file_that_is_accepted_blends_to_one(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int]]
) -> None:
    text = "".join(f"c0 {begin * 10} {(begin + extent) * 10}\n" for begin, extent in sorted(cuts))
    path = windows_file(tmp_path_factory.mktemp("windows"), text)
    try:
        windows = read_windows(path, sites_of([60]), 3)
    except UserError:
        return
    check_blend(windows, 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c0 10 20\nc0 x 30\n", "line 2: expected contig, start and end"),
        ("c0 10\n", "line 1: expected contig, start and end"),
        ("chr9 10 20\n", "line 1: contig chr9 is not in the panel"),
        ("c0 30 20\n", "line 1: end 20 lies before start 30"),
        ("c0 50 80\nc0 10 60\n", "line 2: windows must be sorted"),
        ("c1 10 20\nc0 10 20\n", "line 2: windows must be sorted"),
        ("c0 10 80\nc0 30 60\n", "line 2: windows must be sorted, and none inside another"),
        ("c0 10 50\nc0 10 50\n", "line 2: windows must be sorted, and none inside another"),
        ("c0 10 50\nc0 30 70\nc0 40 90\n", "line 3: at most two windows"),
        ("c0 1 9\n", "no window holds a site"),
        ("", "no window holds a site"),
        ("c0 1_0 20\n", "line 1: expected contig, start and end"),
        ("c0 \u0661 20\n", "line 1: expected contig, start and end"),
        ("c0 -5 20\n", "line 1: expected contig, start and end"),
        ("c0 1e3 2e3\n", "line 1: expected contig, start and end"),
    ],
)
def test_errors_of_a_windows_file_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = windows_file(tmp_path, text)
    with pytest.raises(UserError, match=message) as fault:
        read_windows(path, sites_of([10, 5]), 0)
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00c0"])
def test_a_windows_file_that_cannot_be_read_as_text_is_a_user_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "windows.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read"):
        read_windows(path, sites_of([10]), 0)
