"""``embrag impute --threads``: the same bytes with any number, of a model that adapts, too."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from embrag_ds.data.simulate import DefaultData

Embrag = Callable[..., subprocess.CompletedProcess[str]]


def test_the_output_is_the_same_with_any_number_of_threads(
    embrag: Embrag, simulated: DefaultData, tmp_path: Path
) -> None:
    files = [f"--panel={simulated.panel}", f"--target={simulated.target}", f"--map={simulated.genetic_map}"]
    files += ["--adapt=0.036"]  # 20 steps, the fewest
    # The process that compiles a loop computes other last digits than those that load it, whatever their threads.
    compiling = [f"--cache-dir={tmp_path / 'compiling'}", "--out", tmp_path / "compiling.vcf.gz"]
    assert embrag("impute", *files, *compiling).returncode == 0
    outputs = []
    for threads in (1, 3):
        outputs.append(tmp_path / f"{threads}.vcf.gz")
        own = [f"--cache-dir={tmp_path / str(threads)}", f"--save-model={tmp_path / str(threads)}.safetensors"]
        done = embrag("impute", *files, *own, "--threads", threads, "--out", outputs[-1])
        assert done.returncode == 0, done.stderr
        assert "adapting: step 20/20" in done.stderr and "the adapted model imputes" in done.stderr
    assert len({path.read_bytes() for path in outputs}) == 1
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 1


def test_a_number_below_one_is_refused(embrag: Embrag, tmp_path: Path) -> None:
    done = embrag("impute", "--threads", 0, "--out", tmp_path / "out.vcf.gz")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --threads 0: give at least 1"]


def test_what_cannot_be_written_is_refused(embrag: Embrag, tmp_path: Path) -> None:
    done = embrag("impute", "--format", "GT,PL", "--out", tmp_path / "out.vcf.gz")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --format GT,PL: there is no field 'PL'; choose from GT,DS,HDS,GP",
    ]
