"""Targets at the panel's sites, compared with their alleles in memory."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.data.packing.reading import TARGET
from embrag_ds.data.panel import Panel, open_panel
from embrag_ds.data.ploidy import Ploidy, PloidyRecorder
from embrag_ds.data.targets import Targets, allele_counts, match_targets, open_targets
from embrag_ds.errors import UserError
from embrag_ds.ops.bits import pack_host
from embrag_ds.variants.genotypes import DIPLOID, HAPLOID
from embrag_ds.variants.sites import SiteTable
from tests.containers import bgzipped, vcf_text


def packed(
    name: str,
    pos: np.ndarray,
    alleles: np.ndarray,
    swapped: np.ndarray,
    prefix: str,
    missing: np.ndarray | None = None,
    unphased: np.ndarray | None = None,
    ploidy: Ploidy | None = None,
    contig: np.ndarray | None = None,
) -> Panel:
    """Panel in memory with sites A>C, or C>A where ``swapped``, and alleles [S, 2N]."""
    ref, alt = (["CA"[::step][int(each)] for each in ~swapped] for step in (1, -1))
    contig = np.zeros(len(pos), dtype=np.int32) if contig is None else contig
    sites = SiteTable(("1", "2"), (0, 0), contig, pos, ref, alt, ["."] * len(pos))
    return Panel(
        Path(name),
        sites,
        tuple(f"{prefix}{number}" for number in range(alleles.shape[1] // 2)),
        pack_host(alleles),
        {"no ALT": 2},
        missing=None if missing is None else pack_host(missing),
        unphased=None if unphased is None else pack_host(unphased),
        ploidy=ploidy,
    )


def opened(target: Panel, panel: Panel, allow_overlap: bool = False) -> Targets:
    return open_targets(target, match_targets(target, panel, "report", allow_overlap), panel)


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """What is logged meanwhile; pytest's own way serves one example of a test only."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("embrag_ds.data.targets")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def blank_panel(sites: int) -> Panel:
    return packed("panel.bcf", np.arange(sites), np.zeros((sites, 4), dtype=np.uint8), np.zeros(sites, dtype=bool), "P")


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_alleles_of_any_samples_at_any_sites(seed: int, samples: int) -> None:
    rng = np.random.default_rng(seed)
    typed = np.sort(rng.choice(30, size=rng.integers(1, 20), replace=False))
    alleles = rng.integers(0, 2, (len(typed), 2 * samples), dtype=np.uint8)
    swapped = rng.random(len(typed)) < 0.3
    target = packed("target.bcf", typed, alleles ^ swapped[:, None], swapped, "T")
    with captured_log() as messages:
        targets = opened(target, blank_panel(30))
    assert len(messages) == 1
    assert messages[0].startswith(f"target target.bcf: {samples} samples; {len(typed)} sites, {len(typed)} matched")
    expected = np.zeros((30, 2 * samples), dtype=np.uint8)
    expected[typed] = alleles
    np.testing.assert_array_equal(np.flatnonzero(targets.typed), typed)
    start, stop = np.sort(rng.integers(31, size=2)).tolist()
    first, last = np.sort(rng.integers(samples + 1, size=2)).tolist()
    some = expected[start:stop, 2 * first : 2 * last].T
    np.testing.assert_array_equal(targets.alleles(slice(start, stop), slice(first, last)), some)
    begin, end = np.sort(rng.integers(len(typed) + 1, size=2)).tolist()
    np.testing.assert_array_equal(
        targets.typed_alleles(slice(begin, end), slice(first, last)), alleles[begin:end, 2 * first : 2 * last]
    )
    assert targets.missing_alleles(slice(start, stop), slice(first, last)) is None
    assert targets.haploid(slice(start, stop)) is None


@given(st.integers(0, 2**32), st.integers(1, 9), st.booleans())
def test_missing_alleles_of_any_samples_at_any_sites(seed: int, samples: int, with_half_calls: bool) -> None:
    rng = np.random.default_rng(seed)
    typed = np.sort(rng.choice(30, size=rng.integers(1, 20), replace=False))
    alleles = rng.integers(0, 2, (len(typed), 2 * samples), dtype=np.uint8)
    missing = rng.random(alleles.shape) < rng.choice([0.2, 0.8])
    missing[0, 0] = False
    half = missing[:, 0::2] != missing[:, 1::2]
    unphased = half & (rng.random(half.shape) < 0.5)
    if not with_half_calls:
        unphased[:] = False
    swapped = rng.random(len(typed)) < 0.3
    target = packed("t", typed, alleles ^ swapped[:, None], swapped, "T", missing, unphased if unphased.any() else None)
    # A call of one allele and none, without phase, lacks both.
    lacking = missing | np.repeat(unphased, 2, axis=1)
    some = ~lacking.all(axis=1)
    if not some.any():
        with pytest.raises(UserError, match=r"t: every call at the sites of panel\.bcf is missing; check the file"):
            opened(target, blank_panel(30))
        return
    targets = opened(target, blank_panel(30))
    np.testing.assert_array_equal(targets.sites, typed[some])
    np.testing.assert_array_equal(np.flatnonzero(targets.typed), typed[some])
    expected = np.zeros((30, 2 * samples), dtype=bool)
    expected[typed[some]] = lacking[some]
    values = np.zeros((30, 2 * samples), dtype=np.uint8)
    values[typed[some]] = alleles[some]
    start, stop = np.sort(rng.integers(31, size=2)).tolist()
    first, last = np.sort(rng.integers(samples + 1, size=2)).tolist()
    span, group, columns = slice(start, stop), slice(first, last), slice(2 * first, 2 * last)
    wanted = expected[span, columns].T
    found = targets.missing_alleles(span, group)
    if found is None:
        assert not wanted.any()
    else:
        assert found.dtype == bool
        np.testing.assert_array_equal(found, wanted)
    known = ~wanted
    np.testing.assert_array_equal(targets.alleles(span, group)[known], values[span, columns].T[known])
    # The target's own bits stay as they were.
    assert target.missing is not None
    np.testing.assert_array_equal(target.missing, pack_host(missing))


def test_unphased_calls_are_refused_with_site_sample_and_command() -> None:
    alleles = np.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=np.uint8)
    missing = np.zeros((4, 4), dtype=bool)
    missing[0, 0] = True
    unphased = np.array([[True, False], [False, False], [False, True], [True, True]])
    target = packed("t.vcf.gz", np.arange(4) * 10 + 7, alleles, np.zeros(4, dtype=bool), "T", missing, unphased)
    panel = packed("p.vcf", np.arange(40), np.zeros((40, 4), dtype=np.uint8), np.zeros(40, dtype=bool), "P")
    with pytest.raises(UserError) as caught:
        opened(target, panel)
    assert str(caught.value) == (
        "t.vcf.gz: 1:27: the genotype of sample T1 is not phased, nor are 2 others; add --phase beagle, or phase the "
        "file first (`beagle gt=t.vcf.gz ref=p.vcf out=phased impute=false`, which leaves out sites with "
        "exchanged alleles)"
    )
    unphased[:, :] = False
    unphased[0, 0] = True  # of one allele only, so that it is missing
    target = packed("t", np.arange(4) * 10 + 7, alleles, np.zeros(4, dtype=bool), "T", missing, unphased)
    assert opened(target, panel).missing_alleles(slice(7, 8), slice(0, 2)).tolist() == [
        [True],
        [True],
        [False],
        [False],
    ]  # type: ignore[union-attr]


def test_unphased_calls_at_sites_that_are_not_used_do_not_matter() -> None:
    alleles = np.array([[0, 1], [0, 1]], dtype=np.uint8)
    unphased = np.array([[True], [False]])
    target = packed("t", np.array([50, 1]), alleles, np.zeros(2, dtype=bool), "T", unphased=unphased)
    assert opened(target, blank_panel(3)).sites.tolist() == [1]


@pytest.mark.skipif(
    shutil.which("beagle") is None or shutil.which("bcftools") is None, reason="Beagle or bcftools is not installed"
)
@pytest.mark.parametrize(("name", "kind"), [("t.vcf.gz", "vcf"), ("with blanks.vcf.gz", "vcf"), ("t.bcf", "bcf")])
def test_the_command_that_phases_a_file_works(tmp_path: Path, name: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    lines = [(1 + 100 * place, [f"{a}|{b}" for a, b in rng.integers(0, 2, (4, 2)).tolist()]) for place in range(20)]
    panel = vcf_text(*(f"1 {pos} . A C . . . GT {' '.join(calls)}" for pos, calls in lines), samples=list("PQRS"))
    (tmp_path / "p.vcf").write_bytes(panel)
    text = vcf_text(*(f"1 {pos} . A C . . . GT 0/1 {calls[0]}" for pos, calls in lines), samples=("T", "U"))
    (tmp_path / name).write_bytes(bgzipped(text))
    if kind == "bcf":
        subprocess.run(["bcftools", "view", "-Ob", "-o", "x", name], cwd=tmp_path, check=True)
        (tmp_path / "x").rename(tmp_path / name)
    reference = open_panel(tmp_path / "p.vcf", tmp_path / "cache", progress=False)
    target = open_panel(tmp_path / name, tmp_path / "cache", progress=False, reading=TARGET)
    with pytest.raises(UserError) as caught:
        opened(target, reference)
    command = str(caught.value).split("`")[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    target = open_panel(tmp_path / "phased.vcf.gz", tmp_path / "cache", progress=False, reading=TARGET)
    targets = opened(target, reference)
    assert targets.alleles(slice(0, 20), slice(0, 1)).sum(0).tolist() == [1] * 20


def test_samples_that_are_in_the_panel() -> None:
    alleles = np.array([[0, 1]], dtype=np.uint8)
    panel, target = (packed(name, np.arange(1), alleles, np.zeros(1, dtype=bool), "P") for name in ("p", "t"))
    with pytest.raises(UserError, match="t: 1 samples are also in the panel p, the first is P0"):
        opened(target, panel)
    assert opened(target, panel, allow_overlap=True).samples == ("P0",)


def test_exchanged_panel_and_target() -> None:
    few, many = np.arange(4), np.arange(9)
    target = packed("target", few, np.zeros((4, 4), dtype=np.uint8), np.zeros(4, dtype=bool), "T")
    panel = packed("panel", many, np.zeros((9, 6), dtype=np.uint8), np.zeros(9, dtype=bool), "P")
    assert len(match_targets(target, panel, "report", False).panel_index) == 4
    with pytest.raises(UserError) as caught:
        match_targets(panel, target, "report", False)
    assert str(caught.value) == (
        "panel: it has all 4 sites of the panel target among its 9, so that none is left to impute; "
        "exchange --panel and --target"
    )
    other = packed("other", np.arange(1, 10), np.zeros((9, 6), dtype=np.uint8), np.zeros(9, dtype=bool), "P")
    assert len(match_targets(other, target, "report", False).panel_index) == 3


def test_few_matched_sites_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for number, matched in ((32, 2), (4, 2), (5, 2)):
        caplog.clear()
        pos = np.array([*range(matched), *range(100, 100 + number - matched)])
        target = packed("t", pos, np.ones((number, 2), dtype=np.uint8), np.zeros(number, dtype=bool), "T")
        opened(target, blank_panel(9))
        warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
        told = f"target t: only {matched} of its {number} sites are used; check that it has the panel's genome build"
        assert len(warnings) == (number != 4) and all(each.startswith(told) for each in warnings)


def test_counts_of_alleles() -> None:
    alleles = np.array([[0, 1, 1, 1], [0, 0, 0, 1]], dtype=np.uint8)
    missing = np.array([[True, False, False, False], [True, True, True, False]])
    target = packed("t", np.arange(2), alleles, np.zeros(2, dtype=bool), "T", missing)
    assert [each.tolist() for each in allele_counts(target, np.array([1, 0]))] == [[1, 3], [1, 3]]
    assert [each.tolist() for each in allele_counts(blank_panel(3), np.array([2]))] == [[0], [4]]


# --- ploidy -----------------------------------------------------------------------------------------------


def ploidy_of(codes: list[str]) -> Ploidy | None:
    """Ploidy of samples given as a text of H and D each, one a site."""
    recorder = PloidyRecorder(len(codes))
    for calls in zip(*codes, strict=True):
        recorder.add(np.array([HAPLOID if call == "H" else DIPLOID for call in calls], dtype=np.uint8))
    return recorder.result()


def haploid_sites(target: str, typed: list[int], pos: list[int], panel: str = "", contig: str = "") -> str:
    """Ploidy of one target sample at the panel's sites, given those of its own sites and of a panel sample."""
    contigs = np.array([int(code) for code in contig], dtype=np.int32) if contig else np.zeros(len(pos), dtype=np.int32)
    where, rows = np.array(pos), np.array(typed)
    reference = packed(
        "p", where, np.zeros((len(pos), 2), dtype=np.uint8), np.zeros(len(pos), dtype=bool), "P",
        ploidy=ploidy_of([panel]) if panel else None, contig=contigs,
    )  # fmt: skip
    own = packed(
        "t", where[rows], np.zeros((len(typed), 2), dtype=np.uint8), np.zeros(len(typed), dtype=bool), "T",
        ploidy=ploidy_of([target]), contig=contigs[rows],
    )  # fmt: skip
    targets = opened(own, reference)
    haploid = targets.haploid(slice(0, len(pos)))
    return "D" * len(pos) if haploid is None else "".join("DH"[int(each)] for each in haploid[0])


@pytest.mark.parametrize(
    ("target", "typed", "pos", "panel", "contig", "expected"),
    [
        ("HHH", [0, 2, 4], [1, 2, 3, 4, 5], "", "", "HHHHH"),
        ("DD", [0, 4], [1, 2, 3, 4, 5], "", "", "DDDDD"),
        # Half way between typed sites of other ploidies: at position 3 and beyond, or at the first site beyond 50.
        ("DH", [0, 4], [1, 2, 3, 4, 5], "", "", "DDHHH"),
        ("HD", [1, 4], [1, 2, 40, 60, 100], "", "", "HHHDD"),
        ("DH", [0, 1], [1, 2, 3], "", "", "DHH"),
        ("DH", [1, 2], [1, 2, 100, 200], "", "", "DDHH"),
        # Where the panel's ploidy changes in between.
        ("DH", [0, 4], [1, 2, 3, 4, 5], "DHHHH", "", "DHHHH"),
        ("DH", [0, 4], [1, 2, 3, 4, 5], "DDDDH", "", "DDDDH"),
        ("DHD", [0, 3, 6], [1, 2, 3, 4, 5, 6, 7], "DHHHHHD", "", "DHHHHHD"),
        ("DH", [1, 2], [1, 2, 3, 4], "DHHH", "", "DDHH"),
        # Where the panel has no haploid sample and no site is typed; but a typed site decides.
        ("HHH", [1, 2, 3], [1, 2, 3, 4, 5, 6, 7], "DHHHHDD", "", "DHHHHDD"),
        ("HH", [0, 3], [1, 2, 3, 4], "DHHH", "", "HHHH"),
        # Where the contig changes.
        ("DH", [0, 5], [1, 2, 3, 1, 2, 3], "", "000111", "DDDHHH"),
        ("DH", [0, 5], [1, 2, 3, 1, 2, 3], "DHHHHH", "000111", "DDDHHH"),
    ],
)  # fmt: skip
def test_ploidy_between_typed_sites(
    target: str, typed: list[int], pos: list[int], panel: str, contig: str, expected: str
) -> None:
    assert haploid_sites(target, typed, pos, panel, contig) == expected


def test_haploid_in_haploid_out(tmp_path: Path) -> None:
    """PAR1 and X of a male and a female: the call of the male at X has one allele, on both of his haplotypes."""
    panel = [
        f"1 {pos} . A C . . . GT {each}" for pos, each in ((10, "0|1 1|1"), (20, "1 0|1"), (30, "0 0|1"), (40, "1 1|1"))
    ]
    target = ["1 10 . A C . . . GT 0|1 1|1", "1 30 . A C . . . GT ./. 0|1", "1 40 . A C . . . GT 1 ./."]
    (tmp_path / "p.vcf").write_bytes(vcf_text(*panel))
    (tmp_path / "t.vcf").write_bytes(vcf_text(*target, samples=("T", "U")))
    reference = open_panel(tmp_path / "p.vcf", tmp_path / "cache", progress=False)
    own = open_panel(tmp_path / "t.vcf", tmp_path / "cache", progress=False, reading=TARGET)
    targets = opened(own, reference)
    every, everyone = slice(0, 4), slice(0, 2)
    # The male's missing call says nothing of his ploidy. It is that of the call before, until the next one differs.
    assert targets.haploid(every).tolist() == [[False, False, False, True], [False] * 4]  # type: ignore[union-attr]
    assert targets.alleles(every, everyone)[:, 3].tolist() == [1, 1, 0, 0]
    assert targets.missing_alleles(every, everyone)[:, 2:].T.tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]  # type: ignore[index]
