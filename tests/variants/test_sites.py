"""Site tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.variants.header import as_bytes, as_text
from embrag_ds.variants.sites import SiteTable


def equal(one: SiteTable, other: SiteTable) -> bool:
    """Whether two tables have the same content."""
    numbers = [np.arange(len(each)) if each.record is None else each.record for each in (one, other)]
    return (
        (one.contigs, one.contig_lengths, one.id, dict(one.extent))
        == (other.contigs, other.contig_lengths, other.id, dict(other.extent))
        and list(one.identities()) == list(other.identities())
        and np.array_equal(*numbers)
    )


def test_a_saved_table_loads_as_it_was(small_sites: SiteTable, tmp_path: Path) -> None:
    small_sites.save(tmp_path / "sites.npz")
    loaded = SiteTable.load(tmp_path / "sites.npz")
    assert equal(loaded, small_sites)
    assert (loaded.contig.dtype, loaded.pos.dtype, loaded.extent) == (np.int32, np.int64, dict(small_sites.extent))


field = st.binary(max_size=6).map(lambda raw: as_text(raw.translate(None, b"\t\n\r")))


@given(st.lists(st.tuples(field, field, field, st.sampled_from(["", "END=7", "END=7;SVLEN=-3"])), max_size=5), field)
def test_any_text_is_saved(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, str]], contig: str
) -> None:
    number = len(rows)
    table = SiteTable(
        contigs=(contig, "#2"),
        contig_lengths=(0, 10**15),
        contig=np.arange(number, dtype=np.int32) % 2,
        pos=np.arange(number, dtype=np.int64),
        ref=[row[0] for row in rows],
        alt=[row[1] for row in rows],
        id=[row[2] for row in rows],
        extent={place: row[3] for place, row in enumerate(rows) if row[3]},
        record=np.arange(number, dtype=np.int64) // 2,
    )
    path = tmp_path_factory.mktemp("table") / "sites.npz"
    table.save(path)
    loaded = SiteTable.load(path)
    assert equal(loaded, table)
    assert list(map(as_bytes, loaded.id)) == list(map(as_bytes, table.id))
    chosen = np.arange(0, number, 2)
    taken = loaded.take(chosen)
    assert list(taken.identities()) == list(table.identities())[::2]
    assert taken.extent == {place: rows[row][3] for place, row in enumerate(chosen.tolist()) if rows[row][3]}
    assert taken.record is not None and taken.record.tolist() == (chosen // 2).tolist()


def test_runs_and_names_of_contigs(small_sites: SiteTable) -> None:
    assert small_sites.contig_runs() == [(0, 3), (3, 5)]
    assert small_sites.used_contigs() == ["1", "2"]
    assert [small_sites.where(row) for row in (0, 3)] == ["1:10", "2:5"]
    none = small_sites.take(np.arange(0))
    assert (none.contig_runs(), none.used_contigs(), len(none)) == ([], [], 0)
    assert none.contigs == small_sites.contigs
