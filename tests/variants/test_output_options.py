"""What users may choose of an imputed file, and what they compute from it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pysam.bcftools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants.output import ImputedVcfWriter, OutputOptions
from embrag_ds.variants.sample_text import FORMATS, joined_text
from tests.variants.imputed_files import (
    LATIN_1,
    Imputed,
    expected_records,
    info_of,
    lines_of,
    random_imputed,
    records_of,
    varied_sites,
    write,
)

JOINED = OutputOptions(join_multiallelic=True)


@st.composite
def options_of(draw: st.DrawFn) -> OutputOptions:
    formats = draw(st.lists(st.sampled_from(FORMATS), min_size=1, unique=True))
    sites_only, typed_only, joined = (draw(st.booleans()) for _ in range(3))
    return OutputOptions(
        formats=FORMATS if sites_only else tuple(formats),
        sites_only=sites_only,
        typed_only=typed_only,
        min_r2=0.0 if typed_only else draw(st.sampled_from([0.0, 0.0, 0.2, 0.5])),
        join_multiallelic=joined,
    )


@st.composite
def imputed_of(draw: st.DrawFn) -> Imputed:
    samples = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2 * samples, 10)
    special = np.array([0, 1, 0.5, 0.0005, 0.0015, 0.4995, 0.5005, 0.9995], dtype=np.float32)
    dosage = np.where(rng.random(shape) < 0.5, rng.choice(special, shape), rng.random(shape, dtype=np.float32))
    alleles = rng.integers(2, size=shape).astype(np.uint8)
    haploid = rng.random((samples, 10)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    # The alleles of one record are of one ploidy.
    haploid[:, 2], haploid[:, 7], haploid[:, 8] = haploid[:, 1], haploid[:, 6], haploid[:, 6]
    missing = rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    for each in (dosage, alleles, missing):
        each[1::2][haploid] = each[0::2][haploid]
    return Imputed(dosage, rng.random(10) < 0.4, alleles, missing, haploid)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=options_of(), imputed=imputed_of(), step=st.integers(1, 10))
def test_every_choice_is_what_the_slow_way_gives(tmp_path, options, imputed, step):
    sites = varied_sites()
    records = records_of(write(tmp_path / "out.vcf.gz", sites, imputed, options, step=step))
    expected = expected_records(sites, imputed, options)
    assert [record[:5] for record in records] == [each.fixed for each in expected]
    for record, each in zip(records, expected, strict=True):
        assert record[5:7] == [".", "PASS"]
        assert record[8:] == each.columns
        info = info_of(record)
        assert ("IMP" in info, info.get("END"), info.get("SVLEN")) == (each.imputed, each.end, each.svlen)
        assert int(info["AN"]) == each.number
        for key, values in (
            ("AF", [total / each.number for total, _ in each.sums]),
            ("S_X", [total for total, _ in each.sums]),
            ("S_XX", [squares for _, squares in each.sums]),
            ("DR2", each.dr2),
        ):
            digits = {"AF": 1e-5, "DR2": 1e-3}.get(key, 1e-11)
            np.testing.assert_allclose([float(x) for x in info[key].split(",")], values, rtol=digits, atol=1e-9)


def dr2_of(number: float, total: float, squares: float) -> float:
    """The formula of the header's S_XX."""
    p = total / number
    return (squares / number - p**2) / (p * (1 - p)) if 0 < p < 1 else 0.0


def bcftools_records(command: str, *arguments: str | Path) -> list[list[str]]:
    """Columns of the records that a command of bcftools writes."""
    text = getattr(pysam.bcftools, command)(*map(str, arguments))
    if isinstance(text, bytes):  # pysam's way with what is not UTF-8
        text = text.decode("latin-1")
    return [line.split("\t") for line in text.split("\n") if line and not line.startswith("#")]


def variants(path: Path, *options: str) -> list[list[str]]:
    """Columns of a file's records as bcftools reads them."""
    return bcftools_records("view", *options, path)


def printed(record: list[str]) -> tuple[int, float, float]:
    info = info_of(record)
    return int(info["AN"]), float(info["S_X"]), float(info["S_XX"])


@pytest.mark.parametrize("haploid", ["none", "some"])
def test_the_sums_of_two_batches_give_the_dr2_of_one_run(tmp_path, haploid):
    sites, whole = varied_sites(), random_imputed(40, haploid=haploid, missing=True)
    # Of an ALT that nearly all have, and of one that nearly nobody has: the variance is a small difference.
    whole.dosage[:, 1] = 1 - whole.dosage[:, 1] * 1e-4
    whole.dosage[:, 2] *= 1e-4
    if whole.haploid is not None:
        whole.dosage[1::2][whole.haploid] = whole.dosage[0::2][whole.haploid]
    batches = [
        records_of(write(tmp_path / f"{number}.vcf.gz", sites, whole.taken(samples)))
        for number, samples in enumerate((slice(0, 13), slice(13, None)))
    ]
    for record, *parts in zip(records_of(write(tmp_path / "all.vcf.gz", sites, whole)), *batches, strict=True):
        info = info_of(record)
        merged = np.sum([printed(part) for part in parts], axis=0)
        known = np.isclose(float(info["DR2"]), 1) and "IMP" not in info
        assert merged[0] == int(info["AN"])
        if not known:
            dr2 = dr2_of(*printed(record))
            assert f"{dr2:.4g}" == info["DR2"] or dr2 < 1e-6
            assert dr2_of(*merged) == pytest.approx(float(info["DR2"]), rel=1e-3, abs=1e-7)
    assert any("(S_XX/AN - p^2)/(p(1-p))" in line.decode() for line in lines_of(tmp_path / "all.vcf.gz")[:20])


def test_bcftools_merge_adds_the_sums(tmp_path):
    sites, whole = varied_sites(), random_imputed(8)
    parts = [slice(0, 3), slice(3, None)]
    paths = [
        write(tmp_path / f"{part.start}.vcf.gz", sites, whole.taken(part), samples=whole.samples[part])
        for part in parts
    ]
    records = bcftools_records("merge", "-m", "none", "-i", "S_X:sum,S_XX:sum", *paths)
    joint = records_of(write(tmp_path / "all.vcf.gz", sites, whole))
    assert len(records) == len(joint)
    for record in records:
        (same,) = [each for each in joint if (each[1], each[4], each[2][:3]) == (record[1], record[4], record[2][:3])]
        np.testing.assert_allclose(printed(record), printed(same), rtol=1e-5)


def test_dr2_of_typed_sites_where_alleles_are_missing(tmp_path):
    """Worked by hand: typed 1 and 0, imputed .5 and .5 give p = .5 and DR2 = .125 / .25; what is not missing counts."""
    sites = varied_sites()
    dosage = np.full((4, 10), 0.5, dtype=np.float32)
    alleles = np.tile(np.array([[1], [0], [1], [1]], dtype=np.uint8), 10)
    missing = np.zeros((4, 10), dtype=bool)
    missing[2:, 4] = True
    record = records_of(
        write(tmp_path / "out.vcf.gz", sites, Imputed(dosage, np.ones(10, dtype=bool), alleles, missing))
    )
    assert record[3][7].startswith("AF=0.75;DR2=1;AN=4") and "IMP" not in record[3][7]
    assert record[4][7].startswith("AF=0.5;DR2=0.5;AN=4;S_X=2;S_XX=1.5;END") and "IMP" not in record[4][7]
    assert record[4][9:] == ["1|0:1:1,0:0,1,0", "0|0:1:0.5,0.5:0.25,0.5,0.25"]


def test_two_values_of_a_haploid_sample_are_a_bug(tmp_path):
    imputed = random_imputed(3, haploid="all")
    imputed.dosage[1, 1] = 1 - imputed.dosage[0, 1]
    with pytest.raises(AssertionError, match="two values of a haploid sample"):
        write(tmp_path / "out.vcf.gz", varied_sites(), imputed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"formats": ("GT", "AP1")}, r"--format GT,AP1: there is no field 'AP1'; choose from GT,DS,HDS,GP"),
        ({"formats": ("",)}, r"--format : there is no field ''; choose from GT,DS,HDS,GP"),
        ({"formats": ("DS", "DS")}, r"--format DS,DS: give each field once"),
        ({"min_r2": 1.5}, r"--min-r2 1.5: DR2 is from 0 to 1"),
        ({"min_r2": float("nan")}, r"--min-r2 nan: DR2 is from 0 to 1"),
        ({"sites_only": True, "formats": ("GT",)}, r"--sites-only writes no sample columns"),
        ({"typed_only": True, "min_r2": 0.3}, r"--typed-only leaves out what --min-r2 could filter"),
    ],
)
def test_what_cannot_be(options, complaint):
    with pytest.raises(UserError, match=complaint):
        OutputOptions(**options)


def test_fields_are_written_in_one_order(tmp_path):
    options = OutputOptions(formats=("GP", "DS", "GT"))
    path = write(tmp_path / "out.vcf.gz", varied_sites(), random_imputed(), options)
    assert {record[8] for record in records_of(path)} == {"GT:DS:GP"}
    named = [line for line in lines_of(path) if line.startswith(b"##FORMAT")]
    assert [line.split(b",")[0] for line in named] == [b"##FORMAT=<ID=GT", b"##FORMAT=<ID=DS", b"##FORMAT=<ID=GP"]


@pytest.mark.parametrize(("options", "named"), [(OutputOptions(), b"HDS"), (JOINED, b"AP1 and AP2")])
def test_the_header_names_the_fields_that_there_are(tmp_path, options, named):
    path = write(tmp_path / "out.vcf.gz", varied_sites(), random_imputed(), options)
    header = [line for line in lines_of(path) if line.startswith(b"##")]
    assert sum(named in line for line in header) >= 5
    assert any(b"HDS" in line for line in header) == (named == b"HDS")


def test_the_sites_left_out_are_counted(tmp_path, caplog):
    imputed = random_imputed()
    with caplog.at_level(logging.INFO):
        path = write(tmp_path / "some.vcf.gz", varied_sites(), imputed, OutputOptions(min_r2=0.5))
    kept = len(records_of(path))
    imputed_sites = int((~imputed.typed).sum())
    below = len(varied_sites()) - kept
    assert 0 < below < imputed_sites
    assert caplog.messages == [f"{path}: {below} of {imputed_sites} imputed sites have DR2 below 0.5 and are left out"]


@pytest.mark.parametrize("ending", ["vcf.gz", "bcf"])
def test_an_output_without_records_is_whole(tmp_path, ending):
    imputed = replace(random_imputed(), typed=np.zeros(10, dtype=bool))
    path = write(tmp_path / f"out.{ending}", varied_sites(), imputed, OutputOptions(typed_only=True))
    assert pysam.bcftools.view("-H", str(path)) == ""
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("haploid", ["none", "some"])
@pytest.mark.parametrize("options", [OutputOptions(), JOINED, OutputOptions(sites_only=True)])
def test_a_bcf_holds_what_the_vcf_does(tmp_path, options, haploid):
    imputed = random_imputed(haploid=haploid)
    text = write(tmp_path / "out.vcf.gz", varied_sites(), imputed, options)
    binary = write(tmp_path / "out.bcf", varied_sites(), imputed, options)
    assert variants(binary) == variants(text) and len(variants(text)) > 5
    assert binary.read_bytes()[:2] == b"\x1f\x8b"
    assert pysam.bcftools.view("-h", "--no-version", str(binary)) == pysam.bcftools.view(
        "-h", "--no-version", str(text)
    )
    assert len(variants(binary, "-r", "1:3000200-3000350")) == len(variants(text, "-r", "1:3000200-3000350")) > 0
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "out.bcf",
        "out.bcf.csi",
        "out.vcf.gz",
        "out.vcf.gz.tbi",
    ]


@pytest.mark.parametrize("fails", ["view", "index"])
def test_a_bcf_is_never_half_written(tmp_path, monkeypatch, fails):
    def full(*arguments: str, **options: object) -> None:
        raise pysam.SamtoolsError("bcftools returned with error 1: no space left")

    imputed = random_imputed()
    write(tmp_path / "out.bcf", varied_sites(), imputed)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    monkeypatch.setattr(pysam.bcftools, fails, full)
    with pytest.raises(UserError, match=r"out.bcf: cannot write it .*no space left.*; free some space in"):
        write(tmp_path / "out.bcf", varied_sites(), imputed)
    with pytest.raises(KeyboardInterrupt), ImputedVcfWriter(tmp_path / "out.bcf", varied_sites(), ["a"], "test"):
        raise KeyboardInterrupt
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize("ending", ["vcf.gz", "bcf"])
def test_bytes_that_are_not_utf_8_stay(tmp_path, ending):
    path = write(tmp_path / f"out.{ending}", varied_sites(), random_imputed())
    text = tmp_path / "text.vcf"
    pysam.bcftools.view("-Ov", "-o", str(text), str(path), catch_stdout=False)
    assert b"\t" + LATIN_1 + b"\tA\tT\t" in text.read_bytes()


def test_extents_are_defined_only_where_there_are_some(tmp_path):
    sites = varied_sites()
    with_extents = lines_of(write(tmp_path / "out.vcf.gz", sites, random_imputed()))
    assert {line[:15] for line in with_extents if b"ID=END" in line or b"ID=SVLEN" in line} == {
        b"##INFO=<ID=END,",
        b"##INFO=<ID=SVLE",
    }
    without = lines_of(write(tmp_path / "out.vcf.gz", replace(sites, extent={}), random_imputed()))
    assert not any(b"END" in line or b"SVLEN" in line for line in without)


def test_splitting_the_joined_records_gives_the_sites_back(tmp_path):
    sites, imputed = varied_sites(), random_imputed(haploid="some")
    joined = write(tmp_path / "joined.vcf.gz", sites, imputed, JOINED)
    assert [record[4] for record in records_of(joined)] == ["T", "G,CA", "<DEL>", "<DEL>", "*", "C,G,AT", "<INS>"]
    records = bcftools_records("norm", "-m", "-any", joined)
    assert len(records) == len(sites)
    # bcftools prints fewer digits, so both sides are its text.
    for record, same in zip(records, variants(write(tmp_path / "apart.vcf.gz", sites, imputed)), strict=True):
        assert record[:7] == same[:7]
        found, given = info_of(record), info_of(same)
        assert {key: found[key] for key in found if key != "IMP"} == {key: given[key] for key in given if key != "IMP"}
        for text, other in zip(record[9:], same[9:], strict=True):
            values = dict(zip(record[8].split(":"), text.split(":"), strict=True))
            alone = dict(zip(same[8].split(":"), other.split(":"), strict=True))
            assert values["DS"] == alone["DS"]
            haplotypes = [values[key] for key in ("AP1", "AP2") if values[key] != "."]
            assert ",".join(haplotypes) == alone["HDS"]


def test_alleles_of_a_joined_record():
    """Worked by hand. ALTs of .6 and .3 leave .1 for REF; .8 and .7 are scaled to 8/15 and 7/15."""
    assert joined_text(("GT", "DS", "AP1", "AP2"), (600, 300), (800, 700)) == "1|1:1.4,1:0.6,0.3:0.8,0.7"
    assert joined_text(("GT", "GP"), (600, 300), None) == "1:0.1,0.6,0.3"
    assert joined_text(("GT", "GP"), (800, 700), None) == "1:0,0.533,0.467"
    assert joined_text(("GT",), (400, 300), (501, 700)) == "1|2"
    assert joined_text(("GT",), (700, 700), (500, 500)) == "1|1"
    assert joined_text(("GT",), (300, 300), (500, 0)) == "0|0"
    assert joined_text(("GT",), (300, 350), (350, 300)) == "0|0"
    # Genotypes 0/0, 0/1, 1/1, 0/2, 1/2, 2/2 of haplotypes (.1, .6, .3) and (0, 8/15, 7/15).
    assert joined_text(("GP",), (600, 300), (800, 700)) == "0,0.053,0.32,0.047,0.44,0.14"


@pytest.mark.parametrize("ending", ["vcf.gz", "bcf"])
@pytest.mark.parametrize("options", [OutputOptions(), JOINED, OutputOptions(min_r2=0.3)])
def test_chunks_join_without_a_seam(tmp_path, options, ending):
    sites, imputed = varied_sites(), random_imputed(haploid="some", missing=True)
    whole = write(tmp_path / f"whole.{ending}", sites, imputed, options)
    ranges = [(0, 3), (3, 6), (6, 10)]
    chunks = [write(tmp_path / f"{a}.{ending}", sites, imputed, options, a, b, step=2) for a, b in ranges]
    for arguments in (["--no-version"], ["--naive"]):
        joined = tmp_path / f"joined.{ending}"
        kind = "-Ob" if ending == "bcf" else "-Oz"
        pysam.bcftools.concat(*arguments, kind, "-o", str(joined), *map(str, chunks), catch_stdout=False)
        assert not re.search(r"\[[WE]::|warning|error", pysam.bcftools.concat.get_messages(), re.IGNORECASE)
        assert variants(joined) == variants(whole)
        assert pysam.bcftools.view("-h", "--no-version", str(joined)) == pysam.bcftools.view(
            "-h", "--no-version", str(whole)
        )


def test_a_range_must_be_written_to_its_end(tmp_path):
    imputed = random_imputed()
    with (
        pytest.raises(AssertionError, match="4 of 6 sites"),
        ImputedVcfWriter(tmp_path / "out.vcf.gz", varied_sites(), imputed.samples, "test", first=2, stop=6) as out,
    ):
        out.write(2, imputed.dosage[:, 2:4], imputed.typed[2:4], imputed.alleles[:, 2:4])
    assert list(tmp_path.iterdir()) == []
