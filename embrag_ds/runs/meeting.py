"""Ranks before they join the process group: they meet in its store of keys, where nobody waits against the clock.

A collective operation ends a run when a rank comes later than its time limit. Packing a large panel takes longer, so it
comes first: here ranks wait for as long as the others live (:mod:`embrag_ds.runs.alive`). They also agree here which
folder the run takes, see whether all of them can, and say a fault of all ranks once.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from embrag_ds.data.cache import require_cache
from embrag_ds.data.inputs import PanelFiles, PanelInputs, cache_directory, open_inputs
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import SaidByMain, UserError
from embrag_ds.files import make_folder
from embrag_ds.runs import alive

if TYPE_CHECKING:
    import torch.distributed

Made = TypeVar("Made")
_LONGEST_NAP_S = 0.5
_SEEN_WITHIN_S = 30.0
"""Seconds after which a file that one machine makes is seen by others that share the folder."""
_HEARD_WITHIN_S = 2.0
_SAID_WITHIN_S = 5.0
_GONE = "rank 0 has ended, so this one ends, too; see what rank 0 says"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
"""Words of gloo and NCCL about a rank that is no longer there."""


class Meeting:
    """All ranks of a run as one of them sees them; ``store`` is None for a single rank.

    Methods marked as collective must be called by all ranks, in the same order.
    """

    def __init__(self, rank: int, ranks: int, store: torch.distributed.Store | None):
        self.rank = rank
        self.ranks = ranks
        self._store = store
        self._turn = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def on_main(self, work: Callable[[], Made]) -> Made:
        """What ``work`` returns on rank 0, as JSON keeps it, on every rank (collective); a fault ends all ranks."""
        if self._store is None:
            return work()
        key = self._key("on main")
        if self.is_main:
            self._store.set(key, json.dumps(work()))
        made: Made = json.loads(self._wait_for(key))
        return made

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks (collective)."""
        if self._store is None:
            return [text]
        key = self._key("gather")
        self._store.set(f"{key}/{self.rank}", text)
        return [self._wait_for(f"{key}/{rank}") for rank in range(self.ranks)]

    def open_inputs(self, files: PanelFiles, settings: DataConfig) -> PanelInputs:
        """Open the inputs (collective); one rank fills a cache folder, and all others that see the folder wait for it.

        Machines whose caches are their own fill them at the same time. Only rank 0 shows progress. Raises
        :class:`UserError` as :func:`open_inputs` does.
        """
        if self._store is None:
            return open_inputs(files, settings)
        packer = self._first_in(cache_directory(settings))
        key = self._key("opened")
        with alive.busy("opening the panel"):
            if packer != self.rank:
                self._wait_for(f"{key}/{packer}")
            inputs = open_inputs(files, settings, progress=self.is_main)
            self._store.set(f"{key}/{self.rank}", "")
            for rank in range(self.ranks):
                self._wait_for(f"{key}/{rank}")
        return inputs

    def _first_in(self, folder: Path) -> int:
        """The lowest rank that sees this rank's ``folder`` as its own (collective)."""
        require_cache(folder)
        name = self.on_main(lambda: f".{secrets.token_hex(8)}")
        own = folder / f"{name}-{self.rank}"
        try:
            own.touch()
            self.gather("")
            first = next(
                rank for rank in range(self.ranks) if rank == self.rank or (folder / f"{name}-{rank}").exists()
            )
            self.gather("")
        finally:
            own.unlink(missing_ok=True)
        return first

    def post(self, name: str, text: str = "") -> None:
        """Leave a text for whichever rank waits for the ``name``, which is used once."""
        assert self._store is not None
        self._store.set(f"post/{name}", text)

    def await_post(self, name: str) -> str:
        """The text that another rank posts; raises the fault of a rank that has failed."""
        return self._wait_for(f"post/{name}")

    def check(self) -> None:
        """Raise the fault of another rank, if one has failed."""
        try:
            for rank, host, text in self._faults() if self._store is not None else ():
                raise self._relayed(rank, host, text)
        except RuntimeError as fault:
            raise Left(_GONE) from fault

    def tell(self, text: str) -> None:
        """Tell the others that this rank has failed."""
        if self._store is not None:
            with suppress(RuntimeError, OSError):  # rank 0 has ended, and with it the store
                number = self._store.add("faults", 1)
                self._store.set(f"fault/{number}", json.dumps([self.rank, socket.gethostname(), text]))

    @contextmanager
    def sharing(
        self,
        run_dir: Path,
        patience_s: float,
        option: str = "--run-dir",
        words: alive.Words = alive.OF_TRAINING,
        end: Callable[[str], None] | None = None,
    ) -> Iterator[None]:
        """Context in which ranks watch each other through files in ``run_dir``, which is made (entered collectively).

        Raises :class:`UserError`, with the ``option`` that chooses it, if not all ranks see the folder that rank 0
        made. After a fault, a folder that is still empty is removed. ``end`` and ``words`` are those of
        :class:`embrag_ds.runs.alive.Watch`.
        """
        if self._store is None:
            yield
            return
        if self.is_main:
            make_folder(run_dir)
            alive.clear(run_dir)
        try:
            self._require_shared(run_dir, option)
            watch = alive.Watch(run_dir, self.rank, self.ranks, patience_s, end, words)
            try:
                self.gather("")
                yield
            except BaseException:
                watch.close(well=False)
                raise
            watch.close()
        except BaseException:
            if self.is_main:
                alive.clear(run_dir)
                with suppress(OSError):
                    run_dir.rmdir()
            raise

    def _require_shared(self, run_dir: Path, option: str) -> None:
        token = run_dir / self.on_main(lambda: f".shared-{secrets.token_hex(8)}")
        if self.is_main:
            with _in_folder(run_dir):
                token.touch()
        self.gather("")
        try:
            seen = token.exists()
            until = time.monotonic() + _SEEN_WITHIN_S
            while not seen and time.monotonic() < until:
                time.sleep(_LONGEST_NAP_S)
                with suppress(OSError):
                    os.listdir(run_dir)  # renews what a network file system remembers of the folder
                seen = token.exists()
            answers = [json.loads(each) for each in self.gather(json.dumps([seen, socket.gethostname()]))]
        finally:
            if self.is_main:
                token.unlink(missing_ok=True)
        blind = [f"{rank} ({host})" for rank, (sees, host) in enumerate(answers) if not sees]
        if blind:
            raise UserError(
                f"{run_dir}: rank {', '.join(blind)} cannot see the folder that rank 0 ({answers[0][1]}) made; "
                f"give an absolute path on a file system that all machines share with {option}"
            )

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Context in which a :class:`UserError` of all ranks becomes :class:`SaidByMain` on all but rank 0.

        What torch raises where another rank has ended becomes a :class:`UserError`.
        """
        try:
            yield
        except UserError as fault:
            if self._store is None or isinstance(fault, Left) or not self._is_said(fault) or self.is_main:
                raise
            raise SaidByMain(str(fault)) from fault
        except RuntimeError as fault:
            lost = self._store is not None and self._lost(fault)
            if not lost:
                raise
            raise lost from fault

    def _is_said(self, fault: UserError) -> bool:
        """Tell the others of a fault; returns whether rank 0 has it, too. Gives rank 0 the time to say it."""
        assert self._store is not None
        text = str(fault)
        with suppress(RuntimeError, OSError):  # rank 0 has ended, and with it the store
            if not isinstance(fault, _Relayed):
                self.tell(text)
            until = time.monotonic() + _HEARD_WITHIN_S
            if self.is_main:
                while self._store.add("heard", 0) < self.ranks - 1 and time.monotonic() < until:
                    time.sleep(0.02)
                return True
            said = isinstance(fault, SaidByMain)
            while not said and time.monotonic() < until:
                said = any(rank == 0 and text in words for rank, _, words in self._faults())
                time.sleep(0.02)
            self._store.add("heard", 1)
            if not said:
                return False
            # A launcher ends all ranks as soon as one has ended, and rank 0 must say its line before.
            until = time.monotonic() + _SAID_WITHIN_S
            while time.monotonic() < until:
                with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))):
                    time.sleep(0.1)
        return True

    def _lost(self, fault: RuntimeError) -> UserError | None:
        """The fault for the user where ``fault`` is torch's about a rank that has ended, else None."""
        text = " ".join(str(fault).split())
        if not any(words in text for words in _LOST):
            return None
        # Without the place in gloo's source before it, and its advice behind it.
        reason = re.sub(r"^\[[^\]]*\] *", "", text).partition(". ")[0][:150]
        time.sleep(_LONGEST_NAP_S)  # for the words of the rank that has ended
        try:
            told = self._faults()
        except RuntimeError:
            return Left(_GONE)
        for rank, host, words in told:
            return self._relayed(rank, host, words)
        return UserError(
            f"another rank has ended, or cannot be reached ({reason}); see what its machine says, and go on "
            "with --resume"
        )

    def _faults(self) -> list[tuple[int, str, str]]:
        assert self._store is not None
        found = []
        for number in range(1, self._store.add("faults", 0) + 1):
            if self._store.check([f"fault/{number}"]):
                rank, host, text = json.loads(self._store.get(f"fault/{number}"))
                found.append((rank, host, text))
        return found

    def _relayed(self, rank: int, host: str, text: str) -> UserError:
        """The fault of another rank, as this rank raises it: rank 0 says it, and the others end silently."""
        assert self._store is not None
        if not self.is_main:
            return SaidByMain(text)
        words = text if rank == 0 else f"rank {rank} on {host}: {text}"
        number = self._store.add("faults", 1)
        self._store.set(f"fault/{number}", json.dumps([0, host, words]))
        return _Relayed(words)

    def _key(self, name: str) -> str:
        self._turn += 1
        return f"{self._turn} {name}"

    def _wait_for(self, key: str) -> str:
        """Value of a key that another rank sets, for which this rank waits as long as it takes; raises the fault."""
        assert self._store is not None
        nap = 0.001
        try:
            while not self._store.check([key]):
                for rank, host, text in self._faults():
                    raise self._relayed(rank, host, text)
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP_S)
            return self._store.get(key).decode()
        except RuntimeError as fault:
            raise Left(_GONE) from fault


class Left(UserError):
    """Rank 0 has ended, however that was: there is no store of keys any more."""


class _Relayed(UserError):
    """A fault of another rank that rank 0 says, and has told the others that it does."""


@contextmanager
def meet(limit: timedelta) -> Iterator[Meeting]:
    """Meet the other ranks at MASTER_ADDR and MASTER_PORT, and speak with one voice inside ``with`` (collective).

    Raises :class:`UserError` if rank 0 cannot be reached, or a rank is missing, within ``limit``.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    meeting = Meeting(rank, ranks, None if ranks == 1 else _store(rank, ranks, limit))
    with meeting.one_voice():
        yield meeting


def _store(rank: int, ranks: int, limit: timedelta) -> torch.distributed.Store:
    """Connection to the store of keys, which rank 0 keeps, or torchrun for it."""
    import torch.distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # Several connections of a process share one store, so that the process group will find this one, too.
        found = torch.distributed.TCPStore(
            address, port, ranks, keeps, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as fault:
        raise _unmet(fault, f"{address}:{port}", port, rank, keeps) from fault
    store = torch.distributed.PrefixStore("embrag_ds", found)
    if store.add(f"starts of {rank}", 1) > 1:  # its own rank 0 could not listen there, and says so
        raise SaidByMain(_taken(port))
    store.set(f"here/{rank}", socket.gethostname())
    until = time.monotonic() + limit.total_seconds()
    missing = list(range(ranks))
    nap = 0.001
    while missing := [each for each in missing if not store.check([f"here/{each}"])]:
        if time.monotonic() > until:
            names = ", ".join(map(str, missing[:8])) + ("" if len(missing) <= 8 else " and others")
            kind = UserError if rank == 0 else SaidByMain
            raise kind(
                f"rank {names} of {ranks} did not come to {address}:{port} within {limit.total_seconds():g} s; "
                "was it started?"
            )
        time.sleep(nap)
        nap = min(2 * nap, _LONGEST_NAP_S)
    return store


def _unmet(fault: RuntimeError, where: str, port: int, rank: int, keeps: bool) -> UserError:
    if "EADDRINUSE" in str(fault) or "address already in use" in str(fault):
        return UserError(_taken(port))
    reason = " ".join(str(fault).split())[:150]
    what = "listen" if keeps else "reach rank 0"
    return UserError(
        f"rank {rank} on {socket.gethostname()} cannot {what} at {where} ({reason}); check MASTER_ADDR, MASTER_PORT "
        "and the firewall"
    )


def _taken(port: int) -> str:
    return (
        f"MASTER_PORT {port}: another program, maybe another run, listens there; choose another port "
        "(deepspeed --master_port, torchrun --master_port, or the variable itself)"
    )


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise UserError(f"{folder}: cannot write in this folder ({fault.strerror}); choose another") from fault
