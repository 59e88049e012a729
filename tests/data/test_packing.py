"""Packed files: alleles, missing and unphased calls, ploidy, and the rules for what a panel must not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.packing.reading import TARGET, Missing, Reading
from embrag_ds.data.panel import Panel, open_panel
from embrag_ds.errors import UserError
from embrag_ds.ops.bits import unpack_host
from tests.containers import vcf_text


def packed(folder: Path, *records: str | bytes, reading: Reading, samples: tuple[str, ...] = ("A", "B")) -> Panel:
    path = folder / "in.vcf"
    path.write_bytes(vcf_text(*records, samples=samples))
    return open_panel(path, folder / "cache", progress=False, reading=reading)


def bits(rows: np.ndarray | None, number: int) -> list[list[int]] | None:
    return None if rows is None else unpack_host(np.array(rows), 0, number).tolist()


def slow(texts: list[str]) -> tuple[list[int], list[bool], list[bool]]:
    """Alleles, missing alleles, and calls that need phasing, of genotypes at a biallelic site."""
    alleles, missing, unphased = [], [], []
    for text in texts:
        pair = re.split("[/|]", text) * 2 if len(text) == 1 else re.split("[/|]", text)
        alleles += [int(part == "1") for part in pair]
        missing += [part == "." for part in pair]
        unphased.append("/" in text and pair[0] != pair[1])
    return alleles, missing, unphased


genotype = st.sampled_from(["0|0", "0|1", "1|0", "1|1", "0/1", "1/1", "0/0", "./.", ".|1", "0/.", ".", "1", "0"])


@settings(max_examples=40)
@given(st.data(), st.integers(1, 9), st.sampled_from(["keep", "drop", "major", "error"]))
def test_packed_calls_equal_a_loop_over_the_texts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, samples: int, rule: Missing
) -> None:
    rows = data.draw(st.lists(st.lists(genotype, min_size=samples, max_size=samples), min_size=1, max_size=9))
    names = tuple(f"s{number}" for number in range(samples))
    records = [f"1 {pos} . A C . . . GT {' '.join(row)}" for pos, row in enumerate(rows, start=1)]
    folder = tmp_path_factory.mktemp("packed")
    expected = [slow(row) for row in rows]
    faulty = [any(missing) or any(unphased) for _, missing, unphased in expected]
    if (rule == "error" and any(faulty)) or (rule == "drop" and all(faulty)):
        first = faulty.index(True) + 1
        with pytest.raises(UserError, match=f"1:{first}: the genotype" if rule == "error" else "none of its"):
            packed(folder, *records, reading=Reading(missing=rule), samples=names)
        assert list((folder / "cache").glob("panel-*")) == []
        return
    panel = packed(folder, *records, reading=Reading(missing=rule), samples=names)
    if rule == "drop":
        expected = [each for each, fault in zip(expected, faulty, strict=True) if not fault]
        assert panel.skipped == ({"missing or unphased calls": sum(faulty)} if any(faulty) else {})
    if rule == "major":
        assert panel.filled == sum(faulty)
        for alleles, missing, unphased in expected:
            unknown = [missing[i] or unphased[i // 2] for i in range(2 * samples)]
            known = [allele for allele, without in zip(alleles, unknown, strict=True) if not without]
            major = int(sum(known) > len(known) / 2)
            alleles[:] = [major if without else allele for allele, without in zip(alleles, unknown, strict=True)]
    assert bits(panel.packed, 2 * samples) == [each[0] for each in expected]
    assert panel.records == len(rows)
    if rule == "keep":
        every = [each[1] for each in expected], [each[2] for each in expected]
        assert bits(panel.missing, 2 * samples) == (every[0] if np.any(every[0]) else None)
        assert bits(panel.unphased, samples) == (every[1] if np.any(every[1]) else None)
    else:
        assert panel.missing is None and panel.unphased is None


@pytest.mark.parametrize(
    ("genotype", "problem"),
    [
        ("0/1", "not phased"),
        ("./.", "missing"),
        (".|.", "missing"),
        (".", "missing"),
        ("0|.", "missing"),
        ("./1", "missing"),
    ],
)
@pytest.mark.parametrize("keys", ["GT", "GT:DP"])
def test_a_panel_with_an_unusable_genotype(tmp_path: Path, genotype: str, problem: str, keys: str) -> None:
    depth = ":3" if keys == "GT:DP" else ""
    records = [f"1 10 . A T . . . {keys} 0|1{depth} 1|1", f"1 12 . A T . . . {keys} 0|1 {genotype}{depth}"]
    with pytest.raises(UserError) as caught:
        packed(tmp_path, *records, reading=Reading())
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'in.vcf'}: 1:12: the genotype {genotype} of sample B is {problem}; ")
    assert "--panel-missing drop" in text and "--panel-missing major" in text and "\n" not in text


@pytest.mark.parametrize("genotypes", ["0 1", "0/0 1/1", "|0|1 /0/0"])
def test_a_panel_with_unusual_genotypes_is_taken(tmp_path: Path, genotypes: str) -> None:
    assert len(packed(tmp_path, f"1 10 . A T . . . GT {genotypes}", reading=Reading()).sites) == 1


def test_both_sites_of_a_split_record_follow_the_rule(tmp_path: Path) -> None:
    record = "1 10 . A T,C . . . GT 0|2 ./1"
    panel = packed(tmp_path, record, "1 11 . A T . . . GT 0|0 1|1", reading=Reading(missing="drop"))
    assert panel.sites.pos.tolist() == [11]
    assert (panel.skipped, panel.records) == ({"missing or unphased calls": 2}, 2)
    panel = packed(tmp_path, record, reading=Reading(missing="major"))
    assert bits(panel.packed, 4) == [[0, 0, 0, 0], [0, 1, 0, 0]]  # of A's two alleles one is the second site's ALT
    assert panel.filled == 2


@pytest.mark.parametrize("rule", ["major", "keep"])
def test_haploid_calls_are_known_by_site_range(tmp_path: Path, rule: Literal["major", "keep"]) -> None:
    """PAR1, X and PAR2 of a male and a female, with missing calls."""
    genotypes = ["0|1 1|1", "1|1 0|1", "1 0|1", "./. 1|1", ". .|.", "0 0|0", "0|1 0|0"]
    records = [f"1 {pos} . A T . . . GT {each}" for pos, each in enumerate(genotypes, start=1)]
    panel = packed(tmp_path, *records, reading=Reading(missing=rule))
    assert panel.ploidy is not None
    assert panel.ploidy.start.tolist() == [0, 2, 6]
    assert panel.ploidy.haploid.tolist() == [[False, False], [True, False], [False, False]]
    assert bits(panel.packed, 4)[2] == [1, 1, 0, 1]  # type: ignore[index]


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    records = [
        b"1\t10\tcaf\xe9\tA\t.\t.\t.\t.\tGT\t0|0\t0|0",
        "1 11 x A C . . . GT 0|0 1|1",
        "1 11 y A C . . . GT 0|0 1|1",
        "1 12 z A C . . . GT 0|0 ./.",
        "1 13 w A <*>,G . . . GT 0|0 1|1",
    ]
    panel = packed(tmp_path, *records, reading=Reading(missing="drop"))
    assert panel.excluded is not None
    assert panel.excluded.read_bytes().split(b"\n") == [
        b"1\t10\tcaf\xe9\tA\t.\tno ALT",
        b"1\t11\ty\tA\tC\tduplicate",
        b"1\t12\tz\tA\tC\tmissing or unphased calls",
        b"1\t13\tw\tA\t<*>\tALT <*> is no allele",
        b"",
    ]
    assert panel.skipped == {"no ALT": 1, "duplicate": 1, "missing or unphased calls": 1, "ALT <*> is no allele": 1}
    assert (panel.sites.id, panel.records) == (["x", "w"], 5)


def test_targets_keep_records_without_alt(tmp_path: Path) -> None:
    panel = packed(tmp_path, "1 10 . A . . . . GT:DP 0/0 ./.", "1 11 . A C . . . GT 0/1 1|1", reading=TARGET)
    assert panel.sites.alt == [".", "C"]
    assert bits(panel.packed, 4) == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert bits(panel.missing, 4) == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert bits(panel.unphased, 2) == [[0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([], "it has no records; check the file"),
        (["1 10 . A . . . . GT 0|0 0|0"] * 2, r"none of its 2 records is a site \(2 no ALT\); check the file"),
    ],
)
def test_a_file_without_sites(tmp_path: Path, records: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        packed(tmp_path, *records, reading=Reading())
    assert list((tmp_path / "cache").glob("panel-*")) == []


def test_a_carriage_return_inside_an_id_leaves_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="control character"):
        packed(tmp_path, "1 9 . A C . . . GT 0|0 1|1", b"1\t10\ta\rb\tA\tC\t.\t.\t.\tGT\t0|0\t1|1", reading=Reading())
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_rules_have_caches_of_their_own(tmp_path: Path) -> None:
    record = "1 10 . A C . . . GT 0|0 ./.", "1 11 . A C . . . GT 0|0 1|1"
    found = [len(packed(tmp_path, *record, reading=Reading(missing=rule)).sites) for rule in ("drop", "major", "keep")]  # type: ignore[arg-type]
    assert found == [1, 2, 2]
    again = record[1], record[1]
    with pytest.raises(UserError, match="site A>C appears twice"):
        packed(tmp_path, *again, reading=Reading(duplicates="error"))
    assert packed(tmp_path, *again, reading=Reading()).skipped == {"duplicate": 1}


def test_samples_of_any_bytes_are_kept(tmp_path: Path) -> None:
    names = ("m\udce9", "\u00e9")
    for _ in range(2):
        panel = packed(tmp_path, "1 10 . A C . . . GT 0|0 1|1", reading=Reading(), samples=names)
        assert panel.samples == names
