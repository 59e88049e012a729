"""Imports point one way: data <- retrieval <- model <- engine <- launch."""

from __future__ import annotations

import ast
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

LAYERS = ("data", "retrieval", "model", "engine", "launch")
# Third-party packages that have a home: no other layer may import them.
HOMES = {"pysam": ("data/vcf.py",), "deepspeed": ("engine/",), "faiss": ("retrieval/",), "cupy": ("retrieval/",)}
LAZY = ("faiss", "cupy")
MODEL_SEES_TENSORS_ONLY = {"torch", "embrag_ds"} | set(sys.stdlib_module_names)
SHARED = ("errors", "settings")
"""Modules of the package's top level that every layer may use; ``launching`` belongs to the entry points."""


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and whether the statement stands at the module's top level."""

    module: str
    top_level: bool


def imports_of(source: Path) -> list[Import]:
    """Every import of a file, wherever it stands; those for type checkers only count as inner ones."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    inner: set[int] = set()
    for node in ast.walk(tree):
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if guard or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner.update(id(each) for each in ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, id(node) not in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            module = node.module or ""
            # ``from embrag_ds.engine import metrics`` names a module as well as ``import`` would.
            found += [Import(f"{module}.{alias.name}", id(node) not in inner) for alias in node.names]
    return found


def layer_of(place: str) -> str:
    """Layer of a file ("engine/trainer.py") or top-level module ("config")."""
    return place.split("/")[0].removesuffix(".py")


def violations(root: Path) -> list[str]:
    """What breaks the rules in the source tree at ``root``."""
    files = {path.relative_to(root / "embrag_ds").as_posix(): path for path in (root / "embrag_ds").rglob("*.py")}
    files |= {f"launch/{path.name}": path for path in (root / "launch").glob("*.py")}
    faults = []
    for place, path in sorted(files.items()):
        layer = layer_of(place)
        for each in imports_of(path):
            parts = each.module.split(".")
            package = parts[0]
            if package == "embrag_ds":
                fault = _inner_fault(layer, parts[1] if len(parts) > 1 else "")
            elif package in HOMES and not any(place.startswith(home) for home in HOMES[package]):
                fault = f"only {', '.join(HOMES[package])} may import {package}"
            elif package in LAZY and each.top_level:
                fault = f"{package} must be imported inside functions"
            elif layer == "model" and package not in MODEL_SEES_TENSORS_ONLY:
                fault = "the model sees tensors only"
            else:
                continue
            if fault:
                faults.append(f"{place}: {each.module}: {fault}")
    return faults


def _inner_fault(layer: str, imported: str) -> str | None:
    """Why ``layer`` must not import ``embrag_ds.<imported>``, or None."""
    if imported in SHARED or not (imported in LAYERS or imported in ("config", "launching")):
        return None
    if imported == "config":
        return None if layer in ("engine", "launch") else "the configuration is for engine and launch"
    if imported == "launching":
        return None if layer == "launch" else "for entry points only"
    if layer == "config":
        return None if imported in LAYERS[:3] else "config may know the settings of data, retrieval and model only"
    if layer not in LAYERS:
        return "modules of the top level stand below all layers"
    return None if LAYERS.index(imported) <= LAYERS.index(layer) else f"{layer} is below {imported}"


def test_imports_point_one_way(root: Path) -> None:
    assert violations(root) == []


def test_config_takes_only_settings_from_the_layers(root: Path) -> None:
    taken = [each.module for each in imports_of(root / "embrag_ds" / "config.py") if "embrag_ds." in each.module]
    names = [module.split(".")[-1] for module in taken if module.split(".")[1] in LAYERS]
    assert names and all(name.endswith("Config") for name in names)


def test_entry_points_are_thin(root: Path) -> None:
    scripts = sorted((root / "launch").glob("*.py"))
    assert {script.name for script in scripts} >= {"train.py", "impute.py", "evaluate.py"}
    lengths = {script.name: len(script.read_text(encoding="utf-8").splitlines()) for script in scripts}
    assert {name: lines for name, lines in lengths.items() if lines >= 100} == {}


@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("embrag_ds/data/panel.py", "from embrag_ds.retrieval.settings import RetrievalConfig"),
        ("embrag_ds/data/panel.py", "import embrag_ds.engine.metrics"),
        ("embrag_ds/data/panel.py", "from embrag_ds import model"),
        ("embrag_ds/data/panel.py", "def late():\n    from embrag_ds.model import imputer"),
        ("embrag_ds/retrieval/store.py", "from embrag_ds.config import TrainConfig"),
        ("embrag_ds/retrieval/store.py", "from embrag_ds.model.embedding import HaplotypeEmbedding"),
        ("embrag_ds/retrieval/store.py", "import faiss"),
        ("embrag_ds/retrieval/store.py", "import faiss.contrib.torch_utils"),
        ("embrag_ds/retrieval/store.py", "def late():\n    import deepspeed"),
        ("embrag_ds/model/imputer.py", "import numpy as np"),
        ("embrag_ds/model/imputer.py", "def late():\n    import faiss"),
        ("embrag_ds/engine/trainer.py", "from embrag_ds.launching import run_main"),
        ("embrag_ds/engine/trainer.py", "import pysam"),
        ("embrag_ds/data/sites.py", "from pysam import VariantFile"),
        ("embrag_ds/config.py", "from embrag_ds.engine.trainer import Trainer"),
        ("embrag_ds/errors.py", "from embrag_ds.data.tokens import REF"),
        ("launch/train.py", "from deepspeed.utils import logger"),
    ],
)
def test_a_planted_violation_is_found(root: Path, tmp_path: Path, place: str, statement: str) -> None:
    for folder in ("embrag_ds", "launch"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / place).open("a", encoding="utf-8") as source:
        source.write(f"\n{statement}\n")
    (fault,) = violations(tmp_path)
    assert fault.startswith(place.removeprefix("embrag_ds/"))
