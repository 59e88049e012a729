"""The commands, as a user calls them."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pysam
import pytest
import torch

from embrag_ds.cli.main import main
from embrag_ds.data.simulate import DefaultData
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.variants.phased_output import write_phased
from tests.ranks import LAUNCHER, free_port
from tests.whole_files import read_dosages, read_phased

TINY = [
    "embrag.data.window_sites=64",
    "embrag.data.overlap_sites=16",
    "embrag.data.flank_sites=32",
    "embrag.data.validation_samples=6",
    "embrag.retrieval.k=16",
    "embrag.model.dims=16",
    "embrag.model.layers=1",
    "embrag.train.max_steps=3",
    "embrag.train.log_every=1",
    "embrag.validation.windows=1",
    "train_micro_batch_size_per_gpu=6",
]
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launch(root: Path) -> Launch:
    """Function that runs a script of ``launch/`` in its own process, with ``deepspeed`` or plain ``python``."""

    def run(command: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        start = [sys.executable]
        if command == "deepspeed":
            start = [
                str(Path(sys.executable).with_name("deepspeed")),
                "--num_accelerators",
                "1",
                f"--master_port={free_port()}",
            ]
        return subprocess.run(
            [*start, str(root / "launch" / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=180,
        )

    return run


@pytest.fixture(scope="session")
def panel_options(simulated: DefaultData) -> list[str]:
    return [f"--panel={simulated.panel}", f"--map={simulated.genetic_map}", f"--samples={simulated.samples}"]


@pytest.fixture(scope="session")
def train_options(root: Path, cache_dir: Path, panel_options: list[str]) -> list[str]:
    settings = [f"--set={each}" for each in (*TINY, f"embrag.data.cache_dir={cache_dir}")]
    return ["--deepspeed_config", str(root / "ds_configs" / "quickstart.json"), *panel_options, *settings]


class LaunchedRun(NamedTuple):
    """A run trained through the ``deepspeed`` launcher: its folder, and what the terminal showed."""

    folder: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def launched_run(launch: Launch, train_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> LaunchedRun:
    folder = tmp_path_factory.mktemp("command-line") / "run"
    done = launch("deepspeed", "train.py", *train_options, "--run-dir", folder, "--profile", "nvml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3/3" in done.stderr and "Traceback" not in done.stderr
    assert "Profile of 3 micro-batches on " in done.stderr
    return LaunchedRun(folder, done)


@pytest.fixture(scope="session")
def run_dir(launched_run: LaunchedRun) -> Path:
    return launched_run.folder


def test_deepspeeds_remarks_are_in_the_runs_log_and_not_on_the_terminal(launched_run: LaunchedRun) -> None:
    log = (launched_run.folder / "run.log").read_text()
    speakers = {name.split(".")[0] for name in re.findall(r"^\S+ \S+ [A-Z]+ ([\w.]+): ", log, flags=re.MULTILINE)}
    assert speakers == {"DeepSpeed", "embrag_ds"} and "embrag_ds.training.report: step 3/3" in log
    assert not re.search(r"\[(DEBUG|INFO|WARNING|ERROR)\]|DeepSpeed", launched_run.done.stderr)
    # The launcher is two processes, each of which imports DeepSpeed; a rank of ours would add to what that prints.
    # torch 2.10 prints a line whenever ranks connect.
    launchers = re.compile(r"\[(launch|runner|multinode_runner|constants)\.py:|\[Gloo\] Rank \d")
    others = [line for line in launched_run.done.stdout.splitlines() if not launchers.search(line)]
    assert len(others) <= 2 and all("[real_accelerator.py:" in line for line in others)


def test_train_impute_evaluate(
    launch: Launch, run_dir: Path, simulated: DefaultData, panel_options: list[str], tmp_path: Path
) -> None:
    present = {path.name for path in run_dir.iterdir()}
    trained = {"checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "run.log", "versions.json"}
    assert present == trained | {".lock", "outcome.json"} | {"profile.json", "profile.png", "trace.json"}
    out = tmp_path / "imputed.vcf.gz"
    files = [*panel_options, f"--target={simulated.target}", "--out", out]
    done = launch("python", "impute.py", "--run-dir", run_dir, *files, "--adapt=off")
    assert done.returncode == 0, done.stderr
    assert "9 samples" in done.stderr and not done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"imputed.vcf.gz", "imputed.vcf.gz.tbi"}
    assert len(read_dosages(out).sites) == len(read_phased(simulated.panel).sites)

    arguments = [f"--truth={simulated.truth}", f"--panel={simulated.panel}", f"--target={simulated.target}"]
    outputs = [f"--json={tmp_path / 'out.json'}", f"--markdown={tmp_path / 'out.md'}"]
    done = launch("python", "evaluate.py", *arguments, f"--imputed=ours={out}", "--baselines", *outputs)
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert table[0].startswith("Aggregate dosage r2") and any(line.startswith("ours ") for line in table)
    scores = json.loads((tmp_path / "out.json").read_text())["tools"]
    assert scores["ours"]["aggregate_r2"]["all"] > scores["allele frequency"]["aggregate_r2"]["all"] + 0.1
    assert "| ours |" in (tmp_path / "out.md").read_text()


@pytest.mark.long
def test_a_bad_key_stops_the_launcher_with_one_line(launch: Launch, train_options: list[str], tmp_path: Path) -> None:
    done = launch("deepspeed", "train.py", *train_options, "--run-dir", tmp_path / "run", "--set=embrag.model.dim=3")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "unknown key embrag.model.dim; did you mean 'dims'?" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_one_line_and_nothing_else(launch: Launch, tmp_path: Path) -> None:
    done = launch("python", "impute.py", "--run-dir", tmp_path / "none", "--out", tmp_path / "out.vcf.gz")
    assert done.returncode == 2
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {tmp_path / 'none' / 'model.safetensors'}: cannot read")


Fails = Callable[..., str]


@pytest.fixture
def fails(distributed: DistributedContext, capsys: pytest.CaptureFixture[str]) -> Iterator[Fails]:
    """Function that runs a command in this process, which must end with status 2 and one line; returns the line."""
    before = signal.getsignal(signal.SIGTERM)

    def run(script: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(script, [str(each) for each in arguments])
        assert ended.value.code == 2
        # Progress may precede it.
        lines = capsys.readouterr().err.splitlines()
        assert [line.startswith("error: ") for line in lines].count(True) == 1 and "Traceback" not in lines
        assert lines[-1].startswith("error: ")
        return lines[-1]

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_typo_in_deepspeeds_half_of_a_shipped_configuration_is_found_before_the_panel(
    fails: Fails, tmp_path: Path
) -> None:
    options = ["--deepspeed_config=v18", f"--panel={tmp_path / 'none.vcf.gz'}", f"--run-dir={tmp_path / 'run'}"]
    error = fails("train", *options, "--set=gradient_cliping=1")
    assert error.endswith("v18.json: unknown DeepSpeed key gradient_cliping; did you mean 'gradient_clipping'?")
    assert not (tmp_path / "run").exists()


def test_an_unphased_panel(fails: Fails, train_options: list[str], simulated: DefaultData, tmp_path: Path) -> None:
    panel = tmp_path / "unphased.vcf.gz"
    with pysam.BGZFile(str(simulated.panel), "rb") as lines, pysam.BGZFile(str(panel), "wb") as out:
        for number, line in enumerate(lines):
            out.write((line.replace(b"0|1", b"0/1") if number > 100 else line) + b"\n")
    pysam.tabix_index(str(panel), preset="vcf")
    error = fails("train", *train_options, f"--panel={panel}", "--run-dir", tmp_path / "run")
    assert str(panel) in error and "0/1" in error


def test_a_panel_that_is_not_there(fails: Fails, train_options: list[str], tmp_path: Path) -> None:
    error = fails("train", *train_options, f"--panel={tmp_path / 'none.vcf.gz'}", "--run-dir", tmp_path / "run")
    assert "none.vcf.gz" in error


@pytest.mark.parametrize("option", ["--map", "--samples"])
def test_a_table_that_is_not_there(fails: Fails, train_options: list[str], tmp_path: Path, option: str) -> None:
    error = fails("train", *train_options, f"{option}={tmp_path / 'none.txt'}", "--run-dir", tmp_path / "run")
    assert "none.txt" in error


def test_a_run_folder_is_not_overwritten(fails: Fails, train_options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    error = fails("train", *train_options, "--run-dir", folder)
    assert f"{folder}: holds a run already (metrics.jsonl); add --resume" in error
    assert (folder / "metrics.jsonl").read_text() == "{}\n"


def test_a_run_is_either_resumed_or_begun(fails: Fails, train_options: list[str], tmp_path: Path) -> None:
    folder = ["--run-dir", tmp_path / "run"]
    assert "give one of them" in fails("train", *train_options, *folder, "--resume", "--init-from=model.safetensors")
    assert "cannot read the model" in fails("train", *train_options, *folder, f"--init-from={tmp_path / 'none'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--panel-samples=2"], "--panel-samples must be at least 3"),
        (["--missed-calls=1"], "must lie in"),
        (["--missed-calls=nan"], "must lie in"),
        (["--switch-errors-per-mb=nan"], "--switch-errors-per-mb must lie between 0 and"),
        (["--switch-errors-per-mb=inf"], "--switch-errors-per-mb must lie between 0 and"),
        (["--cm-per-mb=nan"], "--cm-per-mb must be positive"),
        (["--cm-per-mb=1e300"], "--cm-per-mb must be positive"),
        (["--length-bp=99999999999999999999"], "--length-bp must not exceed"),
        (["--panel-samples=99999999999"], "--panel-samples must not exceed"),
        (["--typed-spacing-bp=99999999999999999999"], "--typed-spacing-bp must not exceed"),
        (["--seed=0"], "--seed must lie"),
    ],
)
def test_errors_of_simulate(fails: Fails, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    assert complaint in fails("simulate", "--out", tmp_path / "sim", *arguments)
    assert not (tmp_path / "sim").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has a CUDA device")
def test_a_snapshot_of_allocations_needs_cuda(fails: Fails, train_options: list[str], tmp_path: Path) -> None:
    error = fails("train", *train_options, "--run-dir", tmp_path / "run", "--profile=snapshot")
    assert "--profile snapshot: the history of torch's allocator needs a CUDA device" in error
    assert not (tmp_path / "run").exists()


def test_nothing_to_resume(
    fails: Fails, train_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no run of quickstart" in fails("train", *train_options, "--resume")
    assert "no checkpoint to resume from" in fails("train", *train_options, "--resume", "--run-dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_target_without_a_site_of_the_panel(
    fails: Fails, run_dir: Path, simulated: DefaultData, panel_options: list[str], tmp_path: Path
) -> None:
    target = read_phased(simulated.target)
    target.sites.pos[:] = np.arange(len(target.sites)) + 10_000_000
    path = tmp_path / "elsewhere.vcf.gz"
    write_phased(path, target.sites, target.samples, target.alleles)
    out = tmp_path / "out.vcf.gz"
    error = fails("impute", "--run-dir", run_dir, *panel_options, f"--target={path}", "--out", out)
    assert f"{path}: no site in common with {simulated.panel}" in error and not out.exists()


def test_targets_that_are_in_the_panel(
    fails: Fails, run_dir: Path, simulated: DefaultData, panel_options: list[str], tmp_path: Path
) -> None:
    arguments = ["--run-dir", run_dir, *panel_options, f"--target={simulated.panel}", "--out", tmp_path / "out.vcf.gz"]
    assert "60 samples are also in the panel" in fails("impute", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out=out.vcf"], "out.vcf: the output is a bgzipped VCF or a BCF"),
        (["--out=none/out.vcf.gz"], "none does not exist"),
        (["--samples-per-batch=0"], "--samples-per-batch must be at least 1"),
        (["--panel=p.vcf.gz"], "--panel and --target go together: add --target, or give neither"),
        (["--device=qpu"], "qpu"),
    ],
)
def test_errors_of_impute(
    fails: Fails,
    run_dir: Path,
    simulated: DefaultData,
    panel_options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    target = [] if "--panel=p.vcf.gz" in arguments else [*panel_options, f"--target={simulated.target}"]
    given = ["--run-dir", run_dir, "--out=out.vcf.gz", *target, *arguments]
    assert complaint in fails("impute", *given)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--truth=t.vcf.gz"], "--truth, --panel and --target go together: add --panel and --target, or give none"),
        (["--truth=t", "--panel=p", "--target=t", "--imputed=a=x", "--imputed=a=y"], "'a' is given twice"),
        (["--truth=t.vcf.gz", "--panel=p.vcf.gz", "--target=u.vcf.gz"], "nothing to score"),
        (["--bootstrap=-1"], "--bootstrap must lie between 0 and"),
        (["--bootstrap=99999999999999"], "--bootstrap must lie between 0 and"),
        (["--threads=0"], "--threads must lie between 1 and"),
        (["--truth=t", "--panel=p", "--target=u", "--json=none/out.json"], "the folder none does not exist"),
        (["--truth=t", "--panel=p", "--target=u", "--markdown=none/out.md"], "the folder none does not exist"),
    ],
)
def test_errors_of_evaluate(fails: Fails, arguments: list[str], complaint: str) -> None:
    assert complaint in fails("evaluate", *arguments)


def test_the_ablation_scores_every_row_on_the_held_out_samples(
    launch: Launch, run_dir: Path, simulated: DefaultData, panel_options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "ablation.json"
    data = [f"--typed=array={simulated.target}", f"--json={out}"]
    done = launch("python", "../profiling/ablation.py", "--run-dir", run_dir, *panel_options, *data)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["samples"] == 6
    found = {name: row["all"] for name, row in written["r2"]["array"].items()}
    parts = ["copying, fixed", "copying, learned", "with confidence", "with residual"]
    assert list(found) == ["random", "top 1", *parts]
    assert len({found[each] for each in parts}) == 4  # every part changes something
    assert all(0 <= value <= 1 for value in found.values()) and found["random"] < found["copying, fixed"]


def test_the_ablation_knows_its_rows(
    root: Path, simulated: DefaultData, run_dir: Path, panel_options: list[str], tmp_path: Path
) -> None:
    arguments = ["--run-dir", str(run_dir), *panel_options, f"--typed=array={simulated.target}", "--rows", "none"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="no row 'none'"):
        patch.syspath_prepend(str(root / "profiling"))
        patch.setattr(sys, "argv", ["ablation.py", *arguments, f"--json={tmp_path / 'ablation.json'}"])
        runpy.run_path(str(root / "profiling" / "ablation.py"))["main"]()


def test_evaluation_draws_plots(launch: Launch, simulated: DefaultData, tmp_path: Path) -> None:
    files = [f"--truth={simulated.truth}", f"--panel={simulated.panel}", f"--target={simulated.target}"]
    done = launch(
        "python", "evaluate.py", *files, f"--imputed=truth={simulated.truth}", f"--plots={tmp_path / 'plots'}"
    )
    assert done.returncode == 0, done.stderr
    for name in ("r2.png", "calibration.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
