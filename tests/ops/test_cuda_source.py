"""CUDA sources compile with NVIDIA's run-time compiler, for an H100 and older GPUs, without a GPU."""

from __future__ import annotations

import locale
import re
from pathlib import Path

import pytest
from sass import compiled, compilers

from embrag_ds.ops import dosage_cuda, hamming_cuda, li_stephens_cuda, rotation_cuda

COMPILERS = compilers()
REGISTERS = 65536  # of a multiprocessor
RECURSIONS = ("copying_passes", "copying_adjoint")
pytestmark = pytest.mark.skipif(not COMPILERS, reason="the extra nvrtc is not installed")


@pytest.fixture(params=COMPILERS, ids=[path.name for path in COMPILERS])
def compiler(request: pytest.FixtureRequest) -> Path:
    """Each installed compiler."""
    return request.param


def oldest(compiler: Path) -> str:
    """The oldest architecture that the compiler knows, of those with a warp shuffle: CUDA 13 dropped Volta."""
    return "sm_70" if compiler.name.endswith("12") else "sm_75"


@pytest.mark.long
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("neighbours", [1, 128, 256, 512, 2000, 4096, 5000])
def test_the_copying_kernels_keep_to_registers_and_a_warp_has_no_barrier(
    compiler: Path, neighbours: int, old: bool
) -> None:
    architecture = oldest(compiler) if old else "sm_90"
    options = li_stephens_cuda.compile_options(neighbours)
    made = compiled(compiler, li_stephens_cuda.SOURCE, f"-arch={architecture}", *options)
    registers, threads = made.used(r"Used (\d+) registers"), li_stephens_cuda.block_shape(neighbours)[0]
    assert set(registers) >= {*RECURSIONS, "copying_pack", "copying_posterior", "copying_direct"}
    assert all(threads * -(-registers[name] // 8) * 8 <= REGISTERS for name in RECURSIONS)
    if neighbours <= 4096:
        for what in (r"(\d+) bytes stack frame", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"):
            assert not any(made.used(what).values()), what
    barriers = {each.split("(")[0].strip(): "bar" in each for each in made.assembly.split(".visible .entry")[1:]}
    bodies = {name.split()[0]: found for name, found in barriers.items()}
    assert {name for name, found in bodies.items() if found} == (set(RECURSIONS) if threads > 32 else set())


def test_a_compiler_leaves_the_locale(compiler: Path) -> None:
    encoding = locale.getpreferredencoding(False)
    compiled(compiler, hamming_cuda.SOURCE, "-arch=sm_90")
    assert locale.getpreferredencoding(False) == encoding


@pytest.mark.parametrize(
    "source", [hamming_cuda.SOURCE, dosage_cuda.SOURCE, li_stephens_cuda.LENGTHS_SOURCE, rotation_cuda.SOURCE]
)
def test_the_others_compile(compiler: Path, source: str) -> None:
    made = compiled(compiler, source, "-arch=sm_90")
    assert made.used(r"Used (\d+) registers") and not re.search(r"[1-9]\d* bytes (stack|spill)", made.log)
