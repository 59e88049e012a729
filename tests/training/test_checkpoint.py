"""Exports of a trained model, the search backend of a resumed run, and random numbers of a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from embrag_ds import export
from embrag_ds.config import EmbragConfig
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE, ExportedModel, read_export, write_export
from embrag_ds.model.imputer import Imputer
from embrag_ds.retrieval.fastest import FirstSearch
from embrag_ds.training.checkpoint import seed_step
from embrag_ds.training.distributed import DistributedContext
from embrag_ds.training.masters import gathered_state
from embrag_ds.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
ZERO_3 = ["zero_optimization.stage=3", "zero_optimization.stage3_param_persistence_threshold=0"]
SHORT = ["embrag.train.max_steps=5", "optimizer.params.lr=0.02"]
# The learning rate is 0 in the first two steps: the second generation is the first that differs.
REFRESH = ["embrag.retrieval.encoding=refresh", 'embrag.retrieval.refresh={"every_steps": 3, "lag_steps": 1}']


def rebuilt(model: ExportedModel) -> Imputer:
    network = Imputer(model.config.model)
    network.load_state_dict(model.weights)
    return network.eval()


def predicted(network: Callable, trainer: Trainer) -> Tensor:
    trainer.engine.eval()
    with torch.no_grad():
        return network(trainer.validation_batch(trainer.sampler.queries(3))).logits


@pytest.mark.parametrize("stage", [["zero_optimization.stage=1"], ZERO_3], ids=["stage 1", "stage 3"])
@pytest.mark.parametrize("encoding", [REFRESH, ["embrag.retrieval.encoding=live"]], ids=["refresh", "live"])
def test_an_export_predicts_what_the_trainer_predicts(
    make_trainer: MakeTrainer, tmp_path: Path, encoding: list[str], stage: list[str]
) -> None:
    trainer = make_trainer("run", *SHORT, *encoding, *stage)
    trainer.run()
    model = read_export(tmp_path / "run" / MODEL_FILE)
    assert model.config == trainer.embrag
    torch.testing.assert_close(
        predicted(rebuilt(model), trainer), predicted(trainer.engine, trainer), rtol=0, atol=1e-6
    )
    assert all(value.dtype == torch.float32 for value in model.weights.values())


def test_the_snapshot_is_that_of_the_last_generation(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for name, encoding in (("refresh", REFRESH), ("fixed", ["embrag.retrieval.encoding=fixed"])):
        trainer = make_trainer(name, *SHORT, *encoding)
        state = {key: value.clone() for key, value in trainer.engine.module.embedding.state_dict().items()}
        trainer.run()
        model = read_export(tmp_path / name / MODEL_FILE)
        used = trainer.reference.snapshot_weights(trainer.state.step)
        assert model.snapshot is not None and used is not None
        assert all(torch.equal(value, used[key]) for key, value in model.snapshot.items())
        first = all(torch.equal(value, state[key]) for key, value in model.snapshot.items())
        now = all(torch.equal(value, model.weights[f"embedding.{key}"]) for key, value in model.snapshot.items())
        assert (first, now) == (name == "fixed", False)
    live = make_trainer("live", *SHORT, "embrag.retrieval.encoding=live")
    live.run()
    assert read_export(tmp_path / "live" / MODEL_FILE).snapshot is None


def test_zero_3_exports_the_whole_of_every_parameter(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for name, stage in (("one", []), ("three", ZERO_3)):
        make_trainer(name, *SHORT, *REFRESH, *stage).run()
    one, three = (read_export(tmp_path / name / MODEL_FILE) for name in ("one", "three"))
    assert one.weights.keys() == three.weights.keys()
    for name, value in one.weights.items():
        torch.testing.assert_close(three.weights[name], value, rtol=1e-3, atol=1e-3, msg=name)
    assert one.snapshot is not None and three.snapshot is not None
    assert {k: v.shape for k, v in one.snapshot.items()} == {k: v.shape for k, v in three.snapshot.items()}


def test_gathered_weights_are_copies(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run")
    state = gathered_state(trainer.engine)
    before = state["head.bias"].clone()
    with torch.no_grad():
        trainer.engine.module.head.bias.add_(1)
    assert torch.equal(state["head.bias"], before)


@pytest.mark.parametrize(
    ("fault", "raised"), [(SafetensorError("no space"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_export_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, raised: type[BaseException]
) -> None:
    path = tmp_path / MODEL_FILE
    write_export(path, {"weight": torch.zeros(2)}, None, EmbragConfig())
    before = path.read_bytes()

    def half(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
        file.write_bytes(before[:100])
        raise fault

    monkeypatch.setattr(export, "save_file", half)
    with pytest.raises(raised):
        write_export(path, {"weight": torch.ones(2)}, None, EmbragConfig())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_is_not_an_export_is_refused(tmp_path: Path) -> None:
    missing, text, foreign = (
        tmp_path / name for name in ("none.safetensors", "text.safetensors", "foreign.safetensors")
    )
    text.write_text("weights, perhaps")
    save_file({"weight": torch.zeros(2)}, foreign)
    for path, complaint in (
        (missing, "cannot read"),
        (text, "cannot read"),
        (tmp_path, "cannot read"),
        (foreign, "not a model"),
    ):
        with pytest.raises(UserError) as caught:
            read_export(path)
        assert str(path) in str(caught.value) and complaint in str(caught.value) and "\n" not in str(caught.value)


def test_an_export_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    save_file({"weight": torch.zeros(2)}, path, {"format": "embrag_ds 0", "embrag": "{}"})
    with pytest.raises(UserError, match="another version"):
        read_export(path)


def test_random_numbers_are_a_function_of_seed_step_and_rank() -> None:
    drawn = {}
    # From 281,469,838 on a product with the seed once was too large, at a later step from lower ones on.
    large = [281_469_837, 281_469_838, 2**63 - 1, 2**63, 2**64 - 1]
    of_large = [(seed, step, rank) for seed in large for step in (0, 10**9) for rank in (0, 1)]
    for seed, step, rank in [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (1, 65_537, 0), *of_large]:
        seed_step(seed, step, rank)
        drawn[seed, step, rank] = torch.rand(4)
    seed_step(1, 0, 0)
    assert torch.equal(torch.rand(4), drawn[1, 0, 0])
    assert len({tuple(each.tolist()) for each in drawn.values()}) == len(drawn)


AUTO = "embrag.retrieval.backend=auto"


def fastest_is(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let the timing of the search backends find ``name``; the list gets an entry for every timing."""
    timed: list[str] = []
    monkeypatch.setattr(FirstSearch, "fastest", lambda self: timed.append(name) or name)
    return timed


def test_the_backend_chosen_by_auto_is_recorded_and_kept_on_resume(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = fastest_is(monkeypatch, "faiss-cpu")
    trainer = make_trainer("run", AUTO, "embrag.train.max_steps=1")
    assert timed == ["faiss-cpu"] and trainer.collate.backend == "faiss-cpu"
    assert trainer._validation_collate.backend == "faiss-cpu"
    trainer.run()
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["search_backend"] == "faiss-cpu"
    timed = fastest_is(monkeypatch, "torch")
    for now in (AUTO, "embrag.retrieval.backend=faiss-cpu"):
        resumed = make_trainer("run", now, "embrag.train.max_steps=2", resume=True)
        assert timed == [] and resumed.collate.backend == "faiss-cpu"
    with pytest.raises(UserError, match=r"backend differs .*\(torch for faiss-cpu\).*ties") as caught:
        make_trainer("run", "embrag.retrieval.backend=torch", resume=True)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_backend_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer("run", "embrag.train.max_steps=1").run()
    agreed = tmp_path / "run" / "checkpoints" / "agreed.json"
    content = json.loads(agreed.read_text())
    del content["backend"]
    agreed.write_text(json.dumps(content))
    with pytest.raises(UserError, match="written by another version"):
        make_trainer("run", resume=True)


def test_a_named_backend_is_taken_without_timing(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = fastest_is(monkeypatch, "torch")
    assert make_trainer("run", "embrag.retrieval.backend=faiss-cpu").collate.backend == "faiss-cpu"
    for without in ("embrag.retrieval.mode=none", "embrag.retrieval.store=dense"):
        make_trainer("other", AUTO, without)
    assert timed == []


@pytest.mark.parametrize("encoding", [REFRESH, ["embrag.retrieval.encoding=live"], ["embrag.retrieval.mode=token"]])
def test_all_ranks_take_the_choice_of_the_first(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, encoding: list[str]
) -> None:
    fastest_is(monkeypatch, "torch")
    monkeypatch.setattr(DistributedContext, "agree", lambda self, text: "faiss-cpu" if text == "torch" else text)
    assert make_trainer("run", AUTO, *encoding, *ZERO_3).collate.backend == "faiss-cpu"
