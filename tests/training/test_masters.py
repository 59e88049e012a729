"""Master weights: an export holds the optimiser's own weights, whatever precision the network computes in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from embrag_ds.config import RunConfig, load_config
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine import distributed
from embrag_ds.engine.distributed import in_aligned_order
from embrag_ds.engine.flat_gradients import FlatGradients
from embrag_ds.engine.masters import gathered_state
from embrag_ds.export import MODEL_FILE, ExportedModel, read_export
from embrag_ds.training.trainer import Trainer
from tests.ranks import run_ranks

MakeTrainer = Callable[..., Trainer]
MakeConfig = Callable[..., RunConfig]
BF16 = "bf16.enabled=true"
AUTOCAST = 'torch_autocast={"enabled": true, "dtype": "bfloat16"}'
FROZEN = 'embrag.train.frozen=["fusion"]'
SHORT = ["embrag.train.max_steps=4", "optimizer.params.lr=0.02"]
# The learning rate is 0 in the first two steps: the second generation is the first that differs.
REFRESH = ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_steps": 3, "lag_steps": 0}']
ZERO = {stage: [f"zero_optimization.stage={stage}"] for stage in range(4)}
ZERO[3].append("zero_optimization.stage3_param_persistence_threshold=0")
IN_FP32 = "data_types.grad_accum_dtype=fp32"
WAYS = {
    f"{stage}{name}": [*ZERO[stage], *more] for stage in (1, 2) for name, more in (("", []), (" in fp32", [IN_FP32]))
}
"""Settings that go on from one another's checkpoints, by the stage and by what gradients are added up in."""


@pytest.fixture(autouse=True)
def _bf16_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: True)


def is_rounded(weight: Tensor) -> bool:
    return torch.equal(weight, weight.to(torch.bfloat16).float())


def of_deepspeed(run_dir: Path) -> dict[str, Tensor]:
    """Weights that DeepSpeed's own converter puts together from a run's last checkpoint."""
    return get_fp32_state_dict_from_zero_checkpoint(str(run_dir / "checkpoints"))


def assert_masters(run_dir: Path) -> ExportedModel:
    """Assert that the export equals the checkpoint, and has more digits than bf16.

    Frozen parts and a few scalars have no more digits than bf16.
    """
    export, masters = read_export(run_dir / MODEL_FILE), of_deepspeed(run_dir)
    # Below stage 2 the converter leaves out frozen weights.
    assert (
        {name for name in export.weights if not name.startswith("fusion.")} <= masters.keys() <= export.weights.keys()
    )
    for name, master in masters.items():
        assert torch.equal(export.weights[name], master.float()), name
    assert_digits(export.weights)
    # The snapshot is what the network computes with, rounded to bf16.
    assert export.snapshot is not None and all(is_rounded(value) for value in export.snapshot.values())
    return export


def assert_digits(weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if name.startswith("fusion."):
            assert is_rounded(weight), name
        elif weight.numel() >= 10:
            assert not is_rounded(weight), name


@pytest.mark.parametrize(
    "settings",
    [*WAYS.values(), [*ZERO[2], "zero_optimization.round_robin_gradients=true"], ZERO[3], [*ZERO[3], IN_FP32]],
    ids=[*WAYS, "2 in turns", "3", "3 in fp32"],
)
def test_a_run_in_bf16_exports_its_master_weights(
    make_trainer: MakeTrainer, tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer("run", *SHORT, *REFRESH, *settings, BF16, FROZEN)
    assert {weight.dtype for weight in trainer.engine.module.parameters()} == {torch.bfloat16}
    trainer.run()
    export = assert_masters(tmp_path / "run")
    used = trainer.reference.snapshot_weights(trainer.state.step)
    assert used is not None and export.snapshot is not None
    for name, value in export.snapshot.items():
        assert used[name].dtype == torch.bfloat16 and torch.equal(value, used[name].float())
    capsys.readouterr()
    resumed = make_trainer("run", *SHORT, *REFRESH, *settings, BF16, FROZEN, resume=True)
    assert capsys.readouterr().out == ""  # what DeepSpeed prints goes to the log
    for name, value in gathered_state(resumed.engine).items():
        assert torch.equal(value, export.weights[name])


@pytest.mark.parametrize("way", ["a parameter each", "one flat parameter", "accumulating in fp32"])
def test_masters_outside_of_the_zero_optimisers(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """DeepSpeed has three more optimisers for bf16. Each wraps one of torch's, with masters in its order."""
    if way == "one flat parameter":
        monkeypatch.setattr("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW)
    fp32 = way == "accumulating in fp32"
    settings = WAYS["1 in fp32"] if fp32 else ZERO[0]
    trainer = make_trainer("run", *SHORT, *settings, BF16, FROZEN)
    trainer.run()
    optimizer = trainer.engine.optimizer
    expected = {
        "a parameter each": FP16_UnfusedOptimizer,
        "one flat parameter": FP16_Optimizer,
        "accumulating in fp32": FlatGradients,
    }
    assert type(optimizer) is expected[way]
    (group,) = optimizer.optimizer.param_groups
    flat = torch.cat([each.detach().flatten() for each in group["params"]])
    state = gathered_state(trainer.engine)
    assert_digits(state)
    trained = [each for each in trainer.engine.module.parameters() if each.requires_grad]
    name_of = {id(each): name for name, each in trainer.engine.module.named_parameters()}
    found = [state[name_of[id(each)]].flatten() for each in in_aligned_order(trained)]
    size = sum(each.numel() for each in found)
    assert torch.equal(torch.cat(found), flat[:size]) and not flat[size:].any()


@pytest.mark.parametrize("stage", ZERO)
def test_autocast_computes_with_the_masters_themselves(make_trainer: MakeTrainer, tmp_path: Path, stage: int) -> None:
    make_trainer("run", *SHORT, *ZERO[stage], AUTOCAST).run()
    export = read_export(tmp_path / "run" / MODEL_FILE)
    for name, weight in export.weights.items():
        assert weight.numel() < 10 or not is_rounded(weight), name
    if stage:
        for name, master in of_deepspeed(tmp_path / "run").items():
            assert torch.equal(export.weights[name], master), name


def test_masters_that_are_kept_elsewhere(make_trainer: MakeTrainer, tmp_path: Path, root: Path) -> None:
    shipped = load_config(root / "ds_configs" / "v18_zero3_offload.json").deepspeed
    keys = ("zero_optimization", "zero_force_ds_cpu_optimizer", "data_types")
    offloaded = [f"{key}={json.dumps(shipped[key])}" for key in keys]
    stage_2 = [*ZERO[2], 'zero_optimization.offload_optimizer={"device": "cpu"}', "zero_force_ds_cpu_optimizer=false"]
    runs = {"three": [*offloaded, ZERO[3][1]], "two": stage_2, "two in fp32": [*stage_2, IN_FP32]}
    for name, settings in runs.items():
        make_trainer(name, *SHORT, *REFRESH, *settings, BF16, FROZEN).run()
        assert_masters(tmp_path / name)


@pytest.mark.parametrize(  # five of the sixteen, in which each of the four is left and reached
    ("before", "after"),
    [("1", "1 in fp32"), ("1 in fp32", "2"), ("2", "2 in fp32"), ("2 in fp32", "1"), ("1 in fp32", "2 in fp32")],
)
def test_a_run_goes_on_under_another_stage_or_sum(
    make_trainer: MakeTrainer, metrics_of: Callable[..., list[dict]], before: str, after: str
) -> None:
    """With one micro-batch a step and one rank, all of them compute the same weights, up to the gradient's norm."""
    settings = [*SHORT, BF16, "embrag.train.max_steps=4"]
    make_trainer("whole", *settings, *WAYS[before]).run()
    first = make_trainer("cut", *settings, "embrag.train.max_steps=2", *WAYS[before])
    first.run()
    weights = read_export(first.run_dir / MODEL_FILE).weights
    trainer = make_trainer("cut", *settings, *WAYS[after], resume=True)
    for name, value in gathered_state(trainer.engine).items():
        assert torch.equal(value, weights[name]), name
    trainer.run()
    whole, cut = ([line["loss"] for line in metrics_of(name)] for name in ("whole", "cut"))
    assert len(cut) == 4 and whole == pytest.approx(cut, rel=1e-5)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path for the export of a run in fp32, which the first test that needs it trains."""
    return tmp_path_factory.mktemp("in fp32") / MODEL_FILE


@pytest.fixture
def exported(make_trainer: MakeTrainer, kept: Path) -> Path:
    """Export of a run in fp32."""
    if not kept.exists():
        trainer = make_trainer("first", *SHORT)
        trainer.run()
        (trainer.run_dir / MODEL_FILE).rename(kept)
    return kept


@pytest.mark.parametrize("zero", [ZERO[0], *WAYS.values(), ZERO[3]], ids=["0", *WAYS, "3"])
def test_a_run_in_bf16_starts_from_all_digits_of_an_export(
    make_trainer: MakeTrainer, exported: Path, zero: list[str]
) -> None:
    path = exported
    weights = read_export(path).weights
    assert_digits({name: value for name, value in weights.items() if not name.startswith("fusion.")})
    trainer = make_trainer("second", *SHORT, *zero, BF16, FROZEN, init_from=path)
    for name, value in gathered_state(trainer.engine).items():
        # Frozen parts have no masters: the network computes with their rounded values, and so are they exported.
        expected = weights[name].bfloat16().float() if name.startswith("fusion.") else weights[name]
        assert torch.equal(value, expected), name
    trainer.run()


def train_in_fp16(
    make_trainer: MakeTrainer, metrics_of: Callable[..., list[dict]], run_dir: Path, more: list[str]
) -> None:
    """Train in fp16 under ZeRO-1 from a loss scale that is far too high at first, and resume."""
    scaled = 'fp16={"enabled": true, "initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 100}'
    settings = [*ZERO[1], *more, scaled, FROZEN, "optimizer.params.lr=0.01", "embrag.model.dropout=0"]
    make_trainer("run", *settings, "embrag.train.max_steps=36", "embrag.train.checkpoint_every=36").run()
    lines = metrics_of("run")
    skipped = [line["skipped_steps"] for line in lines]
    # A step that overflows is skipped and halves the scale, until none does.
    assert skipped[:5] == [1] * 5 and 5 < sum(skipped) < 30 and not any(skipped[30:])
    # Gradients are those of the loss itself, not of the scaled one.
    norms = [line["gradient_norm"] for line in lines if not line["skipped_steps"]]
    assert all(0 < norm < 100 for norm in norms)
    export, masters = read_export(run_dir / MODEL_FILE), of_deepspeed(run_dir)
    assert all(torch.equal(export.weights[name], master.float()) for name, master in masters.items())
    head = export.weights["head.weight"]
    assert not torch.equal(head, head.half().float())
    resumed = make_trainer("run", *settings, "embrag.train.max_steps=38", resume=True)
    assert resumed.engine.optimizer.loss_scale == 2.0 ** (30 - sum(skipped))
    resumed.run()
    assert [line["skipped_steps"] for line in metrics_of("run")[36:]] == [0, 0]


SUMS = pytest.mark.parametrize("more", [[], [IN_FP32]], ids=["in fp16", "in fp32"])


@pytest.mark.gpu
@SUMS
def test_fp16_with_loss_scaling_under_zero(
    make_trainer: MakeTrainer, metrics_of: Callable[..., list[dict]], tmp_path: Path, more: list[str]
) -> None:
    train_in_fp16(make_trainer, metrics_of, tmp_path / "run", more)


@SUMS
def test_fp16_with_loss_scaling_is_rehearsed_on_a_cpu(
    make_trainer: MakeTrainer,
    metrics_of: Callable[..., list[dict]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    """The test above on a CPU, where torch computes in fp16 and only DeepSpeed refuses to."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda accelerator: True)
    monkeypatch.setattr("embrag_ds.training.trainer.adapt_to_machine", lambda settings: (settings, []))
    train_in_fp16(make_trainer, metrics_of, tmp_path / "run", more)


TWO_RANKS = """
import sys
from pathlib import Path
import torch
from embrag_ds.config import load_config
from embrag_ds import logs
from embrag_ds.export import MODEL_FILE, read_export
from embrag_ds.engine.masters import gathered_state
from embrag_ds.engine import deepspeed_log, distributed
from embrag_ds.engine.distributed import start_distributed
from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.training.trainer import Trainer

distributed.cpu_has_bf16 = lambda: True
panel, out, *configs = (Path(each) for each in sys.argv[1:])
with logs.on_terminal(), logs.kept_for_run() as run_log, deepspeed_log.written_to(run_log):
    group = start_distributed()
    run_log.write_to(out / group.own_file("run.log"))
    for path in configs:
        run = load_config(path)
        inputs = open_inputs(PanelFiles(panel), run.embrag.data, False)
        Trainer(run, inputs, out / path.stem, group, False).run()
        export = out / path.stem / MODEL_FILE
        group.barrier()
        again = gathered_state(Trainer(run, inputs, out / f"{path.stem} again", group, False, export).engine)
        assert all(torch.equal(again[name], value) for name, value in read_export(export).weights.items())
    group.close()
"""


@pytest.mark.long
def test_two_ranks_export_their_masters_and_each_has_a_log(
    make_config: MakeConfig, inputs: PanelInputs, tmp_path: Path, root: Path
) -> None:
    """Each rank holds half of the masters."""
    settings = {"zero1": WAYS["1 in fp32"], "zero2": ZERO[2], "zero3": ZERO[3]}
    configs = [tmp_path / f"{name}.json" for name in settings]
    for path in configs:
        path.write_text(json.dumps(make_config(*SHORT, *REFRESH, *settings[path.stem], BF16, FROZEN).as_dict()))
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    first, second = run_ranks(root, 2, tmp_path / "two_ranks.py", inputs.panel.path, tmp_path, *configs)
    for name in ("run.log", "run-rank1.log"):
        log = (tmp_path / name).read_text()
        assert " DeepSpeed: " in log and log.count("embrag_ds.training.trainer: run folder: ") == 6
    printed = (first.stdout + second.stdout).splitlines()
    assert not [line for line in printed if not line.startswith("[Gloo] Rank ")]  # torch 2.10 prints those
    assert first.stderr.count("run folder: ") == 6 and "run folder: " not in second.stderr
    assert "DeepSpeed" not in first.stderr + second.stderr
    for path in configs:
        assert_masters(tmp_path / path.stem)
