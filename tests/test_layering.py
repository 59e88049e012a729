"""Rules of imports: they point one way, rooms stay small, and third-party packages with a home stay there."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SHARED = ("children", "dependence", "errors", "settings", "files", "preflight", "seals", "seeds", "logs", "progress")
"""Modules of the package's top level that every room may use."""
ROOMS: dict[str, tuple[str, ...]] = {
    "ops": (),
    "runtime": (),
    "variants": ("ops",),
    "maps": ("variants",),
    "data": ("ops", "variants", "maps"),
    "evaluation": ("variants", "maps", "data"),
    "retrieval": ("ops", "runtime", "data"),
    "model": ("ops", "data", "retrieval"),
    "config_files": (),
    "config": ("config_files", "data", "retrieval", "model"),
    "export": ("config", "model"),
    "compiled": (),
    "copying": ("ops", "data", "model", "compiled"),
    "correction": ("ops", "data", "model", "compiled", "copying"),
    "adaptation": (
        "ops",
        "runtime",
        "data",
        "evaluation",
        "retrieval",
        "model",
        "copying",
        "correction",
        "config",
        "export",
    ),
    "runs": ("data", "config"),
    "imputation": (
        "ops",
        "runtime",
        "variants",
        "data",
        "retrieval",
        "model",
        "copying",
        "correction",
        "config",
        "export",
        "adaptation",
        "runs",
    ),
    "engine": ("runtime", "data", "model", "config_files", "config", "runs"),
    "training": (
        "ops",
        "runtime",
        "data",
        "evaluation",
        "retrieval",
        "model",
        "config",
        "export",
        "adaptation",
        "runs",
        "engine",
    ),
    "reports": ("variants", "data", "evaluation", "runs"),
    "planning": ("ops", "runtime", "data", "retrieval", "model", "config", "export", "runs", "engine", "training"),
    "cli": (
        "runtime",
        "variants",
        "data",
        "evaluation",
        "config",
        "export",
        "imputation",
        "runs",
        "reports",
        "training",
        "planning",
    ),
    "launch": ("cli",),
}
"""What each room, or module of the top level, may import of ours beside itself and SHARED."""
NARROW = {
    "variants": {"ops": ("ops.sample_texts",)},
    "model": {"retrieval": ("retrieval.batch",)},
    "copying": {"model": ("model.numbers",)},
    "correction": {"model": ("model.numbers", "model.settings")},
}
"""Rooms of which another room may import only some modules: the network sees only the records of a batch."""
HOMES = {
    "pysam": ("variants/",),
    "msprime": ("data/simulate.py",),
    "deepspeed": ("engine/", "training/"),
    "faiss": ("retrieval/",),
    "cupy": ("ops/",),
    "numba": ("ops/", "compiled/", "copying/", "correction/"),
    "pynvml": ("runtime/device_sampler.py", "runtime/driver.py"),
    "matplotlib": ("evaluation/plots.py", "training/profile_plot.py"),
    "hjson": ("config_files.py",),
    "pydantic": ("settings.py", "engine/"),
}
"""Third-party packages that nothing else may import."""
LAZY = ("faiss", "cupy")
NUMPY_ONLY = ("variants", "maps", "data", "evaluation", "compiled", "copying", "correction")
"""Rooms without torch."""
MODEL_SEES_TENSORS_ONLY = {"torch", "embrag_ds"} | set(sys.stdlib_module_names)
MOST_MODULES = 14


@dataclass(frozen=True)
class Import:
    """An imported module, absolute, and whether the statement stands at the top level of its file."""

    module: str
    top_level: bool


def imports_of(source: Path) -> list[Import]:
    """Every import of a file, wherever it stands; those for type checkers count as inner ones."""
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
            # ``from embrag_ds.evaluation import metrics`` names a module as well as ``import`` would.
            found += [Import(f"{module}.{alias.name}", id(node) not in inner) for alias in node.names]
    return found


def sources(root: Path) -> dict[str, Path]:
    """Python files of the package and the entry points, by place: "training/trainer.py", "launch/train.py"."""
    files = {path.relative_to(root / "embrag_ds").as_posix(): path for path in (root / "embrag_ds").rglob("*.py")}
    return files | {f"launch/{path.name}": path for path in (root / "launch").glob("*.py")}


def room_of(place: str) -> str:
    """Room of a file ("training/trainer.py") or module of the top level ("config.py")."""
    return place.split("/")[0].removesuffix(".py")


def faults_of(place: str, path: Path) -> list[str]:
    """Broken rules in the file at ``path``, whose place in the tree is ``place``."""
    found = ((each.module, _fault(place, each)) for each in imports_of(path))
    return [f"{place}: {module}: {fault}" for module, fault in found if fault]


def violations(root: Path) -> list[str]:
    """Every violation of the rules in the source tree at ``root``, as text."""
    return [fault for place, path in sorted(sources(root).items()) for fault in faults_of(place, path)]


def _fault(place: str, imported: Import) -> str | None:
    """Reason why the file at ``place`` must not import a module, or None."""
    room, package = room_of(place), imported.module.split(".")[0]
    if package == "embrag_ds":
        return _inner_fault(room, imported.module.removeprefix("embrag_ds").lstrip("."))
    if package in HOMES and not any(place.startswith(home) for home in HOMES[package]):
        return f"only {', '.join(HOMES[package])} may import {package}"
    if package in LAZY and imported.top_level:
        return f"{package} must be imported inside functions"
    if room == "model" and package not in MODEL_SEES_TENSORS_ONLY:
        return "the model sees tensors only"
    if room in NUMPY_ONLY and package == "torch":
        return f"{room} is numpy only"
    return None


def _inner_fault(room: str, imported: str) -> str | None:
    """Reason why ``room`` must not import ``embrag_ds.<imported>``, or None."""
    target = imported.split(".")[0]
    if target in SHARED or target == room or target not in ROOMS:
        return None
    if room not in ROOMS:
        return "modules of the top level stand below all rooms"
    if target not in ROOMS[room]:
        return f"{room} may import {', '.join(ROOMS[room]) or 'nothing of ours'}"
    narrow = NARROW.get(room, {}).get(target)
    if narrow and not any(f"{imported}.".startswith(f"{each}.") for each in narrow):
        return f"{room} may import only {', '.join(narrow)} of {target}"
    return None


def test_imports_point_one_way(root: Path) -> None:
    assert violations(root) == []


def test_rooms_and_modules_have_no_circle(root: Path) -> None:
    TopologicalSorter(ROOMS).prepare()
    files = sources(root)
    modules = {f"embrag_ds.{place.removesuffix('.py').replace('/', '.')}" for place in files}
    graph = {}
    for place, path in files.items():
        named = [each.module for each in imports_of(path)]
        known = {each for each in named if each in modules} | {each.rpartition(".")[0] for each in named} & modules
        graph[f"embrag_ds.{place.removesuffix('.py').replace('/', '.')}"] = known
    TopologicalSorter(graph).prepare()


def test_no_room_is_crowded_and_no_file_long(root: Path) -> None:
    files = sources(root)
    modules = [Path(place) for place in files if "/" in place and not place.endswith("__init__.py")]
    counts = Counter(str(each.parent) for each in modules)
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}
    lengths = {place: len(path.read_text(encoding="utf-8").splitlines()) for place, path in files.items()}
    assert {place: length for place, length in lengths.items() if length > 400} == {}


def test_config_takes_only_settings_from_the_rooms(root: Path) -> None:
    taken = [each.module for each in imports_of(root / "embrag_ds" / "config.py") if "embrag_ds." in each.module]
    names = [module.split(".")[-1] for module in taken if (root / "embrag_ds" / module.split(".")[1]).is_dir()]
    assert names and all(name.endswith("Config") for name in names)


def test_entry_points_are_thin(root: Path) -> None:
    scripts = sorted((root / "launch").glob("*.py"))
    assert {script.name for script in scripts} >= {"train.py", "impute.py", "evaluate.py"}
    lengths = {script.name: len(script.read_text(encoding="utf-8").splitlines()) for script in scripts}
    assert {name: lines for name, lines in lengths.items() if lines >= 12} == {}


@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("embrag_ds/ops/bits.py", "from embrag_ds.data.tokens import REF"),
        ("embrag_ds/ops/dosage.py", "import cupy"),
        ("embrag_ds/runtime/streams.py", "from embrag_ds.data.panel import Panel"),
        ("embrag_ds/data/panel.py", "from embrag_ds.retrieval.settings import RetrievalConfig"),
        ("embrag_ds/data/panel.py", "import embrag_ds.evaluation.metrics"),
        ("embrag_ds/data/panel.py", "import torch"),
        ("embrag_ds/data/panel.py", "from embrag_ds import model"),
        ("embrag_ds/data/panel.py", "def late():\n    from embrag_ds.model import imputer"),
        ("embrag_ds/data/panel.py", "from pysam import VariantFile"),
        ("embrag_ds/evaluation/report.py", "from embrag_ds.retrieval.search import Search"),
        ("embrag_ds/evaluation/report.py", "def late():\n    import torch"),
        ("embrag_ds/retrieval/store.py", "from embrag_ds.config import TrainConfig"),
        ("embrag_ds/retrieval/store.py", "from embrag_ds.model.embedding import HaplotypeEmbedding"),
        ("embrag_ds/retrieval/store.py", "import faiss"),
        ("embrag_ds/retrieval/store.py", "import faiss.contrib.torch_utils"),
        ("embrag_ds/retrieval/store.py", "def late():\n    import deepspeed"),
        ("embrag_ds/model/imputer.py", "import numpy as np"),
        ("embrag_ds/model/imputer.py", "def late():\n    import faiss"),
        ("embrag_ds/model/imputer.py", "from embrag_ds.retrieval.collate import RetrievalCollator"),
        ("embrag_ds/imputation/impute.py", "import deepspeed"),
        ("embrag_ds/imputation/impute.py", "from embrag_ds.training.trainer import Trainer"),
        ("embrag_ds/export.py", "def late():\n    import deepspeed"),
        ("embrag_ds/training/trainer.py", "from embrag_ds.cli import train"),
        ("embrag_ds/training/trainer.py", "import pysam"),
        ("embrag_ds/config.py", "from embrag_ds.training.trainer import Trainer"),
        ("embrag_ds/errors.py", "from embrag_ds.data.tokens import REF"),
        ("launch/train.py", "from deepspeed.utils import logger"),
        ("launch/train.py", "from embrag_ds.training.trainer import Trainer"),
    ],
)
def test_a_planted_violation_is_found(root: Path, tmp_path: Path, place: str, statement: str) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text((root / place).read_text(encoding="utf-8") + f"\n{statement}\n", encoding="utf-8")
    place = place.removeprefix("embrag_ds/")
    assert [each for each in sources(root).items() if each[0] == place]
    (fault,) = faults_of(place, planted)
    assert fault.startswith(place)
