"""Table of the sites of a command's files that were left out, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from embrag_ds.data.panel import Panel
from embrag_ds.files import written
from embrag_ds.variants.harmonise import Harmonised
from embrag_ds.variants.header import as_bytes
from embrag_ds.variants.records import Excluded
from embrag_ds.variants.sites import SiteTable

COLUMNS = "file\tcontig\tpos\tid\tref\talt\treason\n"
"""First line of the table."""


class LeftOutTable:
    """Table with the columns file, contig, pos, id, ref, alt and reason; ``what`` names the file in a command."""

    def __init__(self, out: BinaryIO | None) -> None:
        self._out = out
        if out is not None:
            out.write(as_bytes(COLUMNS))

    def add(self, what: str, each: Excluded) -> None:
        """Add a site that was left out when its file was read."""
        if self._out is not None:
            self._out.write(as_bytes("\t".join((what, *map(str, each))) + "\n"))

    def add_packed(self, what: str, panel: Panel) -> None:
        """Add the sites that were left out of a panel, or of targets, when they were packed."""
        self.add_list(what, panel.excluded)

    def add_list(self, what: str, excluded: Path | None) -> None:
        """Add the sites of such a panel's list ``excluded``."""
        if self._out is None or excluded is None:
            return
        with excluded.open("rb") as lines:
            for line in lines:
                self._out.write(as_bytes(f"{what}\t") + line)

    def add_dropped(self, what: str, match: Harmonised, sites: SiteTable) -> None:
        """Add the ``sites`` of a file that were not matched to the panel's."""
        if self._out is not None:
            for each in match.excluded(sites):
                self.add(what, each)


NO_TABLE = LeftOutTable(None)
"""Table that keeps nothing."""


@contextmanager
def left_out_table(path: Path | None) -> Iterator[LeftOutTable]:
    """Yield a table that is at ``path`` when the block ends without an error; None keeps nothing."""
    if path is None:
        yield NO_TABLE
        return
    with written(path) as temporary, temporary.open("wb") as out:
        yield LeftOutTable(out)
