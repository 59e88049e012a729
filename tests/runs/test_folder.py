"""Which folder a run takes, who holds it, and how it is said to have ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embrag_ds.errors import UserError
from embrag_ds.runs.folder import RunLock, choose, leave_no_trace, never_saved, read_outcome, write_outcome

HOLDER = """
import sys, time
from pathlib import Path
from embrag_ds.runs.folder import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_run_holds_a_folder_until_it_ends_however_it_ends(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=rf"run: process {other.pid} on .* is training in this folder; wait for its"
        ):
            RunLock(folder)
        other.kill()
    RunLock(folder).release()
    RunLock(folder).release()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make this folder"):
        RunLock(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "outcome.json"])
def test_what_holds_a_run_is_not_filled_by_another(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"holds a run already \({name}\); add --resume"):
        choose(tmp_path, "v18", False)
    assert choose(tmp_path, "v18", True) == tmp_path
    assert choose(tmp_path / "new", "v18", False) == tmp_path / "new"


def test_a_run_that_ended_before_its_first_checkpoint(tmp_path: Path) -> None:
    assert not never_saved(tmp_path)
    write_outcome(tmp_path, "running", True, "it has not ended", 0)
    assert never_saved(tmp_path)
    (tmp_path / "checkpoints" / "step3").mkdir(parents=True)
    assert not never_saved(tmp_path)


def test_runs_that_begin_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda pattern: "20260101-000000")
    names = []
    for _ in range(3):
        names.append(choose(None, "v18", False, tmp_path).name)
        (tmp_path / names[-1]).mkdir()
    assert names == ["v18-20260101-000000", "v18-20260101-000000-2", "v18-20260101-000000-3"]


def test_the_newest_run_of_a_configuration_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of v18 with a checkpoint"):
        choose(None, "v18", True, tmp_path)
    for name in ("v18-20260101-000000", "v18-20260102-000000", "v17-20260103-000000"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "v18-20260104-000000").mkdir()
    assert choose(None, "v18", True, tmp_path) == tmp_path / "v18-20260102-000000"


def test_runs_of_other_configurations_and_those_with_a_name_are_not_resumed(tmp_path: Path) -> None:
    for name in ("v18-large-20260102-000000", "v18-mine", "v18-20260101-000000-x", "v[1]8-20260103-000000"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no run of v18 with a checkpoint"):
        choose(None, "v18", True, tmp_path)
    assert choose(None, "v[1]8", True, tmp_path) == tmp_path / "v[1]8-20260103-000000"
    for name in ("v18-20260101-000000", "v18-20260101-000000-2", "v18-20260101-000000-10"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert choose(None, "v18", True, tmp_path) == tmp_path / "v18-20260101-000000-10"


def test_an_outcome_is_written_over_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise UserError(f"{path}: cannot write it (No space left on device)")

    write_outcome(tmp_path, "running", True, "it has not ended" * 9, 0)
    monkeypatch.setattr("embrag_ds.runs.folder.write_json", full)
    write_outcome(tmp_path, "failed", False, "no space" * 1000, 5)
    found = read_outcome(tmp_path)
    assert (found["state"], found["restart"], found["step"]) == ("failed", False, 5)
    assert found["reason"].startswith("no spaceno") and (tmp_path / "outcome.json").stat().st_size < 1000
    with pytest.raises(UserError, match="cannot write it"):
        write_outcome(tmp_path / "elsewhere", "failed", False, "", 0)


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    for content, left in ((None, False), ("metrics.jsonl", True)):
        folder = tmp_path / str(content)
        lock = RunLock(folder)
        write_outcome(folder, "failed", False, "no panel", 0)
        assert read_outcome(folder)["reason"] == "no panel"
        if content:
            (folder / content).touch()
        leave_no_trace(folder)
        lock.release()
        assert folder.exists() is left
    assert read_outcome(tmp_path) == {}
