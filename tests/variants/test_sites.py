"""Site tables, and the matching of the sites of two files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants.sites import Harmonised, SiteTable, harmonise

Row = tuple[str, int, str, str]


def table(rows: list[Row], contigs: tuple[str, ...] = ("1", "2")) -> SiteTable:
    return SiteTable(
        contigs=contigs,
        contig_lengths=(0,) * len(contigs),
        contig=np.array([contigs.index(row[0]) for row in rows], dtype=np.int32),
        pos=np.array([row[1] for row in rows], dtype=np.int64),
        ref=[row[2] for row in rows],
        alt=[row[3] for row in rows],
        id=["."] * len(rows),
    )


def match(target: list[Row], panel: list[Row]) -> Harmonised:
    return harmonise(table(target), table(panel), "target.vcf", "panel.vcf")


def test_same_alleles_match_and_are_not_swapped() -> None:
    found = match([("1", 10, "A", "C"), ("1", 20, "G", "T")], [("1", 20, "G", "T")])
    assert (found.panel_index.tolist(), found.target_index.tolist(), found.swapped.tolist()) == ([0], [1], [False])
    assert found.dropped["not in the panel"] == 1


def test_exchanged_alleles_match_and_are_marked() -> None:
    found = match([("1", 20, "T", "G")], [("1", 20, "G", "T")])
    assert (found.panel_index.tolist(), found.swapped.tolist()) == ([0], [True])


def test_other_alleles_at_a_known_position_are_dropped_and_strands_are_not_guessed() -> None:
    # C/A is the complement of G/T: it must not be taken for the same site.
    found = match([("1", 10, "A", "C"), ("1", 20, "C", "A")], [("1", 10, "A", "C"), ("1", 20, "G", "T")])
    assert found.panel_index.tolist() == [0]
    assert found.dropped["other alleles in the panel"] == 1


def test_exchanged_twin_of_an_exact_match_is_dropped_whatever_its_order() -> None:
    for target in ([("1", 10, "A", "C"), ("1", 10, "C", "A")], [("1", 10, "C", "A"), ("1", 10, "A", "C")]):
        found = match(target, [("1", 10, "A", "C")])
        assert found.panel_index.tolist() == [0]
        assert found.swapped.tolist() == [False]
        assert target[found.target_index[0]] == ("1", 10, "A", "C")
        assert found.dropped["exchanged twin of a matched site"] == 1


def test_contigs_match_by_name_not_by_their_place_in_the_header() -> None:
    target = table([("1", 10, "A", "C"), ("2", 10, "A", "C")], contigs=("1", "2"))
    panel = table([("2", 10, "A", "C")], contigs=("2", "1"))
    assert harmonise(target, panel, "t", "p").target_index.tolist() == [1]


def test_the_report_counts_every_fate() -> None:
    target = [("1", 10, "A", "C"), ("1", 20, "C", "A"), ("1", 30, "A", "T"), ("1", 40, "A", "C")]
    report = match(target, [("1", 10, "A", "C"), ("1", 20, "A", "C"), ("1", 30, "A", "G")]).report()
    assert "2 sites matched" in report
    assert "1 of them with REF/ALT exchanged" in report
    assert "1 dropped (not in the panel)" in report
    assert "1 dropped (other alleles in the panel)" in report


@pytest.mark.parametrize(
    ("target", "remedy"),
    [([("1", 11, "A", "C")], "genome build"), ([("2", 10, "A", "C")], "rename"), ([("1", 10, "A", "T")], "build")],
)
def test_nothing_in_common_is_a_one_line_user_error(target: list[Row], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy) as fault:
        match(target, [("1", 10, "A", "C")])
    assert "\n" not in str(fault.value)
    assert "target.vcf" in str(fault.value) and "panel.vcf" in str(fault.value)


site = st.tuples(st.sampled_from("12"), st.integers(1, 4), st.sampled_from("ACG"), st.sampled_from("ACG")).filter(
    lambda row: row[2] != row[3]
)
sorted_sites = st.lists(site, unique=True, max_size=12).map(sorted)


@settings(deadline=None)
@given(target=sorted_sites, panel=sorted_sites)
def test_harmonise_equals_a_loop_over_all_pairs(target: list[Row], panel: list[Row]) -> None:
    expected = []
    dropped = {"not in the panel": 0, "other alleles in the panel": 0, "exchanged twin of a matched site": 0}
    for row, (contig, pos, ref, alt) in enumerate(target):
        exact = [p for p, other in enumerate(panel) if other == (contig, pos, ref, alt)]
        exchanged = [p for p, other in enumerate(panel) if other == (contig, pos, alt, ref)]
        if exact:
            expected.append((exact[0], row, False))
        elif exchanged and (contig, pos, alt, ref) in target:
            dropped["exchanged twin of a matched site"] += 1
        elif exchanged:
            expected.append((exchanged[0], row, True))
        elif any(other[:2] == (contig, pos) for other in panel):
            dropped["other alleles in the panel"] += 1
        else:
            dropped["not in the panel"] += 1
    if not expected:
        with pytest.raises(UserError):
            match(target, panel)
        return
    found = match(target, panel)
    triples = list(zip(found.panel_index.tolist(), found.target_index.tolist(), found.swapped.tolist(), strict=True))
    assert triples == sorted(expected)
    assert len(set(found.panel_index.tolist())) == len(found.panel_index)
    assert found.dropped == dropped


def test_a_saved_table_loads_as_it_was(small_sites: SiteTable, tmp_path: Path) -> None:
    small_sites.save(tmp_path / "sites.tsv")
    loaded = SiteTable.load(tmp_path / "sites.tsv")
    assert (loaded.contigs, loaded.contig_lengths) == (small_sites.contigs, small_sites.contig_lengths)
    assert list(loaded.identities()) == list(small_sites.identities())
    assert (loaded.id, loaded.contig.dtype, loaded.pos.dtype) == (small_sites.id, np.int32, np.int64)


def test_contig_runs_split_where_the_contig_changes(small_sites: SiteTable) -> None:
    assert small_sites.contig_runs() == [(0, 3), (3, 5)]
    assert table([]).contig_runs() == []
