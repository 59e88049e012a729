"""Phased files."""

from __future__ import annotations

import numpy as np
import pysam.bcftools
import pytest

from embrag_ds.errors import UserError
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable
from tests.whole_files import read_phased


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


def test_positions_beyond_what_a_tbi_holds(tmp_path, small_sites):
    far = SiteTable(("1",), (700_000_000,), np.zeros(1, np.int32), np.array([600_000_000]), ["A"], ["T"], ["."])
    path = tmp_path / "out.vcf.gz"
    write_phased(path, small_sites, ["a"], np.zeros((5, 2), np.uint8))
    write_phased(path, far, ["a"], np.zeros((1, 2), np.uint8))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.vcf.gz", "out.vcf.gz.csi"]
    assert pysam.bcftools.view("-H", str(path), "1:600000000-600000001") != ""


def test_output_name(tmp_path, small_sites):
    with pytest.raises(UserError, match=r"ending in .vcf.gz"):
        write_phased(tmp_path / "out.vcf", small_sites, ["a"], np.zeros((5, 2), np.uint8))
