"""What each installation brings is what its modules import."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

from embrag_ds.cli.train import OF_EXTRA

DISTRIBUTION_OF = {"pynvml": "nvidia-ml-py", "pydantic_core": "pydantic"}
"""Distributions of packages that go by another name; of FAISS and CuPy there are several."""
OF_TRAINING = ("training/", "runtime/device_sampler.py")
"""Modules that the base install cannot import."""
OPTIONAL = {"faiss", "cupy", "nvidia-ml-py"}
"""Distributions that the base install imports where they are there, and does without elsewhere."""


@pytest.fixture
def described(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py says."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.chdir(root)
    runpy.run_path("setup.py")
    return told


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", each)[0] for each in requirements}


def imported(root: Path) -> dict[str, set[str]]:
    """Third-party distributions that each module of the package imports, anywhere in it."""
    found = {}
    for path in sorted((root / "embrag_ds").rglob("*.py")):
        packages = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                packages.add((node.module or "").split(".")[0])
        packages -= {"embrag_ds", *sys.stdlib_module_names}
        found[path.relative_to(root / "embrag_ds").as_posix()] = {DISTRIBUTION_OF.get(each, each) for each in packages}
    return found


def test_an_installation_brings_what_its_modules_import_and_no_more(described: dict[str, Any], root: Path) -> None:
    base, train = names(described["install_requires"]), names(described["extras_require"]["train"])
    needed: dict[bool, set[str]] = {True: set(), False: set()}
    for place, packages in imported(root).items():
        needed[place.startswith(OF_TRAINING)] |= packages
    assert needed[False] - OPTIONAL == base
    assert needed[True] - base == train
    assert not base & train
    assert {DISTRIBUTION_OF.get(package, package) for package in OF_EXTRA} == train


def test_the_base_install_imports_no_module_of_training(root: Path) -> None:
    """But for the command, which asks for DeepSpeed first."""
    for path in sorted((root / "embrag_ds").rglob("*.py")):
        place = path.relative_to(root / "embrag_ds").as_posix()
        if not place.startswith(OF_TRAINING) and place != "cli/train.py":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"import.*(embrag_ds\.training|device_sampler)|from embrag_ds\.training", text), place


def test_development_brings_training(described: dict[str, Any]) -> None:
    extras = described["extras_require"]
    assert set(extras) == {"train", "cpu", "gpu", "dev"}
    assert set(extras["train"]) <= set(extras["dev"])


def test_what_is_not_python_is_packed(described: dict[str, Any], root: Path) -> None:
    folders = {"embrag_ds": root / "embrag_ds", "embrag_ds.ds_configs": root / "ds_configs"}
    patterns = [(folders[package], each) for package, given in described["package_data"].items() for each in given]
    packed = {path for folder, pattern in patterns for path in folder.glob(pattern)}
    there = {path for folder in folders.values() for path in folder.rglob("*") if path.is_file()}
    assert packed == {path for path in there if path.suffix != ".py" and "__pycache__" not in path.parts}
    assert {root / "embrag_ds" / "py.typed", root / "ds_configs" / "v18.json"} <= packed
    modules = (root / "embrag_ds").rglob("*.py")
    assert {path.parent.relative_to(root).as_posix().replace("/", ".") for path in modules} <= set(
        described["packages"]
    )


def test_who_made_it_and_under_which_licence(described: dict[str, Any], root: Path) -> None:
    assert (described["author"], described["license_expression"]) == ("the embrag_ds authors", "MIT")
    assert (root / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 the embrag_ds authors\n")
    assert described["entry_points"]["console_scripts"] == ["embrag = embrag_ds.cli.main:main"]
