"""Training on panels that people have: rules for what is missing, and panels without anything to learn or to score."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.training import run
from embrag_ds.training.trainer import Trainer
from tests.cases.files import embrag
from tests.conftest import TINY, MakeConfig

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t"


def panel(folder: Path, alleles: np.ndarray) -> Path:
    """Write a panel of these alleles [S, 2N]."""
    path = folder / "panel.vcf"
    samples = "\t".join(f"P{number}" for number in range(alleles.shape[1] // 2))
    lines = []
    for number, row in enumerate(alleles):
        calls = "\t".join(f"{one}|{two}" for one, two in row.reshape(-1, 2))
        lines.append(f"1\t{1000 * (number + 1)}\t.\tA\tC\t.\t.\t.\tGT\t{calls}\n")
    path.write_text(f"{HEADER}{samples}\n{''.join(lines)}")
    return path


def some_alleles(sites: int = 100, samples: int = 30) -> np.ndarray:
    return (np.random.default_rng(4).random((sites, 2 * samples)) < 0.3).astype(np.int64)


def trainer(path: Path, make_config: MakeConfig, distributed: DistributedContext) -> Trainer:
    """A trainer of the tiny run on a panel."""
    config = make_config()
    return Trainer(config, open_inputs(PanelFiles(path), config.embrag.data), path.parent / "run", distributed, False)


@pytest.fixture(autouse=True)
def one_group(distributed: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands join the process group of all tests in this process, and leave it open."""
    monkeypatch.setattr(run, "start_distributed", lambda patience_s: distributed)
    monkeypatch.setattr(DistributedContext, "close", lambda self: None)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[list[str]]:
    """The command line of the tiny run, in a folder."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    yield ["train", "--deepspeed_config", str(config), "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path)]


def test_a_panel_without_variants_is_refused(tmp_path: Path, tiny: list[str]) -> None:
    path = panel(tmp_path, np.zeros((100, 60), dtype=np.int64))
    status, lines, _ = embrag(*tiny, "--panel", path)
    assert status == 2
    assert lines[-1].startswith(f"error: {path}: none of its 100 sites varies among the 27 samples to train on; give a")
    assert "warning: panel" in "\n".join(lines) and not (tmp_path / "run" / "model.safetensors").exists()


def test_held_out_samples_that_do_not_vary_are_a_warning(
    tmp_path: Path, make_config: MakeConfig, distributed: DistributedContext, caplog: pytest.LogCaptureFixture
) -> None:
    found = trainer(panel(tmp_path, some_alleles()), make_config, distributed)
    assert "no r2" not in caplog.text
    held_out = found.validator._held_out.samples
    alleles = some_alleles()
    for sample in held_out.tolist():
        alleles[:, 2 * sample : 2 * sample + 2] = 0
    (tmp_path / "other").mkdir()
    trainer(panel(tmp_path / "other", alleles), make_config, distributed)
    (warning,) = [each.getMessage() for each in caplog.records if "no r2" in each.getMessage()]
    assert re.match(r"validation will have no r2 under \S+( and \S+)+: the masked genotypes of 3 held-out", warning)
    assert "embrag.data.validation_samples" in warning


def test_an_incomplete_panel_is_refused_and_the_remedy_works(tmp_path: Path, tiny: list[str]) -> None:
    path = panel(tmp_path, some_alleles())
    path.write_text(re.sub("\t[01]\\|[01]\n", "\t./.\n", path.read_text(), count=1))
    status, lines, _ = embrag(*tiny, "--panel", path)
    assert status == 2 and lines[-1].startswith(f"error: {path}: 1:1000: the genotype ./. of sample P29 is missing; ")
    assert "--panel-missing drop" in lines[-1]
    status, lines, _ = embrag(*tiny, "--panel", path, "--panel-missing", "drop", "--max-steps", "1")
    assert status == 0 and "99 sites" in "\n".join(lines) and (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "key", ["data.windows_file", "masking.array_manifest", "retrieval.relatives", "data.cache_dir"]
)
def test_a_path_in_a_configuration_that_no_system_takes(tmp_path: Path, key: str) -> None:
    room, _, name = key.partition(".")
    settings = {**TINY, "embrag": {**TINY["embrag"], room: {**TINY["embrag"].get(room, {}), name: "a\0b"}}}
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(settings))
    path = panel(tmp_path, some_alleles())
    status, lines, _ = embrag("train", "--deepspeed_config", config, "--run-dir", tmp_path / "run", "--panel", path)
    assert status == 2 and lines[-1].startswith(r"error: a\x00b: cannot ") and "embedded null byte" in lines[-1]


def test_a_site_twice_is_refused_on_request(tmp_path: Path, tiny: list[str]) -> None:
    path = panel(tmp_path, some_alleles())
    text = path.read_text()
    path.write_text(text + text.splitlines(keepends=True)[-1])
    status, lines, _ = embrag(*tiny, "--panel", path, "--duplicates", "error")
    assert status == 2 and lines[-1].startswith(f"error: {path}: 1:100000: site A>C appears twice; ")
