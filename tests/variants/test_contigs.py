"""Contig names of two files: reconciled, and left alone where they are ambiguous."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.variants.contigs import reconcile


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("20", "20"),
        ("20", "chr20"),
        ("chr20", "20"),
        ("CHR20", "chr20"),
        ("Chr20", "20"),
        ("01", "1"),
        ("chr01", "1"),
        ("23", "X"),
        ("23", "chrX"),
        ("chrX", "23"),
        ("chr23", "x"),
        ("24", "Y"),
        ("26", "MT"),
        ("26", "chrM"),
        ("M", "MT"),
        ("chrM", "MT"),
        ("MT", "chrM"),
        ("chrMT", "26"),
        ("25", "X"),
        ("25", "XY"),
        ("XY", "25"),
        ("XY", "chrX"),
        ("PAR1", "X"),
        ("par2", "chr23"),
        ("chrUn_KI270302v1", "Un_KI270302v1"),
    ],
)
def test_the_same_contig(name: str, to: str) -> None:
    assert reconcile([name], [to]) == {name: to}
    assert reconcile([name, "7"], ["1_random", to, "chr7"]) == {name: to, "7": "chr7"}


@pytest.mark.parametrize(
    ("name", "to"),
    [("20", "21"), ("2", "20"), ("X", "Y"), ("X", "25"), ("X", "PAR1"), ("23", "Y"), ("chr", ""), ("0", "00_x")],
)
def test_another_contig(name: str, to: str) -> None:
    assert reconcile([name], [to]) == {}


@pytest.mark.parametrize(
    ("names", "to", "expected"),
    [
        (["20", "chr20"], ["20"], {"20": "20"}),
        (["20"], ["chr20", "CHR20"], {}),
        (["20", "CHR20"], ["chr20"], {}),
        (["20", "chr20"], ["20", "chr20"], {"20": "20", "chr20": "chr20"}),
        (["23", "X"], ["chrX"], {"X": "chrX"}),
        (["23"], ["X", "chrX"], {}),
        (["M", "MT"], ["chrM"], {"M": "chrM"}),
        # Other species: an X beside a chromosome 23, and chromosomes beyond 26.
        (["chr23", "X"], ["23", "chrX"], {"chr23": "23", "X": "chrX"}),
        (["chr23", "chr29"], ["X", "29"], {"chr29": "29"}),
        (["23"], ["X", "38"], {}),
        (["M", "29"], ["MT", "29"], {"M": "MT", "29": "29"}),
        # PLINK keeps the pseudoautosomal regions apart: they are the only names that may share a contig.
        (["23", "25"], ["X"], {"23": "X", "25": "X"}),
        (["X", "PAR1", "PAR2"], ["chrX"], {"X": "chrX", "PAR1": "chrX", "PAR2": "chrX"}),
        (["X"], ["23", "25"], {"X": "23"}),
        (["XY"], ["23", "25"], {"XY": "25"}),
        ([], ["1"], {}),
        (["1", "1"], ["chr1", "chr1"], {"1": "chr1"}),
    ],
)
def test_several_contigs(names: list[str], to: list[str], expected: dict[str, str]) -> None:
    assert reconcile(names, to) == expected


NAMES = st.lists(
    st.builds("{}{}".format, st.sampled_from(["", "chr", "CHR"]), st.sampled_from(["1", "20", "23", "X", "M", "MT"]))
)


@given(NAMES, NAMES)
def test_no_two_names_share_a_contig_and_both_ways_agree(names: list[str], to: list[str]) -> None:
    found = reconcile(names, to)
    assert set(found) <= set(names) and set(found.values()) <= set(to)
    assert all(found[name] == name for name in set(names) & set(to))
    back = reconcile(to, names)
    inexact = {name: other for name, other in found.items() if name != other}
    assert len(set(inexact.values())) == len(inexact)
    assert {other: name for name, other in inexact.items()}.items() <= back.items() | {(n, n) for n in names}
