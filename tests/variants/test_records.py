"""Records of VCF and BCF files, and phased input."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools
import pytest

from embrag_ds.errors import UserError
from embrag_ds.variants.records import PhasedVcf, read_phased


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
