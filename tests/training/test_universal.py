"""Checkpoints go on under another number of ranks, ZeRO stage and precision, or are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine import distributed, universal
from embrag_ds.engine.masters import gathered_state
from embrag_ds.engine.universal import Layout, convert, layout_of, load_universal, needs_conversion, refusal
from embrag_ds.errors import UserError
from embrag_ds.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.training.test_unpickling import Payload

MakeTrainer = Callable[..., Trainer]
Metrics = Callable[..., list[dict[str, Any]]]
# Every rank's part of an odd number of weights is padded; a strong rate shows a lost moment or step in the next loss.
ODD = ["embrag.model.dims=20", "embrag.model.dropout=0", "optimizer.params.lr=0.02", "gradient_accumulation_steps=2"]
FROZEN = 'embrag.train.frozen=["confidence"]'
STAGE_3 = (
    'zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 500, '
    '"stage3_max_reuse_distance": 0, "reduce_bucket_size": 10000}'
)
_STATES, _OPTIMISER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
FLAT = ["bf16.enabled=true", "data_types.grad_accum_dtype=fp32"]


def settings(stage: int | str, *more: str) -> list[str]:
    """Overrides of the tiny run under a ZeRO stage."""
    return [*ODD, FROZEN, STAGE_3 if stage == 3 else f"zero_optimization.stage={stage}", *more]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


def move_frozen(trainer: Trainer) -> Trainer:
    """Give frozen weights other values than those that every run begins with."""
    with torch.no_grad():
        for weight in trainer.engine.module.confidence.parameters():
            weight.add_(0.25)
    return trainer


@pytest.fixture(autouse=True)
def _bf16_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: True)


def test_a_run_goes_on_under_every_other_stage(
    make_trainer: MakeTrainer, metrics_of: Metrics, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stage 1, then 2, 3 (in several groups of weights) and 1 again, two steps each, equals eight steps in stage 1."""
    move_frozen(make_trainer("whole", *settings(1), "embrag.train.max_steps=8")).run()
    trainer = move_frozen(make_trainer("parts", *settings(1), "embrag.train.max_steps=2"))
    trainer.run()
    capfd.readouterr()
    for steps, stage in ((4, 2), (6, 3), (8, 1)):
        before = gathered_state(trainer.engine)
        trainer = make_trainer("parts", *settings(stage), f"embrag.train.max_steps={steps}", resume=True)
        after = gathered_state(trainer.engine)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert trainer.engine.global_steps == steps - 2
        trainer.run()
    parts, whole = metrics_of("parts"), metrics_of("whole")
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    assert [line["learning_rate"] for line in parts] == [line["learning_rate"] for line in whole]
    assert capfd.readouterr().out == ""
    assert not list((tmp_path / "parts" / "checkpoints").glob("*universal*"))


def test_the_precision_may_change(make_trainer: MakeTrainer) -> None:
    """From bf16 with fp32 gradients, whose optimiser is ours, to fp32 and back, no digit of the state is lost."""
    trainer = make_trainer("run", *settings(1, *FLAT), "embrag.train.max_steps=2")
    for steps, precision in ((3, []), (4, FLAT)):
        trainer.run()
        before = gathered_state(trainer.engine)
        trainer = make_trainer("run", *settings(1, *precision), f"embrag.train.max_steps={steps}", resume=True)
        after = gathered_state(trainer.engine)
        # What is frozen has no master: the network has it in bf16.
        assert all(torch.equal(after[name], value) for name, value in before.items() if "confidence" not in name)
        assert trainer.engine.global_steps == steps - 1


RANKS = """
import sys
from pathlib import Path
import torch
from embrag_ds.config import load_config
from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.engine.distributed import start_distributed
from embrag_ds.training.trainer import Trainer

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # fills new memory with values that are no numbers
folder = Path(sys.argv[1])
distributed = start_distributed()
config = load_config(folder / "two.json")
inputs = open_inputs(PanelFiles(*map(Path, sys.argv[2:])), config.embrag.data, progress=False)
for name, resume in (("anew", False), ("parts", True)):
    Trainer(config, inputs, folder / name, distributed, resume).run()
distributed.close()
"""


@pytest.mark.long
def test_the_number_of_ranks_may_change(
    make_trainer: MakeTrainer,
    make_config: Callable[..., Any],
    metrics_of: Metrics,
    inputs: PanelInputs,
    simulated: Any,
    tmp_path: Path,
    root: Path,
) -> None:
    """One rank, then two under stage 3, then one again: the losses of one rank all the time.

    Two ranks save from the beginning, too, although their last parts of the weights end in memory that nobody sets.
    """
    make_trainer("whole", *settings(1), "embrag.train.max_steps=6").run()
    make_trainer("parts", *settings(1), "embrag.train.max_steps=2").run()
    two = make_config(*settings(3), "gradient_accumulation_steps=1", "embrag.train.max_steps=4")
    (tmp_path / "two.json").write_text(json.dumps(two.as_dict()))
    (tmp_path / "ranks.py").write_text(RANKS)
    files = [simulated.panel, simulated.genetic_map, simulated.samples]
    run_ranks(root, 2, tmp_path / "ranks.py", tmp_path, *files)
    make_trainer("parts", *settings(1), "embrag.train.max_steps=6", resume=True).run()
    np.testing.assert_allclose(losses(metrics_of("parts")), losses(metrics_of("whole")), rtol=1e-5)
    np.testing.assert_allclose(losses(metrics_of("anew")), losses(metrics_of("whole"))[:4], rtol=1e-4)
    source = tmp_path / "parts" / "checkpoints" / "step4"
    next(source.glob("zero_pp_rank_1_*_optim_states.pt")).unlink()
    with pytest.raises(UserError, match="it holds the optimiser's state of 1 of 2 ranks"):
        convert(source, tmp_path / "converted")


def test_a_tampered_checkpoint_is_refused_at_every_turn(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer("run", *settings(1), "embrag.train.max_steps=3").run()
    source, target, made = tmp_path / "run" / "checkpoints" / "step3", tmp_path / "converted" / "step3", tmp_path / "x"
    convert(source, target)
    for path in sorted(source.glob("*.pt")):
        whole = path.read_bytes()
        torch.save({"extra": Payload(made), **torch.load(path, weights_only=False)}, path)
        with pytest.raises(UserError) as raised:
            convert(source, tmp_path / "other")
        said = str(raised.value)
        assert f"{path.name}: it holds posix.mkdir" in said and said.endswith("or go on as the run was started")
        assert not made.exists() and not (tmp_path / "other").exists()
        path.write_bytes(whole)
    for path, place in ((source / _OPTIMISER, "param_slice_mappings"), (source / _STATES, "param_shapes")):
        whole = path.read_bytes()
        content = torch.load(path, weights_only=False)
        named = content.get("optimizer_state_dict", content)[place][0]
        named[str(made)] = named.pop("head.bias")
        torch.save(content, path)
        with pytest.raises(UserError, match=rf"cannot convert .*{path.name} has a parameter of the name '{made}'"):
            convert(source, tmp_path / "other")
        path.write_bytes(whole)
    assert not made.exists()
    for name in (_STATES, "zero/optimizer_state.pt", "zero/head.bias/step.pt"):
        whole = (target / name).read_bytes()
        torch.save([Payload(made)], target / name)
        with pytest.raises(UserError, match=rf"{name}: it holds posix\.mkdir.*; remove .*step3 to have it converted"):
            load_universal(make_trainer("later", *settings(2)).engine, target)
        assert not made.exists()
        (target / name).write_bytes(whole)


def test_what_cannot_be_converted_is_one_line(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of folders may hold characters that mean something in a pattern; a fault leaves nothing half written."""
    make_trainer("run", *settings(1), "embrag.train.max_steps=3").run()
    odd = tmp_path / "run [1] (a+b)*"
    shutil.copytree(tmp_path / "run", odd)
    source, target = odd / "checkpoints" / "step3", odd / "converted" / "step3"
    convert(source, target)
    later = make_trainer("later", *settings(2)).engine
    load_universal(later, target)
    assert later.global_steps == 3
    before = sorted(target.rglob("*"))
    states = source / _OPTIMISER
    whole = states.read_bytes()
    for spoilt in (whole[: len(whole) // 2], b"\xff" * 99, b""):
        states.write_bytes(spoilt)
        with pytest.raises(
            UserError, match=r"step3: cannot convert the checkpoint \(.*\); move .*step3 away"
        ) as raised:
            convert(source, odd / "converted" / "other")
        assert "\n" not in str(raised.value)
    states.unlink()
    with pytest.raises(UserError, match="cannot convert the checkpoint"):
        convert(source, target)
    states.write_bytes(whole)
    monkeypatch.setattr(universal.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 1000))
    with pytest.raises(UserError, match=r"step3 needs .* GB, and 0\.0 GB are free; free some space in "):
        convert(source, target)
    assert sorted(target.rglob("*")) == before and [path.name for path in (odd / "converted").iterdir()] == ["step3"]


THEN = Layout(ranks=2, micro_batch=6, accumulation=2, stage=1, precision="fp32", optimizer="adamw", nvme=False)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (
            {},
            {"optimizer": "adam"},
            "optimizer.type is adam, and the checkpoint holds the state of adamw; set it to that",
        ),
        ({}, {"micro_batch": 3}, "train_micro_batch_size_per_gpu is 3, .* 6 samples at a time; set it to that"),
        ({}, {"ranks": 4}, r"4 x 2 micro-batches a step .* has 2 x 2; set gradient_accumulation_steps to 1"),
        ({}, {"ranks": 3, "accumulation": 1}, "3 x 1 micro-batches .*; start as many ranks as divide 4"),
        (
            {"stage": 0},
            {},
            "no conversion from 2 ranks, zero_optimization.stage 0, fp32 to .*; go on with 2 ranks, zero_",
        ),
        ({}, {"stage": 0}, "because stage 0 keeps .*; go on with 2 ranks, zero_optimization.stage 1, fp32"),
        ({"precision": "fp16"}, {}, "because fp16 keeps its loss scale"),
        ({"nvme": True}, {"nvme": True, "stage": 3}, "offload_optimizer.device nvme"),
        ({"optimizer": "lion"}, {"optimizer": "lion", "stage": 2}, "for optimizer.type lion, but for Adam and AdamW"),
    ],
)
def test_what_does_not_go_on_is_refused_by_name(then: dict[str, Any], now: dict[str, Any], said: str) -> None:
    given = replace(THEN, **then), replace(THEN, **now)
    found = refusal(*given)
    assert found is not None and "\n" not in found
    assert re.search(said, found), found
    assert Layout(**json.loads(json.dumps(asdict(given[0])))) == given[0]


@pytest.mark.parametrize(
    ("then", "now", "converts"),
    [
        ({}, {}, False),
        ({"nvme": True}, {"nvme": True}, False),
        ({"stage": 0, "precision": "bf16"}, {"stage": 0, "precision": "bf16", "ranks": 4, "accumulation": 1}, False),
        ({"stage": 0}, {"stage": 0, "precision": "torch_autocast"}, False),
        ({}, {"ranks": 4, "accumulation": 1}, True),
        ({}, {"stage": 3}, True),
        ({"precision": "bf16 with fp32 gradients"}, {"precision": "bf16"}, True),
    ],
)
def test_what_goes_on_is_converted_only_where_it_has_to_be(
    then: dict[str, Any], now: dict[str, Any], converts: bool
) -> None:
    given = replace(THEN, **then), replace(THEN, **now)
    assert refusal(*given) is None and needs_conversion(*given) == converts


def test_the_layout_is_that_of_the_settings(make_config: Callable[..., Any]) -> None:
    assert layout_of(make_config().deepspeed, 2) == replace(THEN, accumulation=1)
    offloaded = 'zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}'
    assert layout_of(make_config(*FLAT, offloaded).deepspeed, 1) == Layout(
        1, 6, 1, 3, "bf16 with fp32 gradients", "adamw", True
    )
