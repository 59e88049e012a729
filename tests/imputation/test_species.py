"""Imputation of a species without a genetic map: inbred lines of maize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pysam.bcftools
import pytest

from embrag_ds.data.inputs import PanelFiles
from embrag_ds.imputation.impute import impute

REGION = "10:1-30000000"


@pytest.mark.real
def test_maize_is_imputed_without_a_map(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = real_data.parent / "maize" / "maize.drops246.phased.vcf.gz"
    if not source.is_file():
        pytest.skip(f"no maize data at {source}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pysam.VariantFile(str(source)) as records:
        lines = list(records.header.samples)
        positions = [record.pos for record in records.fetch("10", 0, 30_000_000)]
    (tmp_path / "typed.tsv").write_text("".join(f"10\t{pos}\n" for pos in positions[::10]))
    panel, truth, target = (tmp_path / f"{name}.vcf.gz" for name in ("panel", "truth", "target"))
    for path, names, sites in ((panel, lines[:120], []), (truth, lines[120:132], []), (target, lines[120:132], ["-T"])):
        typed = [*sites, str(tmp_path / "typed.tsv")] if sites else []
        options = ["-r", REGION, "-s", ",".join(names), *typed, "-Oz", "-o", str(path), str(source)]
        pysam.bcftools.view(*options, catch_stdout=False)
        pysam.bcftools.index("-t", str(path), catch_stdout=False)

    found = []
    for size in (None, 1_000.0):
        out = tmp_path / f"{size}.vcf.gz"
        impute(PanelFiles(panel, cm_per_mb=0.7, effective_size=size), target, out, device="cpu", adapt="off")
        with pysam.VariantFile(str(out)) as records:
            rows = [(each.pos, [call["DS"] for call in each.samples.values()]) for each in records]
            assert list(records.header.samples) == lines[120:132]
        assert [pos for pos, _ in rows] == positions
        found.append(np.array([dosages for _, dosages in rows]))
    with pysam.VariantFile(str(truth)) as records:
        expected = np.array([[sum(call["GT"]) for call in each.samples.values()] for each in records])
    untyped = np.arange(len(positions)) % 10 > 0
    for dosage in found:
        assert ((dosage >= 0) & (dosage <= 2)).all()
        # It runs: accuracy is another matter.
        assert np.corrcoef(dosage[untyped].ravel(), expected[untyped].ravel())[0, 1] ** 2 > 0.3
    assert not np.array_equal(*found)
