"""How a command ends and what it shows: one line for a fault, and a result that any stdout takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embrag_ds.cli.command import one_line, run_command
from embrag_ds.cli.main import main
from embrag_ds.data.simulate import DefaultData
from embrag_ds.errors import UserError


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_fault_is_one_line_whatever_names_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("a\nb\r\x1b[31m\u2028c\udce9: S\u00e9n\u00e9gal is not in it")

    with pytest.raises(SystemExit) as ended:
        run_command(fail)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: a\\nb\\r\\x1b[31m\\u2028c\\udce9: S\u00e9n\u00e9gal is not in it\n"
    assert one_line("plain, with blanks") == "plain, with blanks"


SHOW = r"""
import sys
from embrag_ds.cli.command import run_command, show
run_command(lambda: [show("caf\udce9 S\u00e9n\u00e9gal\n" * int(sys.argv[1])), show("end\n")])
"""


def shown(root: Path, shell: str, lines: int = 1, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The process that ``shell`` makes of a command which shows so many lines and one more."""
    command = f'set -o pipefail; {sys.executable} -c "$SHOW" {lines} {shell}'
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(root), "SHOW": SHOW, **environment},
    )


def test_a_result_is_shown_in_any_encoding(root: Path) -> None:
    for encoding, line in (
        ("utf-8", "caf\\udce9 S\u00e9n\u00e9gal".encode()),
        ("latin-1", b"caf\\udce9 S\xe9n\xe9gal"),
        ("ascii", b"caf\\udce9 S\\xe9n\\xe9gal"),
    ):
        done = shown(root, "", PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout, done.stderr) == (0, line + b"\nend\n", b"")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_stdout_that_takes_no_more(root: Path, lines: int) -> None:
    done = shown(root, "| true", lines)
    assert done.stderr == b"" and done.returncode in (0, 128 + signal.SIGPIPE)
    done = shown(root, "> /dev/full", lines)
    message = b"error: standard output: cannot write to it (No space left on device); write it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, message)
    done = shown(root, ">&-", lines)
    message = b"error: standard output: cannot write to it (Bad file descriptor); write it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("name", ["caf\udce9", "$\\frac$", "_hidden", "a|b", "S\u00e9n\u00e9gal"])
def test_a_report_takes_any_name_of_a_tool(
    simulated: DefaultData, tmp_path: Path, cache_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--truth={simulated.truth}", f"--panel={simulated.panel}", f"--target={simulated.target}"]
    made = [f"--plots={tmp_path}", f"--json={tmp_path / 'json'}", f"--markdown={tmp_path / 'markdown'}"]
    given = [*files, f"--imputed={name}={simulated.truth}", *made, f"--cache-dir={cache_dir}", "--bootstrap=2"]
    main(arguments=["evaluate", *given])
    shown_name = name.encode("utf-8", "backslashreplace").decode()
    assert f"\n{shown_name} " in capsys.readouterr().out
    assert list(json.loads((tmp_path / "json").read_text())["tools"]) == [name]
    rows = (tmp_path / "markdown").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    assert any(row.startswith("| " + name.replace("|", r"\|") + " | ") for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"json", "markdown", "r2.png", "calibration.png"}
