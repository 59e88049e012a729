"""``embrag impute --threads``: the same bytes with any number, of a model that adapts, too."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embrag_ds.cli.main import main
from embrag_ds.data.simulate import DefaultData

Embrag = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.long
def test_the_output_is_the_same_with_any_number_of_threads(
    embrag: Embrag, simulated: DefaultData, tmp_path: Path
) -> None:
    files = [f"--panel={simulated.panel}", f"--target={simulated.target}", f"--map={simulated.genetic_map}"]
    files += ["--adapt=0.036"]  # some 20 steps, the fewest
    # The process that compiles a loop computes other last digits than those that load it, whatever their threads.
    # This one compiles what is not compiled yet.
    main("impute", [*files, f"--cache-dir={tmp_path / 'compiling'}", f"--out={tmp_path / 'compiling.vcf.gz'}"])
    outputs = []
    for threads in (1, 3):
        outputs.append(tmp_path / f"{threads}.vcf.gz")
        own = [f"--cache-dir={tmp_path / str(threads)}", f"--save-model={tmp_path / str(threads)}.safetensors"]
        done = embrag("impute", *files, *own, "--threads", threads, "--out", outputs[-1])
        assert done.returncode == 0, done.stderr
        assert re.search(r"typed sites: 2\d steps", done.stderr) and "the adapted model imputes" in done.stderr
    assert len({path.read_bytes() for path in outputs}) == 1
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 1


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--threads=0", "error: --threads 0: give at least 1"),
        ("--format=GT,PL", "error: --format GT,PL: there is no field 'PL'; choose from GT,DS,HDS,GP"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, complaint: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main("impute", [option, f"--out={tmp_path / 'out.vcf.gz'}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [complaint]
