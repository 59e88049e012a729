"""VCF and BCF files: phased input, dosages of other programs, and output."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrag_ds.data import spool as spool_module
from embrag_ds.data.sites import SiteTable
from embrag_ds.data.vcf import PhasedVcf, read_phased
from embrag_ds.data.vcf_dosages import read_dosages, spool_dosages
from embrag_ds.data.vcf_output import ImputedVcfWriter, write_phased
from embrag_ds.errors import UserError


def read_all(path: Path) -> None:
    with PhasedVcf(path) as vcf:
        list(vcf.records())


def message(path: Path) -> str:
    """The error of reading ``path``, which must be one line that names the file."""
    with pytest.raises(UserError) as caught:
        read_all(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and ";" in text
    return text


# --- phased input -------------------------------------------------------------------------------


def test_reads_biallelic_records_in_order(make_vcf, container):
    path = make_vcf(
        "1 10 rs1 A T . PASS . GT 0|1 1|1",
        "1 20 . A T,C . . . GT 0|2 1|0",
        "1 21 . A . . . . GT 0|0 0|0",
        "1 22 . A * . . . GT 0|1 0|0",
        "1 30 del A <DEL> . . . GT:DP 1|0:12 0|1:7",
        "2 5 . AC G . . . GT 0|0 1|0",
        container=container,
    )
    with PhasedVcf(path) as vcf:
        records = list(vcf.records())
        assert vcf.samples == ("A", "B")
        assert vcf.contigs == ("1", "2")
        assert vcf.contig_lengths == (1000, 0)
        assert vcf.skipped == {"more than one ALT": 1, "no ALT": 1, "ALT is *": 1}
    assert [record[:5] for record in records] == [
        (0, 10, "rs1", "A", "T"),
        (0, 30, "del", "A", "<DEL>"),
        (1, 5, ".", "AC", "G"),
    ]
    assert [record.alleles.tolist() for record in records] == [[0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0]]
    assert all(record.alleles.dtype == np.uint8 for record in records)


def test_records_can_be_iterated_again(make_vcf, container):
    path = make_vcf(
        "1 10 . A T . . . GT 0|1 1|1", "1 11 . A *  . . . GT 0|1 1|1".replace("  ", " "), container=container
    )
    with PhasedVcf(path) as vcf:
        first = [record.pos for record in vcf.records()]
        assert [record.pos for record in vcf.records()] == first == [10]
        assert vcf.skipped["ALT is *"] == 1


def test_read_phased_agrees_with_the_records(make_vcf, container):
    path = make_vcf("1 10 . A T . . . GT 0|1 1|1", "2 3 x A G . . . GT 1|0 0|1", container=container)
    data = read_phased(path)
    assert list(data.sites.identities()) == [("1", 10, "A", "T"), ("2", 3, "A", "G")]
    assert data.sites.id == [".", "x"]
    assert data.alleles.tolist() == [[0, 1, 1, 1], [1, 0, 0, 1]]
    assert data.samples == ("A", "B")


def test_other_alleles_at_one_position_are_other_sites(make_vcf):
    path = make_vcf("1 10 . A T . . . GT 0|1 1|1", "1 10 . A C . . . GT 0|1 1|1", "1 10 . AT A . . . GT 0|1 1|1")
    assert len(read_phased(path).sites) == 3


@pytest.mark.parametrize(
    ("genotype", "problem"),
    [
        ("0/1", "not phased"),
        ("./.", "missing"),
        (".|.", "missing"),
        (".", "missing"),
        ("0|.", "missing"),
        ("0", "haploid"),
        ("1", "haploid"),
    ],
)
@pytest.mark.parametrize("keys", ["GT", "GT:DP"])
def test_unusable_genotype(make_vcf, container, genotype, problem, keys):
    depth = ":3" if keys == "GT:DP" else ""
    path = make_vcf(
        f"1 10 . A T . . . {keys} 0|1{depth} 1|1{depth}",
        f"1 12 . A T . . . {keys} 0|1{depth} {genotype}{depth}",
        container=container,
    )
    text = message(path)
    assert "1:12" in text and f"genotype {genotype} of sample B is {problem}" in text


@pytest.mark.parametrize("genotype", ["0|2", "0|1|1", "1|", "x|0", "0}1"])
def test_genotype_that_is_no_pair_of_alleles(make_vcf, genotype):
    assert f"{genotype} of sample A is not one of" in message(make_vcf(f"1 10 . A T . . . GT {genotype} 0|1"))


def test_format_without_gt(make_vcf, container):
    path = make_vcf("1 10 . A T . . . DP 3 4", container=container)
    text = message(path)
    assert "1:10" in text and "FORMAT DP does not start with GT" in text


def test_unsorted(make_vcf, container):
    path = make_vcf("1 10 . A T . . . GT 0|1 1|1", "1 9 . A T . . . GT 0|1 1|1", container=container)
    text = message(path)
    assert "1:9" in text and "follows position 10" in text and "bcftools sort" in text


def test_contig_that_reappears(make_vcf, container):
    path = make_vcf(
        "1 10 . A T . . . GT 0|1 1|1",
        "2 10 . A T . . . GT 0|1 1|1",
        "1 11 . A T . . . GT 0|1 1|1",
        container=container,
    )
    assert "1:11: contig 1 appears a second time" in message(path)


def test_duplicate_site_is_found_across_other_alleles(make_vcf, container):
    path = make_vcf(
        "1 10 . A T . . . GT 0|1 1|1",
        "1 10 . A G . . . GT 0|1 1|1",
        "1 10 . A T . . . GT 0|0 1|1",
        container=container,
    )
    assert "1:10: site A>T appears twice" in message(path)


@pytest.mark.parametrize("real_index", [False, True])
def test_undeclared_contig(make_vcf, real_index):
    path = make_vcf("1 10 . A T . . . GT 0|1 1|1", "3 10 . A T . . . GT 0|1 1|1")
    if real_index:
        # htslib adds the contigs of the index to the header it shows.
        pysam.tabix_index(str(path), preset="vcf", force=True)
    assert "3:10: contig 3 is not declared in the header" in message(path)


def test_wrong_number_of_genotypes(make_vcf):
    path = make_vcf("1 10 . A T . . . GT 0|1 1|1 0|0")
    assert "1:10: it has 3 genotype columns for 2 samples" in message(path)


@pytest.mark.parametrize("record", ["1 x . A T . . . GT 0|1 1|1", "1 10 . A", "nonsense"])
def test_malformed_record(make_vcf, record):
    assert "is not a VCF record" in message(make_vcf(record))


def test_missing_file(tmp_path):
    assert "no such file" in message(tmp_path / "absent.vcf.gz")


def test_uncompressed_vcf(tmp_path):
    path = tmp_path / "plain.vcf"
    path.write_text("##fileformat=VCFv4.3\n")
    assert f"bgzip {path} && tabix -p vcf {path}.gz" in message(path)


def test_gzipped_vcf(tmp_path):
    path = tmp_path / "gzipped.vcf.gz"
    with gzip.open(path, "wb") as out:
        out.write(b"##fileformat=VCFv4.3\n")
    assert "compressed with gzip, not bgzip" in message(path)


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 10])
def test_not_a_vcf(tmp_path, content):
    path = tmp_path / "text.vcf.gz"
    path.write_bytes(content)
    assert "not a bgzipped VCF or a BCF" in message(path)


def test_bgzipped_text_that_is_not_a_vcf(tmp_path):
    path = tmp_path / "text.vcf.gz"
    with pysam.BGZFile(str(path), "wb") as out:
        out.write(b"hello\n")
    assert "not a VCF or BCF" in message(path)


def test_header_without_column_names(tmp_path):
    path = tmp_path / "headless.vcf.gz"
    with pysam.BGZFile(str(path), "wb") as out:
        out.write(b"##fileformat=VCFv4.3\n1\t10\n")
    assert "#CHROM" in message(path)


def test_no_index(make_vcf, container):
    path = make_vcf("1 10 . A T . . . GT 0|1 1|1", index=False, container=container)
    assert f"no index (.tbi or .csi); run `bcftools index {path}`" in message(path)


def test_no_samples(make_vcf, container):
    assert "no samples" in message(make_vcf("1 10 . A T . . .", samples=(), container=container))


def test_repeated_sample(make_vcf):
    assert "sample A appears twice" in message(make_vcf("1 10 . A T . . . GT 0|1 1|1", samples=("A", "A")))


def many_records() -> list[str]:
    rng = np.random.default_rng(0)
    return [
        f"1 {pos} . A T . . . GT {a}|{b} {c}|{d}"
        for pos, (a, b, c, d) in enumerate(rng.integers(2, size=(20_000, 4)).tolist(), start=1)
    ]


@pytest.mark.parametrize("lost", [28, 5000])
def test_truncated(make_vcf, container, lost, capfd):
    path = make_vcf(*many_records(), container=container)
    path.write_bytes(path.read_bytes()[:-lost])
    assert "truncated (no BGZF end marker)" in message(path)
    assert capfd.readouterr().err == ""


def test_damaged_in_the_middle(make_vcf, container, capfd):
    path = make_vcf(*many_records(), container=container)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)
    text = message(path)
    assert re.search(r"after 1:\d+: the next record is damaged", text)
    assert capfd.readouterr().err == ""


def test_record_cut_in_a_complete_file(make_vcf):
    path = make_vcf("1 10 . A T . . . GT 0|1 1|1", "1 12 . A T . . . GT 0|1 1|")
    assert "1:12: the genotype 1| of sample B" in message(path)


# --- dosages of other programs ------------------------------------------------------------------


def test_reads_beagle(make_vcf, container):
    path = make_vcf(
        "1 10 . A T . PASS DR2=0.87;IMP GT:DS:AP1:AP2:GP 0|1:1.1:0.2:0.9:0.08,0.74,0.18 0|0:0.5:0.25:0.25:0.5,0.5,0",
        "1 12 . A T . PASS DR2=1.00 GT:DS:AP1:AP2:GP 0|1:1:0:1:0,1,0 1|1:2:1:1:0,0,1",
        container=container,
    )
    found = read_dosages(path)
    np.testing.assert_allclose(found.dosage, [[1.1, 0.5], [1, 2]], rtol=1e-6)
    np.testing.assert_allclose(found.haplotype_dosage, [[0.2, 0.9, 0.25, 0.25], [0, 1, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(found.gp[0], [[0.08, 0.74, 0.18], [0.5, 0.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(found.dr2, [0.87, 1.0], rtol=1e-6)
    assert found.imputed.tolist() == [True, False]
    assert found.dosage.dtype == found.gp.dtype == found.haplotype_dosage.dtype == found.dr2.dtype == np.float32


def test_reads_minimac(make_vcf, container):
    path = make_vcf(
        "1 10 . A T . PASS IMPUTED;R2=0.4 HDS 0.1,0.3 0,1",
        "1 12 . A T . PASS TYPED GT:HDS 0|1:0.2,0.9 1|1:1,1",
        container=container,
        index=False,
    )
    found = read_dosages(path)
    np.testing.assert_allclose(found.dosage, [[0.4, 1], [1.1, 2]], rtol=1e-6)
    assert found.gp is None
    assert found.dr2[0] == np.float32(0.4) and np.isnan(found.dr2[1])
    assert found.imputed.tolist() == [True, False]


def test_dosage_from_gp_then_from_gt(make_vcf, container):
    path = make_vcf(
        "1 10 . A T . PASS . GT:GP 0|0:0.1,0.6,0.3 0|0:1,0,0",
        "1 12 . A T . PASS . GT 0/1 1|1",
        info=False,
        container=container,
    )
    found = read_dosages(path)
    np.testing.assert_allclose(found.dosage, [[1.2, 0], [1, 2]], rtol=1e-6)
    # A value that some records lack is None for the file.
    assert found.gp is None and found.haplotype_dosage is None and found.dr2 is None and found.imputed is None


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("GT:DS", "0|1:."),
        ("GT:HDS", "0|1:."),
        ("GT:HDS", "0|1:0.5"),
        ("GT:DS:GP", "0|1:1:."),
        ("GT", "./."),
        ("GT:DS", "0|1"),
        ("GT:DS", "0|1:nan"),
        ("GT:DS:GP", "0|1:1:nan,1,0"),
        ("GT:DS:GP", "0|1:1:0,inf,0"),
        ("GT", "0/."),
        ("GT", "."),
    ],
)
def test_missing_dosage(make_vcf, container, keys, value):
    good = {"GT:DS": "0|1:1", "GT:HDS": "0|1:0,1", "GT:DS:GP": "0|1:1:0,1,0", "GT": "0|1"}[keys]
    path = make_vcf(f"1 10 . A T . . . {keys} {good} {value}", container=container)
    with pytest.raises(UserError, match=f"1:10: sample B has {keys} .*missing or not a number"):
        read_dosages(path)


def test_no_dosage_in_format(make_vcf):
    with pytest.raises(UserError, match="1:10: FORMAT DP has no DS"):
        read_dosages(make_vcf("1 10 . A T . . . DP 3 4"))


@pytest.mark.parametrize("keys", ["DP", "GT2:AP1"])
def test_no_dosage_in_format_of_any_kind(make_vcf, keys):
    with pytest.raises(UserError, match=f"1:10: FORMAT {keys} has no DS, HDS, AP1 and AP2, GP or GT"):
        read_dosages(make_vcf(f"1 10 . A T . . . {keys} 3:1 4:1"))


@pytest.mark.parametrize("value", ["2.1", "-0.1"])
def test_impossible_dosage(make_vcf, value):
    path = make_vcf(f"1 10 . A T . . . GT:DS 0|1:1 0|1:{value}")
    with pytest.raises(UserError, match=f"1:10: sample B has dosage {value}, which is not from 0 to 2; impute"):
        read_dosages(path)


def test_r2_that_is_no_number(make_vcf):
    with pytest.raises(UserError, match=r"1:10: its INFO has an r2 that is no number .*high"):
        read_dosages(make_vcf("1 10 . A T . . DR2=high DS 1 2"))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        *(("GT", genotype) for genotype in ("./.", ".|.", ".", "0/.", ".|1")),
        ("GT:DP", "./.:3"),
        ("GT:DP", "./."),
        ("DP:GT", "3"),
        ("GT:DS", "0|1:."),
        ("GT:DS", "0|1"),
        ("GT:HDS", "0|1:.,."),
        ("GT:AP1:AP2", "0|1:0.5:."),
        ("GT:GP", "0|1:."),
    ],
)
def test_missing_value_of_a_truth_is_nan(make_vcf, tmp_path, keys, value):
    good = {"GT": "0|1", "DP": "3", "DS": "1", "HDS": "0,1", "AP1": "0", "AP2": "1", "GP": "0,1,0"}
    path = make_vcf(f"1 10 . A T . . . {keys} {':'.join(good[key] for key in keys.split(':'))} {value}")
    with spool_dosages(path, tmp_path, allow_missing=True) as found:
        np.testing.assert_array_equal(found.dosage(np.arange(1)), [[1, np.nan]])
    with pytest.raises(UserError, match=r"1:10: sample B has .*missing or not a number; impute"):
        read_dosages(path)


@pytest.mark.parametrize(("keys", "value"), [("GT", "x/0"), ("GT", "1"), ("GT:DS", "./.:x"), ("GT:HDS", "0|1:1")])
def test_damaged_value_of_a_truth_is_an_error(make_vcf, tmp_path, keys, value):
    good = {"GT": "0|1", "GT:DS": "0|1:1", "GT:HDS": "0|1:0,1"}[keys]
    path = make_vcf(f"1 10 . A T . . . {keys} {good} {value}")
    what = f"1:10: sample B has {keys} {value}, where a value is not a number; correct it"
    with pytest.raises(UserError, match=re.escape(what)), spool_dosages(path, tmp_path, allow_missing=True):
        pass


def test_pages_and_formats_do_not_matter(make_vcf, tmp_path, monkeypatch):
    """Records have three FORMATs in turn; the last ones have new values only."""
    rng = np.random.default_rng(0)
    records, expected = [], []
    for number in range(60):
        first, second = np.round(rng.random((2, 2)), 1 if number < 30 else 6)
        cells = {
            "DS": [f"{value:.6f}" for value in first + second],
            "GT:HDS": [f"0|1:{a:.6f},{b:.6f}" for a, b in zip(first, second, strict=True)],
            "AP1:AP2:DP": [f"{a:.6f}:{b:.6f}:5" for a, b in zip(first, second, strict=True)],
        }
        keys = list(cells)[number % 3]
        records.append(f"1 {10 + number} . A T . . . {keys} {' '.join(cells[keys])}")
        expected.append(first + second)
    path = make_vcf(*records)
    whole = read_dosages(path)
    np.testing.assert_allclose(whole.dosage, expected, atol=1e-6)
    assert whole.gp is None and whole.haplotype_dosage is None
    monkeypatch.setattr(spool_module, "_PAGE_ENTRIES", 1)
    np.testing.assert_array_equal(read_dosages(path).dosage, whole.dosage)
    with spool_dosages(path, tmp_path) as file:
        assert set(tmp_path.iterdir()) == {path, Path(f"{path}.csi")}
        np.testing.assert_array_equal(
            file.dosage(np.array([50, 2, 3]), np.array([1])), whole.dosage[[50, 2, 3]][:, [1]]
        )


# --- output -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("samples", [1, 3])
def test_write_phased_round_trip(tmp_path, small_sites, samples):
    alleles = np.random.default_rng(1).integers(2, size=(5, 2 * samples)).astype(np.uint8)
    names = tuple(f"s{i}" for i in range(samples))
    path = tmp_path / "out.vcf.gz"
    write_phased(path, small_sites, names, alleles)
    found = read_phased(path)
    np.testing.assert_array_equal(found.alleles, alleles)
    assert list(found.sites.identities()) == list(small_sites.identities())
    assert found.sites.id == small_sites.id
    assert (found.samples, found.sites.contigs, found.sites.contig_lengths) == (
        names,
        small_sites.contigs,
        small_sites.contig_lengths,
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.vcf.gz", "out.vcf.gz.tbi"]


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
    assert " ".join(rows[0]) == ("1 10 rs1 A T . PASS AF=1;DR2=1 GT:DS:HDS:GP 1|1:2.000:1.000,1.000:0.000,0.000,1.000")
    assert [row[9] for row in rows[1:]] == [
        "0|0:0.800:0.400,0.400:0.360,0.480,0.160",
        "0|1:1.001:0.500,0.501:0.250,0.499,0.251",
        "0|1:1.000:0.000,1.000:0.000,1.000,0.000",
        "0|1:1.000:0.250,0.750:0.188,0.624,0.188",
    ]
    assert [row[7] for row in rows[1:]] == [
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
            first, second = (int(part.replace(".", "")) for part in hds.split(","))
            assert int(ds.replace(".", "")) == first + second
            assert gt == f"{int(first > 500)}|{int(second > 500)}"
            gp_thousandths = [int(part.replace(".", "")) for part in gp.split(",")]
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


def test_block_size_does_not_matter(tmp_path, small_sites):
    dosage, typed, alleles = example(small_sites)
    write_imputed(tmp_path / "two.vcf.gz", small_sites, dosage, typed, alleles)
    with ImputedVcfWriter(tmp_path / "one.vcf.gz", small_sites, ["sample0", "sample1", "sample2"], "test") as out:
        out.write(0, dosage, typed, alleles)
    assert text_of(tmp_path / "one.vcf.gz") == text_of(tmp_path / "two.vcf.gz")


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


def test_positions_beyond_what_a_tbi_holds(tmp_path, small_sites):
    far = SiteTable(("1",), (700_000_000,), np.zeros(1, np.int32), np.array([600_000_000]), ["A"], ["T"], ["."])
    path = tmp_path / "out.vcf.gz"
    write_phased(path, small_sites, ["a"], np.zeros((5, 2), np.uint8))
    write_phased(path, far, ["a"], np.zeros((1, 2), np.uint8))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.vcf.gz", "out.vcf.gz.csi"]
    assert pysam.bcftools.view("-H", str(path), "1:600000000-600000001") != ""


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
    with pytest.raises(UserError, match=r"out.bcf: .*ending in .vcf.gz"):
        ImputedVcfWriter(tmp_path / "out.bcf", small_sites, ["a"], "test")
    with pytest.raises(UserError, match=r"folder .*absent does not exist"):
        ImputedVcfWriter(tmp_path / "absent" / "out.vcf.gz", small_sites, ["a"], "test")
    with pytest.raises(UserError, match=r"ending in .vcf.gz"):
        write_phased(tmp_path / "out.vcf", small_sites, ["a"], np.zeros((5, 2), np.uint8))
