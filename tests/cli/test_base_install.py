"""What the base install does, without the packages of any extra (``.ci/base_install`` makes a real one)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embrag_ds.cli.train import OF_EXTRA
from embrag_ds.data.simulate import DefaultData
from tests.reports.runs import write_run
from tests.whole_files import read_dosages, read_phased

Embrag = Callable[..., subprocess.CompletedProcess[str]]

OF_EXTRAS = ("deepspeed", "pynvml", "psutil", "faiss", "cupy")


def test_the_packages_are_hidden(embrag: Embrag) -> None:
    for package in OF_EXTRAS:
        done = embrag(code=f"import {package}", without=OF_EXTRAS)
        assert done.returncode == 1 and f"No module named '{package}'" in done.stderr


def test_the_model_of_the_package_imputes_and_is_scored(embrag: Embrag, simulated: DefaultData, tmp_path: Path) -> None:
    files = [f"--panel={simulated.panel}", f"--target={simulated.target}", f"--map={simulated.genetic_map}"]
    files.append(f"--samples={simulated.samples}")
    out, scores = tmp_path / "imputed.vcf.gz", tmp_path / "scores.json"
    done = embrag("impute", *files, "--adapt", "off", "--out", out, without=OF_EXTRAS)
    assert done.returncode == 0, done.stderr
    assert "pretrained/model.safetensors" in done.stderr
    truth, imputed = read_phased(simulated.truth), read_dosages(out)
    assert len(imputed.sites) == len(read_phased(simulated.panel).sites)
    counts = truth.alleles[:, 0::2].astype(float) + truth.alleles[:, 1::2]
    assert np.corrcoef(counts.reshape(-1), imputed.dosage.reshape(-1))[0, 1] ** 2 > 0.8

    files += [f"--truth={simulated.truth}", f"--imputed=ours={out}", f"--plots={tmp_path / 'plots'}"]
    done = embrag("evaluate", *files, "--baselines", f"--json={scores}", without=OF_EXTRAS)
    assert done.returncode == 0, done.stderr
    r2 = {name: tool["aggregate_r2"]["all"] for name, tool in json.loads(scores.read_text())["tools"].items()}
    assert r2["ours"] > r2["allele frequency"] + 0.1
    assert (tmp_path / "plots" / "r2.png").is_file()


@pytest.mark.parametrize(("package", "name"), OF_EXTRA.items())
def test_train_names_the_extra_and_nothing_else(embrag: Embrag, tmp_path: Path, package: str, name: str) -> None:
    done = embrag("train", "--deepspeed_config", "v18", without=(package,), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == f"error: training needs {name}, which is not installed; pip install 'embrag_ds[train]'"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["impute", "--help"], ["--version"], []])
def test_help_comes_without_the_packages_that_take_seconds_to_import(embrag: Embrag, arguments: list[str]) -> None:
    slow = ("torch", "deepspeed", "numba", "matplotlib", "msprime")
    code = f"""
import sys
from embrag_ds.cli.main import main
from tests.whole_files import read_dosages, read_phased
try:
    {"main()" if arguments else "pass"}
except SystemExit as ended:
    assert not ended.code
print("imported", sorted(set({slow}) & set(sys.modules)))
"""
    done = embrag(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"


@pytest.mark.parametrize("transformer", ["off", "on"])
def test_imputation_imports_nothing_that_it_does_not_need(
    embrag: Embrag, simulated: DefaultData, tmp_path: Path, transformer: str
) -> None:
    """Torch alone takes two seconds to import, and half as long to forget when the process ends."""
    slow = ("torch", "sympy", "deepspeed", "matplotlib", "msprime", "pandas", "scipy", "faiss", "wandb", "tqdm")
    code = f"""
import gc, sys
from embrag_ds.cli.main import main
main()
print("imported", sorted(set({slow}) & set(sys.modules)), "searched for garbage", gc.get_freeze_count() < 50_000)
"""
    files = [f"--panel={simulated.panel}", f"--target={simulated.target}", f"--map={simulated.genetic_map}"]
    options = ["--adapt", "off", "--transformer", transformer, "--out", tmp_path / "imputed.vcf.gz"]
    done = embrag("impute", *files, *options, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported [] searched for garbage False\n"


def test_a_runs_report_imports_no_torch(embrag: Embrag, tmp_path: Path) -> None:
    slow = ("torch", "numba", "deepspeed", "matplotlib", "msprime")
    code = f"""
import sys
from embrag_ds.cli.main import main
main()
print("imported", sorted(set({slow}) & set(sys.modules)))
"""
    done = embrag("report", write_run(tmp_path / "run"), code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported []\n"
