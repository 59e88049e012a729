"""CUDA kernels without a GPU: a stand-in for CuPy that compiles them for the host and runs them there."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.ops import cuda

STREAM = 4242
HARNESS = Path(__file__).with_name("cuda_on_host.hpp")
Library = Callable[[str, tuple[str, ...]], ctypes.CDLL]


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Function that compiles CUDA source, with the compiler's options for it, for this machine and loads it.

    For each kernel the library has a function ``run_`` and its name: see ``cuda_on_host.hpp``.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "a C++ compiler is a requirement of the project"
    loaded: dict[tuple[str, tuple[str, ...]], ctypes.CDLL] = {}

    def load(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
        key = source, options
        if key not in loaded:
            folder = tmp_path_factory.mktemp("kernel")
            names = re.findall(r"__global__ void (?:__launch_bounds__\(\w+\) )?(\w+)\(", source)
            lines = [f'#include "{HARNESS}"', source, *(f"RUNNER({name})" for name in names)]
            (folder / "kernel.cpp").write_text("\n".join(lines), encoding="utf-8")
            how = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", *options]
            subprocess.run([compiler, *how, "-o", folder / "kernel.so", folder / "kernel.cpp"], check=True)
            loaded[key] = ctypes.CDLL(str(folder / "kernel.so"))
        return loaded[key]

    return load


def stand_in(load: Library) -> types.ModuleType:
    """A module with the rules of CuPy 14: no deprecated streams, the stream protocol, numpy scalars as arguments."""

    streams: list[int] = []
    devices: list[int | None] = []

    class Device:
        def __init__(self, index: int | None):
            self.index = index

        def __enter__(self) -> None:
            devices.append(self.index)

        def __exit__(self, *fault: object) -> None:
            devices.pop()

    class Stream:
        def __init__(self, address: int):
            self.address = address

        def __enter__(self) -> None:
            streams.append(self.address)

        def __exit__(self, *fault: object) -> None:
            streams.pop()

        @classmethod
        def from_external(cls, foreign: Any) -> Stream:
            if not hasattr(foreign, "__cuda_stream__"):
                raise TypeError(f"{type(foreign)} does not implement the CUDA stream protocol")
            version, address = foreign.__cuda_stream__()
            assert version == 0 and type(address) is int and len(devices) == 1
            return cls(address)

    class ExternalStream(Stream):
        def __init__(self, address: int):
            warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)
            super().__init__(address)

    class RawKernel:
        def __init__(self, code: str, name: str, options: tuple[str, ...] = ()):
            self.run = getattr(load(code, options), f"run_{name}")

        def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
            assert streams == [STREAM] and len(devices) == 1
            assert all(type(each) is int for each in (*grid, *block)) and len(grid) == len(block) == 1
            assert 1 <= grid[0] < 2**31 and 1 <= block[0] <= 1024
            values = []
            for each in args:
                if isinstance(each, np.ndarray):
                    each = np.uintp(each.ctypes.data)
                if not isinstance(each, np.generic):
                    raise TypeError(f"Unsupported type {type(each)}")
                values.append(np.array(each))
            given = (ctypes.c_void_p * len(values))(*(each.ctypes.data for each in values))
            assert self.run(grid[0], block[0], given) == 0, "some lanes of a warp, or warps of a block, wait for ever"

    def from_dlpack(array: Tensor) -> np.ndarray:
        return np.from_dlpack(array)  # refuses a tensor that requires gradients

    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(Device=Device, Stream=Stream, ExternalStream=ExternalStream)  # type: ignore
    module.RawKernel, module.from_dlpack = RawKernel, from_dlpack  # type: ignore
    return module


@pytest.fixture
def kernels_on_host(host_library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While in use, kernels run on the host, on tensors of the CPU, whose uninitialised memory is NaN."""
    caches = cuda.import_fault, cuda.kernel, cuda._stream

    def forget() -> None:
        for each in caches:
            each.cache_clear()

    forget()
    monkeypatch.setitem(sys.modules, "cupy", stand_in(host_library))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(cuda, "_KIND", "cpu")
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    forget()
