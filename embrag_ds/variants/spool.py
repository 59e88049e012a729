"""Spool: rows of numbers on disk with few distinct entries, written one after another and read in blocks.

A row has N entries of C numbers each. A *page* is a run of rows that share one table of distinct entries. A row is
stored as N codes, which are indices into its page's table. A page ends when its table might not hold the entries of the
next row.

Memory: one page's table, ``4 C max(65,536, 4 N)`` bytes, and the rows that are read. Disk: 2 bytes per entry (4 where N
> 16,384) and ``4 C`` bytes per distinct entry of a page. That is at most ``4 C + 4`` bytes per entry, even where all
differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np

from embrag_ds.errors import UserError

_PAGE_ENTRIES = 1 << 16
_READ_BYTES = 1 << 24


class Spool:
    """Spool of rows with ``entries`` entries of ``columns`` float32 numbers each, in unnamed scratch files.

    To write a row, call :meth:`new_page_if_full`, then :meth:`add` for each entry that is new in the page, then
    :meth:`append` with the row's codes. Call :meth:`finish` after the last row; then :meth:`read` works.

    Use it as a context manager. The files lie in ``folder`` and vanish with the process, however that ends. Raises
    :class:`UserError` if the folder cannot be written to.
    """

    def __init__(self, folder: Path, entries: int, columns: int) -> None:
        self._folder = folder
        self._entries = entries
        self._table = np.empty((max(_PAGE_ENTRIES, 4 * entries), columns), dtype=np.float32)
        self._used = 0
        self._added: list[Sequence[float]] = []
        self._rows = 0
        # For every page: its first row, and the place of its table, counted in entries.
        self._first_row = [0]
        self._begin = [0]
        self._page_in_table = -1
        self.code_type = np.min_scalar_type(len(self._table) - 1)
        with self._writing():
            self._codes = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._tables = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        for file in (self._codes, self._tables):
            # Closing writes what is still buffered, which fails on a full disk.
            with suppress(OSError):
                file.close()

    def new_page_if_full(self) -> bool:
        """Begin a new page if another row of new entries might not fit.

        Returns True if it did: then no entry has a code in the page yet.
        """
        full = self._used + self._entries > len(self._table)
        if full:
            self._end_page()
        return full

    def add(self, entry: Sequence[float]) -> int:
        """Store one more entry of ``columns`` numbers in the page, and return its code."""
        self._added.append(entry)
        return self._used + len(self._added) - 1

    def append(self, codes: np.ndarray) -> None:
        """Write a row of N codes with dtype :attr:`code_type`."""
        assert codes.shape == (self._entries,) and codes.dtype == self.code_type, (codes.shape, codes.dtype)
        with self._writing():
            self._codes.write(codes.tobytes())
        self._rows += 1
        if self._added:
            self._table[self._used : self._used + len(self._added)] = self._added
            self._used += len(self._added)
            self._added.clear()

    def finish(self) -> None:
        """End the last page; no rows may follow."""
        self._end_page()
        with self._writing():
            self._codes.flush()
            self._tables.flush()

    def read(self, rows: np.ndarray, columns: slice, entries: np.ndarray | None = None) -> np.ndarray:
        """Read some ``columns`` of any ``rows`` int64 [n], for all ``entries`` or those numbered int64 [N]: float32 [n,
        N, C].
        """
        codes = self._read_codes(rows, np.arange(self._entries) if entries is None else entries)
        values = np.empty((*codes.shape, len(range(self._table.shape[1])[columns])), dtype=np.float32)
        page_of = np.searchsorted(self._first_row, rows, side="right") - 1
        for page in np.unique(page_of).tolist():
            here = page_of == page
            values[here] = np.ascontiguousarray(self._read_table(page)[:, columns])[codes[here]]
        return values

    def _read_codes(self, rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
        codes = np.empty((len(rows), len(entries)), dtype=self.code_type)
        row_bytes = self._entries * codes.itemsize
        at_once = max(1, _READ_BYTES // row_bytes)
        # A run of consecutive rows is one read, unless it is large.
        bounds = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        for start, stop in pairwise([0, *bounds, len(rows)]):
            for first in range(start, stop, at_once):
                whole = np.empty((min(at_once, stop - first), self._entries), dtype=self.code_type)
                self._codes.seek(int(rows[first]) * row_bytes)
                self._codes.readinto(whole.data)
                codes[first : first + len(whole)] = whole[:, entries]
        return codes

    def _read_table(self, page: int) -> np.ndarray:
        table = self._table[: self._begin[page + 1] - self._begin[page]]
        if page != self._page_in_table:
            self._tables.seek(self._begin[page] * self._table[0].nbytes)
            self._tables.readinto(table.data)
            self._page_in_table = page
        return table

    def _end_page(self) -> None:
        with self._writing():
            self._tables.write(self._table[: self._used].tobytes())
        self._first_row.append(self._rows)
        self._begin.append(self._begin[-1] + self._used)
        self._used = 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            raise UserError(
                f"{self._folder}: cannot write scratch files ({fault.strerror}); free some space, or have the cache "
                "elsewhere by setting XDG_CACHE_HOME"
            ) from fault
