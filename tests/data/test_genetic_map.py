"""Genetic maps: formats, interpolation and faulty files."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.data.genetic_map import GeneticMap
from embrag_ds.errors import UserError
from embrag_ds.variants.sites import SiteTable

FORMATS = {
    "plink": "20 rs1 1.0 1000\n20 . 1.5 2000\n20 . 3.5 4000\n",
    "plink with prefix": "chr20\t.\t1.0\t1000\nchr20\t.\t1.5\t2000\nchr20\t.\t3.5\t4000\n",
    "hapmap": "Chromosome\tPosition(bp)\tRate(cM/Mb)\tMap(cM)\n"
    "chr20\t1000\t500\t1.0\nchr20\t2000\t1000\t1.5\nchr20\t4000\t0\t3.5\n",
    "eagle": "chr position COMBINED_rate(cM/Mb) Genetic_Map(cM)\n20 1000 500 1.0\n20 2000 1000 1.5\n20 4000 0 3.5\n",
    "shapeit": "pos\tchr\tcM\n1000\t20\t1.0\n2000\t20\t1.5\n4000\t20\t3.5\n",
}


def table(*sites: tuple[str, int]) -> SiteTable:
    contigs = tuple(dict.fromkeys(contig for contig, _ in sites))
    return SiteTable(
        contigs=contigs,
        contig_lengths=(0,) * len(contigs),
        contig=np.array([contigs.index(contig) for contig, _ in sites], dtype=np.int32),
        pos=np.array([pos for _, pos in sites], dtype=np.int64),
        ref=["A"] * len(sites),
        alt=["T"] * len(sites),
        id=["."] * len(sites),
    )


@pytest.mark.parametrize("contig", ["20", "chr20"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gzipped", [False, True])
def test_formats(tmp_path, name, gzipped, contig):
    path = tmp_path / "map"
    path.write_bytes(gzip.compress(FORMATS[name].encode()) if gzipped else FORMATS[name].encode())
    sites = table((contig, 400), (contig, 1000), (contig, 1500), (contig, 3000), (contig, 4000), (contig, 5200))
    # The mean rate is 2.5 cM in 3000 bp.
    expected = [1.0 - 0.5, 1.0, 1.25, 2.5, 3.5, 3.5 + 1.0]
    np.testing.assert_allclose(GeneticMap.read(path).positions(sites), expected)


def test_each_contig_has_its_own_points(tmp_path):
    path = tmp_path / "map"
    path.write_text("1 . 0 1000\n1 . 1 2000\nX . 5 100\nX . 9 300\n")
    cm = GeneticMap.read(path).positions(table(("X", 200), ("1", 1500), ("1", 2000)))
    np.testing.assert_allclose(cm, [7, 0.5, 1])


def test_uniform():
    cm = GeneticMap.uniform(2.0).positions(table(("1", 1_000_000), ("1", 1_500_000), ("anything", 500_000)))
    np.testing.assert_allclose(cm, [2, 3, 1])


@given(
    steps=st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 2)), min_size=1, max_size=20),
    pos=st.lists(st.integers(1, 300_000), min_size=1, max_size=50),
)
def test_monotone(steps, pos):
    bp = np.cumsum([500, *(step for step, _ in steps)]).astype(float)
    cm = np.cumsum([0.0, *(step for _, step in steps), 1.0])[: len(bp)]
    positions = GeneticMap("map", {"1": (bp, cm)}).positions(table(*(("1", p) for p in sorted(pos))))
    assert (np.diff(positions) >= -1e-9).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 . 0 1000\n1 . 1 900\n", "line 2: position 900 of contig 1 follows 1000"),
        ("1 . 0 1000\n1 . 1 1000\n", "line 2: position 1000 of contig 1 follows 1000"),
        ("1 . 0.5 1000\n1 . 0.4 2000\n", "line 2: 0.4 cM on contig 1 follows 0.5"),
        ("1 . 0.5 1000\n1 . x 2000\n", "line 2: cannot find numbers"),
        ("1 . 0.5 1000\n\n1 . 0.6\n", "line 3: cannot find numbers"),
        ("1 . 0.5 1000\n1 . nan 2000\n", "line 2: bp and cM must be finite"),
        ("1 . 0 1000\n1 . 1 2000\n2 . 0 10\n", "contig 2 needs at least two points"),
        ("1 . 1 1000\n1 . 1 2000\n", "contig 1 needs at least two points with different cM"),
        ("", "no points"),
        ("pos chr cM\n", "no points"),
        ("position rate(cM/Mb) Map(cM)\n1 2 3\n", "line 1: no contig column"),
        ("chr locus cM\n1 2 3\n", "line 1: no bp column"),
        ("chr pos rate\n1 2 3\n", "line 1: no cM column"),
    ],
)
def test_faults(tmp_path, text, expected):
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        GeneticMap.read(path)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)
    assert ";" in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable(tmp_path):
    with pytest.raises(UserError, match="cannot read the genetic map"):
        GeneticMap.read(tmp_path / "absent")
    path = tmp_path / "map.gz"
    path.write_bytes(gzip.compress(FORMATS["plink"].encode())[:-12])
    with pytest.raises(UserError, match="cannot read the genetic map"):
        GeneticMap.read(path)


def test_contig_that_the_map_lacks(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text(FORMATS["plink"])
    with pytest.raises(UserError, match=r"map.txt: it has no contig chr21 \(it has 20\)"):
        GeneticMap.read(path).positions(table(("chr20", 5), ("chr21", 5)))
