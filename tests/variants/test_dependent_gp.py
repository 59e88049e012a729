"""GP of haplotypes that depend on each other."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.dependence import Dependence
from embrag_ds.variants.output import ImputedVcfWriter
from tests.variants.test_output import text_of


def test_gp_by_hand_and_everything_else_as_before(tmp_path: Path, small_sites) -> None:
    """Of .3 and .4, half as opposite as can be: .5 x .12 less of both homozygotes. Haploid samples have one haplotype.

    Half as alike as can be: .5 x .18 more of both.
    """
    dosage = np.full((4, 5), 0.25, dtype=np.float32)
    dosage[:2] = np.array([[0.3], [0.4]])
    haploid = np.zeros((2, 5), dtype=bool)
    haploid[1] = True
    found = {}
    for name, dependence in {
        "opposite": Dependence(0.5, 0.0),
        "alike": Dependence(0.0, 0.5),
        "none": Dependence(),
    }.items():
        path = tmp_path / f"{name}.vcf.gz"
        with ImputedVcfWriter(path, small_sites, ["one", "two"], "test", dependence=dependence) as out:
            out.write(0, dosage, np.zeros(5, dtype=bool), np.zeros(dosage.shape, dtype=np.uint8), haploid=haploid)
        found[name] = text_of(path)[0][9:]
    assert found["none"] == ["0|0:0.7:0.3,0.4:0.42,0.46,0.12", "0:0.25:0.25:0.75,0.25"]
    assert found["opposite"] == ["0|0:0.7:0.3,0.4:0.36,0.58,0.06", found["none"][1]]
    assert found["alike"] == ["0|0:0.7:0.3,0.4:0.51,0.28,0.21", found["none"][1]]


@pytest.mark.parametrize("dependence", [Dependence(0.37, 0.0), Dependence(0.0, 0.97), Dependence(0.4, 0.6)])
def test_dosages_follow_from_gp_within_rounding(tmp_path: Path, small_sites, dependence: Dependence) -> None:
    dosage = np.random.default_rng(3).random((400, 5)).astype(np.float32)
    path = tmp_path / "out.vcf.gz"
    with ImputedVcfWriter(path, small_sites, [f"s{n}" for n in range(200)], "test", dependence=dependence) as out:
        out.write(0, dosage, np.zeros(5, dtype=bool), np.zeros(dosage.shape, dtype=np.uint8))
    for row in text_of(path):
        for text in row[9:]:
            _, dose, _, gp = text.split(":")
            none, one, two = map(float, gp.split(","))
            assert min(none, one, two) >= 0 and none + one + two == pytest.approx(1)
            assert one + 2 * two == pytest.approx(float(dose), abs=0.0021)


def test_the_header_says_how(tmp_path: Path, small_sites) -> None:
    for dependence, text in (
        (Dependence(), "products of HDS"),
        (Dependence(0.39, 0.1), "by 0.39 min(ab, (1-a)(1-b)) - 0.1"),
    ):
        path = tmp_path / f"{dependence.alike}.vcf.gz"
        with ImputedVcfWriter(path, small_sites, ["one"], "test", dependence=dependence) as out:
            out.write(0, np.zeros((2, 5), np.float32), np.ones(5, dtype=bool), np.zeros((2, 5), dtype=np.uint8))
        header = gzip.decompress(path.read_bytes()).decode()
        (line,) = [each for each in header.splitlines() if each.startswith("##FORMAT=<ID=GP,")]
        assert text in line
