"""Profiles: they do not change the run, their report is complete, and failures of both are raised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import UserError
from embrag_ds.runtime.device_sampler import DeviceSampler
from embrag_ds.runtime.timeline import NO_TIMELINE, PHASES, Timeline
from embrag_ds.training.profile import SNAPSHOT_FILE, Profile
from embrag_ds.training.trainer import Trainer

Metrics = Callable[..., list[dict[str, Any]]]
Train = Callable[..., None]
KINDS = (("profile", ".json"), ("profile", ".png"), ("trace", ".json"))


@pytest.fixture(autouse=True)
def remarks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


@pytest.fixture
def train(
    make_config: Callable[..., RunConfig], inputs: PanelInputs, distributed: DistributedContext, tmp_path: Path
) -> Train:
    def run(name: str, timeline: Timeline, *overrides: str) -> None:
        refresh = 'embrag.retrieval.refresh={"every_steps": 2, "lag_steps": 1}'
        config = make_config("embrag.retrieval.encoding=refresh", refresh, *overrides)
        Trainer(config, inputs, tmp_path / name, distributed, resume=False, timeline=timeline).run()

    return run


@pytest.mark.long
def test_a_profiled_run_has_the_losses_of_any_other(
    train: Train, distributed: DistributedContext, metrics_of: Metrics, tmp_path: Path
) -> None:
    overrides = ["embrag.train.eval_every=3", "gradient_accumulation_steps=2"]
    train("plain", NO_TIMELINE, *overrides)
    with Profile("nvml", tmp_path / "profiled", distributed) as timeline:
        train("profiled", timeline, *overrides)
    for kind, key in (("train", "loss"), ("validation", "score")):
        plain, profiled = ([line[key] for line in metrics_of(name, kind)] for name in ("plain", "profiled"))
        assert plain == profiled and len(set(plain)) > 1


def test_the_report_is_complete(
    train: Train, distributed: DistributedContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Profile("nvml", tmp_path / "run", distributed) as timeline:
        train("run", timeline, "embrag.train.eval_every=3")
    report = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert (tmp_path / "run" / "profile.png").read_bytes().startswith(b"\x89PNG")

    header = report["header"]
    assert torch.__version__.startswith(header["packages"]["torch"])  # a CUDA build adds "+cu130"
    assert (header["rank"], header["ranks"]) == (0, 1)
    assert report["micro_batches"] == 6
    rows = {each["name"]: each for each in report["phases"]}
    assert list(rows) == list(PHASES) and len(report["phases"]) == len(PHASES)  # validation is no row of its own
    threads = {"collate": "retrieval-prefetch", "search": "retrieval-prefetch", "h2d": "retrieval-prefetch"}
    threads["refresh"] = "reference-refresh_0"
    for name, row in rows.items():
        assert row["thread"] == threads.get(name, "MainThread")
        if name != "refresh":
            assert row["count"] == 6 and row["ms_per_micro_batch"] == pytest.approx(row["total_ms"] / 6)
        assert 0 < row["median_ms"] <= row["total_ms"]
    assert rows["search"]["total_ms"] < rows["collate"]["total_ms"]
    assert rows["refresh"]["count"] in (2, 3)  # the last may be cancelled by the end

    trace = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    slices = [event for event in trace if event["ph"] == "X"]
    assert len(slices) == sum(row["kept"] for row in report["phases"])
    of_row = {event["tid"]: event["args"]["name"] for event in trace if event["name"] == "thread_name"}
    found = {(event["name"], of_row[event["tid"]]) for event in slices}
    assert found == {(row["name"], f"{row['thread']}, {row['stream']}") for row in report["phases"]}

    readings = report["readings"]
    assert len(set(map(len, readings.values()))) == 1 and readings["seconds"] == sorted(readings["seconds"])
    assert report["peaks"]["host_bytes"] == max(readings["host_bytes"]) > 1 << 27
    logged = "\n".join(caplog.messages)
    assert f"Profile of 6 micro-batches on {header['device']}; {header['source']}" in logged
    for name in PHASES:
        assert f"\n{name} " in logged


def test_the_header_names_a_missing_driver(
    distributed: DistributedContext, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    with Profile("nvml", tmp_path, distributed):
        pass
    report = json.loads((tmp_path / "profile.json").read_text())
    assert report["header"]["source"].startswith("no NVIDIA driver (")
    assert report["header"]["source"].endswith("): process memory and CPU are sampled instead")
    assert report["header"]["source"] in caplog.text
    assert (report["micro_batches"], report["phases"]) == (0, [])


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), UserError("the loss is nan")])
def test_a_run_that_ends_early_leaves_its_report(
    train: Train, distributed: DistributedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def dies(trainer: Trainer, *given: Any) -> None:
        raise fault

    monkeypatch.setattr(Trainer, "_log", dies)
    with pytest.raises(type(fault)) as raised, Profile("nvml", tmp_path / "run", distributed) as timeline:
        train("run", timeline)
    assert raised.value is fault
    assert json.loads((tmp_path / "run" / "profile.json").read_text())["micro_batches"] == 1


def sampling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sampler: DeviceSampler, cpu_percent: float | None) -> None:
        raise OSError("the process has no statistics")

    monkeypatch.setattr(DeviceSampler, "_read_all", fails)


def test_a_failure_of_the_sampler_is_raised(
    distributed: DistributedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling_fails(monkeypatch)
    profile = Profile("nvml", tmp_path, distributed)
    with pytest.raises(OSError, match="no statistics"), profile as timeline, timeline.phase("step"):
        pass
    assert json.loads((tmp_path / "profile.json").read_text())["micro_batches"] == 1


def test_a_failure_of_the_run_is_raised_before_one_of_the_profile(
    distributed: DistributedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sampling_fails(monkeypatch)
    with pytest.raises(ZeroDivisionError), Profile("nvml", tmp_path, distributed):
        raise ZeroDivisionError
    assert caplog.messages[-1] == "the profile failed: OSError('the process has no statistics')"


def test_every_rank_writes_its_own_files(distributed: DistributedContext, tmp_path: Path) -> None:
    for rank in (0, 1):
        with Profile("nvml", tmp_path, dataclasses.replace(distributed, rank=rank, ranks=2)):
            pass
    names = {f"{name}{rank}{suffix}" for name, suffix in KINDS for rank in ("", "-rank1")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "profile-rank1.json").read_text())["header"]["rank"] == 1
    events = json.loads((tmp_path / "trace-rank1.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {1}


@pytest.mark.gpu
def test_the_history_of_allocations(distributed: DistributedContext, tmp_path: Path) -> None:
    with Profile("snapshot", tmp_path, distributed) as timeline, timeline.phase("step"):
        torch.ones(1 << 20, device=distributed.device).mul_(2)
    assert (tmp_path / SNAPSHOT_FILE).stat().st_size > 0
    report = json.loads((tmp_path / "profile.json").read_text())
    assert report["header"]["source"].startswith("NVML: ")
    assert report["phases"][0]["stream"] == "default stream"
