"""Compilation of CUDA kernels for the host, with its C++ compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Function that compiles C++ source for this machine and loads it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "a C++ compiler is a requirement of the project"

    def load(source: str) -> ctypes.CDLL:
        folder: Path = tmp_path_factory.mktemp("kernel")
        (folder / "kernel.cpp").write_text(source, encoding="utf-8")
        how = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([compiler, *how, "-o", folder / "kernel.so", folder / "kernel.cpp"], check=True)
        return ctypes.CDLL(str(folder / "kernel.so"))

    return load
