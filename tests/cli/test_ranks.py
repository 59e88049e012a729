"""``embrag impute`` over ranks: the bytes of one rank, whatever starts them, and all end where one of them fails."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embrag_ds.config import RunConfig
from embrag_ds.export import write_export
from embrag_ds.runs.launchers import PLACE, RANKS_HERE
from tests.imputation.genomes import GenomeFiles, simulate_genome
from tests.ranks import ended_ranks, free_port
from tests.untrained import untrained

pytestmark = pytest.mark.long

MakeConfig = Callable[..., RunConfig]

SPOILT = """
import os, signal, sys
from embrag_ds.runs.launchers import take_place
take_place()  # before torch is imported, as the command does
from embrag_ds.errors import UserError
from embrag_ds.imputation import division, ranks

ranks.PATIENCE_S = 2.0
write = division.write_blended

def spoilt(*given):
    if os.environ["RANK"] == "1":
        {fault}
    write(*given)

division.write_blended = spoilt
from embrag_ds.cli.main import main
main("impute")
"""


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> GenomeFiles:
    return simulate_genome(tmp_path_factory.mktemp("genome"))


@pytest.fixture
def whole(genome: GenomeFiles, make_config: MakeConfig, tmp_path: Path, cache_dir: Path) -> list[str]:
    """Options of the genome in one file of each kind, with a model without Good-Turing correction."""
    model = untrained(make_config("embrag.model.good_turing=false"), head=0.3)
    write_export(tmp_path / "m.safetensors", model)
    return [*options(genome, tmp_path, cache_dir), *files(genome, 2)]


def options(genome: GenomeFiles, folder: Path, cache_dir: Path) -> list[str]:
    return [f"--model={folder / 'm.safetensors'}", f"--cache-dir={cache_dir}", "--adapt=off"]


def files(genome: GenomeFiles, *places: int) -> list[str]:
    named = {"--panel": genome.panels, "--map": genome.maps, "--target": genome.targets}
    return [text for option, paths in named.items() for text in (option, *(str(paths[each]) for each in places))]


def launched(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    ours = {*PLACE, RANKS_HERE}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def digests(out: Path) -> list[str]:
    index = ".csi" if out.suffix == ".bcf" else ".tbi"
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (out, Path(f"{out}{index}"))]


def test_ranks_write_the_bytes_of_one_rank(
    root: Path, whole: list[str], genome: GenomeFiles, tmp_path: Path, cache_dir: Path
) -> None:
    script = str(root / "launch" / "impute.py")
    (one,) = ended_ranks(root, 1, script, *whole, f"--out={tmp_path / 'one.vcf.gz'}")
    assert one.returncode == 0, one.stderr
    expected = digests(tmp_path / "one.vcf.gz")
    several = [*options(genome, tmp_path, cache_dir), *files(genome, 0, 1)]
    torchrun = ["torch.distributed.run", f"--master_port={free_port()}", "--nproc_per_node=3", script]
    deepspeed = ["deepspeed.launcher.runner", "--num_accelerators=2", f"--master_port={free_port()}", script]
    for name, command in {"t": torchrun, "d": deepspeed}.items():
        done = launched(root, *command, *several, f"--out={tmp_path / name}.vcf.gz")
        assert done.returncode == 0, done.stderr
        assert digests(tmp_path / f"{name}.vcf.gz") == expected
        assert re.search(r"vcf.gz: [0-9]+ samples in", done.stderr) and "rank 1: " not in done.stderr
    assert not list(tmp_path.glob(".*"))


def test_more_ranks_than_windows_and_a_region_of_a_bcf(
    root: Path, whole: list[str], tmp_path: Path, cache_dir: Path
) -> None:
    """Without the transformer a contig is one stretch. The model adapts on rank 0 alone, and all take what it found."""
    script = str(root / "launch" / "impute.py")
    given = [each for each in whole if each != "--adapt=off"]
    given += ["--region=1", "--transformer=off", "--adapt=0.04", "--min-r2=0.2"]
    for ranks in (1, 3):
        own = [f"--cache-dir={tmp_path / f'cache{ranks}'}", f"--report={tmp_path / f'{ranks}.json'}"]
        done = ended_ranks(root, ranks, script, *given, *own, f"--out={tmp_path / f'{ranks}.bcf'}")
        assert [each.returncode for each in done] == [0] * ranks, [each.stderr for each in done]
        assert "imputed sites have DR2 below 0.2 and are left out" in done[0].stderr
        assert not any(each.stderr for each in done[1:])
    assert digests(tmp_path / "1.bcf") == digests(tmp_path / "3.bcf")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "3.json").read_bytes()


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        ("raise UserError('the disk of this rank is full; free some')", 2, "the disk of this rank is full; free some"),
        ("raise MemoryError('none left')", 2, "ended by a fault (MemoryError: none left); see what it says"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, None),
    ],
)
def test_where_a_rank_fails_all_end_and_nothing_is_left(
    root: Path, whole: list[str], tmp_path: Path, fault: str, status: int, line: str | None
) -> None:
    done = ended_ranks(root, 2, "-c", SPOILT.format(fault=fault), *whole, f"--out={tmp_path / 'out.vcf.gz'}")
    errors = [each for each in done[0].stderr.splitlines() if each.startswith("error: ")]
    assert done[0].returncode == status and done[1].returncode != 0 and len(errors) == 1, done
    if line is None:
        assert done[1].returncode == -signal.SIGKILL
        assert errors[0].startswith("error: no sign of progress in 2 s from rank 1 (") and "start again" in errors[0]
    else:
        assert errors[0].startswith("error: rank 1 on ") and errors[0].endswith(f": {line}")
        assert ("Traceback" in done[1].stderr) == ("MemoryError" in line)
    assert "Traceback" not in done[0].stderr
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("m.safetensors", "tiny.json")] == []


def test_a_fault_of_all_ranks_is_said_once(root: Path, whole: list[str], tmp_path: Path) -> None:
    out = f"--out={tmp_path / 'out.vcf.gz'}"
    done = ended_ranks(root, 2, str(root / "launch" / "impute.py"), *whole, "--region=7", out)
    assert [each.returncode for each in done] == [2, 2]
    assert done[0].stderr.splitlines()[-1].startswith("error: --region 7: no such region of ")
    assert done[1].stderr == ""
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_where_rank_0_is_killed_the_others_clean_up(root: Path, whole: list[str], tmp_path: Path) -> None:
    spoilt = SPOILT.replace('== "1"', '== "0"').format(fault="os.kill(os.getpid(), signal.SIGKILL)")
    main, other = ended_ranks(root, 2, "-c", spoilt, *whole, f"--out={tmp_path / 'out.vcf.gz'}")
    assert (main.returncode, other.returncode) == (-signal.SIGKILL, 2)
    assert other.stderr == "rank 1: error: rank 0 has ended, so this one ends, too; see what rank 0 says\n"
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))
