"""Dosages of other programs and of truth files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.errors import UserError
from embrag_ds.variants import spool as spool_module
from embrag_ds.variants.dosages import read_dosages, spool_dosages


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
