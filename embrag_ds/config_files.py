"""Configuration files as JSON trees: where they are found, what they extend, and single keys set on top.

*Names.* A configuration is the path of a file, or the bare name of a shipped one (``v18``). An existing path wins.

*Extending.* ``"extends": "v18.json"`` inherits the settings of another file, which may extend a third. The path is
relative to the extending file; the name of a shipped configuration works too. Sections are merged key by key, both
DeepSpeed's and ours. Numbers, texts and lists replace the inherited value. So does ``masking.policies``, whose weights
mean something only together. Of keys that exclude one another, setting one removes the inherited others. ``null``
removes a key of DeepSpeed's, which then has DeepSpeed's default. Under ``"embrag"`` it is an ordinary value
(``train.patience``: never), refused by keys that do not allow it.

*Overrides.* ``dotted.key=value`` acts like a file with this one key that extends the run's configuration.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hjson

from embrag_ds.errors import UserError
from embrag_ds.files import decode_text
from embrag_ds.settings import as_json

EXCLUSIVE = {"embrag.retrieval.refresh": ("every_steps", "every_epochs", "at_steps")}
"""Section -> keys of which a configuration keeps only one."""
REPLACED_WHOLE = ("embrag.masking.policies",)
"""Sections that replace the inherited section instead of being merged with it."""
_BEYOND = 1 << 64
_MOST_DIGITS = 4000
_DEEPEST = 100
_SHOWN = 60
_EXTENDS = "extends"
_PYTHON_ONLY = ("True", "False", "None")


def read_tree(name: Path | str, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """Read a configuration with all that it extends, and apply the overrides.

    Returns the merged JSON tree and the name for it in errors. Raises :class:`UserError` for a missing, unreadable or
    malformed file, for files that extend one another in a circle, and for a malformed override.
    """
    path = _find(name, Path())
    tree, extended = _read(path, ())
    for override in overrides:
        tree = _merged(tree, _override(override), f"--set {override}")
    _require_finite({key: value for key, value in tree.items() if key != "embrag"}, "", str(path))
    return tree, f"{path} (extends {', '.join(map(str, extended))})" if extended else str(path)


def _require_finite(tree: Any, place: str, source: str) -> None:
    """Raise :class:`UserError` for a number that is not finite, or beyond 64 bits: DeepSpeed would take some."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _require_finite(value, f"{place}.{key}" if place else str(key), source)
    elif isinstance(tree, int | float) and not abs(tree) < _BEYOND:
        raise UserError(f"{source}: {place} must be a finite number of at most 64 bits, not {as_json(tree)}")


def shipped_configurations() -> dict[str, Path]:
    """Configurations shipped with the package: name -> file."""
    package = Path(str(importlib.resources.files("embrag_ds")))
    installed = package / "ds_configs"
    # setup.py puts the folder there; in a checkout, also one that is installed with ``-e``, it lies beside the package.
    folder = installed if installed.is_dir() else package.parent / "ds_configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def _find(name: Path | str, folder: Path) -> Path:
    path = folder / name
    if not os.path.isdir(path) and os.path.exists(path):
        return path
    return shipped_configurations().get(str(name), path)


def _read(path: Path, extending: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """Tree of one file merged over the files that it extends, and those files, nearest first."""
    chain = (*extending, path)
    if os.path.realpath(path) in map(os.path.realpath, extending):
        raise UserError(f"{chain[0]}: extends go round in a circle: {' -> '.join(map(str, chain))}")
    tree = _parse(path, f", which {extending[-1]} extends" if extending else "")
    if _EXTENDS not in tree:
        return tree, []
    name = tree.pop(_EXTENDS)
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f"{path}: extends must be the path or the name of one configuration, not {as_json(name)}")
    base = _find(name, path.parent)
    inherited, further = _read(base, chain)
    return _merged(inherited, tree, str(path)), [base, *further]


def _parse(path: Path, why: str) -> dict[str, Any]:
    try:
        text = decode_text(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as fault:
        names = ", ".join(shipped_configurations())
        raise UserError(
            f"{path}: cannot read the configuration{why}: there is no such file; shipped configurations: {names}"
        ) from fault
    except OSError as fault:
        raise UserError(f"{path}: cannot read the configuration{why}: {fault.strerror}") from fault
    except ValueError as fault:
        raise UserError(f"{path}: cannot read the configuration{why}: not a text file") from fault
    try:
        tree = hjson.loads(
            text, object_pairs_hook=_no_duplicates, use_decimal=False, parse_float=_Number, parse_int=_whole
        )
    except RecursionError as fault:
        raise UserError(f"{path}: not a configuration: its sections are nested too deeply") from fault
    except (hjson.HjsonDecodeError, ValueError) as fault:
        raise UserError(f"{path}: not valid JSON: {fault}") from fault
    if _depth(tree) > _DEEPEST:
        raise UserError(f"{path}: not a configuration: its sections are nested too deeply")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a configuration: expected a JSON object, as in ds_configs/v18.json")
    return json.loads(json.dumps(tree))  # plain containers instead of hjson's ordered ones


def _depth(tree: Any) -> int:
    """Number of levels of sections and lists, counted without recursion."""
    level, depth = [tree], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


class _Number(float):
    """Number that hjson, which asks whether it is whole, may find infinite; the settings refuse it by its key."""

    def __int__(self) -> int:
        return super().__int__() if math.isfinite(self) else 0


def _whole(text: str) -> int | float:
    """Whole number, or infinity for one with more digits than Python reads."""
    return int(text) if len(text) < _MOST_DIGITS else float(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"key {key!r} appears twice")
        tree[key] = value
    return tree


def _override(override: str) -> dict[str, Any]:
    """Tree with the one key that ``dotted.key=value`` sets; the value is JSON, or else plain text."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {override}: write it as dotted.key=value, for example embrag.model.dims=128")
    if dotted.split(".")[0] == _EXTENDS:
        raise UserError(f"--set {override}: only a file can extend another; give --deepspeed_config the other one")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_int=_whole)
    except RecursionError as fault:
        raise UserError(f"--set {override[:_SHOWN]}...: its key or value is nested too deeply") from fault
    except ValueError as fault:
        if text[:1] in ("[", "{"):
            raise UserError(f"--set {override}: not valid JSON: {fault}") from fault
        if text in _PYTHON_ONLY:
            raise UserError(f"--set {override}: write true, false or null") from fault
        value = text
    names = dotted.split(".")
    if len(names) + _depth(value) > _DEEPEST:
        raise UserError(f"--set {override[:_SHOWN]}...: its key or value is nested too deeply")
    for name in reversed(names):
        value = {name: value}
    return value


def _merged(base: dict[str, Any], over: dict[str, Any], source: str, section: str = "") -> dict[str, Any]:
    """``over`` merged into ``base``; ``section`` is the dotted name of both, ``source`` names ``over`` in errors."""
    result = dict(base)
    exclusive = EXCLUSIVE.get(section, ())
    if any(over.get(key) is not None for key in exclusive):
        for key in exclusive:
            result.pop(key, None)
    for key, value in over.items():
        place = f"{section}.{key}" if section else key
        inherited = result.get(key)
        if isinstance(value, dict) and place not in REPLACED_WHOLE:
            if inherited is not None and not isinstance(inherited, dict):
                raise UserError(f"{source}: {place} is not a section but {as_json(inherited)}")
            result[key] = _merged(inherited or {}, value, source, place)
        elif value is None and place.split(".")[0] != "embrag":
            result.pop(key, None)
        else:
            result[key] = value
    return result
