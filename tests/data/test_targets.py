"""Targets at the panel's sites, compared with their alleles in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.data.panel import Panel
from embrag_ds.data.targets import harmonise_targets
from embrag_ds.errors import UserError
from embrag_ds.variants.sites import SiteTable


def packed(name: str, pos: np.ndarray, alleles: np.ndarray, swapped: np.ndarray, prefix: str) -> Panel:
    """Panel in memory with sites A>C, or C>A where ``swapped``, and alleles [S, 2N]."""
    ref, alt = (["CA"[::step][int(each)] for each in ~swapped] for step in (1, -1))
    sites = SiteTable(("1",), (0,), np.zeros(len(pos), dtype=np.int32), pos, ref, alt, ["."] * len(pos))
    samples = tuple(f"{prefix}{number}" for number in range(alleles.shape[1] // 2))
    return Panel(Path(name), sites, samples, np.packbits(alleles, axis=1, bitorder="little"), {"no ALT": 2})


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """What is logged meanwhile; pytest's own way serves one example of a test only."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("embrag_ds.data.targets")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_alleles_of_any_samples_at_any_sites(seed: int, samples: int) -> None:
    rng = np.random.default_rng(seed)
    plain = np.zeros(30, dtype=bool)
    panel = packed("panel.bcf", np.arange(30), rng.integers(0, 2, (30, 4), dtype=np.uint8), plain, "P")
    typed = np.sort(rng.choice(30, size=rng.integers(1, 20), replace=False))
    alleles = rng.integers(0, 2, (len(typed), 2 * samples), dtype=np.uint8)
    swapped = rng.random(len(typed)) < 0.3
    target = packed("target.bcf", typed, alleles ^ swapped[:, None], swapped, "T")
    with captured_log() as messages:
        targets = harmonise_targets(target, panel, allow_overlap=False)
    assert messages[0].startswith(f"target target.bcf: {samples} samples; {len(typed)} sites matched")
    assert messages[1:] == ["target.bcf: 2 records skipped (no ALT)"]
    expected = np.zeros((30, 2 * samples), dtype=np.uint8)
    expected[typed] = alleles
    np.testing.assert_array_equal(np.flatnonzero(targets.typed), typed)
    start, stop = np.sort(rng.integers(31, size=2)).tolist()
    first, last = np.sort(rng.integers(samples + 1, size=2)).tolist()
    some = expected[start:stop, 2 * first : 2 * last].T
    np.testing.assert_array_equal(targets.alleles(slice(start, stop), slice(first, last)), some)
    begin, end = np.sort(rng.integers(len(typed) + 1, size=2)).tolist()
    np.testing.assert_array_equal(
        targets.typed_alleles(slice(begin, end), slice(first, last)), alleles[begin:end, 2 * first : 2 * last]
    )


def test_samples_that_are_in_the_panel() -> None:
    alleles = np.array([[0, 1]], dtype=np.uint8)
    panel, target = (packed(name, np.arange(1), alleles, np.zeros(1, dtype=bool), "P") for name in ("p", "t"))
    with pytest.raises(UserError, match="t: 1 samples are also in the panel p, the first is P0"):
        harmonise_targets(target, panel, allow_overlap=False)
    assert harmonise_targets(target, panel, allow_overlap=True).samples == ("P0",)
