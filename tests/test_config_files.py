"""Configuration files: where they are found, what they extend, and keys set on top."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.config import load_config
from embrag_ds.config_files import EXCLUSIVE, _merged, read_tree, shipped_configurations
from embrag_ds.errors import UserError

NAMES = ["quickstart", "v17", "v18", "v18_cpu", "v18_large_batch", "v18_wide", "v18_zero3_offload"]
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95]}},
    "bf16": {"enabled": True},
    "embrag": {
        "masking": {"policies": {"array": 0.7, "random": 0.3}, "random_rate": [0.3, 0.8]},
        "retrieval": {"refresh": {"every_epochs": 2, "lag_steps": 7, "asynchronous": False}},
        "train": {"patience": 10, "max_steps": 50},
    },
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file ``name`` with this tree beside ``base.json``, which is there."""

    def make(name: str, tree: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(tree), encoding="utf-8")
        return path

    make("base.json", BASE)
    return make


def extended(write: Write, tree: dict[str, Any], base: str = "base.json") -> dict[str, Any]:
    return read_tree(write("run.json", {"extends": base, **tree}))[0]


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """BASE with one value changed."""
    tree = copy.deepcopy(BASE)
    *parents, last = dotted.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    return tree


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_micro_batch_size_per_gpu", 3),
        ("optimizer.params.lr", 0.5),
        ("optimizer.params.betas", [0.8]),
        ("gradient_clipping", 1.0),
        ("scheduler.params.total_num_steps", 5),
        ("embrag.train.max_steps", 60),
        ("embrag.train.patience", None),
        ("embrag.masking.random_rate", [0.1, 0.2]),
        ("embrag.masking.policies", {"array": 1.0}),
        ("embrag.model.dims", 64),
        ("embrag.retrieval.refresh.lag_steps", 0),
    ],
)
def test_one_key_changes_that_key_in_a_file_and_on_the_command_line(write: Write, key: str, value: Any) -> None:
    tree: Any = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    assert extended(write, tree) == changed(key, value)
    assert extended(write, {}) == BASE
    assert read_tree(write("run.json", BASE), [f"{key}={json.dumps(value)}"])[0] == changed(key, value)


LEAVES = st.integers() | st.booleans() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
TREES = st.dictionaries(
    st.tuples(st.sampled_from(["one", "two"]), st.sampled_from(["a", "b"]), st.sampled_from(["x", "y", "z"])), LEAVES
)


def tree_of(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for names, value in flat.items():
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = value
    return tree


@given(st.lists(TREES, min_size=1, max_size=4))
def test_merging_is_an_update_of_dotted_keys(flats: list[dict[tuple[str, ...], Any]]) -> None:
    before = copy.deepcopy(flats)
    tree, flat = tree_of(flats[0]), dict(flats[0])
    for over in flats[1:]:
        lower = copy.deepcopy(tree)
        merged = _merged(tree, tree_of(over), "over.json")
        assert tree == lower, "the lower one is left alone"
        tree, flat = merged, flat | over
    assert tree == tree_of(flat) and flats == before


@given(st.lists(st.dictionaries(st.sampled_from([*EXCLUSIVE["embrag.retrieval.refresh"], "lag_steps"]), LEAVES)))
def test_of_keys_that_exclude_one_another_the_topmost_files_stay(files: list[dict[str, Any]]) -> None:
    exclusive = EXCLUSIVE["embrag.retrieval.refresh"]
    tree: dict[str, Any] = {"embrag": {"retrieval": {"refresh": {"lag_steps": 4}}}}
    for file in files:
        tree = _merged(tree, {"embrag": {"retrieval": {"refresh": file}}}, "over.json")
    refresh = tree["embrag"]["retrieval"]["refresh"]
    setting = [file for file in files if any(key in file for key in exclusive)]
    expected = {key: value for key, value in setting[-1].items() if key in exclusive} if setting else {}
    assert {key: value for key, value in refresh.items() if key in exclusive} == expected
    assert refresh["lag_steps"] == [4, *(file["lag_steps"] for file in files if "lag_steps" in file)][-1]


@pytest.mark.parametrize(("key", "value"), [("every_steps", 60), ("every_epochs", 3), ("at_steps", [5, 9])])
def test_an_interval_replaces_the_others_and_nothing_else(write: Write, key: str, value: Any) -> None:
    refresh = {"lag_steps": 7, "asynchronous": False, key: value}
    dotted = f"embrag.retrieval.refresh.{key}"
    assert extended(write, {"embrag": {"retrieval": {"refresh": {key: value}}}}) == changed(
        "embrag.retrieval.refresh", refresh
    )
    path = write("run.json", BASE)
    for override in (f"{dotted}={json.dumps(value)}", f"embrag.retrieval.refresh={json.dumps({key: value})}"):
        assert read_tree(path, [override])[0] == changed("embrag.retrieval.refresh", refresh)
    assert read_tree(path, [f"{dotted}=null"])[0]["embrag"]["retrieval"]["refresh"].keys() >= {"every_epochs"}
    loaded = load_config("v18", [f"{dotted}={json.dumps(value)}", "embrag.retrieval.refresh.lag_steps=2"])
    given = tuple(value) if isinstance(value, list) else value
    assert getattr(loaded.embrag.retrieval.refresh, key) == given and loaded.embrag.retrieval.refresh.lag_steps == 2


def test_two_intervals_in_one_file_are_still_refused(write: Write) -> None:
    both = {"embrag": {"retrieval": {"refresh": {"every_steps": 1, "at_steps": [3]}}}}
    path = write("run.json", {"extends": "base.json", **both})
    assert "set exactly one of every_steps, every_epochs and at_steps" in message(lambda: load_config(path))


def test_a_resolved_configuration_can_be_extended(write: Write) -> None:
    resolved = load_config(write("run.json", BASE)).as_dict()
    write("resolved.json", resolved)
    refresh = {"embrag": {"retrieval": {"refresh": {"every_steps": 5}}}}
    config = load_config(write("next.json", {"extends": "resolved.json", **refresh}))
    assert config.embrag.retrieval.refresh.every_steps == 5 and config.embrag.retrieval.refresh.every_epochs is None
    assert config.embrag.retrieval.refresh.lag_steps == 7


def test_null_removes_a_key_of_deepspeeds_and_is_a_value_of_ours(write: Write) -> None:
    over = {"bf16": None, "scheduler": None, "optimizer": {"params": {"betas": None}}}
    expected = copy.deepcopy(BASE)
    del expected["bf16"], expected["optimizer"]["params"]["betas"]
    assert extended(write, over) == expected
    overrides = ["bf16=null", "scheduler=null", "optimizer.params.betas=null"]
    assert read_tree(write("run.json", BASE), overrides)[0] == expected
    assert load_config(write("run.json", BASE), ["embrag.train.patience=null"]).embrag.train.patience is None
    path = write("run.json", {"extends": "base.json", "embrag": {"model": None}})
    assert "embrag.model must be a section, not null" in message(lambda: load_config(path))


def test_what_was_null_becomes_a_section(write: Write) -> None:
    path = write("run.json", {**BASE, "bf16": None, "embrag": {"model": None}})
    config = load_config(path, ["bf16.enabled=true", "embrag.model.dims=64"])
    assert config.deepspeed["bf16"] == {"enabled": True} and config.embrag.model.dims == 64


@pytest.mark.parametrize(
    ("key", "place", "there"),
    [
        ("optimizer.params.betas.0", "optimizer.params.betas", "[0.9, 0.95]"),
        ("embrag.masking.random_rate.1", "embrag.masking.random_rate", "[0.3, 0.8]"),
        ("embrag.train.max_steps.more.of.it", "embrag.train.max_steps", "50"),
        ("train_micro_batch_size_per_gpu.x", "train_micro_batch_size_per_gpu", "2"),
    ],
)
def test_a_value_is_no_section_to_set_keys_in(write: Write, key: str, place: str, there: str) -> None:
    override = f"{key}=0.5"
    error = message(lambda: read_tree(write("run.json", BASE), [override]))
    assert error == f"--set {override}: {place} is not a section but {there}"
    tree: Any = 0.5
    for name in reversed(key.split(".")):
        tree = {name: tree}
    error = message(lambda: extended(write, tree))
    assert error.endswith(f"run.json: {place} is not a section but {there}")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("optimizer.params.betas=[0.9, 0.95", "not valid JSON: "),
        ("bf16={enabled: true}", "not valid JSON: "),
        ('embrag={"seed": 1, "seed": 2}', "'seed' appears twice"),
        ("optimizer.params.torch_adam=False", "write true, false or null"),
        ("bf16.enabled=True", "write true, false or null"),
        ("scheduler=None", "write true, false or null"),
        ("extends=v17", "only a file can extend another"),
        ("extends.more=1", "only a file can extend another"),
    ],
)
def test_a_malformed_override_is_refused(write: Write, override: str, complaint: str) -> None:
    error = message(lambda: read_tree(write("run.json", BASE), [override]))
    assert error.startswith(f"--set {override}: ") and complaint in error


def test_a_chain_is_followed_from_folder_to_folder_and_leaves_no_trace(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("below/middle.json", {"extends": "../base.json", "gradient_clipping": 1.0, "embrag": {"seed": 2}})
    write("middle.json", {"seed": "not this one"})
    path = write("below/run.json", {"extends": "middle.json", "embrag": {"seed": 3}})
    monkeypatch.chdir(tmp_path)
    tree, source = read_tree(Path("below") / "run.json", ["embrag.model.dims=64"])
    assert tree == {**BASE, "gradient_clipping": 1.0, "embrag": {**BASE["embrag"], "seed": 3, "model": {"dims": 64}}}
    assert source == "below/run.json (extends below/middle.json, below/../base.json)"
    config = load_config(path)
    assert "extends" not in config.deepspeed and "extends" not in json.dumps(config.as_dict())
    error = message(lambda: load_config(Path("below/run.json"), ["embrag.modle.dims=1"]))
    assert error.startswith(f"{source}: unknown key embrag.modle; did you mean 'model'?")


@pytest.mark.parametrize(
    ("files", "chain"),
    [
        ({"run.json": "run.json"}, ["run.json", "run.json"]),
        ({"run.json": "a.json", "a.json": "run.json"}, ["run.json", "a.json", "run.json"]),
        ({"run.json": "a.json", "a.json": "b.json", "b.json": "./a.json"}, ["run.json", "a.json", "b.json", "a.json"]),
    ],
)
def test_a_circle_is_named(write: Write, tmp_path: Path, files: dict[str, str], chain: list[str]) -> None:
    for name, base in files.items():
        write(name, {"extends": base})
    error = message(lambda: read_tree(tmp_path / "run.json"))
    circle = " -> ".join(str(tmp_path / name) for name in chain)
    assert error == f"{tmp_path / 'run.json'}: extends go round in a circle: {circle}"


def test_a_circle_under_changing_names_ends_too(write: Write, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(write("run.json", {"extends": "link.json"}))
    assert "in a circle" in message(lambda: read_tree(tmp_path / "run.json"))
    path = write("below/run.json", {"extends": "../below/run.json"})
    assert message(lambda: read_tree(path)).endswith(f"in a circle: {path} -> {path.parent / '../below/run.json'}")


@pytest.mark.parametrize("base", [None, 3, ["base.json"], {"a": 1}])
def test_extends_is_one_name(write: Write, base: Any) -> None:
    error = message(lambda: extended(write, {}, base))
    assert error.endswith(f"extends must be the path or the name of one configuration, not {json.dumps(base)}")


def test_extends_inside_our_section_is_a_key_like_any_other(write: Write) -> None:
    path = write("run.json", {**BASE, "embrag": {"extends": "base.json"}})
    assert "unknown key embrag.extends" in message(lambda: load_config(path))


def test_a_missing_or_damaged_file_is_named_with_the_file_that_extends_it(write: Write, tmp_path: Path) -> None:
    error = message(lambda: extended(write, {}, "none.json"))
    assert error.startswith(
        f"{tmp_path / 'none.json'}: cannot read the configuration, which {tmp_path / 'run.json'} extends: "
        "there is no such file"
    )
    (tmp_path / "broken.json").write_text("{")
    assert message(lambda: extended(write, {}, "broken.json")).startswith(f"{tmp_path / 'broken.json'}: not valid JSON")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}\0")
    assert message(lambda: extended(write, {}, "bytes.json")).endswith("extends: not a text file")
    assert "cannot read the configuration" in message(lambda: read_tree(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_a_configuration_may_come_from_another_system(tmp_path: Path, encoding: str, end: str) -> None:
    text = "# a remark" + end + json.dumps(BASE, indent=1).replace("\n", end)
    (tmp_path / "run.json").write_bytes(text.encode(encoding))
    assert read_tree(tmp_path / "run.json")[0] == BASE


def test_a_remark_may_be_in_any_encoding_but_no_setting(tmp_path: Path) -> None:
    text = json.dumps({**BASE, "embrag": {"data": {"cache_dir": "HERE"}}})
    (tmp_path / "run.json").write_bytes(b"# caf\xe9\n" + text.encode())
    assert load_config(tmp_path / "run.json").embrag.data.cache_dir == "HERE"
    (tmp_path / "run.json").write_bytes(text.encode().replace(b"HERE", b"caf\xe9"))
    assert message(lambda: load_config(tmp_path / "run.json")).endswith("embrag: a text in it is not Unicode")


HUGE = "9" * 5000


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1e400", HUGE, f"-{HUGE}", f"{HUGE}.5"])
@pytest.mark.parametrize("key", ["embrag.seed", "embrag.loss.rarity", "embrag.model.dims", "gradient_clipping"])
def test_numbers_without_end_are_refused_by_their_key(write: Write, tmp_path: Path, key: str, value: str) -> None:
    tree: Any = "VALUE"
    for name in reversed(key.split(".")):
        tree = {name: tree}
    text = json.dumps({"extends": str(write("base.json", BASE)), **tree}).replace('"VALUE"', value)
    (tmp_path / "run.json").write_text(text)
    wanted = {"embrag.loss.rarity": "a number", "gradient_clipping": "a finite number of at most 64 bits"}
    error = message(lambda: load_config(tmp_path / "run.json"))
    infinity = "-Infinity" if value.startswith("-") else "Infinity"
    assert error.endswith(f": {key} must be {wanted.get(key, 'a whole number')}, not {infinity}")
    error = message(lambda: load_config(tmp_path / "base.json", [f"{key}={value}"]))
    assert f"{key} must be {wanted.get(key, 'a whole number')}, not " in error


@pytest.mark.parametrize("number", [2**53 + 1, 2**64 - 1, 2**64, 10**30, -(10**30)])
def test_whole_numbers_beyond_what_the_machine_counts_are_refused(write: Write, number: int) -> None:
    for key in ("window_sites", "flank_sites", "validation_samples"):
        path = write("run.json", {**BASE, "embrag": {"data": {key: number}}})
        assert f"embrag.data.{key}" in message(lambda path=path: load_config(path))
    path = write("run.json", {**BASE, "train_micro_batch_size_per_gpu": number})
    if abs(number) >= 2**64:
        assert "train_micro_batch_size_per_gpu must be" in message(lambda: load_config(path))
    path = write("run.json", {**BASE, "embrag": {"seed": number}})
    if 0 <= number < 2**64:
        assert load_config(path).embrag.seed == number
    else:
        assert "seed" in message(lambda: load_config(path))


@pytest.mark.parametrize(
    "key", ["model.dims", "model.layers", "model.ffn_multiple", "retrieval.prefetch", "train.workers"]
)
def test_what_no_machine_could_hold_is_refused_before_it_is_tried(write: Write, key: str) -> None:
    error = message(lambda: load_config(write("run.json", BASE), [f"embrag.{key}=1000000000"]))
    assert f"embrag.{key}: must not exceed " in error


@pytest.mark.parametrize("depth", [90, 1_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")], ids=["lists", "sections"])
def test_nesting_without_end_is_refused(write: Write, tmp_path: Path, opening: str, closing: str, depth: int) -> None:
    for closed in (depth, 0):
        nested = opening * depth + "1" * bool(closed) + closing * closed
        (tmp_path / "run.json").write_text('{"a": ' + nested + "}")
        message(lambda: load_config(tmp_path / "run.json"))
        message(lambda nested=nested: load_config(write("base.json", BASE), [f"embrag.seed={nested}"]))
    message(lambda: load_config(write("base.json", BASE), ["embrag." + ".".join(["a"] * depth) + "=1"]))


def test_a_name_with_a_zero_is_no_name(write: Write) -> None:
    assert "extends must be the path" in message(lambda: extended(write, {}, "a\0b"))


def test_a_shipped_name_will_do_for_a_path(write: Write, root: Path, tmp_path: Path) -> None:
    assert list(shipped_configurations()) == NAMES
    for name in NAMES:
        assert load_config(name) == load_config(Path(name)) == load_config(root / "ds_configs" / f"{name}.json")
    extending = load_config(write("run.json", {"extends": "v18_large_batch", "embrag": {"seed": 9}}))
    assert extending.embrag.seed == 9 and extending.deepspeed == load_config("v18_large_batch").deepspeed


def test_a_path_that_exists_wins_over_a_name(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v17").mkdir()  # a folder is no configuration
    assert load_config("v17").embrag.retrieval.mode == "token"
    write("v18", BASE)
    assert read_tree("v18") == (BASE, "v18")
    assert extended(write, {"gradient_clipping": 2.0}, "v18") == {**BASE, "gradient_clipping": 2.0}


@pytest.mark.parametrize("name", ["v19", "v18.json", "ds_configs/v18", "nobody/v18.json"])
def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message(lambda: load_config(name)) == (
        f"{name}: cannot read the configuration: there is no such file; shipped configurations: {', '.join(NAMES)}"
    )


def test_what_setup_py_builds_holds_the_shipped_configurations(root: Path, tmp_path: Path) -> None:
    """The package is built as ``pip install .`` leaves it: in one place, without a checkout around it."""
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(root / name, source)
    for name in ("embrag_ds", "ds_configs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    assert {path.name for path in built.iterdir()} == {"embrag_ds"}
    for path in (root / "ds_configs").glob("*.json"):
        assert (built / "embrag_ds" / "ds_configs" / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(source)
    ask = "from embrag_ds.config_files import *; print(read_tree('v17')[1], *shipped_configurations())"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(built)},
        timeout=120,
    )
    shipped = built / "embrag_ds" / "ds_configs"
    assert done.stdout.split() == f"{shipped / 'v17.json'} (extends {shipped / 'v18.json'})".split() + NAMES
