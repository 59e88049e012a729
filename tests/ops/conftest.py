"""The host's C++ compiler in place of a GPU's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """C++ source, compiled for this machine and loaded."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "a C++ compiler is a requirement of the project"

    def load(source: str) -> ctypes.CDLL:
        folder: Path = tmp_path_factory.mktemp("kernel")
        (folder / "kernel.cpp").write_text(source, encoding="utf-8")
        how = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([compiler, *how, "-o", folder / "kernel.so", folder / "kernel.cpp"], check=True)
        return ctypes.CDLL(str(folder / "kernel.so"))

    return load
