"""CUDA sources compile with NVIDIA's run-time compiler, for an H100 and the oldest GPU it serves, without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import locale
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from embrag_ds.ops import dosage_cuda, hamming_cuda, li_stephens_cuda
from embrag_ds.ops.cuda import kept_locale

REGISTERS = 65536  # of a multiprocessor


def compiler() -> ctypes.CDLL | None:
    """NVIDIA's run-time compiler: torch's, or for a torch without CUDA the extra nvrtc's; None without."""
    places = getattr(importlib.util.find_spec("nvidia"), "submodule_search_locations", None) or []
    found = {path.suffix: path for place in places for path in Path(place).glob("*/lib/libnvrtc.so.*")}
    major = str(torch.version.cuda).split(".")[0]
    path = found.get(f".{major}") or next(iter(found.values()), None)
    return None if path is None else ctypes.CDLL(str(path))


library = compiler()
if library is None:
    pytest.skip("the extra nvrtc is not installed", allow_module_level=True)


def architectures() -> list[str]:
    """An H100's, and the oldest from a V100's on: CUDA 13 has left that one out."""
    count = ctypes.c_int()
    assert library.nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0
    served = (ctypes.c_int * count.value)()
    assert library.nvrtcGetSupportedArchs(served) == 0
    return [f"sm_{min(each for each in served if each >= 70)}", "sm_90"]


def compiled(source: str, *options: str) -> str:
    """Compile ``source`` and return the compiler's log, which states the registers in use."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    given = [option.encode() for option in ("--ptxas-options=-v", *options)]
    encoding = locale.getpreferredencoding(False)
    with kept_locale():
        failed = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    assert locale.getpreferredencoding(False) == encoding
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    return log.value.decode()


@pytest.mark.parametrize("architecture", architectures())
@pytest.mark.parametrize("neighbours", [1, 128, 1536, 4096, 5000])
def test_the_copying_kernels_compile_and_a_block_fits_a_multiprocessor(neighbours: int, architecture: str) -> None:
    options = li_stephens_cuda.compile_options(neighbours)
    log = compiled(li_stephens_cuda.SOURCE, f"-arch={architecture}", *options)
    registers = [int(each) for each in re.findall(r"Used (\d+) registers", log)]
    threads, _ = li_stephens_cuda.block_shape(neighbours)
    assert len(registers) == 3
    assert all(threads * -(-each // 8) * 8 <= REGISTERS for each in registers)


@pytest.mark.parametrize("module", [hamming_cuda, dosage_cuda])
def test_the_others_compile(module: ModuleType) -> None:
    assert "Used" in compiled(module.SOURCE, "-arch=sm_90")
