"""What each installation brings is what its modules import and its machine can run."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

from embrag_ds.cli.train import OF_EXTRA
from embrag_ds.runs.record import package_versions

DISTRIBUTION_OF = {"pynvml": "nvidia-ml-py", "pydantic_core": "pydantic"}
"""Distributions of packages that go by another name; of FAISS and CuPy there are several."""
OF_TRAINING = ("engine/", "planning/", "training/", "runtime/device_sampler.py")
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
            assert not re.search(
                r"import.*(embrag_ds\.(training|engine)|device_sampler)|from embrag_ds\.(training|engine)\b", text
            ), place


def test_development_brings_training(described: dict[str, Any]) -> None:
    extras = described["extras_require"]
    assert set(extras) == {"train", "cpu", "gpu", "gpu-cu12", "docs", "dev", "nvrtc", "tensorboard", "wandb"}
    assert {*extras["train"], *extras["docs"], *extras["tensorboard"]} <= set(extras["dev"])


def pins(root: Path, name: str) -> dict[str, list[str]]:
    """Pinned versions, with their markers, by package."""
    found: dict[str, list[str]] = {}
    for line in (root / name).read_text().splitlines():
        if not line.startswith("#"):
            package, version = line.split("==", 1)
            found.setdefault(package, []).append(version)
    return found


@pytest.mark.parametrize(
    ("extra", "constraints"),
    [("cpu", "constraints.txt"), ("gpu", "constraints.txt"), ("gpu-cu12", "constraints-cu12.txt")],
)
def test_what_an_extra_names_is_pinned(described: dict[str, Any], root: Path, extra: str, constraints: str) -> None:
    extras = described["extras_require"]
    named = [*described["install_requires"], *(each for name in (extra, "dev", "wandb") for each in extras[name])]
    assert names(named) - {"setuptools"} <= set(pins(root, constraints))
    assert len({name for name in names(named) if name.startswith("faiss")}) == 1
    assert len({name for name in names(named) if name.startswith("cupy")}) == (extra != "cpu")


def test_a_run_records_which_faiss_and_cupy_it_had(described: dict[str, Any]) -> None:
    extras = described["extras_require"]
    named = names([*extras["cpu"], *extras["gpu"], *extras["gpu-cu12"]])
    assert named == {name for name in package_versions() if name.startswith(("torch", "faiss", "cupy"))}


def test_each_gpu_extra_has_one_cuda(root: Path) -> None:
    """NVIDIA's packages for CUDA 12 end in -cu12, those for CUDA 13 have its number in the version alone."""
    of_twelve = pins(root, "constraints-cu12.txt")
    assert not {"cupy-cuda13x", "faiss-cuda", "nvidia-cuda-nvrtc"} & set(of_twelve)
    assert of_twelve["torch"] == ["2.10.0"] and of_twelve["nvidia-cuda-nvrtc-cu12"] == ["12.8.93"]
    of_thirteen = pins(root, "constraints.txt")
    assert not {"cupy-cuda12x", "faiss-gpu", "nvidia-cuda-runtime-cu12"} & set(of_thirteen)
    assert of_thirteen["faiss-cuda"] == ["1.14.1.post4"] and of_thirteen["nvidia-cuda-nvrtc"] == ["13.0.88"]


def test_what_has_no_cuda_is_pinned_alike(root: Path) -> None:
    has_cuda = re.compile("torch|triton|faiss|cupy|cuda|nvidia-(?!ml-py)")
    plain = [
        {package: versions for package, versions in pins(root, name).items() if not has_cuda.search(package)}
        for name in ("constraints.txt", "constraints-cu12.txt")
    ]
    assert plain[0] == plain[1] and len(plain[0]) > 15


Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that gives the machine an ``nvidia-smi``: the lines of each GPU, or its failure."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def give(*gpus: str, status: int = 0, knows: str = "driver_version,compute_cap") -> None:
        told = "\n".join(gpus)
        refusal = "Field is not a valid field to query."
        text = f"""#!/bin/sh
case $1 in --query-gpu=driver_version) ;; --query-gpu={knows}) ;; *) echo "{refusal}"; exit 2 ;; esac
[ "$2" = --format=csv,noheader ] || exit 3
cat <<'END'
{told}
END
exit {status}
"""
        (folder / "nvidia-smi").write_text(text)
        (folder / "nvidia-smi").chmod(0o755)

    give("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", status=9)
    return give


@pytest.fixture
def make(root: Path, tmp_path: Path, driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Make:
    """What ``make`` would run in a checkout without a virtual environment."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    for name in ("EXTRAS", "MAKEFLAGS", "MAKEOVERRIDES"):  # these tests may run under make, too
        monkeypatch.delenv(name, raising=False)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "which_extra.sh", "setup.py", "constraints.txt", "constraints-cu12.txt"):
        shutil.copy(root / name, checkout)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--dry-run", "--no-print-directory", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    ("gpus", "extra", "why"),
    [
        (["580.159.04, 9.0"], "gpu", "driver 580.159.04 has CUDA 13"),
        (["600.1, 8.0", "600.1, 10.3"], "gpu", "driver 600.1 has CUDA 13"),
        (["580.65.06, [N/A]"], "gpu", "driver 580.65.06 has CUDA 13"),
        (["575.57.08, 9.0"], "gpu-cu12", "driver 575.57.08 has CUDA 12: 580 has CUDA 13"),
        (["525.60.13, 8.0"], "gpu-cu12", "driver 525.60.13 has CUDA 12: 580 has CUDA 13"),
        (["580.65.06, 9.0", "580.65.06, 7.5"], "gpu-cu12", "a GPU of compute capability 7.5: the packages for CUDA 13"),
        (["580.65.06, 12.0"], "gpu-cu12", "a GPU of compute capability 12.0: the packages for CUDA 13 serve 8 to 10"),
        (["470.82.01, 7.0"], "cpu", "driver 470.82.01 has no CUDA 12: 525 has, 580 has CUDA 13"),
        ([], "cpu", "nvidia-smi finds no driver"),
    ],
)
def test_make_installs_what_the_driver_can_run(
    make: Make, driver: Callable[..., None], gpus: list[str], extra: str, why: str
) -> None:
    driver(*gpus)
    if extra == "gpu" and sys.version_info < (3, 11):
        extra, why = "gpu-cu12", "FAISS for it needs Python 3.11"
    lines = make("install").stdout.splitlines()
    assert lines[0].startswith(f"echo 'EXTRAS: {extra} (") and why in lines[0]
    constraints = "constraints-cu12.txt" if extra == "gpu-cu12" else "constraints.txt"
    extras = "cpu,nvrtc" if extra == "cpu" else extra
    assert lines[-2].endswith(f"-c {constraints} -e '.[train,{extras},dev]'")
    assert lines[-1] == f"touch .venv/installed-{extra}"


def test_python_without_faiss_for_cuda_13_gets_cuda_12(make: Make, driver: Callable[..., None], tmp_path: Path) -> None:
    driver("580.159.04, 9.0")
    old = tmp_path / "bin" / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    told = make("install", "PYTHON=python3.10").stdout
    assert "EXTRAS: gpu-cu12 (driver 580.159.04 has CUDA 13, but FAISS for it needs Python 3.11)" in told


def test_a_driver_that_does_not_tell_the_capability_is_asked_again(make: Make, driver: Callable[..., None]) -> None:
    driver("470.82.01", knows="driver_version")
    assert "EXTRAS: cpu (driver 470.82.01 has no CUDA 12" in make("install").stdout


def test_a_driver_that_fails_is_none(make: Make) -> None:
    assert "EXTRAS: cpu (nvidia-smi finds no driver)" in make("install").stdout


def test_extras_can_be_named(make: Make, driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    driver("580.159.04, 9.0")
    assert "-e '.[train,cpu,nvrtc,dev]'" in make("install", "EXTRAS=cpu").stdout
    monkeypatch.setenv("EXTRAS", "gpu-cu12")
    assert "EXTRAS: gpu-cu12 (as EXTRAS says)" in make("install").stdout
    failed = make("install", "EXTRAS=cuda")
    assert failed.returncode and "EXTRAS=cuda: there are cpu, gpu and gpu-cu12" in failed.stderr


def test_the_packages_that_are_there_stay(make: Make, driver: Callable[..., None], tmp_path: Path) -> None:
    """Unless others are named: those get an empty environment, because every FAISS owns the same folder."""
    driver("580.159.04, 9.0")
    (tmp_path / "checkout" / ".venv").mkdir()
    (tmp_path / "checkout" / ".venv" / "installed-cpu").touch()
    assert make("lint").stdout.splitlines() == ["ruff check .", "ruff format --check .", "mypy"]
    assert "venv --clear .venv" in make("install", "EXTRAS=gpu").stdout
    assert "--clear" not in make("install", "EXTRAS=cpu").stdout


def test_make_test_is_the_run_of_the_cpu(make: Make, driver: Callable[..., None]) -> None:
    driver("580.159.04, 9.0")
    command = "DS_ACCELERATOR=cpu python -m pytest -n 2 --dist loadfile -m"
    assert make("test").stdout.splitlines()[-1] == f"{command} 'not gpu and not long'"
    assert make("test-long").stdout.splitlines()[-1] == f"{command} 'long and not gpu'"
    assert make("test-gpu").stdout.splitlines()[-1] == "python -m pytest -m gpu"


@pytest.mark.parametrize(("accelerator", "seen"), [("cpu", ""), ("cuda", "0")])
def test_a_run_of_the_cpu_hides_gpus_before_torch_is_there(root: Path, accelerator: str, seen: str) -> None:
    script = """
import os, sys

def watch(event, given):
    if event == "import" and given[0] == "torch":
        print(repr(os.environ["CUDA_VISIBLE_DEVICES"]), flush=True)
        os._exit(0)

sys.addaudithook(watch)
import tests.conftest
"""
    given = os.environ | {"DS_ACCELERATOR": accelerator, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=root, env=given, capture_output=True, text=True, check=True)
    assert done.stdout == f"{seen!r}\n"


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
