"""Exports of a trained model, the search backend of a resumed run, and random numbers of a step."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from embrag_ds import export
from embrag_ds.config import PATHS, EmbragConfig, parse_config, without_paths
from embrag_ds.dependence import Dependence
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.engine.masters import gathered_state
from embrag_ds.errors import UserError
from embrag_ds.export import MODEL_FILE, ExportedModel, read_export, write_export
from embrag_ds.model.imputer import Imputer
from embrag_ds.retrieval.fastest import FirstSearch
from embrag_ds.training.checkpoint import seed_step
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
    assert model.config == without_paths(trainer.embrag)[0] and trainer.embrag.data.cache_dir is not None
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
    write_export(path, ExportedModel.of(EmbragConfig(), {"weight": torch.zeros(2)}, None))
    before = path.read_bytes()

    def half(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
        file.write_bytes(before[:100])
        raise fault

    monkeypatch.setattr(export, "save_file", half)
    with pytest.raises(raised):
        write_export(path, ExportedModel.of(EmbragConfig(), {"weight": torch.ones(2)}, None))
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


def a_model(*overrides: str) -> tuple[EmbragConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Settings of a small network, its weights, and its snapshot."""
    tree = {"train_micro_batch_size_per_gpu": 1, "optimizer": {}, "embrag": {"model": {"dims": 8, "layers": 1}}}
    tree["embrag"] |= {"retrieval": {"encoding": "fixed"}}  # type: ignore[operator]
    for override in overrides:
        section, key, value = override.split(".", 2)
        tree["embrag"].setdefault(section, {})[key] = value  # type: ignore[attr-defined]
    config = parse_config(tree, "tree").embrag
    weights = Imputer(config.model).state_dict()
    return config, weights, {key[10:]: value.clone() for key, value in weights.items() if key.startswith("embedding.")}


def test_a_model_carries_no_path_of_its_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    named = ["data.windows_file./secret/w", "data.cache_dir./secret/c", "masking.array_manifest./secret/m"]
    config, weights, snapshot = a_model(*named, "retrieval.relatives./secret/r")
    assert json.dumps(asdict(config)).count("/secret/") == 4
    path = tmp_path / MODEL_FILE
    write_export(path, ExportedModel.of(config, weights, snapshot))
    assert b"secret" not in path.read_bytes()
    found = read_export(path).config
    assert caplog.messages == []
    bare = a_model()[0]
    assert found == bare and found.data.windows_file is None
    # A file written before: its paths are there, and ignored with a line.
    tensors = dict(weights) | {f"snapshot.{name}": value for name, value in snapshot.items()}
    header = json.dumps({"format": export.EXPORT_FORMAT, "embrag": asdict(config)})
    save_file(tensors, path, {"embrag_ds": header})
    assert b"secret" in path.read_bytes() and read_export(path).config == bare
    ignored = (
        "embrag.data.windows_file, embrag.data.cache_dir, embrag.masking.array_manifest, embrag.retrieval.relatives"
    )
    assert caplog.messages == [f"{path}: paths of its training are ignored ({ignored})"]


def test_every_setting_that_may_be_a_path_is_known_as_one() -> None:
    """Text without a fixed choice is a path; a new one must be dropped from models, or be an exception here."""
    texts = set()
    for section, kind in typing.get_type_hints(EmbragConfig).items():
        for key, hint in typing.get_type_hints(kind).items() if is_dataclass(kind) else ():
            if str in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not dict:
                texts.add(f"{section}.{key}")
    assert texts - {"model.fusion", "train.frozen", "train.checkpoint_every"} == set(PATHS)


def without_snapshot(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("snapshot.")]:
        del tensors[name]


def with_tensor(name: str, value: list[float]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.tensor(value)})


DAMAGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "no tensor head.bias": lambda tensors: tensors.pop("head.bias"),
    "no tensor snapshot.": without_snapshot,
    "head.bias has the shape [2], and its network [1]": with_tensor("head.bias", [0, 0]),
    "head.bias has values that are not finite": with_tensor("head.bias", [torch.nan]),
    "background has values that are not finite": with_tensor("background", [torch.inf]),
    "extra is no tensor of its network": with_tensor("extra", [0]),
}


@pytest.mark.parametrize("given", [{"opposite": 0.8, "alike": 0.3}, {"opposite": "much"}, {"other": 0.1}, [1], None])
def test_a_dependence_that_cannot_be_is_refused(tmp_path: Path, given: Any) -> None:
    config, weights, snapshot = a_model()
    path, dependence = tmp_path / MODEL_FILE, Dependence(0.4, 0.1)
    write_export(path, dataclasses.replace(ExportedModel.of(config, weights, snapshot), dependence=dependence))
    assert read_export(path).dependence == dependence
    tensors = dict(weights) | {f"snapshot.{name}": value for name, value in snapshot.items()}
    header = json.dumps({"format": export.EXPORT_FORMAT, "embrag": asdict(config), "dependence": given})
    save_file(tensors, path, {"embrag_ds": header})
    with pytest.raises(UserError, match="the model is damaged: its dependence is") as raised:
        read_export(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_those_of_the_network_are_refused(tmp_path: Path, damage: str) -> None:
    config, weights, snapshot = a_model()
    tensors = dict(weights) | {f"snapshot.{name}": value for name, value in snapshot.items()}
    header = json.dumps({"format": export.EXPORT_FORMAT, "embrag": asdict(config)})
    path = tmp_path / MODEL_FILE
    save_file(tensors, path, {"embrag_ds": header})
    read_export(path)
    DAMAGES[damage](tensors)
    save_file(tensors, path, {"embrag_ds": header})
    with pytest.raises(UserError) as raised:
        read_export(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: the model is damaged: ") and damage in said and "\n" not in said


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("{", "not a model"),
        ("[1]", "not a model"),
        ("[" * 100_000, "not a model"),
        ('{"format": 3}', "not a model"),
        ('{"format": 3, "embrag": %s}' % ("9" * 5000), "not a model"),
        ('{"format": 3, "embrag": 5}', "embrag must be a section, not 5"),
        ('{"format": 3, "embrag": {"seed": NaN}}', "embrag.seed must be a whole number, not NaN"),
        ('{"format": 3, "embrag": {"model": {"layers": 1000000000000}}}', "embrag.model.layers: must not exceed"),
        (
            '{"format": 3, "embrag": {"model": {"dims": 16000000000000, "layers": 1}}}',
            "embrag.model.dims: must not exceed",
        ),
        ('{"format": 3, "embrag": {"model": {"layers": 10000}}}', "too few tensors for 10000"),
        ('{"format": 3, "embrag": {"model": {"dims": 1e999}}}', "embrag.model.dims must be a whole number"),
    ],
)
def test_a_header_that_means_nothing_is_one_line(tmp_path: Path, header: str, complaint: str) -> None:
    path = tmp_path / MODEL_FILE
    save_file({"weight": torch.zeros(2)}, path, {"embrag_ds": header})
    with pytest.raises(UserError) as raised:
        read_export(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: ") and complaint in said and "\n" not in said


LIMITED = """
import resource, sys, time
from pathlib import Path
from embrag_ds.errors import UserError
from embrag_ds.export import PRETRAINED, read_export

read_export(PRETRAINED)  # what it imports takes memory, too
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for path in map(Path, sys.argv[1:]):
    mapped = 2 * min(path.stat().st_size, 1 << 31)  # by safetensors and by torch
    resource.setrlimit(resource.RLIMIT_AS, (taken + mapped + (256 << 20), resource.RLIM_INFINITY))
    began = time.process_time()
    try:
        read_export(path)
    except UserError as fault:
        print(f"{time.process_time() - began:.2f} {fault}")
"""


def with_holes(path: Path, header: dict[str, str], tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """Write an export whose tensors (type, shape and bytes by name) take no room on the disk."""
    named: dict[str, object] = {"__metadata__": header}
    end = 0
    for name, (kind, shape, size) in tensors.items():
        named[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(named).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def test_a_tampered_export_is_refused_before_it_takes_memory_or_time(tmp_path: Path) -> None:
    """A header may name any shapes, and its file may be all holes: neither is asked for, nor a network made of them."""
    config, weights, snapshot = a_model()
    header = {"embrag_ds": json.dumps({"format": export.EXPORT_FORMAT, "embrag": asdict(config)})}
    many = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=10_000, dims=65_536))
    header_of_many = {"embrag_ds": json.dumps({"format": export.EXPORT_FORMAT, "embrag": asdict(many)})}
    proper = {name: ("F32", list(value.shape), 4 * value.numel()) for name, value in weights.items()}
    proper |= {f"snapshot.{name}": ("F32", list(value.shape), 4 * value.numel()) for name, value in snapshot.items()}
    gib = 1 << 30
    with_holes(tmp_path / "wide", header, {**proper, "head.weight": ("I8", [1, gib], gib)})
    with_holes(tmp_path / "foreign", header, {**proper, "head.more": ("F16", [gib // 2], gib)})
    with_holes(tmp_path / "layers", header_of_many, {f"w{number}": ("I8", [1], 1) for number in range(10_001)})
    with_holes(tmp_path / "larger", header, {**proper, "head.weight": ("F32", [120 * gib], 480 * gib)})
    with_holes(tmp_path / "lying", header, {**proper, "head.weight": ("F32", [120 * gib], gib)})
    with_holes(tmp_path / "product", header, {**proper, "head.weight": ("F32", [1 << 40, 1 << 40], gib)})
    complaints = {
        "wide": f"the model is damaged: head.weight has the shape [1, {gib}], and its network [1, 8]",
        "foreign": "the model is damaged: head.more is no tensor of its network",
        "layers": "the model is damaged: it has no tensor background",
        "larger": "",  # the system says what it does not give
        "lying": "cannot read the model",
        "product": "cannot read the model",
    }
    command = [sys.executable, "-c", LIMITED, *(tmp_path / name for name in complaints)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(complaints)
    for line, (name, complaint) in zip(lines, complaints.items(), strict=True):
        seconds, said = line.split(" ", 1)
        assert said.startswith(f"{tmp_path / name}: {complaint}") and float(seconds) < 8


def test_other_files_are_no_models(tmp_path: Path) -> None:
    whole = export.PRETRAINED.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"weight": 1}))
    (tmp_path / "empty").touch()
    (tmp_path / "cut").write_bytes(whole[:-1])
    (tmp_path / "header").write_bytes(whole[:99])
    (tmp_path / "long").write_bytes(b"\xff" * 8 + whole[8:])
    (tmp_path / "longer").write_bytes(whole + b"\0")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError) as raised:
            read_export(path)
        said = str(raised.value)
        assert said.startswith(f"{path}: cannot read the model: ") and "\n" not in said


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
