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
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hjson

from embrag_ds.errors import UserError
from embrag_ds.settings import as_json

EXCLUSIVE = {"embrag.retrieval.refresh": ("every_steps", "every_epochs", "at_steps")}
"""Section -> keys of which a configuration keeps only one."""
REPLACED_WHOLE = ("embrag.masking.policies",)
"""Sections that replace the inherited section instead of being merged with it."""
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
    return tree, f"{path} (extends {', '.join(map(str, extended))})" if extended else str(path)


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
    if not isinstance(name, str):
        raise UserError(f"{path}: extends must be the path or the name of one configuration, not {as_json(name)}")
    base = _find(name, path.parent)
    inherited, further = _read(base, chain)
    return _merged(inherited, tree, str(path)), [base, *further]


def _parse(path: Path, why: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as fault:
        names = ", ".join(shipped_configurations())
        raise UserError(
            f"{path}: cannot read the configuration{why}: there is no such file; shipped configurations: {names}"
        ) from fault
    except OSError as fault:
        raise UserError(f"{path}: cannot read the configuration{why}: {fault.strerror}") from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: cannot read the configuration{why}: not a text file") from fault
    try:
        tree = hjson.loads(text, object_pairs_hook=_no_duplicates, use_decimal=False)
    except (hjson.HjsonDecodeError, ValueError) as fault:
        raise UserError(f"{path}: not valid JSON: {fault}") from fault
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a configuration: expected a JSON object, as in ds_configs/v18.json")
    return json.loads(json.dumps(tree))  # plain containers instead of hjson's ordered ones


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
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as fault:
        if text[:1] in ("[", "{"):
            raise UserError(f"--set {override}: not valid JSON: {fault}") from fault
        if text in _PYTHON_ONLY:
            raise UserError(f"--set {override}: write true, false or null") from fault
        value = text
    for name in reversed(dotted.split(".")):
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
