"""CUDA sources compile with NVIDIA's run-time compiler, for an H100 and a V100, without a GPU."""

from __future__ import annotations

import ctypes
import locale
import re
from pathlib import Path
from types import ModuleType

import pytest

from embrag_ds.ops import dosage_cuda, hamming_cuda, li_stephens_cuda, rotation_cuda
from embrag_ds.ops.cuda import kept_locale

nvrtc = pytest.importorskip("nvidia.cuda_nvrtc", reason="the package nvidia-cuda-nvrtc-cu12 is not installed")
REGISTERS = 65536  # of a multiprocessor


def compiled(source: str, *options: str) -> str:
    """Compile ``source`` and return the compiler's log, which states the registers in use."""
    (path,) = Path(next(iter(nvrtc.__path__))).glob("lib/libnvrtc.so.*")
    library, program, size = ctypes.CDLL(str(path)), ctypes.c_void_p(), ctypes.c_size_t()
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


@pytest.mark.parametrize("architecture", ["sm_70", "sm_90"])
@pytest.mark.parametrize("neighbours", [1, 128, 1536, 4096, 5000])
def test_the_copying_kernels_compile_and_a_block_fits_a_multiprocessor(neighbours: int, architecture: str) -> None:
    options = li_stephens_cuda.compile_options(neighbours)
    log = compiled(li_stephens_cuda.SOURCE, f"-arch={architecture}", *options)
    registers = [int(each) for each in re.findall(r"Used (\d+) registers", log)]
    threads, _ = li_stephens_cuda.block_shape(neighbours)
    assert len(registers) == 3
    assert all(threads * -(-each // 8) * 8 <= REGISTERS for each in registers)


@pytest.mark.parametrize("module", [hamming_cuda, dosage_cuda, rotation_cuda])
def test_the_others_compile(module: ModuleType) -> None:
    assert "Used" in compiled(module.SOURCE, "-arch=sm_90")
