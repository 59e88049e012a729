"""Run folder: configuration, versions and metrics."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.config import load_config, parse_config
from embrag_ds.errors import UserError
from embrag_ds.runs.record import RunRecord, read_metrics
from embrag_ds.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


def strict_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_the_run_folder_describes_the_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(
        "run", "gradient_accumulation_steps=2", "embrag.train.max_steps=2", "embrag.train.eval_every=1"
    )
    trainer.run()
    folder = tmp_path / "run"
    present = {path.name for path in folder.iterdir()}
    assert present == {"config.json", "versions.json", "metrics.jsonl", "model.safetensors", "checkpoints"}
    # Resolved: every default is in it, and it starts the same run again.
    resolved = json.loads((folder / "config.json").read_text())
    assert resolved["embrag"]["model"]["ffn_multiple"] == 4 and resolved["embrag"]["loss"]["kind"] == "cross_entropy"
    assert load_config(folder / "config.json").embrag == trainer.embrag
    assert parse_config(resolved, "").deepspeed["gradient_accumulation_steps"] == 2
    versions = json.loads((folder / "versions.json").read_text())
    assert (versions["ranks"], versions["micro_batch_samples"], versions["global_batch_samples"]) == (1, 6, 12)
    assert all(versions["packages"][name] for name in ("torch", "deepspeed", "numpy", "pysam"))
    assert versions["panel"].endswith("panel.vcf.gz")
    lines = strict_lines(folder / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1), ("validation", 1), ("train", 2), ("validation", 2)
    ]  # fmt: skip


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run", True)
    infinite = float("inf")
    record.write("train", 3, {"a": float("nan"), "b": {"c": infinite, "d": {"e": -infinite, "f": 1.5}}})
    (line,) = strict_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["a"] is None and line["b"] == {"c": None, "d": {"e": None, "f": 1.5}}
    assert (line["kind"], line["step"]) == ("train", 3) and line["seconds"] >= 0


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_what_a_resumed_run_supersedes_stays_in_the_file_and_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = RunRecord(tmp_path, True)
    for step in range(1, 9):
        record.write("train", step, {"a": 1.0})
    before = path.read_bytes()
    with path.open("ab") as stream:  # as a killed process may leave it
        stream.write(b'[1]\n{"step": "2"}\n{}\n\xff\n{"step": 3, "kin')
    resumed = RunRecord(tmp_path, True)
    resumed.resume_at(4)
    assert steps(path) == [1, 2, 3, 4]
    resumed.write("train", 5, {"a": 2.0})
    resumed.write("train", 5, {"a": 3.0})
    assert steps(path) == [1, 2, 3, 4, 5] and read_metrics(path)[-1]["a"] == 3.0
    assert path.read_bytes().startswith(before) and path.read_bytes().endswith(b"\n")
    again = RunRecord(tmp_path, True)
    again.resume_at(5)
    again.write("train", 6, {})
    assert steps(path) == [1, 2, 3, 4, 5, 6] and path.read_bytes().count(b'"resume"') == 2


def test_total_seconds_go_on_over_resumes(tmp_path: Path) -> None:
    RunRecord(tmp_path, True).write("train", 1, {"total_seconds": 100.0})
    resumed = RunRecord(tmp_path, True)
    resumed.resume_at(1)
    resumed.write("train", 2, {})
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert 100 < last["total_seconds"] < 101 and last["seconds"] < 1


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord(tmp_path, True)
    record.write("train", 1, {})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    real = os.write

    def half(descriptor: int, content: bytes) -> int:
        if len(content) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot write it \(No space left on device\)"):
            record.write("train", 2, {})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run", False)
    record.write("train", 1, {"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_deepspeeds_monitors_get_every_number(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "tiny"}
    make_trainer(
        "run", f"csv_monitor={json.dumps(monitor)}", "embrag.train.max_steps=3", "embrag.train.eval_every=3"
    ).run()
    tables = {path.stem: path for path in (tmp_path / "monitor" / "tiny").glob("*.csv")}
    assert {"train_loss", "train_staleness", "train_retrieval_wait_share", "validation_score"} <= set(tables)
    lines = [line for line in strict_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    with tables["train_loss"].open() as stream:
        rows = list(csv.reader(stream))[1:]
    assert [int(step) for step, _ in rows] == [1, 2, 3]
    assert [float(value) for _, value in rows] == pytest.approx([line["loss"] for line in lines])
    assert any("r2_all" in name and name.startswith("validation_array") for name in tables)
