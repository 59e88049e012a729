"""Dosages of other programs and of truth files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.errors import UserError
from embrag_ds.variants import spool as spool_module
from embrag_ds.variants.dosages import spool_dosages
from embrag_ds.variants.genotypes import DIPLOID, HAPLOID
from tests.whole_files import read_dosages


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
        ("GT:DS", ".|1"),
        ("GT:DS", "."),
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
        *(("GT", genotype) for genotype in ("./.", ".|.", ".", "0/.", ".|1", "|.|1", "/./.")),
        ("GT:DP", "./.:3"),
        ("GT:DP", "./."),
        ("DP:GT", "3"),
        ("GT:DS", "./.:1"),
        ("GT:DS", ".|1:0.5"),
        ("DS", "."),
        ("DP:DS", "3"),
        ("HDS", ".,."),
        ("HDS", "."),
        ("AP1:AP2", "0.5:."),
        ("GP", "."),
        ("GP", ".,.,."),
    ],
)
def test_missing_value_of_a_truth_is_nan(make_vcf, tmp_path, keys, value):
    good = {"GT": "0|1", "DP": "3", "DS": "1", "HDS": "0,1", "AP1": "0", "AP2": "1", "GP": "0,1,0"}
    path = make_vcf(f"1 10 . A T . . . {keys} {':'.join(good[key] for key in keys.split(':'))} {value}")
    with spool_dosages(path, tmp_path, truth=True) as found:
        np.testing.assert_array_equal(found.dosage(np.arange(1)), [[1, np.nan]])
    if ":1" not in value and ":0.5" not in value:
        with pytest.raises(UserError, match=r"1:10: sample B has .*missing or not a number; impute"):
            read_dosages(path)


@pytest.mark.parametrize(
    ("keys", "value"), [("DS", "x"), ("HDS", "1,2,3"), ("DS", "nan"), ("DS", "1_0"), ("DS", "1,1"), ("GP", "1,0,0,0")]
)
def test_damaged_value_of_a_truth_is_an_error(make_vcf, tmp_path, keys, value):
    good = {"DS": "1", "HDS": "0,1", "GP": "0,1,0"}[keys]
    path = make_vcf(f"1 10 . A T . . . {keys} {good} {value}")
    what = f"1:10: sample B has {keys} {value}, where a value is not a number; correct it"
    with pytest.raises(UserError, match=re.escape(what)), spool_dosages(path, tmp_path, truth=True):
        pass


@pytest.mark.parametrize("truth", [False, True])
@pytest.mark.parametrize(
    ("genotype", "why"),
    [
        ("x/0", "is not a genotype"),
        ("0|1|1", "has 3 alleles"),
        ("0|2", "has an allele above 1"),
        ("0|-1", "is not a genotype"),
        ("0|", "is not a genotype"),
        ("", "is not a genotype"),
        ("0|1_0", "is not a genotype"),
    ],
)
def test_damaged_genotype_is_an_error(make_vcf, tmp_path, genotype, why, truth):
    for keys, value in (("GT", genotype), ("GT:DS", f"{genotype}:1")):
        path = make_vcf(f"1 10 . A T . . . {keys} {'0|1:1' if keys != 'GT' else '0|1'} {value}")
        what = f"1:10: sample B has the genotype {genotype!r}, which {why}"
        with pytest.raises(UserError, match=re.escape(what)), spool_dosages(path, tmp_path, truth=truth):
            pass


TRUTHS = {
    "phased": ("GT 0|1 1|1", [1, 2]),
    "unphased": ("GT 1/0 0/0", [1, 0]),
    "haploid and diploid": ("GT 1 0|1", [1, 1]),
    "VCF 4.4": ("GT |0|1 /1/1", [1, 2]),
    "GT anywhere": ("DP:GT:DS 3:1|1:0 3:0/1:0", [2, 1]),
    "left-over DS": ("GT:DS 0|1:0.02 1|1:1.2", [1, 2]),
    "left-over DS that is none": ("GT:DS:GP 0|1:x:9,9 1|1:-7:nan", [1, 2]),
    "trailing fields left out": ("GT:DS:GP 0|1:2 1|1", [1, 2]),
    "DS alone": ("DS 0.25 1.5", [0.25, 1.5]),
}


@pytest.mark.parametrize("kind", TRUTHS)
def test_truths(make_vcf, tmp_path, container, kind):
    values, expected = TRUTHS[kind]
    if container == "bcf" and kind in ("VCF 4.4", "left-over DS that is none"):
        pytest.skip("bcftools cannot write it")
    path = make_vcf(f"1 10 . A T . . . {values}", "1 12 . A T . . . GT 0|0 0|1", container=container)
    with spool_dosages(path, tmp_path, truth=True) as found:
        np.testing.assert_allclose(found.dosage(np.arange(2)), [expected, [0, 1]])
        assert found.is_called == (kind != "DS alone")
        assert not found.has_gp.any() and not found.has_haplotypes
        assert (HAPLOID in found.ploidies) == ("haploid" in kind)
        if "haploid" in kind:
            assert found.ploidy(np.arange(2)).tolist() == [[HAPLOID, DIPLOID], [DIPLOID, DIPLOID]]


def test_truth_without_alt_is_a_site(make_vcf, tmp_path):
    path = make_vcf("1 10 . A . . . . GT 0/0 ./.", "1 12 . A . . . . DS 0 1")
    with spool_dosages(path, tmp_path, truth=True) as found:
        np.testing.assert_array_equal(found.dosage(np.arange(2)), [[0, np.nan], [np.nan, np.nan]])
    assert len(read_dosages(path).sites) == 0


def test_multiallelic_truth_counts_each_alt(make_vcf, tmp_path, container):
    path = make_vcf("1 10 . A T,C,* . . . GT 1|2 2", "1 12 . A T,C . . . GT 0/2 .|1", container=container)
    with spool_dosages(path, tmp_path, truth=True) as found:
        dosage = found.dosage(np.arange(5))
    assert found.sites.alt == ["T", "C", "*", "T", "C"]
    np.testing.assert_array_equal(dosage, [[1, 0], [1, 1], [0, 0], [0, np.nan], [1, np.nan]])


IMPUTED = {
    # Values of the second sample: dosage, haplotypes, GP; ploidy.
    "Beagle, haploid": ("GT:DS:AP1:AP2:GP 0|1:1:0:1:0,1,0 0:0.12:0.12:.:.", 0.12, (0.12, 0.12), (0.88, 0.12, 0), 1),
    "minimac4, haploid": ("GT:GP:DS:HDS 0|1:0,1,0:1:0,1 1:0.2,0.8:0.8:0.8", 0.8, (0.8, 0.8), (0.2, 0.8, 0), 1),
    "ours, haploid": ("GT:DS:HDS:GP 0|1:1:0,1:0,1,0 1:0.8:0.8:0.2,0.8", 0.8, (0.8, 0.8), (0.2, 0.8, 0), 1),
    "HDS without GT": ("HDS 0,1 0.3", 0.3, (0.3, 0.3), None, 1),
    "GP without GT": ("GP 0,1,0 0.7,0.3", 0.3, None, (0.7, 0.3, 0), 1),
    "DS tells no ploidy": ("DS 1 0.3", 0.3, None, None, 0),
    "haploid GT": ("GT 0|1 1", 1, None, None, 1),
    "two decimals": ("GT:DS:GP 0|1:1:0,1,0 0|1:1:0.25,0.52,0.24", 1, None, (0.25, 0.52, 0.24), 2),
    "two decimals, zeros behind": ("DS:GP 1:0,1,0 1:0.2500,0.5200,0.2400", 1, None, (0.25, 0.52, 0.24), 2),
    "exponents": ("DS:GP 1:0,1,0 1:6.99994e-06,0.00798602,0.992007", 1, None, (0, 0.00798602, 0.992007), 2),
    "above 2 and 1": ("DS:HDS:GP 1:0,1:0,1,0 2.0001:1.0001,1.0001:-0.0001,0,1.0001", 2, (1, 1), (0, 0, 1), 2),
    "below 0": ("DS:HDS 1:0,1 -0.0001:-0.0001,-0", 0, (0, 0), None, 2),
    "AP above 1": ("AP1:AP2 0:1 1.0001:1", 2, (1, 1), None, 2),
    "haploid above 1": ("GT:DS 0|1:1 1:1.0001", 1, None, None, 1),
    "missing GT": ("GT:DS 0|1:1 ./.:0.4", 0.4, None, None, 2),
    "PLINK 2, DS left out": ("GT:DS 0|1:1 1|1", 2, None, None, 2),
    "PLINK 2, HDS left out": ("GT:DS:HDS 0|1:1:0,1 0|0:0.002", 0.002, None, None, 2),
    "PLINK 2, both left out": ("GT:DS:HDS 0|1:1:0,1 1|0", 1, (1, 0), None, 2),
    "PLINK 2, GP left out": ("GT:GP 0|1:0,1,0 1|1", 2, None, (0, 0, 1), 2),
    "left out, haploid": ("GT:DS:HDS:GP 0|1:1:0,1:0,1,0 1", 1, (1, 1), (0, 1, 0), 1),
    "only GT": ("GT 0|1 1|1", 2, None, None, 2),
    "DS twice": ("GT:DS:DS 0|1:1:0 0|0:0.1:2", 0.1, None, None, 2),
}


@pytest.mark.parametrize("kind", IMPUTED)
def test_imputed_files(make_vcf, tmp_path, kind):
    text, dosage, haplotypes, gp, ploidy = IMPUTED[kind]
    path = make_vcf(f"1 10 . A T . . . {text}")
    one = np.arange(1)
    with spool_dosages(path, tmp_path) as found:
        np.testing.assert_allclose(found.dosage(one), [[1, dosage]], atol=1e-6)
        np.testing.assert_allclose(
            found.haplotype_dosage(one)[0, 2:], (np.nan, np.nan) if haplotypes is None else haplotypes, atol=1e-6
        )
        np.testing.assert_allclose(found.gp(one)[0, 1], (np.nan,) * 3 if gp is None else gp, atol=2e-4)
        assert found.ploidy(one)[0, 1] == ploidy and ploidy in found.ploidies
        assert found.has_gp.tolist() == [gp is not None]


REFUSED = {
    "sum": ("GT:DS:GP", "0|1:1:0.2,0.2,0.2", "GP 0.2,0.2,0.2, which has the sum 0.6, not 1; write it as .* so that DS"),
    "sum, two decimals": ("GT:GP", "0|1:0.5,0.27,0.25", "GP .*, which has the sum 1.02, not 1; .*so that GT counts"),
    "sum, three decimals": ("GP", "0.502,0.25,0.25", "GP .*, which has the sum 1.002, not 1; .* from 0 to 1$"),
    "sum of 0": ("GP", "0,0,0", "GP 0,0,0, which has the sum 0, not 1"),
    "sum, haploid": ("GT:DS:GP", "1:1:0.2,0.2", "GP 0.2,0.2, which has the sum 0.4, not 1"),
    "out of range": ("GT:DS:GP", "0|1:1:-5,7,-1", "GP -5,7,-1, which is not from 0 to 1"),
    "just out of range": ("GT:DS:GP", "0|1:1:-0.01,1,0.01", "GP .*, which is not from 0 to 1"),
    "log10": (
        "GT:DS:GP",
        "0|1:1:-0.05,-1.2,-5",
        r"GP .*, which is log10-scaled, as GP was before VCF 4\.3; .*-x FORMAT/GP",
    ),
    "log10, certain": ("GT:DS:GP", "0|1:1:0,-5,-5", "GP 0,-5,-5, which is log10-scaled"),
    "phred": ("GT:DS:GP", "0|1:1:30,0.004,52", "GP .*, which is phred-scaled"),
    "nan": ("GT:DS:GP", "0|1:1:nan,0,0", "GT:DS:GP .*missing or not a number"),
    "inf": ("GT:DS:GP", "0|1:1:inf,0,0", "GT:DS:GP .*missing or not a number"),
    "huge": ("GT:DS", "0|1:1e999", "GT:DS .*missing or not a number"),
    "underscore": ("GT:DS", "0|1:1_0", "GT:DS .*missing or not a number"),
    "too many GP": ("GT:DS:GP", "0|1:1:0.25,0.25,0.25,0.25", "GT:DS:GP .*missing or not a number"),
    "GP of a diploid": ("GT:DS:GP", "0:1:0,0,1", "GT:DS:GP .*missing or not a number"),
    "GP of a haploid": ("GT:DS:GP", "0|1:1:0,1", "GT:DS:GP .*missing or not a number"),
    "GP left out beside DS": ("GT:DS:GP", "0|1:0.7", "GT:DS:GP .*missing or not a number"),
    "HDS of a haploid": ("GT:HDS", "0|1:0.5", "GT:HDS .*missing or not a number"),
    "AP2 of a diploid": ("GT:DS:AP1:AP2", "0|1:1:1:.", "GT:DS:AP1:AP2 .*missing or not a number"),
    "AP2 of a haploid": ("GT:DS:AP1:AP2", "1:1:1:0", "GT:DS:AP1:AP2 .*missing or not a number"),
    "HDS above 1": ("GT:DS:HDS", "0|1:1:1.1,0", "HDS 1.1,0, which is not from 0 to 1; impute"),
    "HDS below 0": ("GT:DS:HDS", "0|1:1:1,-0.1", "HDS 1,-0.1, which is not from 0 to 1"),
    "AP above 1": ("AP1:AP2", "1:1.01", "AP2 1.01, which is not from 0 to 1"),
    "DS above 2": ("GT:DS", "0|1:2.01", "dosage 2.01, which is not from 0 to 2; impute"),
    "DS above 1": ("GT:DS", "1:1.9", "dosage 1.9 of a haploid sample, which is not from 0 to 1"),
    "two DS": ("GT:DS", "0|1:1,0", "GT:DS .*missing or not a number"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_impossible_values_are_named(make_vcf, kind):
    keys, value, what = REFUSED[kind]
    good = {"GT": "0|1", "DS": "1", "HDS": "0,1", "AP1": "0", "AP2": "1", "GP": "0,1,0"}
    path = make_vcf(f"1 10 . A T . . . {keys} {':'.join(good[key] for key in keys.split(':'))} {value}")
    with pytest.raises(UserError, match=f"in\\.vcf\\.gz: 1:10: sample B has {what}"):
        read_dosages(path)


def test_multiallelic_imputed_files(make_vcf, container):
    """Probabilities are added over the genotypes with as many copies; HDS has the first haplotype first."""
    path = make_vcf(
        "1 10 . A T,C . . DR2=0.5,0.25;IMP GT:DS:HDS:GP 1|2:0.9,0.8:0.7,0.1,0.2,0.7:0.02,0.2,0.14,0.05,0.52,0.07"
        " 2:0.1,0.6:0.1,0.6:0.3,0.1,0.6",
        "1 12 . A T . . DR2=0.75;IMP GT:DS:HDS:GP 0|1:1:0,1:0,1,0 1:1:1:0,1",
        container=container,
    )
    found = read_dosages(path)
    assert found.sites.alt == ["T", "C", "T"]
    np.testing.assert_allclose(found.dosage, [[0.9, 0.1], [0.8, 0.6], [1, 1]], atol=1e-6)
    np.testing.assert_allclose(
        found.haplotype_dosage, [[0.7, 0.2, 0.1, 0.1], [0.1, 0.7, 0.6, 0.6], [0, 1, 1, 1]], atol=1e-6
    )
    # Order of genotypes: 0/0, 0/1, 1/1, 0/2, 1/2, 2/2.
    expected = [[0.02 + 0.05 + 0.07, 0.2 + 0.52, 0.14], [0.02 + 0.2 + 0.14, 0.05 + 0.52, 0.07], [0, 1, 0]]
    np.testing.assert_allclose(found.gp[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(found.gp[:, 1], [[0.9, 0.1, 0], [0.4, 0.6, 0], [0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(found.dr2, [0.5, 0.25, 0.75])


def test_beagle_with_several_alts(make_vcf):
    found = read_dosages(
        make_vcf("1 10 . A T,C . . . GT:DS:AP1:AP2:GP 0|2:0,1:0,0:0,1:0,0,0,1,0,0 1:0.9,0.1:0.9,0.1:.,.:.")
    )
    np.testing.assert_allclose(found.dosage, [[0, 0.9], [1, 0.1]], atol=1e-6)
    np.testing.assert_allclose(found.gp, [[[1, 0, 0], [0.1, 0.9, 0]], [[0, 1, 0], [0.9, 0.1, 0]]], atol=1e-6)


def test_files_as_people_have_them(tmp_path, caplog):
    """Plain text, an empty line, no contig lines, bytes that are not UTF-8, a duplicate, CRLF, another FORMAT."""
    columns = "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", "A"])
    body = [
        "##fileformat=VCFv4.2",
        '##INFO=<ID=R2,Number=1,Type=Float,Description="r2">',
        columns,
        "1\t10\tf\xfcr\tA\tT\t.\t.\tNOTE=\xe9;XR2=5;R2=1.00001\tGT:DS\t0|1:0.9",
        "",
        "1\t10\t.\tA\tT\t.\t.\tR2=.\tGT:DS\t0|1:0.1",
        "1\t12\t.\tA\tT\t.\t.\tR2=0.5\tHDS:GT\t0.25,0.5:0|1",
    ]
    (tmp_path / "in.vcf").write_bytes("\r\n".join([*body, ""]).encode("latin-1"))
    found = read_dosages(tmp_path / "in.vcf")
    np.testing.assert_allclose(found.dosage, [[0.9], [0.75]], atol=1e-6)
    np.testing.assert_allclose(found.dr2, [1, 0.5], atol=1e-4)
    assert "empty line" in caplog.text


def test_r2_of_the_file(make_vcf, caplog):
    """A value for each ALT or one for all; one that is not from 0 to 1 is taken as it is, with a warning."""
    found = read_dosages(
        make_vcf(
            "1 10 . A T,C . . DR2=0.5,. DS 1,0 1,1",
            "1 12 . A T,C . . R2=0.3 DS 1,0 1,1",
            "1 14 . A T . . R2=1.2;DR2=0.1 DS 1 1",
            "1 16 . A T . . R2=1.2 DS 1 1",
            "1 18 . A T . . R2=nan DS 1 1",
        )
    )
    np.testing.assert_allclose(found.dr2, [0.5, np.nan, 0.3, 0.3, 0.1, 1.2, np.nan], rtol=1e-6)
    assert "the r2 in INFO of 1 records is not from 0 to 1" in caplog.text


@pytest.mark.parametrize("value", ["high", "", "1e999", "1_0", "0.5,0.5"])
def test_r2_that_is_no_number_of_any_kind(make_vcf, value):
    with pytest.raises(UserError, match=r"1:10: its INFO has an r2 that is no number .*-x INFO/DR2"):
        read_dosages(make_vcf(f"1 10 . A T . . DR2={value} DS 1 2"))


def test_minimac_marks_typed_sites_twice(make_vcf):
    found = read_dosages(make_vcf("1 10 . A T . . TYPED;IMPUTED DS 1 2", "1 12 . A T . . IMPUTED DS 1 2"))
    assert found.imputed is not None and found.imputed.tolist() == [False, True]


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
