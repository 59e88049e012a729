"""Records of variant files: split into sites as bcftools splits them, and refused with one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants.genotypes import DIPLOID, HAPLOID, UNKNOWN
from embrag_ds.variants.records import Excluded, VariantReader
from tests.containers import CONTAINERS, contained, split_by_bcftools, vcf_text

Call = tuple[list[int], list[bool], list[int], list[bool]]


def calls_of(vcf: VariantReader) -> list[tuple[tuple[str, int, str, str, str, str], Call]]:
    """Every site of a file, and its calls with nothing left out."""
    number = len(vcf.samples)
    found = []
    for site in vcf.sites():
        alleles, missing, ploidy, unphased = vcf.calls(site)
        assert alleles.dtype == np.uint8 and (ploidy is None or ploidy.dtype == np.uint8)
        assert missing is None or missing.dtype == bool
        call = (
            alleles.tolist(),
            [False] * 2 * number if missing is None else missing.tolist(),
            [DIPLOID] * number if ploidy is None else ploidy.tolist(),
            [False] * number if unphased is None else unphased.tolist(),
        )
        found.append(((vcf.contigs[site.contig_code], *site[1:6]), call))
    return found


def read_all(path: Path) -> None:
    with VariantReader(path) as vcf:
        calls_of(vcf)


def message(path: Path) -> str:
    """The error of reading ``path``, which must be one line that names the file."""
    with pytest.raises(UserError) as caught:
        read_all(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and ";" in text
    return text


def written(folder: Path, *records: str | bytes, **more: object) -> Path:
    path = folder / "in.vcf"
    path.write_bytes(vcf_text(*records, **more))  # type: ignore[arg-type]
    return path


# --- bcftools as the oracle -----------------------------------------------------------------------


def slow_calls(texts: list[str]) -> Call:
    """Genotypes at a site of one ALT, from its definition."""
    call: Call = ([], [], [], [])
    for text in texts:
        parts = re.split("[/|]", text)
        pair = parts if len(parts) == 2 else parts * 2
        call[0].extend(int(part == "1") for part in pair)
        call[1].extend(part == "." for part in pair)
        call[2].append(DIPLOID if len(parts) == 2 else UNKNOWN if text == "." else HAPLOID)
        call[3].append("/" in text and pair[0] != pair[1])
    return call


def expected_sites(text: bytes) -> tuple[list[tuple[tuple[str, int, str, str, str, str], Call]], int]:
    """What ``bcftools norm -m -any`` makes of a VCF, less records without ALT and duplicates; and their number."""
    seen, found = set(), []
    rows = split_by_bcftools(text)
    for contig, pos, name, ref, alt, end, svlen, *genotypes in rows:
        symbolic = alt.startswith("<")
        extent = ";".join(f"{key}={value}" for key, value in (("END", end), ("SVLEN", svlen)) if value != ".")
        # Symbolic alleles and breakends keep their case.
        alleles = (ref.upper(), alt if symbolic or "[" in alt else alt.upper())
        key = (contig, int(pos), name, *alleles, extent if symbolic else "")
        if alt in (".", "<*>", "<NON_REF>") or (key[:2], key[3:]) in seen:
            continue
        seen.add((key[:2], key[3:]))
        found.append((key, slow_calls(genotypes)))
    return found, len(rows) - len(found)


@st.composite
def records(draw: st.DrawFn, samples: int) -> list[str]:
    """Records of a sorted VCF."""
    lines, pos = [], 1
    for number in range(draw(st.integers(0, 6))):
        pos += draw(st.integers(0, 1))
        ref = draw(st.sampled_from(["A", "AC", "c", "N"]))
        options = ["A", "C", "g", "AC", "ACCT", "*", "<DEL>", "<INS:ME:ALU>", "<NON_REF>", "<*>", "A[2:4["]
        alts = draw(st.lists(st.sampled_from([each for each in options if each.upper() != ref.upper()]), max_size=3))
        info = {}
        if "<DEL>" in alts:
            info["END"] = draw(st.sampled_from(["", ".", "30", "40"]))
            info["SVLEN"] = draw(st.sampled_from(["", ",".join(["-20", ".", "-30"][: len(alts)])]))
        keys = draw(st.sampled_from(["GT", "GT:DP", "DP:GT"]))
        allele = st.sampled_from([".", *map(str, range(len(alts) + 1))])
        pair = st.tuples(allele, st.sampled_from("/|"), allele).map("".join)
        genotypes = draw(st.lists(st.one_of(pair, pair, allele), min_size=samples, max_size=samples))
        columns = {
            "GT": genotypes,
            "GT:DP": [each + draw(st.sampled_from(["", ":3", ":."])) for each in genotypes],
            "DP:GT": [f"3:{each}" for each in genotypes],
        }[keys]
        text = ";".join(f"{key}={value}" for key, value in info.items() if value) or "."
        lines.append(
            " ".join(["1", str(pos), f"r{number}", ref, ",".join(alts) or ".", ".", ".", text, keys, *columns])
        )
    return lines


@pytest.mark.parametrize("container", CONTAINERS)
@settings(max_examples=25)
@given(data=st.data(), samples=st.integers(1, 3), end=st.sampled_from([b"\n", b"\r\n"]))
def test_sites_and_genotypes_equal_those_of_bcftools(
    tmp_path_factory: pytest.TempPathFactory, container: str, data: st.DataObject, samples: int, end: bytes
) -> None:
    lines = data.draw(records(samples))
    names = [f"s{number}" for number in range(samples)]
    expected, left_out = expected_sites(vcf_text(*lines, samples=names))
    empty = data.draw(st.lists(st.integers(0, len(lines)), max_size=2)) if container != "bcf" else []
    for place in empty:
        lines.insert(place, b"")
    text = vcf_text(*lines, samples=names, end=b"\n" if container == "bcf" else end)
    folder = tmp_path_factory.mktemp("read")
    excluded: list[Excluded] = []
    with contained(text, container, folder) as path, VariantReader(path, on_excluded=excluded.append) as vcf:
        found = calls_of(vcf)
        assert vcf.samples == tuple(names)
        assert vcf.records == len(lines) - len(empty)
        assert sum(vcf.skipped.values()) == len(excluded) == left_out
        again = calls_of(vcf)
        assert (again, vcf.records) == (found, len(lines) - len(empty))
    # bcftools may put the sites of one position into another order.
    assert sorted(found) == sorted(expected)


def test_sites_of_a_split_record_keep_their_order_and_share_its_number(tmp_path: Path) -> None:
    path = written(
        tmp_path, "1 10 a A T . . . GT 0|1 1|1", "1 10 b A C,G,<*> . . . GT 1|2 2|0", "1 12 c A T . . . GT 0|0 0|0"
    )
    with VariantReader(path) as vcf:
        sites = list(vcf.sites())
        assert [(site.alt, site.record, site.allele, site.alleles) for site in sites] == [
            ("T", 0, 1, 1),
            ("C", 1, 1, 3),
            ("G", 1, 2, 3),
            ("T", 2, 1, 1),
        ]
        assert [vcf.calls(site).alleles.tolist() for site in sites[1:3]] == [[1, 0, 0, 0], [0, 1, 1, 0]]
        assert vcf.skipped == {"ALT <*> is no allele": 1}


def test_both_sites_of_an_unphased_call_of_two_alts_need_phasing(tmp_path: Path) -> None:
    path = written(tmp_path, "1 10 a A C,G . . . GT 1/2 2/2")
    with VariantReader(path) as vcf:
        assert [vcf.calls(site).unphased.tolist() for site in vcf.sites()] == [[True, False]] * 2  # type: ignore[union-attr]


def test_a_call_of_another_alt_needs_no_phasing_where_it_is_homozygous(tmp_path: Path) -> None:
    path = written(tmp_path, "1 10 a A C,G,T . . . GT 0/2 1/2")
    with VariantReader(path) as vcf:
        found = [vcf.calls(site).unphased for site in vcf.sites()]
    assert [None if each is None else each.tolist() for each in found] == [[False, True], [True, True], None]


# --- duplicates and extents -----------------------------------------------------------------------


def test_duplicates_are_counted_or_an_error(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "1 10 . A T . . . GT 0|1 1|1",
        "1 10 . A G . . . GT 0|1 1|1",
        "1 10 x a t . . . GT 0|0 1|1",
        "1 11 . A C . . . GT 0|1 1|1",
        "1 11 y A G,C . . . GT 0|1 1|1",
        "1 12 . A T . . . GT 0|1 1|1",
        "2 12 . A T . . . GT 0|1 1|1",
    )
    excluded: list[Excluded] = []
    with VariantReader(path, on_excluded=excluded.append) as vcf:
        assert [(site.pos, site.alt) for site in vcf.sites()] == [
            (10, "T"), (10, "G"), (11, "C"), (11, "G"), (12, "T"), (12, "T")
        ]  # fmt: skip
        assert vcf.skipped == {"duplicate": 2}
    assert excluded == [
        ("1", 10, "x", "A", "T", "duplicate"),
        ("1", 11, "y", "A", "C", "duplicate"),
    ]
    with VariantReader(path, duplicates="error") as vcf, pytest.raises(UserError, match="1:10: site A>T appears twice"):
        list(vcf.sites())


def test_symbolic_alleles_of_other_extents_are_other_sites(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "1 10 a A <DEL> . . END=20 GT 0|1 1|1",
        "1 10 b A <DEL> . . NOTE=x;END=030;SVLEN=-20 GT 0|1 1|1",
        "1 10 c A <DEL>,T,<DUP> . . SVLEN=-5,.,7 GT 0|1 1|3",
        "1 10 d A <DEL>,<DUP> . . END=30 GT 0|1 1|1",
        "1 10 e A <DEL> . . NOTE=END=40 GT 0|1 1|1",
        "1 10 f A <DEL> . . END=20 GT 0|1 1|1",
    )
    with VariantReader(path) as vcf:
        assert [(site.id, site.alt, site.extent) for site in vcf.sites()] == [
            ("a", "<DEL>", "END=20"),
            ("b", "<DEL>", "END=30;SVLEN=-20"),
            ("c", "<DEL>", "SVLEN=-5"),
            ("c", "T", ""),
            ("c", "<DUP>", "SVLEN=7"),
            ("d", "<DEL>", "END=30"),
            ("d", "<DUP>", "END=30"),
            ("e", "<DEL>", ""),
        ]
        assert vcf.skipped == {"duplicate": 1}


@pytest.mark.parametrize(
    "info", ["END=abc", "SVLEN=-1,-2", "END=1e6", "END=99999999999", "SVLEN=", "END=" + "9" * 5000]
)
def test_extent_that_is_no_number(tmp_path: Path, info: str) -> None:
    text = message(written(tmp_path, f"1 10 . A <DEL> . . {info} GT 0|1 1|1"))
    assert "1:10: INFO END is" in text or "1:10: INFO SVLEN is" in text
    read_all(written(tmp_path, f"1 10 . A T . . {info} GT 0|1 1|1"))


# --- records without ALT --------------------------------------------------------------------------


@pytest.mark.parametrize("alt", [".", "<*>", "<NON_REF>"])
def test_records_without_alt_are_left_out_or_sites(tmp_path: Path, alt: str) -> None:
    path = written(
        tmp_path,
        f"1 10 x A {alt} . . END=40 GT 0|0 0/0",
        f"1 11 x A {alt} . . . GT:DP 0|0:1 0|0",
        f"1 12 x A {alt} . . . GT 0 .",
    )
    excluded: list[Excluded] = []
    with VariantReader(path, on_excluded=excluded.append) as vcf:
        assert list(vcf.sites()) == []
        assert vcf.skipped == {"no ALT": 3}
    assert excluded[0] == ("1", 10, "x", "A", alt, "no ALT")
    with VariantReader(path, without_alt=True) as vcf:
        found = calls_of(vcf)
        assert [site[1:] for site, _ in found] == [(pos, "x", "A", ".", "") for pos in (10, 11, 12)]
        # Each allele is REF, whatever makes of the record its decoder.
        assert [call[0] for _, call in found] == [[0] * 4] * 3
        assert found[2][1][1:3] == ([False, False, True, True], [HAPLOID, UNKNOWN])


@pytest.mark.parametrize("keys", ["GT", "GT:DP"])
def test_an_alt_allele_of_a_record_without_alt(tmp_path: Path, keys: str) -> None:
    path = written(tmp_path, f"1 10 . A . . . . {keys} 0|0 0|1")
    with (
        VariantReader(path, without_alt=True) as vcf,
        pytest.raises(UserError, match=r"1:10: the genotype .0\|1. of sample B"),
    ):
        calls_of(vcf)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "genotype", ["0|2", "0|1|1", "1|", "x|0", "0}1", "|", "/", "||0", "0||1", "-1|0", "99999|0", "0|+1"]
)
@pytest.mark.parametrize("keys", ["GT", "DP:GT"])
def test_genotype_of_other_alleles_or_none(tmp_path: Path, genotype: str, keys: str) -> None:
    text = message(written(tmp_path, f"1 10 . A T . . . {keys} {genotype if keys == 'GT' else f'3:{genotype}'} 0|1"))
    assert f"1:10: the genotype '{genotype}' of sample A" in text


@pytest.mark.parametrize("keys", ["GT", "GT:DP"])
def test_genotype_without_text(tmp_path: Path, keys: str) -> None:
    assert "1:10: the genotype '' of sample A is not" in message(written(tmp_path, f"1 10 . A T . . . {keys}  0|1"))


def test_format_without_gt(tmp_path: Path) -> None:
    assert "1:10: FORMAT DP has no GT" in message(written(tmp_path, "1 10 . A T . . . DP 3 4"))


@pytest.mark.parametrize("container", CONTAINERS)
def test_unsorted(tmp_path: Path, container: str) -> None:
    text = vcf_text("1 10 . A T . . . GT 0|1 1|1", "1 9 . A T . . . GT 0|1 1|1")
    with contained(text, container, tmp_path) as path:
        assert "1:9: it follows position 10; sort the file (bcftools sort)" in message(path)


def test_contig_that_reappears(tmp_path: Path) -> None:
    path = written(tmp_path, *(f"{contig} 10 . A T . . . GT 0|1 1|1" for contig in "121"))
    assert "1:10: contig 1 appears a second time; sort it" in message(path)


def test_contigs_that_the_header_lacks_are_added_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, *(f"{contig} 10 . A T . . . GT 0|1 1|1" for contig in ("x", "2", "y")))
    with VariantReader(path) as vcf:
        assert [vcf.contigs[site.contig_code] for site in vcf.sites()] == ["x", "2", "y"]
        assert (vcf.contigs, vcf.contig_lengths) == (("1", "2", "x", "y"), (1000, 0, 0, 0))
        assert len(list(vcf.sites())) == 3 and len(vcf.contigs) == 4


def test_wrong_number_of_genotypes(tmp_path: Path) -> None:
    for columns, number in (("0|1 1|1 0|0", 3), ("0|1", 1)):
        path = written(tmp_path, f"1 10 . A T . . . GT {columns}")
        assert f"1:10: it has {number} genotype columns for 2 samples" in message(path)


@pytest.mark.parametrize(
    "record",
    ["1 x . A T . . . GT 0|1 1|1", "1 -5 . A T . . . GT 0|1 1|1", "1 10 . A", "nonsense", " 10 . A T . . . GT 0|1 1|1"],
)
def test_malformed_record(tmp_path: Path, record: str) -> None:
    assert "is not a VCF record" in message(written(tmp_path, record))


@pytest.mark.parametrize("pos", ["2147483648", "9" * 20, "9" * 5000, "0" * 30 + "7"])
def test_huge_position(tmp_path: Path, pos: str) -> None:
    text = message(written(tmp_path, f"1 {pos} . A T . . . GT 0|1 1|1"))
    assert f"1:{pos[:20]}: no position exceeds 2,147,483,647" in text and len(text) < 300


@pytest.mark.parametrize("header", ["##contig=<ID=3>", "#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT A B"])
def test_header_line_among_the_records(tmp_path: Path, header: str) -> None:
    path = written(tmp_path, "1 10 . A T . . . GT 0|1 1|1", header, "1 11 . A T . . . GT 0|1 1|1")
    assert "it is a header line among the records" in message(path)


@pytest.mark.parametrize("field", range(9))
def test_control_character(tmp_path: Path, field: int) -> None:
    fields = b"1\t10\tid\tA\t<DEL>\t.\tPASS\tNOTE=x\tGT".split(b"\t")
    fields[field] += b"\rx"
    text = message(written(tmp_path, b"\t".join([*fields, b"0|1", b"1|1"])))
    assert "control character" in text or "is not a VCF record" in text


@pytest.mark.parametrize(
    ("ref", "alt", "problem"),
    [
        ("A", "A", "REF and ALT are both A"),
        ("a", "A", "REF and ALT are both A"),
        ("A", "C,A", "REF and ALT are both A"),
        ("A", "", "ALT is ''"),
        ("A", "C,", "ALT is 'C,'"),
        ("A", ",C", "ALT is ',C'"),
        ("A", "C,,G", "ALT is 'C,,G'"),
        ("A", "C,.", "ALT is 'C,.'"),
        ("A", "A-C", "ALT is 'A-C'"),
        ("A", "<DEL", "ALT is '<DEL'"),
        ("A", "1", "ALT is '1'"),
        ("", "C", "REF is ''"),
        (".", "C", "REF is '.'"),
        ("<DEL>", "C", "REF is '<DEL>'"),
        ("A,C", "G", "REF is 'A,C'"),
    ],
)  # fmt: skip
def test_alleles_that_are_none(tmp_path: Path, ref: str, alt: str, problem: str) -> None:
    record = f"1 10 . {ref} {alt} . . . GT 0|1 1|1"
    assert f"1:10: {problem}" in message(written(tmp_path, record))


@pytest.mark.parametrize("alt", ["r", "N", "ACGTN", "*", "<DEL>", "<INS:ME>", "A[2:5[", "]<ctg>:5]A", ".C", "C."])
def test_alleles_of_every_kind_are_taken(tmp_path: Path, alt: str) -> None:
    with VariantReader(written(tmp_path, f"1 10 . A {alt} . . . GT 0|1 1|1")) as vcf:
        assert [site.alt for site in vcf.sites()] == [alt.upper() if alt == "r" else alt]
