"""Which sites are written, and what is said of contigs and windows without typed sites."""

from __future__ import annotations

import numpy as np
import pytest

from embrag_ds.data.windows import Window
from embrag_ds.errors import UserError
from embrag_ds.imputation.extent import FEW_TYPED, Extent, UntypedContigs, extent, warn_of_few_typed
from embrag_ds.variants.sites import SiteTable

CONTIGS = ("chr1", "unused", "HLA-A*01:01", "X")
POS = [[10, 20, 20, 30], [], [5, 6], [1_000, 2_000, 2_147_483_647]]
"""Positions on each contig: rows 0 to 3, 4 and 5, and 6 to 8."""


def sites() -> SiteTable:
    contig = [code for code, pos in enumerate(POS) for _ in pos]
    number = len(contig)
    return SiteTable(
        CONTIGS,
        (0,) * len(CONTIGS),
        np.array(contig, dtype=np.int32),
        np.array([pos for each in POS for pos in each], dtype=np.int64),
        ["A"] * number,
        ["C"] * number,
        ["."] * number,
    )


def typed(*rows: int) -> np.ndarray:
    return np.isin(np.arange(9), rows)


def spans(region: str | None, untyped: UntypedContigs = "drop", *rows: int) -> list[tuple[int, int]]:
    return extent(sites(), typed(*(rows or range(9))), region, untyped, "panel.bcf", "target.bcf").spans


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("chr1", (0, 4)),
        ("1", (0, 4)),
        ("CHR1", (0, 4)),
        ("1:10-20", (0, 3)),
        ("chr1:20", (1, 3)),
        ("chr1:11-", (1, 4)),
        ("chr1:20-20", (1, 3)),
        ("1:0-1,000,000", (0, 4)),
        ("X:1,000-2,000", (6, 8)),
        ("23:2000-", (7, 9)),
        ("chrX:2147483647", (8, 9)),
        (f"X:1-{'9' * 5000}", (6, 9)),
        ("HLA-A*01:01", (4, 6)),
        ("HLA-A*01:01:6", (5, 6)),
        ("HLA-A*01:01:1-5", (4, 5)),
    ],
)
def test_regions(region: str, expected: tuple[int, int]) -> None:
    assert spans(region) == [expected]


@pytest.mark.parametrize(
    ("region", "problem"),
    [
        ("2", "no such region of panel.bcf, whose contigs are chr1, HLA-A*01:01, X; give contig or contig:start-end"),
        ("unused", "no such region"),
        ("unused:1-5", "no such region"),
        ("", "no such region"),
        (":", "no such region"),
        ("1:", "no such region"),
        ("1:-5", "no such region"),
        ("1:,", "no such region"),
        ("1:,-,", "no such region"),
        ("1:a-b", "no such region"),
        ("1:5-6-7", "no such region"),
        ("1:1.5", "no such region"),
        ("1:\u0661-\u0662", "no such region"),
        ("1:20-10", "it ends before it starts; give contig:start-end"),
        ("1:11-19", "panel.bcf has no site there; its sites on chr1 lie between 10 and 30"),
        ("1:31-", "panel.bcf has no site there"),
        ("X:" + "9" * 5000, "panel.bcf has no site there; its sites on X lie between 1000 and 2147483647"),
    ],
)
def test_what_is_no_region(region: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        spans(region)
    text = str(caught.value)
    assert text.startswith(f"--region {region}: ") and problem in text and "\n" not in text


def test_contigs_without_typed_sites(caplog: pytest.LogCaptureFixture) -> None:
    assert spans(None, "drop", 0, 4, 6) == [(0, 4), (4, 6), (6, 9)] and caplog.messages == []
    assert spans(None, "drop", 0) == [(0, 4)]
    assert caplog.messages == [
        "target.bcf is not typed on HLA-A*01:01, X, which 5 sites of panel.bcf are on: left out (--untyped-contigs "
        "frequency writes them)"
    ]
    caplog.clear()
    assert spans(None, "frequency", 0) == [(0, 4), (4, 6), (6, 9)]
    assert caplog.messages == [
        "target.bcf is not typed on HLA-A*01:01, X: dosages there are the panel's allele frequencies"
    ]


@pytest.mark.parametrize("untyped", ["drop", "frequency"])
def test_a_region_without_typed_sites_is_written_from_frequencies(
    untyped: UntypedContigs, caplog: pytest.LogCaptureFixture
) -> None:
    assert spans("X:1-1000", untyped, 0) == [(6, 7)]
    assert caplog.messages == ["target.bcf is not typed on X: dosages there are the panel's allele frequencies"]
    caplog.clear()
    assert spans("1:10", untyped, 3) == [(0, 1)] and caplog.messages == []


WINDOWS = [
    Window(0, 0, 3, 0, 2),
    Window(1, 0, 4, 2, 4),
    Window(2, 4, 6, 4, 6),
    Window(3, 6, 9, 6, 8),
    Window(4, 6, 9, 7, 9),
]


def test_rows_and_windows_of_an_extent() -> None:
    assert Extent([(1, 3), (6, 7)]).rows().tolist() == [1, 2, 6]
    found = [[each.index for each in Extent(part).windows(WINDOWS)] for part in ([(0, 2)], [(2, 4)], [(1, 3), (7, 8)])]
    assert found == [[0], [1], [0, 1, 3, 4]]


def test_windows_with_few_typed_sites_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    many = SiteTable(("1",), (0,), np.zeros(40, np.int32), np.arange(40) * 10, ["A"] * 40, ["C"] * 40, ["."] * 40)
    windows = [Window(0, 0, 20, 0, 15), Window(1, 10, 40, 15, 40)]
    typed = np.zeros(40, dtype=bool)
    typed[:FEW_TYPED] = True
    typed[-FEW_TYPED:] = True
    warn_of_few_typed(windows, many, typed)
    assert caplog.messages == []
    typed[[3, 4, -1]] = False
    warn_of_few_typed(windows, many, typed)
    assert caplog.messages == ["2 of 2 windows have fewer than 10 typed sites; 1:0-190 has 8"]
