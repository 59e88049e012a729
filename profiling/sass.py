"""Machine code of the copying model's recursions, without a GPU: instructions a site, registers, spills, barriers.

    python profiling/sass.py [--neighbours 128] [--architecture sm_90]

NVIDIA's run-time compiler and disassembler are needed: the extra ``nvrtc``, and ``pip install nvidia-cuda-nvdisasm``.
``read ahead`` is the number of instructions between a load and the first use of what it loads, at the median.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from embrag_ds.ops import li_stephens_cuda
from embrag_ds.ops.cuda import kept_locale

SUMS = {"copying_passes": 1, "copying_adjoint": 3}  # over neighbours at a site, each of five shuffles
HEAD = ("kernel", "K", "threads x per", "registers", "spilled", "barriers", "a site", "loads", "read ahead")
ROW = "{:>16} {:>5} {:>13} {:>9} {:>8} {:>8} {:>9} {:>9} {:>10}"


def packages() -> list[Path]:
    """Folders of NVIDIA's packages from PyPI."""
    spec = find_spec("nvidia")
    return [Path(each) for each in (spec.submodule_search_locations if spec else None) or ()]


def compilers() -> list[Path]:
    """Libraries of NVIDIA's run-time compiler that are installed as packages."""
    return sorted(path for folder in packages() for path in folder.glob("*/lib/libnvrtc.so.*"))


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a source: machine code, assembly, and the log, which states registers and spills."""

    code: bytes
    assembly: str
    log: str

    def used(self, pattern: str) -> dict[str, int]:
        """The number that ``pattern`` finds in the log's lines about each kernel."""
        parts = re.split(r"Compiling entry function '(\w+)'", self.log)[1:]
        found = {name: re.search(pattern, text) for name, text in zip(parts[::2], parts[1::2], strict=True)}
        return {name: int(each[1]) if each else 0 for name, each in found.items()}


def compiled(compiler: Path, source: str, *options: str) -> Compiled:
    """Compile ``source`` for the architecture among the ``options``. Raises ValueError with the compiler's errors."""
    for part in compiler.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    library, program = ctypes.CDLL(str(compiler)), ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    # CuPy flushes denormal numbers to zero.
    given = [option.encode() for option in ("--ptxas-options=-v", "-ftz=true", *options)]
    with kept_locale():
        failed = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    if failed:
        raise ValueError(text("ProgramLog").decode())
    return Compiled(text("CUBIN"), text("PTX").decode(), text("ProgramLog").decode())


def instructions(code: bytes) -> dict[str, tuple[list[str], dict[str, int]]]:
    """Instructions of each kernel, and the index at which each label stands."""
    installed = [shutil.which("nvdisasm"), *(path for folder in packages() for path in folder.glob("*/bin/nvdisasm"))]
    found = next((str(each) for each in installed if each), None) or sys.exit("pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code)
        text = subprocess.run([found, "-c", file.name], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in re.split(r"\n\.text\.", text)[1:]:
        lines, labels = list[str](), dict[str, int]()
        for line in part.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(lines)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                lines.append(instruction[1])
        kernels[part.split(":")[0]] = lines, labels
    return kernels


def recursions(lines: list[str], labels: dict[str, int]) -> list[list[str]]:
    """Bodies of the loops that have shuffles and lie in no other such loop."""
    jumps = ((i, re.search(r"\bBRA.*?`\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines))
    spans = {(labels[jump[1]], i + 1) for i, jump in jumps if jump and labels[jump[1]] <= i}
    loops = [span for span in spans if count(lines[slice(*span)], "SHFL")]
    outer = [a for a in loops if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in loops)]
    return [lines[slice(*span)] for span in sorted(outer)]


def count(lines: list[str], operation: str) -> int:
    """Number of instructions of an ``operation`` such as BAR."""
    return sum(bool(re.match(rf"(@!?U?P\d+ )?{operation}\b", line)) for line in lines)


def read_ahead(body: list[str]) -> float:
    """Median number of instructions from a load of the loop ``body`` to the first use of its result."""
    distances = []
    for i, line in enumerate(body):
        if load := re.match(r"(?:@!?U?P\d+ )?LDG\S* R(\d+),", line):
            wide = 4 if ".128" in line else 2 if ".64" in line.split(" R")[0] else 1
            target = re.compile(rf"\bR({'|'.join(str(int(load[1]) + j) for j in range(wide))})\b")
            rest = body[i + 1 :] + body[: i + 1]
            distances.append(next(n for n, each in enumerate(rest, 1) if target.search(each)))
    return statistics.median(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neighbours", type=int, nargs="+", default=[32, 64, 128, 256, 512, 2000])
    parser.add_argument("--architecture", default="sm_90")
    given = parser.parse_args()
    found = compilers() or sys.exit("pip install nvidia-cuda-nvrtc-cu12")
    print(f"{found[-1].name}, {given.architecture}")
    print(
        ROW.format("kernel", "K", "threads x per", "registers", "spilled", "barriers", "a site", "loads", "read ahead")
    )
    for neighbours in given.neighbours:
        options = f"-arch={given.architecture}", *li_stephens_cuda.compile_options(neighbours)
        made = compiled(found[-1], li_stephens_cuda.SOURCE, *options)
        registers, spilled = made.used(r"Used (\d+) registers"), made.used(r"(\d+) bytes spill loads")
        kernels = instructions(made.code)
        shape = " x ".join(map(str, li_stephens_cuda.block_shape(neighbours)))
        for name in SUMS:
            for body in recursions(*kernels[name]):
                sites = count(body, "SHFL") / (5 * SUMS[name])
                a_site = [f"{count(body, each) / sites:g}" for each in ("BAR", r"[A-Z]\S*", "LDG")]
                print(ROW.format(name, neighbours, shape, registers[name], spilled[name], *a_site, read_ahead(body)))


if __name__ == "__main__":
    main()
