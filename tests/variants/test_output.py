"""The writer of imputed files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants import sample_text
from embrag_ds.variants.output import ImputedVcfWriter
from embrag_ds.variants.sample_text import Statistics
from embrag_ds.variants.sites import SiteTable
from tests.whole_files import read_dosages


def write_imputed(path: Path, sites: SiteTable, dosage: np.ndarray, typed: np.ndarray, alleles: np.ndarray) -> None:
    samples = [f"sample{i}" for i in range(len(dosage) // 2)]
    with ImputedVcfWriter(path, sites, samples, "test") as out:
        for first in range(0, len(sites), 2):
            block = slice(first, first + 2)
            out.write(first, dosage[:, block], typed[block], alleles[:, block])


def example(sites: SiteTable, samples: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    dosage = rng.random((2 * samples, len(sites))).astype(np.float32)
    return dosage, np.arange(len(sites)) % 2 == 0, rng.integers(2, size=dosage.shape).astype(np.uint8)


def text_of(path: Path) -> list[list[str]]:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def test_imputed_text(tmp_path, small_sites):
    """Worked by hand: HDS .4, .4 gives GP .36, .48, .16; a tie at .5 is REF.

    .5 and .501 give .2495, .5, .2505. Rounding up makes 1.001, and the largest gives back the excess.
    """
    dosage = np.zeros((2, 5), dtype=np.float32)
    dosage[:, 1] = 0.4
    dosage[:, 2] = [0.5, 0.5006]
    dosage[:, 3] = [0.0, 1.0]
    dosage[:, 4] = [0.25, 0.75]
    typed = np.array([True, False, False, False, False])
    path = tmp_path / "out.vcf.gz"
    write_imputed(path, small_sites, dosage, typed, np.ones((2, 5), dtype=np.uint8))
    rows = text_of(path)
    assert " ".join(rows[0]) == ("1 10 rs1 A T . PASS AF=1;DR2=1;AN=2;S_X=2;S_XX=2 GT:DS:HDS:GP 1|1:2:1,1:0,0,1")
    assert [row[9] for row in rows[1:]] == [
        "0|0:0.8:0.4,0.4:0.36,0.48,0.16",
        "0|1:1.001:0.5,0.501:0.25,0.499,0.251",
        "0|1:1:0,1:0,1,0",
        "0|1:1:0.25,0.75:0.188,0.624,0.188",
    ]
    assert [row[7].partition(";AN")[0] for row in rows[1:]] == [
        "AF=0.4;DR2=0;IMP",
        "AF=0.5003;DR2=3.6e-07;IMP",
        "AF=0.5;DR2=1;IMP",
        "AF=0.5;DR2=0.25;IMP",
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_imputed_round_trip(tmp_path, small_sites, data):
    samples = data.draw(st.integers(1, 4))
    values = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, 0.5, 0.0005, 0.4995, 0.5005, 0.9995])
    shape = (2 * samples, 5)
    size = shape[0] * 5
    dosage = np.array(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=np.float32).reshape(shape)
    alleles = np.array(data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)), dtype=np.uint8).reshape(
        shape
    )
    typed = np.array(data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))
    path = tmp_path / "out.vcf.gz"
    write_imputed(path, small_sites, dosage, typed, alleles)

    found = read_dosages(path)
    expected = np.where(typed, alleles, dosage).T
    np.testing.assert_allclose(found.haplotype_dosage, expected, atol=0.000501)
    np.testing.assert_array_equal(found.haplotype_dosage[typed], alleles.T[typed])
    np.testing.assert_array_equal(found.imputed, ~typed)
    assert list(found.sites.identities()) == list(small_sites.identities())
    frequency = expected.mean(axis=1, dtype=np.float64)
    for site, row in enumerate(text_of(path)):
        info = dict(entry.partition("=")[::2] for entry in row[7].split(";"))
        assert float(info["AF"]) == pytest.approx(frequency[site], rel=1e-5)
        assert 0 <= float(info["DR2"]) <= 1
        for sample in row[9:]:
            gt, ds, hds, gp = sample.split(":")
            first, second = (round(1000 * float(part)) for part in hds.split(","))
            assert ds == f"{(first + second) / 1000:g}"
            assert gt == f"{int(first > 500)}|{int(second > 500)}"
            gp_thousandths = [round(1000 * float(part)) for part in gp.split(",")]
            assert sum(gp_thousandths) == 1000
            p, q = first / 1000, second / 1000
            np.testing.assert_allclose(
                gp_thousandths, [1000 * (1 - p) * (1 - q), 1000 * (p + q - 2 * p * q), 1000 * p * q], atol=1.5
            )


def test_dr2_is_the_variance_ratio(tmp_path, small_sites):
    dosage, _, alleles = example(small_sites, samples=40)
    path = tmp_path / "out.vcf.gz"
    write_imputed(path, small_sites, dosage, np.zeros(5, dtype=bool), alleles)
    p = dosage.mean(axis=0)
    np.testing.assert_allclose(read_dosages(path).dr2, dosage.var(axis=0) / (p * (1 - p)), rtol=1e-3)


def test_equal_dosages_have_no_dr2_whatever_their_number():
    number = np.arange(1, 400)
    for value in np.float32([0.0005, 0.0015, 0.3, 0.5, 0.9995, 0.99999]).astype(np.float64):
        found = Statistics(number, number * value, number * value**2, np.zeros(len(number), dtype=bool))
        assert not found.dr2.any()


def test_block_size_does_not_matter(tmp_path, small_sites):
    dosage, typed, alleles = example(small_sites)
    write_imputed(tmp_path / "two.vcf.gz", small_sites, dosage, typed, alleles)
    with ImputedVcfWriter(tmp_path / "one.vcf.gz", small_sites, ["sample0", "sample1", "sample2"], "test") as out:
        out.write(0, dosage, typed, alleles)
    assert text_of(tmp_path / "one.vcf.gz") == text_of(tmp_path / "two.vcf.gz")


def test_texts_are_the_same_however_often_their_table_grows(tmp_path, small_sites, monkeypatch):
    given = example(small_sites, samples=50)
    whole, grown = tmp_path / "whole.vcf.gz", tmp_path / "grown.vcf.gz"
    write_imputed(whole, small_sites, *given)
    monkeypatch.setattr(sample_text, "_FIRST_ROWS", 1)
    write_imputed(grown, small_sites, *given)
    assert grown.read_bytes() == whole.read_bytes()
    assert len({text for row in text_of(whole) for text in row[9:]}) > 100


def test_bcftools_reads_it_without_a_warning(tmp_path, small_sites, capfd):
    path = tmp_path / "out.vcf.gz"
    write_imputed(path, small_sites, *example(small_sites))
    previous = pysam.set_verbosity(3)
    try:
        text = pysam.bcftools.view(str(path))
        region = pysam.bcftools.view("-H", str(path), "2:5-6")
        stats = pysam.bcftools.stats(str(path))
        pysam.bcftools.view("-Ob", "-o", str(tmp_path / "out.bcf"), str(path), catch_stdout=False)
        pysam.bcftools.index("-f", str(path))
    finally:
        pysam.set_verbosity(previous)
    assert capfd.readouterr().err == ""
    for command in (pysam.bcftools.view, pysam.bcftools.stats, pysam.bcftools.index):
        assert command.get_messages() == ""
    assert [line.split("\t")[1] for line in region.splitlines()] == ["5"]
    assert "number of records:\t5" in stats
    for line in ("##fileformat=VCFv4.3", "##source=test", "##contig=<ID=1,length=1000>", "##contig=<ID=2>"):
        assert line in text.splitlines()
    np.testing.assert_array_equal(read_dosages(tmp_path / "out.bcf").gp, read_dosages(path).gp)


@pytest.mark.parametrize("written", [0, 2])
def test_interrupted_writer_leaves_nothing(tmp_path, small_sites, written):
    dosage, typed, alleles = example(small_sites)
    with (
        pytest.raises(KeyboardInterrupt),
        ImputedVcfWriter(tmp_path / "out.vcf.gz", small_sites, ["a", "b", "c"], "test") as out,
    ):
        out.write(0, dosage[:, :written], typed[:written], alleles[:, :written])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_the_earlier_file(tmp_path, small_sites):
    path = tmp_path / "out.vcf.gz"
    write_imputed(path, small_sites, *example(small_sites))
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), ImputedVcfWriter(path, small_sites, ["a"], "test"):
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_incomplete_output_is_a_bug_and_leaves_nothing(tmp_path, small_sites):
    dosage, typed, alleles = example(small_sites)
    with (
        pytest.raises(AssertionError, match="2 of 5 sites"),
        ImputedVcfWriter(tmp_path / "out.vcf.gz", small_sites, ["a", "b", "c"], "test") as out,
    ):
        out.write(0, dosage[:, :2], typed[:2], alleles[:, :2])
    assert list(tmp_path.iterdir()) == []


def test_sites_out_of_order_are_a_bug(tmp_path, small_sites):
    dosage, typed, alleles = example(small_sites)
    with (
        pytest.raises(AssertionError, match="follow 0"),
        ImputedVcfWriter(tmp_path / "out.vcf.gz", small_sites, ["a", "b", "c"], "test") as out,
    ):
        out.write(2, dosage[:, 2:], typed[2:], alleles[:, 2:])


@pytest.mark.parametrize("value", [1.2, -0.1, np.nan])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_dosage_outside_the_unit_interval_is_a_bug(tmp_path, small_sites, value):
    dosage, typed, alleles = example(small_sites)
    dosage[1, 3] = value
    with pytest.raises(AssertionError, match="outside"):
        write_imputed(tmp_path / "out.vcf.gz", small_sites, dosage, typed, alleles)
    assert list(tmp_path.iterdir()) == []


def test_output_name(tmp_path, small_sites):
    with pytest.raises(UserError, match=r"out.vcf: .*ending in .vcf.gz or .bcf"):
        ImputedVcfWriter(tmp_path / "out.vcf", small_sites, ["a"], "test")
    with pytest.raises(UserError, match=r"folder .*absent does not exist"):
        ImputedVcfWriter(tmp_path / "absent" / "out.vcf.gz", small_sites, ["a"], "test")
