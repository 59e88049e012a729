"""Run folder: configuration, versions and metrics."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embrag_ds.config import load_config, parse_config
from embrag_ds.errors import UserError
from embrag_ds.training.distributed import DistributedContext
from embrag_ds.training.run_record import RunRecord
from embrag_ds.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
SILENT = SimpleNamespace(monitor=SimpleNamespace(enabled=False))


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


def test_numbers_that_are_none_are_null(tmp_path: Path, distributed: DistributedContext) -> None:
    record = RunRecord(tmp_path / "run", distributed)
    infinite = float("inf")
    record.write("train", 3, {"a": float("nan"), "b": {"c": infinite, "d": {"e": -infinite, "f": 1.5}}}, SILENT)  # type: ignore[arg-type]
    (line,) = strict_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["a"] is None and line["b"] == {"c": None, "d": {"e": None, "f": 1.5}}
    assert (line["kind"], line["step"]) == ("train", 3) and line["seconds"] >= 0


def test_a_resumed_run_that_cannot_drop_lines_keeps_them(
    tmp_path: Path, distributed: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord(tmp_path, distributed)
    for step in range(1, 9):
        record.write("train", step, {"a": 1.0}, SILENT)  # type: ignore[arg-type]
    before = (tmp_path / "metrics.jsonl").read_text()

    def half(path: Path, text: str, encoding: str, errors: str) -> None:
        path.write_bytes(text.encode(encoding, errors)[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot write it \(No space left on device\)"):
            record.forget_after(4)
    assert (tmp_path / "metrics.jsonl").read_text() == before and len(list(tmp_path.iterdir())) == 1
    with (tmp_path / "metrics.jsonl").open("ab") as stream:  # as a killed process may leave it
        stream.write(b'[1]\n{"step": "2"}\n{}\n\xff\n{"step": 3, "kin')
    record.forget_after(4)
    assert [line["step"] for line in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_only_the_main_rank_writes(tmp_path: Path, distributed: DistributedContext) -> None:
    record = RunRecord(tmp_path / "run", DistributedContext(1, 2, distributed.device))
    record.write("train", 1, {"a": 1.0}, SILENT)  # type: ignore[arg-type]
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
