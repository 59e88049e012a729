"""Ranks meet before the process group: packing may take any time, and a fault of all ranks is said once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.simulate import DefaultData
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import SaidByMain, UserError
from embrag_ds.runs import meeting as meeting_module
from embrag_ds.runs.alive import FOLDER
from embrag_ds.runs.meeting import Meeting
from tests.ranks import free_port, run_ranks

Act = Callable[[Meeting], Any]


def together(act: Act, ranks: int = 3) -> list[Any]:
    """What ``act`` returned or raised on every rank; a rank is a thread here."""
    port = free_port()
    outcomes: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        limit = timedelta(seconds=60)
        store = torch.distributed.TCPStore("127.0.0.1", port, ranks, rank == 0, limit, False)
        try:
            outcomes[rank] = act(Meeting(rank, ranks, torch.distributed.PrefixStore("test", store)))
        except Exception as fault:
            outcomes[rank] = fault
        barrier.wait(60)  # the store must not go before the others have ended

    barrier = threading.Barrier(ranks)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


def test_rank_0_decides_and_all_hear_of_all() -> None:
    def act(meeting: Meeting) -> Any:
        first, second = meeting.on_main(lambda: f"of rank {meeting.rank}"), meeting.on_main(lambda: 2)
        return first, second, meeting.on_main(lambda: None), meeting.gather(f"rank {meeting.rank}")

    expected = ("of rank 0", 2, None, ["rank 0", "rank 1", "rank 2"])
    assert together(act) == [expected] * 3


def test_a_single_rank_needs_no_store(tmp_path: Path) -> None:
    meeting = Meeting(0, 1, None)
    assert meeting.on_main(lambda: tmp_path) == tmp_path and meeting.gather("alone") == ["alone"]
    with meeting.sharing(tmp_path / "run", 1.0):
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"^faulty$"), meeting.one_voice():
        raise UserError("faulty")


@pytest.mark.parametrize("shared", [True, False])
def test_one_rank_packs_for_all_that_see_its_cache(
    shared: bool, simulated: DefaultData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing: list[str] = []
    opened = meeting_module.open_inputs

    def note(files: PanelFiles, settings: DataConfig, progress: bool = True) -> Any:
        assert settings.cache_dir is not None
        empty = not list(Path(settings.cache_dir).glob("panel-*"))
        packing.extend([settings.cache_dir] * empty)
        time.sleep(0.3 * empty)
        return opened(files, settings, progress)

    monkeypatch.setattr(meeting_module, "open_inputs", note)

    def act(meeting: Meeting) -> Any:
        cache = tmp_path / ("cache" if shared or meeting.rank < 2 else "other")
        inputs = meeting.open_inputs(PanelFiles(simulated.panel), DataConfig(cache_dir=str(cache)))
        return len(inputs.panel.samples), sorted(path.name for path in cache.glob(".*") if "panel" not in path.name)

    assert together(act) == [(60, [])] * 3
    assert sorted(packing) == [str(tmp_path / "cache"), *([] if shared else [str(tmp_path / "other")])]


def test_a_rank_that_cannot_open_its_panel_ends_all(
    simulated: DefaultData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting_module, "_SAID_WITHIN_S", 0.0)

    def act(meeting: Meeting) -> Any:
        panel = simulated.panel if meeting.rank < 2 else tmp_path / "none.vcf.gz"
        with meeting.one_voice():
            meeting.open_inputs(PanelFiles(panel), DataConfig(cache_dir=str(tmp_path / f"cache{meeting.rank}")))

    main, other, blind = together(act)
    assert type(main) is not SaidByMain and "none.vcf.gz" in str(main) and str(main).startswith("rank 2 on ")
    assert isinstance(other, SaidByMain) and isinstance(blind, SaidByMain)


def test_a_fault_of_all_ranks_is_said_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_SAID_WITHIN_S", 0.0)

    def act(meeting: Meeting) -> Any:
        with meeting.one_voice():
            time.sleep(0.2 * (2 - meeting.rank))
            raise UserError("embrag.seed: faulty")

    outcomes = together(act)
    assert [type(each) for each in outcomes] == [UserError, SaidByMain, SaidByMain]
    assert {str(each) for each in outcomes} == {"embrag.seed: faulty"}


def test_a_fault_of_one_rank_is_said_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_HEARD_WITHIN_S", 0.3)

    def act(meeting: Meeting) -> Any:
        with meeting.one_voice():
            if meeting.rank == 1:
                raise UserError("the disk of rank 1 is full")
            time.sleep(1)
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38471")

    main, own, other = together(act)
    assert type(own) is UserError and str(own) == "the disk of rank 1 is full"
    assert str(main).startswith("rank 1 on ") and str(main).endswith(": the disk of rank 1 is full")
    assert isinstance(other, SaidByMain)


def test_a_rank_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_HEARD_WITHIN_S", 0.3)

    def act(meeting: Meeting) -> Any:
        with meeting.one_voice():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection reset by peer\nwith a second line")

    for outcome in together(act):
        assert isinstance(outcome, UserError) and str(outcome).startswith(
            "another rank has ended, or cannot be reached"
        )

    def bug(meeting: Meeting) -> Any:
        with meeting.one_voice():
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    assert [type(each) for each in together(bug)] == [RuntimeError] * 3


def test_a_run_folder_that_not_all_ranks_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_SEEN_WITHIN_S", 0.1)

    def act(meeting: Meeting) -> Any:
        with meeting.sharing(tmp_path / ("run" if meeting.rank != 1 else "elsewhere"), 60.0):
            raise AssertionError("it is not shared")

    for outcome in together(act):
        assert isinstance(outcome, UserError)
        assert "run: rank 1 (" in str(outcome).replace("elsewhere", "run")
        assert "cannot see the folder that rank 0 (" in str(outcome) and "with --run-dir" in str(outcome)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_watch_each_other_in_the_folder_until_the_end(fails: bool, tmp_path: Path) -> None:
    def act(meeting: Meeting) -> Any:
        with meeting.one_voice(), meeting.sharing(tmp_path / "run", 60.0):
            present = sorted(path.name for path in (tmp_path / "run" / FOLDER).iterdir())
            meeting.gather("")
            if fails:
                raise UserError("a fault of all")
            return present

    outcomes = together(act)
    assert outcomes == [["rank0", "rank1", "rank2"]] * 3 if not fails else all(map(str, outcomes))
    assert not (tmp_path / "run" / FOLDER).exists() and (tmp_path / "run").exists() == (not fails)


def test_a_second_run_at_the_same_port_does_not_mix_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    limit = timedelta(seconds=60)
    first: list[Any] = []
    main = threading.Thread(target=lambda: first.append(meeting_module._store(0, 2, limit)))
    main.start()
    first.append(meeting_module._store(1, 2, limit))
    main.join(60)
    assert len(first) == 2
    with pytest.raises(
        SaidByMain, match=r"^MASTER_PORT \d+: another program, maybe another run, listens there; choose"
    ):
        meeting_module._store(1, 2, limit)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(UserError, match=r"^MASTER_PORT \d+: another program, maybe another run, listens there"):
            meeting_module._store(0, 2, timedelta(seconds=60))


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(
        UserError, match=r"^rank 1, 2 of 3 did not come to 127\.0\.0\.1:\d+ within 0\.3 s; was it started"
    ):
        meeting_module._store(0, 3, timedelta(seconds=0.3))


PROGRAM = """
import sys, time
from datetime import timedelta
from pathlib import Path
from embrag_ds.data import inputs
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.windows import DataConfig
from embrag_ds.engine import distributed
from embrag_ds.runs import meeting

distributed.collective_limit = lambda patience_s: timedelta(seconds=3)
panel, folder = map(Path, sys.argv[1:])

def slowly(files, settings, progress=True):
    if not progress:  # rank 1, whose machine is slower
        time.sleep(6)
    return inputs.open_inputs(files, settings, progress)

meeting.open_inputs = slowly
with meeting.meet(timedelta(seconds=60)) as met, met.sharing(folder / "run", 2.0):
    own = folder / f"cache{met.rank}"
    opened = met.open_inputs(PanelFiles(panel), DataConfig(cache_dir=str(own)))
    group = distributed.start_distributed()
    group.barrier()
    print(group.rank, group.ranks, len(opened.panel.samples))
    group.close()
"""


@pytest.mark.long
def test_packing_may_take_longer_than_a_collective_operation(
    root: Path, simulated: DefaultData, tmp_path: Path
) -> None:
    """The machines' caches are not shared, and one needs twice the limit, and three times the patience, to pack."""
    done = run_ranks(root, 2, "-c", PROGRAM, simulated.panel, tmp_path)
    assert [each.stdout.splitlines()[-1] for each in done] == ["0 2 60", "1 2 60"]


def test_a_text_for_one_rank_and_a_fault_that_no_rank_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_SAID_WITHIN_S", 0.0)

    def act(meeting: Meeting) -> Any:
        if meeting.rank == 2:
            meeting.post("name", "of rank 2")
            meeting.await_post("heard")
            meeting.tell("MemoryError")
            meeting.post("told")
            return None
        heard = meeting.await_post("name") if meeting.is_main else None
        meeting.check()  # nobody has failed yet
        if meeting.is_main:
            meeting.post("heard")
        while True:
            try:
                meeting.check()
            except UserError as fault:
                return heard, type(fault) is SaidByMain, str(fault)

    main, other, _ = together(act)
    assert main[:2] == ("of rank 2", False) and main[2].startswith("rank 2 on ") and main[2].endswith(": MemoryError")
    assert other == (None, True, "MemoryError") or other[2] == main[2]
