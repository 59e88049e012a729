"""Run configuration: the files and keys that are accepted or refused, and the errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from embrag_ds.config import EmbragConfig, load_config, parse_config, parse_embrag
from embrag_ds.data.masking import MaskingConfig
from embrag_ds.errors import UserError
from embrag_ds.model.settings import ModelConfig
from embrag_ds.retrieval.schedule import RefreshConfig

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
    """Every section of this package: dotted name and dataclass."""
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
def test_every_file_of_ds_configs_loads(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config.as_dict(), "again") == config


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


def leaves(tree: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Leaves of a tree, dotted key -> value; an empty section is a leaf."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{name}{key}.") if isinstance(value, dict) and value else {f"{name}{key}": value}
    return found


OFFLOADED = {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("v17.json", {"embrag.retrieval.mode": "token"}),
        (
            "v18_zero3_offload.json",
            {
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization.stage": 3,
                **{f"zero_optimization.offload_param.{key}": value for key, value in OFFLOADED.items()},
                **{f"zero_optimization.offload_optimizer.{key}": value for key, value in OFFLOADED.items()},
            },
        ),
        (
            "v18_large_batch.json",
            {
                "train_micro_batch_size_per_gpu": 64,
                "gradient_accumulation_steps": 64,
                "optimizer.params.lr": 0.0068,
                "scheduler.params.total_num_steps": 390,
                "scheduler.params.warmup_num_steps": 16,
                "embrag.masking.curriculum_steps": 40,
                "embrag.retrieval.refresh.every_steps": 20,
                "embrag.retrieval.refresh.every_epochs": None,
                "embrag.train.max_steps": 390,
                "embrag.train.log_every": 1,
                "embrag.train.eval_every": 20,
                "embrag.train.checkpoint_every": 20,
            },
        ),
    ],
)
def test_what_extends_v18_differs_from_it_in_this_and_nothing_else(name: str, differing: dict[str, Any]) -> None:
    other, v18 = leaves(shipped(name)), leaves(shipped("v18.json"))
    assert {key: value for key, value in other.items() if key not in v18 or v18[key] != value} == differing
    assert v18.keys() <= other.keys()


def test_v18_is_this() -> None:
    assert {key: value for key, value in shipped("v18.json").items() if key != "embrag"} == {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0006,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "weight_decay": 0.01,
                "torch_adam": True,
                "fused": True,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": 50_000,
                "warmup_num_steps": 1000,
                "warmup_min_ratio": 0.001,
                "warmup_type": "linear",
            },
        },
    }


def test_the_large_batch_sees_the_samples_of_v18_in_fewer_steps() -> None:
    small, large = shipped("v18.json"), shipped("v18_large_batch.json")

    def samples(config: dict[str, Any]) -> int:
        return config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]

    factor = samples(large) / samples(small)
    assert (samples(large), factor) == (4096, 128)
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
        nearest = {"patience": "patience_s"}.get(name, name)  # of two keys that differ by the letters added here
        assert repr(nearest) in message or "known keys: " in message
    with pytest.raises(
        UserError, match=f"unknown key {section}.qqqqqq; known keys: .*{next(iter(kind.__annotations__))}"
    ):
        parse(f"{section}.qqqqqq", 1)


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
        ("embrag.model.dims.more=3", "embrag.model.dims is not a section but 32"),
        ("train_micro_batch_size_per_gpu.x=3", "train_micro_batch_size_per_gpu is not a section but 2"),
        ("embrag.model.dimms=3", "did you mean 'dims'"),
        ("embrag.model.dims=wide", 'embrag.model.dims must be a whole number, not "wide"'),
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
        ("data.map_scale", 1e308),
        ("data.map_scale", 1e-7),
        ("data.validation_samples", 0),
        ("data.cache_dir", 3),
        ("masking.policies", {"arrays": 1.0}),
        ("masking.policies", {"array": 0.0}),
        ("masking.policies", {"array": -1.0, "random": 2.0}),
        ("masking.policies", ["array"]),
        ("masking.scope", "haplotype"),
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
        ("validation.samples", 0),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_key_named(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        parse(f"embrag.{key}", value)
    message = str(caught.value)
    assert message.startswith("run.json: embrag.") and "\n" not in message
    assert key.split(".")[0] in message


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("seed", 1.0, "a whole number, not 1.0"),
        ("seed", True, "a whole number, not true"),
        ("seed", None, "a whole number, not null"),
        ("train.patience", "never", 'a whole number, or null, not "never"'),
        ("train.compile", 1, 'true or false, or "max", not 1'),
        ("train.compile", "most", 'true or false, or "max", not "most"'),
        ("model.dropout", True, "a number, not true"),
        ("model.dropout", "0", 'a number, not "0"'),
        ("masking.rare_maf", float("nan"), "a number, not NaN"),
        ("retrieval.dense_budget_gb", float("inf"), "a number, not Infinity"),
        ("data.cache_dir", 3, "text, or null, not 3"),
        ("retrieval.mode", "tokens", 'one of "embedding", "token", "none", not "tokens"'),
        ("retrieval.mode", ["token"], 'one of "embedding", "token", "none", not ["token"]'),
        ("masking.random_rate", [0.5], "a list of 2 numbers, not [0.5]"),
        ("masking.random_rate", [0.3, 0.5, 0.8], "a list of 2 numbers, not [0.3, 0.5, 0.8]"),
        ("masking.random_rate", [0.3, True], "a list of 2 numbers, not [0.3, true]"),
        ("masking.random_rate", "0.3", 'a list of 2 numbers, not "0.3"'),
        ("masking.policies", ["array"], 'a section, not ["array"]'),
        ("masking.policies.array", "often", 'a number, not "often"'),
        ("retrieval.refresh.at_steps", [1, 2.5], "a list of whole numbers, or null, not [1, 2.5]"),
        ("train.frozen", "pooling", 'a list of texts, not "pooling"'),
        ("train.frozen", [*["pooling"] * 9, 1], f"a list of texts, not {json.dumps(['pooling'] * 9)[:60]}..."),
        ("retrieval.refresh", [], "a section, not []"),
        ("retrieval", None, "a section, not null"),
        ("model", 3, "a section, not 3"),
    ],
)
def test_the_error_of_a_wrong_type_is_in_words(key: str, value: Any, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(f"embrag.{key}", value)
    assert str(caught.value) == f"run.json: embrag.{key} must be {complaint}"


@pytest.mark.parametrize("tree", [[], [1], None, 3, "text", True])
def test_a_section_that_is_none_is_a_users_error(tree: Any) -> None:
    for dotted in sections():
        with pytest.raises(UserError, match=f"^run.json: {dotted} must be a section, not "):
            parse(dotted, tree)
    with pytest.raises(UserError, match=r"^model\.safetensors: embrag must be a section, not "):
        parse_embrag(tree, "model.safetensors")


def test_an_unknown_key_is_named_before_a_wrong_value() -> None:
    with pytest.raises(UserError, match=r"unknown key embrag\.model\.dimms; did you mean 'dims'\?"):
        parse("embrag.model", {"layers": "many", "dimms": 8})


def test_a_text_that_is_not_unicode_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"^run.json: embrag: a text in it is not Unicode$"):
        parse("embrag.data.cache_dir", "/data/\udcff")


def fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value is of the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(value is None if each is type(None) else fits(each, value) for each in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return isinstance(value, list) and all(fits(arguments[0], each) for each in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(fits, arguments, value))
    if origin is dict:
        return isinstance(value, dict) and all(fits(arguments[1], each) for each in value.values())
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


KEYS = [
    (f"{name}.{key}", hint) for name, kind in sections().items() for key, hint in typing.get_type_hints(kind).items()
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.floats(-1, 9, allow_nan=False),
    st.sampled_from(["array", "token", "sample", "focal", "text"]),
)


@example(("embrag.model.fusion", str), "array")
@given(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.just("array"), SCALARS))
def test_types_are_as_strict_as_their_annotations(key: tuple[str, Any], value: Any) -> None:
    (dotted, hint), complaint = key, ""
    try:
        parse(dotted, value)
    except UserError as fault:
        complaint = str(fault)
        assert "\n" not in complaint and complaint.startswith("run.json: ")
    wrong = f"run.json: {dotted}" in complaint and " must be " in complaint and ", not " in complaint
    wrong &= f"{dotted}: " not in complaint  # of the right type, but a value that breaks a rule
    assert wrong == (not fits(hint, value)), complaint


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        (ModelConfig, {"dims": "64"}, "dims\n  Input should be a valid integer"),
        (ModelConfig, {"dims": 64.0}, "dims\n  Input should be a valid integer"),
        (ModelConfig, {"dims": True}, "dims\n  Input should be a valid integer"),
        (ModelConfig, {"dimms": 64}, "dimms\n  Unexpected keyword argument"),
        (ModelConfig, {"dropout": False}, "dropout\n  Input should be a valid number"),
        (ModelConfig, {"fusion": 1}, "fusion\n  Input should be a valid string"),
        (MaskingConfig, {"random_rate": [0.3, 0.8]}, "random_rate\n  Input should be a valid tuple"),
        (EmbragConfig, {"model": {"dims": 64}}, "model\n  Input should be an instance of ModelConfig"),
    ],
)
def test_settings_built_in_python_are_strict_and_name_the_key(
    kind: type, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**arguments)
    assert str(caught.value).startswith(f"1 validation error for {kind.__name__}\n{named}")


def test_settings_are_dataclasses_like_any_other() -> None:
    config = EmbragConfig(model=ModelConfig(dims=64, dropout=0))
    assert type(config.model.dropout) is float
    again = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=3))
    assert again.model == ModelConfig(dims=64, layers=3) and config.model.layers == 12
    assert dataclasses.asdict(again)["model"]["layers"] == 3
    with pytest.raises(ValidationError, match="layers"):
        dataclasses.replace(config.model, layers="3")
    with pytest.raises(UserError, match=r"^embrag.model.layers: must be at least 1$"):
        dataclasses.replace(config.model, layers=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(again)) == again == copy.deepcopy(again)
    assert {config.model: 1}[ModelConfig(dims=64)] == 1
    for kind in sections().values():
        if kind not in (EmbragConfig, MaskingConfig):  # the policies are a dictionary
            one, other = (RefreshConfig(every_steps=1) if kind is RefreshConfig else kind() for _ in range(2))
            assert hash(one) == hash(other)


@pytest.mark.parametrize("steps", [0, -1, 1.5, "auto"])
def test_accumulation_is_a_positive_whole_number(steps: Any) -> None:
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        parse("gradient_accumulation_steps", steps)


@pytest.mark.parametrize("size", [0, -1, 1.5, "auto"])
def test_the_micro_batch_is_a_positive_whole_number(size: Any) -> None:
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu"):
        parse("train_micro_batch_size_per_gpu", size)


@pytest.mark.parametrize("key", MINIMAL)
def test_the_keys_that_every_run_needs_are_required(key: str) -> None:
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
