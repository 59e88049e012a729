"""Ranks of an imputation: how they meet, hand each other dosages, and end together where one of them fails."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.imputation.parts import remove_folder, room_for, seen
from embrag_ds.imputation.shares import Border
from embrag_ds.runs.alive import Words
from embrag_ds.runs.meeting import Left, Meeting, meet

PATIENCE_S = 600.0
"""Seconds without a sign of life after which a rank counts as lost."""
_MEET_WITHIN = timedelta(minutes=10)
_LONGEST_NAME = 60
_WORDS = Words("", "", "start again")


class Ranks:
    """All ranks of an imputation as one of them sees them; one rank alone is rank 0 of 1."""

    def __init__(self, meeting: Meeting):
        self._meeting = meeting
        self.rank, self.ranks = meeting.rank, meeting.ranks
        self.is_main = meeting.is_main
        self._folder: Path | None = None

    def on_main(self, work: Callable[[], str]) -> str:
        """The text that ``work`` returns on rank 0, on every rank (collective); a fault ends all ranks."""
        return self._meeting.on_main(work)

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks (collective)."""
        return self._meeting.gather(text)

    @contextmanager
    def folder(self, out: Path) -> Iterator[Path]:
        """Yield a folder beside ``out`` that all ranks see, which is removed at the end, or where one fails.

        In it the ranks watch each other (:mod:`embrag_ds.runs.alive`). Raises :class:`UserError` if not all see it.
        """
        token = self.on_main(lambda: secrets.token_hex(4))
        self._folder = Path(os.path.realpath(out)).parent / f".tmp-{token}-{out.name[-_LONGEST_NAME:]}.parts"
        folder = self._folder

        def end(line: str) -> None:
            remove_folder(folder)
            os._exit(1)

        with self._meeting.sharing(folder, PATIENCE_S, "--out", _WORDS, end):
            yield folder
        # Rank 0 keeps what they meet in, so it ends last.
        for rank in range(1, self.ranks) if self.is_main else ():
            self._meeting.await_post(f"done {rank}")
        if not self.is_main:
            self._meeting.post(f"done {self.rank}")

    def exchange(self, out: Path, folder: Path, unit: int) -> Lending:
        """What hands dosages of a unit of ``out`` from rank to rank, through a ``folder`` that all see."""
        return Lending(self._meeting, out, folder, unit)

    def leave(self, fault: BaseException | None) -> None:
        """Remove the shared folder: rank 0 does, or each that ends without it."""
        gone = fault is not None and (isinstance(fault, Left) or not isinstance(fault, UserError))
        if self._folder is not None and (self.is_main or gone):
            remove_folder(self._folder)

    def tell(self, fault: BaseException) -> None:
        """Tell the others of a fault that is none of the user's; raises that of another rank, if this follows it."""
        if isinstance(fault, OSError):
            self._meeting.check()  # rank 0 has failed, and removed the folder
        words = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        self._meeting.tell(f"ended by a fault ({words}); see what it says")


class Lending:
    """Exchange of dosages at the borders of two ranks' shares, by files in a ``folder`` that all ranks see."""

    def __init__(self, meeting: Meeting, out: Path, folder: Path, unit: int):
        self._meeting = meeting
        self._out = out
        self._folder = folder
        self._unit = unit

    def lend(self, border: Border, dosage: np.ndarray) -> None:
        """Give the left rank of a border this one's part of the dosages, float32 [2N, n]."""
        name = self._name(border)
        with room_for(self._out, self._folder.parent), (self._folder / name).open("wb") as lent:
            np.save(lent, dosage)
        self._meeting.post(name)

    def borrow(self, border: Border) -> np.ndarray:
        """The right rank's part of the dosages, float32 [2N, n]."""
        name = self._name(border)
        self._meeting.await_post(name)
        path = seen(self._folder / name)
        found: np.ndarray = np.load(path)
        path.unlink()
        return found

    def check(self) -> None:
        """Raise the fault of another rank, if one has failed."""
        self._meeting.check()

    def _name(self, border: Border) -> str:
        return f"lent-{self._unit}-{border.window}"


@contextmanager
def ranks_met() -> Iterator[Ranks]:
    """Meet the other ranks; inside ``with``, a fault of all is said once, by rank 0, and one of a rank ends all.

    Raises :class:`UserError` as :func:`embrag_ds.runs.meeting.meet` does.
    """
    ranks: Ranks | None = None
    try:
        with meet(_MEET_WITHIN) as meeting:
            ranks = Ranks(meeting)
            try:
                yield ranks
            except UserError:
                raise
            except BaseException as fault:
                ranks.tell(fault)
                raise
    except BaseException as fault:
        if ranks is not None:
            ranks.leave(fault)
        raise
    ranks.leave(None)
