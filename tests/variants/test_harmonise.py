"""Matching of the sites of two files, compared with a loop over all pairs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants import harmonise as names
from embrag_ds.variants.harmonise import Harmonised, Strand, harmonise
from embrag_ds.variants.records import Excluded
from embrag_ds.variants.sites import SiteTable

Row = tuple[str, int, str, str] | tuple[str, int, str, str, str]
Counted = dict[int, tuple[float, float]]
STRANDS = get_args(Strand)


def table(rows: list[Row], contigs: tuple[str, ...] = ("1", "2")) -> SiteTable:
    """Table of (contig, pos, REF, ALT) or the same with an extent."""
    return SiteTable(
        contigs=contigs,
        contig_lengths=(0,) * len(contigs),
        contig=np.array([contigs.index(row[0]) for row in rows], dtype=np.int32),
        pos=np.array([row[1] for row in rows], dtype=np.int64),
        ref=[row[2] for row in rows],
        alt=[row[3] for row in rows],
        id=[f"r{number}" for number in range(len(rows))],
        extent={number: row[4] for number, row in enumerate(rows) if len(row) == 5 and row[4]},
    )


def counts(given: Counted) -> names.Counts:
    """Function of counts; rows that nobody may ask for are not there."""

    def found(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.array([given[row] for row in rows.tolist()], dtype=np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    return found


def match(
    target: list[Row],
    panel: list[Row],
    strand: Strand = "report",
    target_counts: Counted | None = None,
    panel_counts: Counted | None = None,
) -> Harmonised:
    return harmonise(
        table(target),
        table(panel),
        "target.vcf",
        "panel.vcf",
        strand,
        counts(target_counts or {}),
        counts(panel_counts or {}),
    )


def triples(found: Harmonised) -> list[tuple[int, int, bool]]:
    """(Panel row, target row, exchanged) of every matched site."""
    columns = (found.panel_index, found.target_index, found.swapped)
    return list(zip(*(column.tolist() for column in columns), strict=True))


# --- one site at a time -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "panel", "strand", "expected"),
    [
        # The same alleles, and the same exchanged.
        ("A C", "A C", "report", False),
        ("C A", "A C", "report", True),
        ("C A", "A C", "drop", True),
        ("AC GG", "GG AC", "report", True),
        # The other strand.
        ("A C", "T G", "report", names.OTHER_STRAND),
        ("A C", "T G", "drop", names.OTHER_STRAND),
        ("A C", "T G", "flip", False),
        ("C A", "T G", "report", names.OTHER_STRAND_EXCHANGED),
        ("C A", "T G", "drop", names.OTHER_STRAND_EXCHANGED),
        ("C A", "T G", "flip", True),
        ("AC GG", "GT CC", "flip", False),
        # Palindromic: the other strand looks like exchanged alleles.
        ("A T", "A T", "report", False),
        ("A T", "A T", "drop", names.PALINDROMIC),
        ("T A", "A T", "report", names.PALINDROMIC),
        ("T A", "A T", "drop", names.PALINDROMIC),
        ("C G", "G C", "report", names.PALINDROMIC),
        ("AC GT", "GT AC", "report", names.PALINDROMIC),
        ("AC GT", "AC GT", "report", False),
        # Indels have no other strand without the reference's next bases, and are never exchanged.
        ("A AC", "A AC", "report", False),
        ("AC A", "A AC", "report", names.OTHER_ALLELES),
        ("AC A", "A AC", "flip", names.OTHER_ALLELES),
        ("T TG", "A AC", "flip", names.OTHER_ALLELES),
        ("A AT", "A AT", "drop", False),
        # Symbolic alleles.
        ("A *", "A *", "report", False),
        ("A <DEL>", "A <DEL>", "report", False),
        ("A <DEL> END=5", "A <DEL> END=5", "report", False),
        ("A <DEL> END=5", "A <DEL> END=6", "report", names.OTHER_ALLELES),
        ("A <DEL> END=5", "A <DEL>", "report", False),
        ("A <DEL> END=5", "A <DEL> SVLEN=-4", "report", False),
        ("A <DEL> END=5;SVLEN=-4", "A <DEL> END=5", "report", False),
        ("A <DEL> END=5;SVLEN=-3", "A <DEL> END=5;SVLEN=-4", "report", names.OTHER_ALLELES),
        ("A <DEL>", "A <DUP>", "report", names.OTHER_ALLELES),
        ("A <DEL>", "T <DEL>", "flip", names.OTHER_ALLELES),
        # Without ALT, only REF is compared, and only with SNVs.
        ("A .", "A C", "report", False),
        ("C .", "A C", "report", True),
        ("G .", "A C", "report", names.OTHER_STRAND_EXCHANGED),
        ("T .", "A C", "report", names.OTHER_STRAND),
        ("T .", "A C", "flip", False),
        ("G .", "A C", "flip", True),
        ("A .", "A T", "report", False),
        ("A .", "A T", "drop", names.PALINDROMIC),
        ("T .", "A T", "report", names.PALINDROMIC),
        ("A .", "A AC", "report", names.OTHER_ALLELES),
        ("A .", "A *", "report", names.OTHER_ALLELES),
        ("A .", "A <DEL>", "report", names.OTHER_ALLELES),
        ("AC .", "AC GG", "report", names.OTHER_ALLELES),
        # Other alleles.
        ("A C", "A G", "flip", names.OTHER_ALLELES),
        ("A C", "C G", "flip", names.OTHER_ALLELES),
        ("A N", "A C", "flip", names.OTHER_ALLELES),
    ],
)  # fmt: skip
def test_one_site(target: str, panel: str, strand: Strand, expected: bool | str) -> None:
    rows: list[Row] = [("1", 10, *target.split()), ("1", 20, "A", "C")]  # type: ignore[list-item]
    found = match(rows, [("1", 10, *panel.split()), ("1", 20, "A", "C")], strand)  # type: ignore[list-item]
    if isinstance(expected, bool):
        assert triples(found) == [(0, 0, expected), (1, 1, False)]
        assert (found.reason, found.dropped) == ([None, None], {})
    else:
        assert triples(found) == [(1, 1, False)]
        assert (found.reason, found.dropped) == ([expected, None], {expected: 1})
    # A site that may be the panel's is related to it, whatever became of it.
    assert found.related.tolist() == ([1] if expected == names.OTHER_ALLELES else [0, 1])
    assert sum(found.matched.values()) + sum(found.dropped.values()) == 2
    palindromic = set(panel.split()[:2]) in ({"A", "T"}, {"C", "G"}, {"AC", "GT"})
    assert found.palindromic == int(palindromic and isinstance(expected, bool))


# --- frequencies --------------------------------------------------------------------------------------


def test_frequencies_decide_palindromic_sites_on_both_strands() -> None:
    panel: list[Row] = [("1", pos, "A", "T") for pos in (1, 2, 3, 4, 5, 6)] + [("1", 7, "A", "C")]
    target: list[Row] = [("1", pos, *alleles) for pos, alleles in enumerate(["AT", "TA"] * 3, start=1)]
    rare, common, middle = (10.0, 200.0), (190.0, 200.0), (90.0, 200.0)
    few, half = (0.0, 6.0), (50.0, 100.0)
    observed = {0: (5.0, 100.0), 1: (5.0, 100.0), 2: (95.0, 100.0), 3: half, 4: few, 5: (5.0, 100.0)}
    theirs = {0: rare, 1: rare, 2: rare, 3: rare, 4: common, 5: middle}
    found = match([*target, ("1", 7, "A", "C")], panel, "flip", observed, theirs)
    # The second has its alleles exchanged, but as rare an ALT as the panel's: it is on the other strand.
    assert triples(found) == [(0, 0, False), (1, 1, False), (2, 2, True), (4, 4, True), (6, 6, False)]
    assert found.matched == {names.SAME: 2, names.OTHER_STRAND: 1, names.OTHER_STRAND_EXCHANGED: 2}
    assert found.reason[3] == found.reason[5] == names.PALINDROMIC  # no likelihood ratio, and too common
    assert (found.palindromic, found.dropped) == (4, {names.PALINDROMIC: 2})


@pytest.mark.parametrize(("called", "decided"), [(2, False), (3, False), (4, True), (40, True)])
def test_few_targets_decide_nothing(called: int, decided: bool) -> None:
    panel: list[Row] = [("1", 1, "A", "T"), ("1", 2, "A", "C")]
    p = (10 + 0.5) / (100 + 1)
    odds = called * math.log((1 - p) / p)
    assert (odds >= math.log(names.LEAST_ODDS)) == decided
    found = match(panel, panel, "flip", {0: (0.0, called)}, {0: (10.0, 100.0)})
    assert found.reason == [None if decided else names.PALINDROMIC, None]


@pytest.mark.parametrize(("copies", "decided"), [(39, True), (40, True), (41, False), (59, False), (60, True)])
def test_too_common_alleles_decide_nothing(copies: int, decided: bool) -> None:
    panel: list[Row] = [("1", 1, "A", "T"), ("1", 2, "A", "C")]
    observed = (0.0, 1000.0) if copies < 50 else (1000.0, 1000.0)
    found = match(panel, panel, "flip", {0: observed}, {0: (copies * 10_000 - 0.5, 1_000_000 - 1)})
    assert found.reason == [None if decided else names.PALINDROMIC, None]


def test_a_panel_without_copies_does_not_decide_alone() -> None:
    panel: list[Row] = [("1", 1, "A", "T"), ("1", 2, "A", "C")]
    found = match(panel, panel, "flip", {0: (0.0, 2.0)}, {0: (0.0, 4.0)})
    assert found.reason == [names.PALINDROMIC, None]


# --- several sites at a position ------------------------------------------------------------------------


def test_exchanged_twin_of_an_exact_match_is_dropped_whatever_its_order() -> None:
    for target in ([("1", 10, "A", "C"), ("1", 10, "C", "A")], [("1", 10, "C", "A"), ("1", 10, "A", "C")]):
        found = match(target, [("1", 10, "A", "C")])
        assert target[found.target_index[0]] == ("1", 10, "A", "C")
        assert (found.swapped.tolist(), found.dropped) == ([False], {names.TWIN: 1})


def test_a_record_without_alt_is_matched_to_all_snvs_at_its_position() -> None:
    panel: list[Row] = [("1", 10, "A", "C"), ("1", 10, "A", "G"), ("1", 10, "A", "AT"), ("1", 10, "C", "A")]
    found = match([("1", 10, "A", ".")], panel)
    assert triples(found) == [(0, 0, False), (1, 0, False)]
    assert (found.matched, found.related.tolist()) == ({names.SAME: 1}, [0, 1, 3])
    assert found.report() == "1 sites, 1 matched"


@pytest.mark.parametrize("order", [1, -1])
def test_a_record_with_alt_goes_before_one_without(order: int) -> None:
    panel: list[Row] = [("1", 10, "A", "C"), ("1", 10, "A", "G")]
    target: list[Row] = [("1", 10, "A", "."), ("1", 10, "C", "A")][::order]  # type: ignore[assignment]
    found = match(target, panel)
    with_alt = target.index(("1", 10, "C", "A"))
    assert triples(found) == [(0, with_alt, True), (1, 1 - with_alt, False)]
    assert found.dropped == {}


def test_symbolic_alleles_without_extent_may_be_several() -> None:
    panel: list[Row] = [("1", 10, "A", "<DEL>", "END=20"), ("1", 10, "A", "<DEL>", "END=30"), ("1", 20, "A", "C")]
    found = match([("1", 10, "A", "<DEL>"), ("1", 20, "A", "C")], panel)
    assert (found.reason, found.related.tolist()) == ([names.SEVERAL, None], [0, 1, 2])
    found = match([("1", 10, "A", "<DEL>", "END=30"), ("1", 10, "A", "<DEL>", "END=20")], panel)
    assert triples(found) == [(0, 1, False), (1, 0, False)]
    panel[1] = ("1", 10, "A", "<DEL>")
    found = match([("1", 10, "A", "<DEL>", "END=20"), ("1", 10, "A", "<DEL>")], panel)
    assert triples(found) == [(0, 0, False), (1, 1, False)]


# --- contigs ------------------------------------------------------------------------------------------


def test_contigs_match_by_name_not_by_their_place_in_the_header() -> None:
    target = table([("1", 10, "A", "C"), ("2", 10, "A", "C")], contigs=("1", "2"))
    panel = table([("2", 10, "A", "C")], contigs=("2", "1"))
    found = harmonise(target, panel, "t", "p")
    assert (found.target_index.tolist(), found.contigs) == ([1], {})
    assert found.dropped == {names.NO_CONTIG: 1}


def test_contigs_are_reconciled() -> None:
    target = table([("chr1", 10, "A", "C"), ("23", 10, "A", "C")], contigs=("other", "chr1", "23"))
    panel = table([("X", 10, "A", "C"), ("1", 10, "A", "C")], contigs=("X", "1"))
    found = harmonise(target, panel, "t", "p")
    assert triples(found) == [(0, 1, False), (1, 0, False)]
    assert found.contigs == {"chr1": "1", "23": "X"}


def test_several_contigs_that_are_parts_of_one() -> None:
    """PLINK has the pseudoautosomal regions of X on a contig of their own."""
    rows: list[Row] = [("23", 10, "A", "C"), ("23", 12, "A", "C")]
    rows += [("25", 10, "A", "G"), ("25", 11, "A", "C"), ("25", 12, "A", "C")]
    target = table(rows, contigs=("23", "25"))
    panel = table([("X", 10, "A", "C"), ("X", 10, "A", "G"), ("X", 11, "A", "C"), ("X", 12, "A", "C")], contigs=("X",))
    found = harmonise(target, panel, "t", "p")
    assert triples(found) == [(0, 0, False), (1, 2, False), (2, 3, False), (3, 1, False)]
    assert found.reason == [None, None, None, None, names.TWIN]


# --- reports and errors -------------------------------------------------------------------------------


def test_the_report_counts_every_fate() -> None:
    target: list[Row] = [("1", 10, "A", "C"), ("1", 20, "C", "A"), ("1", 30, "A", "T"), ("1", 40, "A", "C")]
    target += [("1", 50, "G", "T"), ("2", 1, "A", "C")]
    panel: list[Row] = [("1", 10, "A", "C"), ("1", 20, "A", "C"), ("1", 30, "A", "G"), ("1", 50, "C", "A")]
    found = match(target, panel)
    assert found.report() == (
        "6 sites, 2 matched, 1 REF and ALT exchanged; dropped: 1 other alleles in the panel, 1 not in the panel, "
        "1 on the other strand, 1 contig not in the panel"
    )
    assert list(found.excluded(table(target))) == [
        Excluded("1", 30, "r2", "A", "T", names.OTHER_ALLELES),
        Excluded("1", 40, "r3", "A", "C", names.ABSENT),
        Excluded("1", 50, "r4", "G", "T", names.OTHER_STRAND),
        Excluded("2", 1, "r5", "A", "C", names.NO_CONTIG),
    ]


@pytest.mark.parametrize(
    ("target", "strand", "remedy"),
    [
        ([("1", 11, "A", "C")], "report", "1 not in the panel; check that both use the same genome build and"),
        ([("2", 10, "A", "C")], "report", "its contigs are 2 and the panel's 1; rename them"),
        ([("1", 10, "A", "T")], "report", "1 other alleles in the panel; check that both use the same genome build"),
        ([("1", 10, "T", "G")], "report", "1 on the other strand; check .* or try --strand flip"),
        ([("1", 11, "T", "A")], "drop", "1 palindromic, strand unclear; check .* or try --strand flip"),
        ([("1", 11, "T", "A")], "flip", "palindromic, strand unclear; check that both .* the same region$"),
    ],
)  # fmt: skip
def test_nothing_in_common_is_a_one_line_user_error(target: list[Row], strand: Strand, remedy: str) -> None:
    panel: list[Row] = [("1", 10, "A", "C")] + [("1", 11, "A", "T")] * (target[0][3] == "A")
    with pytest.raises(UserError, match=remedy) as fault:
        match(target, panel, strand, {0: (1.0, 2.0)}, {1: (1.0, 2.0)})
    assert str(fault.value).startswith("target.vcf: no site in common with panel.vcf: ")
    assert "\n" not in str(fault.value)


# --- a loop over all pairs as the oracle ----------------------------------------------------------------


def other_strand(bases: str) -> str:
    return "".join({"A": "T", "C": "G", "G": "C", "T": "A"}[base] for base in reversed(bases))


def agree(one: str, other: str) -> bool:
    """Whether no key has two values in extents."""
    pairs = {tuple(part.split("=")) for each in (one, other) for part in each.split(";") if part}
    return len(pairs) == len({pair[0] for pair in pairs})


def slow_relations(target: Row, panel: Row) -> list[str]:
    """How a target's row may be a panel's row."""
    (_, _, ref, alt, extent), (_, _, panel_ref, panel_alt, panel_extent) = target, panel  # type: ignore[misc]
    if target[:2] != panel[:2]:
        return []
    snv = len(panel_ref) == len(panel_alt) == 1 and panel_alt in "ACGT"
    if alt == ".":
        ways = ((panel_ref, ref), (panel_alt, ref), (panel_ref, other_strand(ref)), (panel_alt, other_strand(ref)))
        return [relation for relation, (one, two) in zip(names.RELATIONS, ways, strict=True) if snv and one == two]
    found = []
    if (ref, alt) == (panel_ref, panel_alt) and agree(extent, panel_extent):
        found.append(names.SAME)
    if snv and len(ref) == len(alt) == 1 and alt in "ACGT":
        if (alt, ref) == (panel_ref, panel_alt):
            found.append(names.EXCHANGED)
        if (other_strand(ref), other_strand(alt)) == (panel_ref, panel_alt):
            found.append(names.OTHER_STRAND)
        if (other_strand(alt), other_strand(ref)) == (panel_ref, panel_alt):
            found.append(names.OTHER_STRAND_EXCHANGED)
    return found


def slow_decision(target: tuple[float, float], panel: tuple[float, float]) -> int:
    """1 if frequencies say that ALT is the panel's, -1 if it is REF, 0 if they do not say."""
    p = (panel[0] + 0.5) / (panel[1] + 1)
    if min(p, 1 - p) > names.MOST_MINOR:
        return 0
    alt, ref = target[0], target[1] - target[0]
    log_ratio = alt * math.log(p) + ref * math.log(1 - p) - alt * math.log(1 - p) - ref * math.log(p)
    return 0 if abs(log_ratio) < math.log(names.LEAST_ODDS) else 1 if log_ratio > 0 else -1


def slow_harmonise(
    target: list[Row], panel: list[Row], strand: Strand, observed: Counted, theirs: Counted
) -> tuple[dict[int, tuple[int, str]], list[str | None], set[int]]:
    """The (target row, relation) of every matched panel row, the reason of every target row, and related rows."""
    proposals: dict[int, list[tuple[int, str]]] = {}
    reasons: list[str | None] = []
    related = set()
    for t, row in enumerate(target):
        ways = {p: found for p, other in enumerate(panel) if (found := slow_relations(row, other))}
        related |= ways.keys()
        if not ways:
            here = any(row[:2] == other[:2] for other in panel)
            known = any(row[0] == other[0] for other in panel)
            reasons.append(names.OTHER_ALLELES if here else names.ABSENT if known else names.NO_CONTIG)
            continue
        best = min((found[0] for found in ways.values()), key=names.RELATIONS.index)
        chosen = [p for p, found in ways.items() if found[0] == best]
        if len(chosen) > 1 and row[3] != ".":
            chosen = [p for p in chosen if panel[p][4] == row[4]]  # type: ignore[misc]
        reason = names.SEVERAL
        for p in chosen:
            relation: str | None = best
            if len(ways[p]) == 2:
                decision = int(strand == "report" and best == names.SAME)
                if strand == "flip":
                    decision = slow_decision(observed[t], theirs[p])
                kinds: tuple[str, ...] = ()
                if decision:
                    kinds = names.RELATIONS[0::2] if decision == 1 else names.RELATIONS[1::2]
                relation = next((each for each in ways[p] if each in kinds), None)
                reason = names.PALINDROMIC
            elif strand != "flip" and best in (names.OTHER_STRAND, names.OTHER_STRAND_EXCHANGED):
                relation, reason = None, best
            if relation is not None:
                proposals.setdefault(p, []).append((t, relation))
        reasons.append(reason)
    kept = {}
    for p, found in proposals.items():
        found.sort(key=lambda each: (target[each[0]][3] == ".", names.RELATIONS.index(each[1]), each[0]))
        kept[p] = found[0]
        for t, _ in found[1:]:
            reasons[t] = names.TWIN
    for t, _ in kept.values():
        reasons[t] = None
    return kept, reasons, related


bases = st.tuples(st.sampled_from("ACGT"), st.sampled_from("ACGT"), st.just("")).filter(lambda row: row[0] != row[1])
others = st.sampled_from(
    [
        ("A", "AC", ""),
        ("AC", "A", ""),
        ("A", "*", ""),
        ("A", "<DEL>", ""),
        ("A", "<DEL>", "END=5"),
        ("A", "<DEL>", "END=6"),
        ("A", "<DEL>", "END=5;SVLEN=-4"),
    ]
)


def sites(alleles: st.SearchStrategy[tuple[str, str, str]]) -> st.SearchStrategy[list[Row]]:
    row = st.tuples(st.sampled_from("12"), st.integers(1, 2), alleles).map(lambda each: (*each[:2], *each[2]))
    return st.lists(row, unique=True, max_size=12).map(lambda rows: sorted(rows, key=lambda each: each[:2]))


count = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: (float(pair[0]), float(sum(pair))))
without_alt = st.sampled_from("ACGT").map(lambda ref: (ref, ".", ""))


@settings(max_examples=200)
@given(sites(bases | bases | others | without_alt), sites(bases | others), st.sampled_from(STRANDS), st.data())
def test_harmonise_equals_a_loop_over_all_pairs(
    target: list[Row], panel: list[Row], strand: Strand, data: st.DataObject
) -> None:
    observed = dict(enumerate(data.draw(st.lists(count, min_size=len(target), max_size=len(target)))))
    theirs = dict(enumerate(data.draw(st.lists(count, min_size=len(panel), max_size=len(panel)))))
    kept, reasons, related = slow_harmonise(target, panel, strand, observed, theirs)
    if not kept:
        with pytest.raises(UserError, match="no site in common"):
            match(target, panel, strand, observed, theirs)
        return
    found = match(target, panel, strand, observed, theirs)
    exchanged = (names.EXCHANGED, names.OTHER_STRAND_EXCHANGED)
    assert triples(found) == [(p, t, relation in exchanged) for p, (t, relation) in sorted(kept.items())]
    assert found.reason == reasons
    assert found.related.tolist() == sorted(related)
    assert found.dropped == Counter(reason for reason in reasons if reason is not None)
    # Every row of the target has one fate.
    assert sum(found.matched.values()) + sum(found.dropped.values()) == len(target)
    assert found.matched == Counter({t: relation for _, (t, relation) in sorted(kept.items())}.values())


def test_a_site_of_several_alts_is_never_exchanged() -> None:
    """What is 0 at one of them may be the other ALT: it is not known to be REF, which would be the panel's ALT."""
    split = replace(table([("1", 10, "A", "G"), ("1", 10, "A", "T"), ("1", 20, "A", "G")]), record=np.array([0, 0, 1]))
    panel = table([("1", 10, "G", "A"), ("1", 20, "G", "A")])
    found = harmonise(split, panel, "target.vcf", "panel.vcf")
    assert found.reason == [names.SEVERAL_ALTS, names.OTHER_ALLELES, None]
    assert found.target_index.tolist() == [2] and found.swapped.tolist() == [True]
    same = harmonise(split, table([("1", 10, "A", "G"), ("1", 20, "G", "A")]), "target.vcf", "panel.vcf")
    assert same.target_index.tolist() == [0, 2] and same.swapped.tolist() == [False, True]
