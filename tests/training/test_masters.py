"""Master weights: an export holds the optimiser's own weights, whatever precision the network computes in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from embrag_ds.config import RunConfig, load_config
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.export import MODEL_FILE, ExportedModel, read_export
from embrag_ds.training import distributed
from embrag_ds.training.masters import gathered_state
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
    [ZERO[1], ZERO[2], [*ZERO[2], "zero_optimization.round_robin_gradients=true"], ZERO[3]],
    ids=["1", "2", "2 in turns", "3"],
)
def test_a_run_in_bf16_exports_its_master_weights(
    make_trainer: MakeTrainer, tmp_path: Path, settings: list[str]
) -> None:
    trainer = make_trainer("run", *SHORT, *REFRESH, *settings, BF16, FROZEN)
    assert {weight.dtype for weight in trainer.engine.module.parameters()} == {torch.bfloat16}
    trainer.run()
    export = assert_masters(tmp_path / "run")
    used = trainer.reference.snapshot_weights(trainer.state.step)
    assert used is not None and export.snapshot is not None
    for name, value in export.snapshot.items():
        assert used[name].dtype == torch.bfloat16 and torch.equal(value, used[name].float())
    resumed = make_trainer("run", *SHORT, *REFRESH, *settings, BF16, FROZEN, resume=True)
    for name, value in gathered_state(resumed.engine).items():
        assert torch.equal(value, export.weights[name])


@pytest.mark.parametrize("way", ["a parameter each", "one flat parameter", "accumulating in fp32"])
def test_masters_outside_of_the_zero_optimisers(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """DeepSpeed has three more optimisers for bf16. Each wraps one of torch's, with masters in the model's order."""
    if way == "one flat parameter":
        monkeypatch.setattr("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW)
    fp32 = way == "accumulating in fp32"
    settings = [*ZERO[1], 'data_types={"grad_accum_dtype": "fp32"}'] if fp32 else ZERO[0]
    trainer = make_trainer("run", *SHORT, *settings, BF16, FROZEN)
    trainer.run()
    optimizer = trainer.engine.optimizer
    expected = {
        "a parameter each": FP16_UnfusedOptimizer,
        "one flat parameter": FP16_Optimizer,
        "accumulating in fp32": BF16_Optimizer,
    }
    assert type(optimizer) is expected[way]
    (group,) = optimizer.optimizer.param_groups
    flat = torch.cat([each.detach().flatten() for each in group["params"]])
    state = gathered_state(trainer.engine)
    assert_digits(state)
    found = [state[name].flatten() for name, each in trainer.engine.module.named_parameters() if each.requires_grad]
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
    offloaded = [f"{key}={json.dumps(shipped[key])}" for key in ("zero_optimization", "zero_force_ds_cpu_optimizer")]
    stage_2 = [*ZERO[2], 'zero_optimization.offload_optimizer={"device": "cpu"}', "zero_force_ds_cpu_optimizer=false"]
    for name, settings in {"three": [*offloaded, ZERO[3][1]], "two": stage_2}.items():
        make_trainer(name, *SHORT, *REFRESH, *settings, BF16, FROZEN).run()
        assert_masters(tmp_path / name)


TWO_RANKS = """
import sys
from pathlib import Path
from embrag_ds.config import load_config
from embrag_ds import logs
from embrag_ds.training import deepspeed_log, distributed
from embrag_ds.training.distributed import start_distributed
from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.training.trainer import Trainer

distributed.cpu_has_bf16 = lambda: True
panel, out, *configs = (Path(each) for each in sys.argv[-4:])
with logs.on_terminal(), logs.kept_for_run() as run_log, deepspeed_log.written_to(run_log):
    group = start_distributed()
    run_log.write_to(out / group.own_file("run.log"))
    for path in configs:
        run = load_config(path)
        Trainer(run, open_inputs(PanelFiles(panel), run.embrag.data, False), out / path.stem, group, False).run()
    group.close()
"""


def test_two_ranks_export_their_masters_and_each_has_a_log(
    make_config: MakeConfig, inputs: PanelInputs, tmp_path: Path, root: Path
) -> None:
    """Each rank holds half of the masters."""
    for stage in (2, 3):
        config = make_config(*SHORT, *REFRESH, *ZERO[stage], BF16, FROZEN)
        (tmp_path / f"zero{stage}.json").write_text(json.dumps(config.as_dict()))
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    configs = [tmp_path / f"zero{stage}.json" for stage in (2, 3)]
    first, second = run_ranks(root, 2, tmp_path / "two_ranks.py", inputs.panel.path, tmp_path, *configs)
    for name in ("run.log", "run-rank1.log"):
        log = (tmp_path / name).read_text()
        assert " DeepSpeed: " in log and log.count("embrag_ds.training.trainer: run folder: ") == 2
    assert (first.stdout, second.stdout) == ("", "")
    assert first.stderr.count("run folder: ") == 2 and "run folder: " not in second.stderr
    assert "DeepSpeed" not in first.stderr + second.stderr
    for path in configs:
        assert_masters(tmp_path / path.stem)
