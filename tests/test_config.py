"""The run's file: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime import config as deepspeed_config
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.config import DEEPSPEED_KEYS, EmbragConfig, load_config, parse_config, parse_embrag
from embrag_ds.errors import UserError

FILES = sorted((Path(__file__).resolve().parents[1] / "ds_configs").glob("*.json"))
MINIMAL: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}}


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(base)
    for key, value in extra.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def parse(dotted: str, value: Any) -> Any:
    return parse_config(merged(MINIMAL, nested(dotted, value)), "run.json")


def sections(kind: type = EmbragConfig, name: str = "embrag") -> dict[str, type]:
    """Every section of ours: dotted name and dataclass."""
    found = {name: kind}
    for key, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= sections(typing.cast(type, hint), f"{name}.{key}")
    return found


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_ds_configs_loads_here_and_in_deepspeed(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config.as_dict(), "again") == config
    # No process group: only the settings are read.
    theirs = deepspeed_config.DeepSpeedConfig(copy.deepcopy(config.deepspeed))
    assert theirs.train_micro_batch_size_per_gpu == config.deepspeed["train_micro_batch_size_per_gpu"]
    assert theirs.optimizer_name == config.deepspeed["optimizer"]["type"].lower()


def shipped(name: str) -> dict[str, Any]:
    (path,) = (path for path in FILES if path.name == name)
    return load_config(path).as_dict()


def test_v17_is_v18_but_for_the_mode() -> None:
    v17, v18 = shipped("v17.json"), shipped("v18.json")
    assert v17["embrag"]["retrieval"].pop("mode") == "token" and v18["embrag"]["retrieval"].pop("mode") == "embedding"
    assert v17 == v18


def test_offloading_is_v18_but_for_zero() -> None:
    offloaded, v18 = shipped("v18_zero3_offload.json"), shipped("v18.json")
    assert offloaded.pop("zero_optimization")["stage"] == 3 and not offloaded.pop("zero_force_ds_cpu_optimizer")
    del v18["zero_optimization"]
    assert offloaded == v18


def test_the_large_batch_sees_the_people_of_v18_in_fewer_steps() -> None:
    small, large = shipped("v18.json"), shipped("v18_large_batch.json")

    def people(config: dict[str, Any]) -> int:
        return config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]

    factor = people(large) / people(small)
    assert (people(large), factor) == (4096, 128)
    rates = [config["optimizer"]["params"]["lr"] for config in (small, large)]
    assert rates[1] / rates[0] == pytest.approx(factor**0.5, rel=0.01)
    for config in (small, large):
        assert config["scheduler"]["params"]["total_num_steps"] == config["embrag"]["train"]["max_steps"]
    assert large["embrag"]["train"]["max_steps"] * factor == pytest.approx(
        small["embrag"]["train"]["max_steps"], rel=0.01
    )
    for section in ("model", "loss", "data"):
        assert large["embrag"][section] == small["embrag"][section]


@pytest.mark.parametrize(("section", "kind"), sections().items(), ids=sections())
def test_our_unknown_keys_are_refused_with_the_nearest_name(section: str, kind: type) -> None:
    for name in typing.get_type_hints(kind):
        typo = name[:-1] + ("zx" if len(name) < 6 else name[-1] + "s")
        with pytest.raises(UserError) as caught:
            parse(f"{section}.{typo}", 1)
        message = str(caught.value)
        assert message.startswith(f"run.json: unknown key {section}.{typo}; ") and "\n" not in message
        assert repr(name) in message or "known keys: " in message
    with pytest.raises(
        UserError, match=f"unknown key {section}.qqqqqq; known keys: .*{next(iter(kind.__annotations__))}"
    ):
        parse(f"{section}.qqqqqq", 1)


@pytest.mark.parametrize("section", DEEPSPEED_KEYS, ids=lambda name: name or "top level")
def test_deepspeeds_unknown_keys_are_refused_with_the_nearest_name(section: str) -> None:
    prefix = f"{section}." if section else ""
    for name in DEEPSPEED_KEYS[section]:
        typo = f"{name}_"
        with pytest.raises(UserError) as caught:
            parse(f"{prefix}{typo}", 1)
        assert str(caught.value) == f"run.json: unknown DeepSpeed key {prefix}{typo}; did you mean {name!r}?"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("embrg", "embrag"),
        ("Embrag", "embrag"),
    ],
)
def test_a_typo_at_top_level_is_not_passed_over(typo: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"{typo}; did you mean {meant!r}"):
        parse(typo, {})


class Recorder(dict):
    """A settings section that notes which keys are asked for."""

    def __init__(self, tree: dict[str, Any], name: str, asked: dict[str, set[str]]):
        inner = {
            key: Recorder(value, f"{name}.{key}" if name else key, asked) if isinstance(value, dict) else value
            for key, value in tree.items()
        }
        super().__init__(inner)
        self._asked = asked.setdefault(name, set())

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self


@pytest.fixture(scope="module")
def asked_by_deepspeed() -> dict[str, set[str]]:
    """Section -> keys that DeepSpeed looks for when it reads a file with all of our silent sections in it."""
    tree = {section: {} for section in DEEPSPEED_KEYS if section and "." not in section}
    tree |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
    tree |= {"optimizer": {"type": "AdamW", "params": {}}, "scheduler": {"type": "WarmupLR", "params": {}}}
    asked: dict[str, set[str]] = {}
    deepspeed_config.DeepSpeedConfig(Recorder(tree, "", asked))
    return asked


@pytest.mark.parametrize("section", [name for name in DEEPSPEED_KEYS if name != "optimizer.params"])
def test_the_known_keys_are_those_deepspeed_reads(asked_by_deepspeed: dict[str, set[str]], section: str) -> None:
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    tpu_only = {"vocabulary_size"}  # looked at only to warn that it is not a multiple of 8
    not_ours = {"sequence_parallel_size"}  # asked for in a running process group; our windows are not split over ranks
    refused = removed | tpu_only | not_ours if section == "" else set()
    assert DEEPSPEED_KEYS[section] >= asked_by_deepspeed[section] - refused
    # Defined, but read where the thing is used.
    elsewhere = {"aio": {"thread_count"}}
    assert asked_by_deepspeed[section] >= DEEPSPEED_KEYS[section] - elsewhere.get(section, set())


def test_optimizer_parameters_are_those_of_the_optimizers() -> None:
    import inspect

    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    kinds = (DeepSpeedCPUAdagrad, DeepSpeedCPUAdam, FusedAdam, FusedLamb, DeepSpeedCPULion, FusedLion)
    known = DEEPSPEED_KEYS["optimizer.params"]
    supplied_by_deepspeed = {"self", "model_params", "params", "adamw_mode", "set_grad_none", "max_grad_norm"}
    for kind in (*kinds, torch.optim.AdamW):
        wanted = {name for name, each in inspect.signature(kind.__init__).parameters.items() if each.kind < 4}
        tuning = {"maximize", "capturable", "differentiable", "fused", "eps_inside_sqrt"}
        assert wanted - supplied_by_deepspeed - tuning <= known, kind
    assert {deepspeed_config.TORCH_ADAM_PARAM, deepspeed_config.ADAM_W_MODE} <= known


@pytest.mark.parametrize(
    ("override", "place", "expected"),
    [
        ("embrag.model.dims=128", "embrag.model.dims", 128),
        ("embrag.retrieval.encoding=live", "embrag.retrieval.encoding", "live"),
        ('embrag.retrieval.encoding="live"', "embrag.retrieval.encoding", "live"),
        ("embrag.retrieval.relatives=a=b.tsv", "embrag.retrieval.relatives", "a=b.tsv"),
        ("embrag.masking.random_rate=[0.1, 0.2]", "embrag.masking.random_rate", (0.1, 0.2)),
        ('embrag.masking.policies={"random": 1}', "embrag.masking.policies", {"random": 1.0}),
        ("embrag.train.patience=null", "embrag.train.patience", None),
        ("embrag.model={}", "embrag.model.layers", 12),
        ("zero_optimization.stage=3", "zero_optimization.stage", 3),
        ("optimizer.params.lr=1e-3", "optimizer.params.lr", 1e-3),
        ("gradient_clipping=0.5", "gradient_clipping", 0.5),
    ],
)
def test_set_takes_json_or_text_at_any_depth(tmp_path: Path, override: str, place: str, expected: Any) -> None:
    config = load_config(write(tmp_path, json.dumps(MINIMAL)), [override])
    value: Any = config.as_dict()
    for name in place.split("."):
        value = value[name]
    assert value == expected and type(value) is type(expected)


def test_the_last_set_wins_and_the_two_intervals_exclude_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(merged(MINIMAL, nested("embrag.retrieval.refresh.every_steps", 60))))
    config = load_config(
        path, ["embrag.model.dims=32", "embrag.model.dims=64", "embrag.retrieval.refresh.every_epochs=2"]
    )
    assert config.embrag.model.dims == 64
    assert config.embrag.retrieval.refresh.every_epochs == 2 and config.embrag.retrieval.refresh.every_steps is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("embrag.model.dims", "write it as dotted.key=value"),
        ("=3", "write it as dotted.key=value"),
        ("embrag.model.dims.more=3", "'dims' is not a section"),
        ("train_micro_batch_size_per_gpu.x=3", "'train_micro_batch_size_per_gpu' is not a section"),
        ("embrag.model.dimms=3", "did you mean 'dims'"),
        ("embrag.model.dims=wide", "embrag.model.dims must be of type int, not 'wide'"),
        ("embrag=3", "embrag must be a section"),
        ("optimizer=3", "optimizer must be a section"),
        ("embrag..dims=3", "unknown key embrag."),
    ],
)
def test_a_bad_set_is_one_line(tmp_path: Path, override: str, complaint: str) -> None:
    text = json.dumps(merged(MINIMAL, nested("embrag.model.dims", 32)))
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text), [override])
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1.5),
        ("seed", True),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 2**80),
        ("data.window_sites", 1),
        ("data.overlap_sites", 600),
        ("data.flank_sites", -1),
        ("data.validation_people", 0),
        ("data.cache_dir", 3),
        ("masking.policies", {"arrays": 1.0}),
        ("masking.policies", {"array": 0.0}),
        ("masking.policies", {"array": -1.0, "random": 2.0}),
        ("masking.policies", ["array"]),
        ("masking.scope", "person"),
        ("masking.random_rate", [0.5]),
        ("masking.random_rate", [0.8, 0.3]),
        ("masking.random_rate", [0.3, 1.1]),
        ("masking.random_rate", 0.3),
        ("masking.rare_rate", 1.5),
        ("masking.curriculum_steps", 0),
        ("retrieval.mode", "tokens"),
        ("retrieval.k", 0),
        ("retrieval.k", "64"),
        ("retrieval.refresh", {"every_steps": 1, "every_epochs": 1}),
        ("retrieval.refresh", {}),
        ("retrieval.refresh", {"every_steps": 0}),
        ("retrieval", {"store": "dense", "encoding": "live"}),
        ("retrieval.dense_budget_gb", -1.0),
        ("model.dims", 4),
        ("model.dims", 100),
        ("model.layers", 0),
        ("model.heads", 0),
        ("model.heads", -4),
        ("model.ffn_multiple", 0),
        ("model.dropout", 1.0),
        ("model.dropout", "0"),
        ("loss.kind", "mse"),
        ("loss.focal_gamma", -0.1),
        ("loss", {"haplotype_weight": 0, "genotype_weight": 0}),
        ("train.max_steps", 0),
        ("train.patience", 0),
        ("train.patience", "never"),
        ("validation.people", 0),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_key_named(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        parse(f"embrag.{key}", value)
    message = str(caught.value)
    assert message.startswith("run.json: embrag.") and "\n" not in message
    assert key.split(".")[0] in message


@pytest.mark.parametrize("steps", [0, -1, 1.5, "auto"])
def test_accumulation_is_a_positive_whole_number(steps: Any) -> None:
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        parse("gradient_accumulation_steps", steps)


@pytest.mark.parametrize("size", [0, -1, 1.5, "auto"])
def test_the_micro_batch_is_a_positive_whole_number(size: Any) -> None:
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu"):
        parse("train_micro_batch_size_per_gpu", size)


@pytest.mark.parametrize("key", MINIMAL)
def test_what_every_run_needs_is_asked_for(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} is missing"):
        parse_config({name: value for name, value in MINIMAL.items() if name != key}, "run.json")


def test_the_file_named_in_the_advice_exists(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({}, "run.json")
    advised = str(caught.value).split("see ")[1]
    assert (root / advised).is_file()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"embrag": {"seed": 1, "seed": 2}}', "'seed' appears twice"),
        ("{", "not valid JSON"),
        ("[1, 2]", "run.json"),
        ("3", "run.json"),
        ("", "run.json"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config(write(tmp_path, text))
    with pytest.raises(UserError, match=r"none\.json: cannot read"):
        load_config(tmp_path / "none.json")


def test_comments_are_allowed_as_deepspeed_allows_them(tmp_path: Path) -> None:
    text = '{\n  # why\n  "train_micro_batch_size_per_gpu": 2, // two\n  "optimizer": {"type": "AdamW"}\n}'
    assert load_config(write(tmp_path, text)) == parse_config(MINIMAL, "")


FRACTION = st.floats(0.001, 1.0, allow_nan=False)
OURS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "masking": st.fixed_dictionaries(
            {},
            optional={
                "random_rate": st.tuples(FRACTION, FRACTION).map(sorted),
                "policies": st.dictionaries(st.sampled_from(["array", "random"]), FRACTION, min_size=1),
                "scope": st.sampled_from(["sample", "window"]),
            },
        ),
        "retrieval": st.fixed_dictionaries(
            {},
            optional={
                "refresh": st.one_of(
                    st.fixed_dictionaries({"every_steps": st.integers(1, 99)}),
                    st.fixed_dictionaries({"every_epochs": st.integers(1, 99)}),
                ),
                "relatives": st.none() | st.text(),
                "k": st.integers(1, 2000),
            },
        ),
        "loss": st.fixed_dictionaries({}, optional={"focal_gamma": st.integers(0, 3) | FRACTION}),
    },
)


@given(OURS)
def test_a_resolved_configuration_reads_back_as_itself(ours: dict[str, Any]) -> None:
    config = parse_config({**MINIMAL, "embrag": ours}, "run.json")
    again = json.loads(json.dumps(config.as_dict()))
    assert parse_config(again, "config.json") == config
    assert parse_embrag(again["embrag"], "config.json") == config.embrag
    for section, value in ours.items():
        kept = again["embrag"][section]
        assert (
            kept == value
            if not isinstance(value, dict)
            else all(kept[key] == value[key] or key == "refresh" for key in value)
        )


def test_parsing_leaves_its_input_alone() -> None:
    tree = merged(MINIMAL, nested("embrag.retrieval.k", 7))
    before = copy.deepcopy(tree)
    parse_config(tree, "run.json")
    assert tree == before
