"""What a target haplotype copies from the panel, on targets of which that is known."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelFiles, PanelInputs
from embrag_ds.data.simulate import DefaultData
from embrag_ds.errors import UserError
from embrag_ds.export import write_export
from embrag_ds.imputation.copied import Copied, copied_by
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable
from tests.untrained import untrained
from tests.whole_files import PhasedData, read_phased


@dataclass
class Files:
    """A panel and a target ``t``, of which the first haplotype is a mosaic of two of the panel's."""

    panel: PhasedData
    files: PanelFiles
    model: Path
    folder: Path

    def target(self, alleles: np.ndarray, typed: np.ndarray, sample: str = "t") -> Path:
        """File with the alleles [S, 2] of a sample at the sites ``typed``."""
        path = self.folder / f"{sample}.vcf.gz"
        write_phased(path, self.panel.sites.take(typed), [sample], alleles[typed])
        return path

    def copied(self, target: Path, haplotype: int = 0, sample: str = "t") -> Copied:
        return copied_by(sample, haplotype, self.files, target, model=self.model, cache_dir=self.folder / "cache")


def slow_alone(make_config: Callable[..., RunConfig], path: Path, *overrides: str) -> None:
    """Write a model in which the slow copying model has all the weight."""
    model = untrained(make_config(*overrides), head=0.0)
    if "pooling.slow" in model.arrays:
        model.arrays["pooling.slow"] = np.array([10, 0], dtype=np.float32)
    write_export(path, model)


@pytest.fixture
def known(simulated: DefaultData, make_config, tmp_path: Path) -> Files:
    slow_alone(make_config, tmp_path / "model.safetensors")
    files = PanelFiles(simulated.panel, simulated.genetic_map, simulated.samples)
    return Files(read_phased(simulated.panel), files, tmp_path / "model.safetensors", tmp_path)


@pytest.fixture
def typed(simulated: DefaultData, known: Files) -> np.ndarray:
    """Rows of the simulated targets' typed sites."""
    return np.flatnonzero(np.isin(known.panel.sites.pos, read_phased(simulated.target).sites.pos))


def mosaic(panel: PhasedData, first: int, second: int) -> np.ndarray:
    """Alleles [S, 2]: haplotype ``first`` of the panel and ``second`` half way, and a constant haplotype beside."""
    middle = len(panel.sites) // 2
    joined = np.concatenate([panel.alleles[:middle, first], panel.alleles[middle:, second]])
    return np.stack([joined, panel.alleles[:, 40]], axis=1)


@pytest.mark.parametrize("haplotype", [0, 1])
def test_the_haplotypes_of_a_mosaic_are_found(known: Files, typed: np.ndarray, haplotype: int) -> None:
    alleles = mosaic(known.panel, 7, 90)
    found = known.copied(known.target(alleles, typed), haplotype)
    assert found.samples == known.panel.samples and found.sites.pos.tolist() == known.panel.sites.pos.tolist()
    assert found.typed.tolist() == typed.tolist()
    assert found.probability.shape == (len(typed), known.panel.alleles.shape[1])
    np.testing.assert_allclose(found.probability.sum(1), 1, atol=1e-5)
    here = known.panel.alleles[typed]
    of_source = []
    for place in range(4, len(typed) - 4):
        if haplotype == 0 and abs(place - len(typed) / 2) < 12:
            continue  # where the mosaic changes sides
        near = slice(place - 4, place + 5)
        alike = (here[near] == alleles[typed][near, haplotype][:, None]).all(axis=0)
        assert found.probability[place, alike].sum() > 0.95
        source = 40 if haplotype else (7 if place < len(typed) / 2 else 90)
        of_source.append(found.probability[place, source])
    assert np.mean(of_source) > 6 / found.probability.shape[1]
    assert (found.dosage.round() == alleles[:, haplotype]).mean() > 0.97


def test_the_dosage_is_the_mean_allele_of_what_is_copied(known: Files, typed: np.ndarray, inputs: PanelInputs) -> None:
    found = known.copied(known.target(mosaic(known.panel, 7, 90), typed))
    cm = inputs.position_cm
    between = [np.interp(cm, cm[typed], each) for each in found.probability.T]
    expected = (np.stack(between, axis=1) * known.panel.alleles).sum(1)
    np.testing.assert_allclose(found.dosage, expected, atol=1e-4)


def test_missing_alleles_are_filled_in_and_not_copied_from(known: Files, typed: np.ndarray) -> None:
    """A missing allele at every other site counts as no mismatch, whatever is written beside it."""
    alleles = mosaic(known.panel, 7, 7)
    path = known.target(alleles, typed)
    text = [line.split("\t") for line in _lines(path)]
    for number, line in enumerate(text):
        if number % 2:
            line[-1] = ".|" + line[-1][2:]
    (known.folder / "missing.vcf").write_text("".join("\t".join(line) + "\n" for line in [*_header(path), *text]))
    found = known.copied(known.folder / "missing.vcf")
    apart = found.dosage[typed][1::2] - alleles[typed][1::2, 0]
    assert found.typed.tolist() == typed.tolist() and np.abs(apart).mean() < 0.1


def _header(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in _text(path) if line.startswith("#")]


def _lines(path: Path) -> list[str]:
    return [line for line in _text(path) if not line.startswith("#")]


def _text(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def test_a_sample_of_the_panel_does_not_copy_itself(known: Files, typed: np.ndarray) -> None:
    name = known.panel.samples[5]
    found = known.copied(known.target(known.panel.alleles[:, 10:12], typed, name), 1, name)
    assert (found.probability[:, 10:12] == 0).all()
    np.testing.assert_allclose(found.probability.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("both", [False, True])
def test_contigs_are_copied_apart(known: Files, typed: np.ndarray, both: bool) -> None:
    whole, middle = known.panel, len(known.panel.sites) // 2
    contig = (np.arange(len(whole.sites)) >= middle).astype(np.int32)
    sites: SiteTable = replace(whole.sites, contigs=("1", "2"), contig_lengths=(0, 0), contig=contig, record=None)
    known.panel = replace(whole, sites=sites)
    write_phased(known.folder / "panel.vcf.gz", sites, whole.samples, whole.alleles)
    known.files = PanelFiles(known.folder / "panel.vcf.gz")
    rows = typed if both else typed[typed < middle]
    found = known.copied(known.target(mosaic(whole, 7, 90), rows))
    assert found.typed.tolist() == rows.tolist() and len(found.probability) == len(rows)
    agrees = found.dosage.round() == mosaic(whole, 7, 90)[:, 0]
    assert agrees[:middle].mean() > 0.97
    if both:
        assert agrees[middle:].mean() > 0.97
    else:
        np.testing.assert_allclose(found.dosage[middle:], whole.alleles[middle:].mean(axis=1), atol=1e-6)


def test_what_cannot_be_copied_is_refused(known: Files, typed: np.ndarray, make_config) -> None:
    target = known.target(mosaic(known.panel, 7, 90), typed)
    with pytest.raises(UserError, match=r"t\.vcf\.gz: it has no sample s; the first is t"):
        known.copied(target, sample="s")
    with pytest.raises(UserError, match="haplotype 2: a sample has the haplotypes 0 and 1"):
        known.copied(target, 2)
    slow_alone(make_config, known.model, "embrag.model.fusion=rare_variant")
    with pytest.raises(UserError, match="it has the fusion rare_variant; give a model with copying"):
        known.copied(target)


def test_a_panel_smaller_than_the_overlap_of_windows(known: Files, typed: np.ndarray) -> None:
    whole = known.panel
    known.panel = replace(whole, sites=whole.sites.take(np.arange(20)), alleles=whole.alleles[:20])
    write_phased(known.folder / "panel.vcf.gz", known.panel.sites, whole.samples, known.panel.alleles)
    known.files = PanelFiles(known.folder / "panel.vcf.gz")
    found = known.copied(known.target(mosaic(known.panel, 7, 7), typed[typed < 20]))
    assert found.dosage.shape == (20,) and len(found.typed) == (typed < 20).sum() > 0
