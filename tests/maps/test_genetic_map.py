"""Genetic maps: formats, interpolation and faulty files."""

from __future__ import annotations

import gzip
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pysam
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.maps import formats
from embrag_ds.maps.genetic_map import GeneticMap
from embrag_ds.variants.sites import SiteTable

FORMATS = {
    "plink": "20 rs1 1.0 1000\n20 . 1.5 2000\n20 . 3.5 4000\n",
    "plink with prefix": "chr20\t.\t1.0\t1000\nchr20\t.\t1.5\t2000\nchr20\t.\t3.5\t4000\n",
    "plink with numbers for ids": "20 17 1 1000\n20 18 1.5 2000\n20 19 3.5 4000\n",
    "hapmap": "Chromosome\tPosition(bp)\tRate(cM/Mb)\tMap(cM)\n"
    "chr20\t1000\t500\t1.0\nchr20\t2000\t1000\t1.5\nchr20\t4000\t0\t3.5\n",
    "eagle": "chr position COMBINED_rate(cM/Mb) Genetic_Map(cM)\n20 1000 500 1.0\n20 2000 1000 1.5\n20 4000 0 3.5\n",
    "eagle without header": "20 1000 500 1.0\n20 2000 1000 1.5\n20 4000 0 3.5\n",
    "eagle in whole numbers": "20 1000 500 1\n20 2000 1000 1.5\n20 4000 0 3.5\n",
    "shapeit": "pos\tchr\tcM\n1000\t20\t1.0\n2000\t20\t1.5\n4000\t20\t3.5\n",
    "shapeit without header": "1000 chr20 1\n2000 chr20 1.5\n4000 chr20 3.5\n",
    "shapeit 2": "pposition rrate gposition\n1000 500 1.0\n2000 1000 1.5\n4000 0 3.5\n",
    "impute": "position COMBINED_rate(cM/Mb) Genetic_Map(cM)\n1000 500 1.0\n2000 1000 1.5\n4000 0 3.5\n",
    "impute without header": "1000 500.5 1.0\n2000 1000 1.5\n4000 0 3.5\n",
    "minimac": "#chrom\tpos\tcM\n20\t1000\t1.0\n20\t2000\t1.5\n20\t4000\t3.5\n",
    "header in a comment": "# made by hand\n#cM rate chrom\tpos\n1.0 0 20 1000\n1.5 0 20 2000\n3.5 0 20 4000\n",
    "minimac with map": "chr pos map\n20 1e3 1.0\n20 2000 15e-1\n20 4000 3.5\n",
    "minimac without header": "20 1e+03 1.0\n20 2000 1.5\n20 4000 3.5\n",
    "decode": "# Halldorsson et al., Science 363\n# cM: position of the end, cMperMb: rate\n"
    "Chr\tBegin\tEnd\tcMperMb\tcM\nchr20\t1000\t2000\t500\t1.5\nchr20\t2000\t4000\t1000\t3.5\n",
    "decode without header": "chr20 1000 2000 500.0 1.5\nchr20 2000 4000 1000.0 3.5\n",
    "decode with a gap": "seqnames start end cMperMb cM\n20 0 1000 1000 1\n"
    "20 1000 2000 500 1.5\n20 3000 4000 1000 3.5\n",
    "named otherwise, quoted": '"cM" "marker" "bp" "chrom"\n1 "m1" 1000 "20"\n1.5 "m2" 2000 "20"\n3.5 "m3" 4000 "20"\n',
    "comments, blanks and joined headers": "# made by hand\n\npos chr cM  \n1000 20 1.0 \n  # half way\n"
    "2000 20 1.5\t\n\npos chr cM\n4000 20 3.5\n \n",
    "comment that is a byte of Latin-1": "#\udce9\n20 \udce9 1.0 1000\n20 . 1.5 2000\n20 . 3.5 4000\n",
}
"""The same map in every format: 1 cM at 1,000 bp, 1.5 at 2,000 and 3.5 at 4,000, mean rate 2.5 cM in 3,000 bp."""


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def bgzipped(content: bytes) -> bytes:
    """Content in the blocks that bgzip writes, each with its extra field, and the empty one at the end."""
    with tempfile.NamedTemporaryFile(suffix=".gz") as file:
        with pysam.BGZFile(file.name, "wb") as out:
            out.write(content[: len(content) // 2])
            out.flush()
            out.write(content[len(content) // 2 :])
        return Path(file.name).read_bytes()


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda content: content,
    "gzip": gzip.compress,
    "bgzip": bgzipped,
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
    "mark": lambda content: b"\xef\xbb\xbf" + content,
    "mark and gzip": lambda content: gzip.compress(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")),
    "no end of line": lambda content: content.rstrip(),
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


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name, container):
    path = tmp_path / "map"
    path.write_bytes(CONTAINERS[container](as_bytes(FORMATS[name])))
    read = GeneticMap.read(path)
    # The mean rate is 2.5 cM in 3000 bp.
    expected = [1.0 - 0.5, 1.0, 1.25, 2.5, 3.5, 3.5 + 1.0]
    if name == "decode with a gap":  # its first interval begins at 0 bp, 0 cM
        expected[0], expected[-1] = 0.4, 3.5 + 1.2 * 3.5 / 4
    for contig in ("20", "chr20", "CHR20"):
        sites = table(*((contig, pos) for pos in (400, 1000, 1500, 3000, 4000, 5200)))
        np.testing.assert_allclose(read.positions(sites), expected)


def test_each_contig_has_its_own_points(tmp_path):
    path = tmp_path / "map"
    path.write_text("1 . 0 1000\n1 . 1 2000\nX . 5 1000\nX . 9 9000\n")
    cm = GeneticMap.read(path).positions(table(("X", 5000), ("1", 1500), ("1", 2000)))
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
        ("1 . 0 1000\n1 . 1 2000\n2 . 0 10\n2 . 0 20\n", "contig 2 needs at least two points with different cM"),
        ("1 . 0 1000\n1 . 1 2000\n2 . 0 10\n2 . 1 20\n", "contig 2 has 1e+05 cM/Mb on average"),
        ("1 . 0 1000\n1 . 1e-9 200000\n", "contig 1 has 5.03e-09 cM/Mb on average"),
        ("1 . 1 1000\n1 . 1 2000\n", "contig 1 needs at least two points with different cM"),
        ("", "no points"),
        ("pos chr cM\n", "no points"),
        ("# pos chr cM\n", "no points"),
        ("position rate(cM/Mb) Map(cM)\n1 2 3\n9000 2 4\n", "its columns name no contig, and the panel's are 1, 2"),
        ("position rate(cM/Mb) Map(cM)\n1 2 3\n", "it needs at least two points"),
        ("chr locus cM\n1 2 3\n", "line 1: no bp column"),
        ("chr pos rate\n1 2 3\n", "line 1: no cM column"),
        ("\n\nchr pos rate\n1 2 3\n", "line 3: no cM column among chr, pos, rate; name one of them cm or"),
        ("Chr Begin cMperMb cM\n1 2 3 4\n", "line 1: no bp column among Chr, Begin, cMperMb, cM; name one of them end"),
        ("chr begin end rate cM\n1 2000 1000 1 1\n", "line 2: the interval begins at 2000 and ends at 1000"),
        # cM and bp exchanged, or taken from other columns.
        ("1 . 1000 0.001\n1 . 6000 0.006\n", "line 1: 0.001 bp, by PLINK's columns chr, id, cM, bp, is no whole"),
        ("1 . 1000 1\n1 . 6000 6\n", "contig 1 has 1e+09 cM/Mb on average, by PLINK's columns"),
        (
            "chr pos cM\n1 1 1000\n1 6 6000\n",
            "contig 1 has 1e+09 cM/Mb on average, by the header's columns chr, pos, cM",
        ),
        ("chr pos cM\n1 1.5 1000\n1 6 6000\n", "line 2: 1.5 bp, by the header's columns chr, pos, cM, is no whole"),
        ("1 5.5 1000 1.0\n1 6.5 6000 1.1\n", "no map as PLINK's columns chr, id, cM, bp, nor as Eagle's columns"),
        ("1 . 0 -5\n1 . 1 2000\n", "line 1: -5 bp"),
        ("1 . 0 1000\n1 . 1 2147483648\n", "line 2: 2147483648 bp"),
        ("1 . 0 1000\n1 . 1 99999999999999999999\n", "line 2: 1e+20 bp"),
        ("1 . 0 1000\n1 . 1e300 2000\n", "line 2: 1e+300 cM"),
        ("1 . 0 1000\n1 . 1e999 2000\n", "line 2: bp and cM must be finite"),
        ("1 . 0 1000\n1 . 1 inf\n", "line 2: bp and cM must be finite"),
        ("1 . 0 1000\n1 . 1_0 2000\n", "line 2: cannot find numbers"),
        ("1 . 0 1000\n1 a b 1 2000\n", "line 2: cannot find numbers for bp and cM: it has 5 columns, the first line 4"),
        # Forms that are no map.
        ("1 rs1 1000\n1 rs2 2000\n", "PLINK's .map without cM (chr, id, bp)"),
        ("chr1 rs1 1000\nchr1 rs2 2000\n", "PLINK's .map without cM (chr, id, bp)"),
        ("1 7 1000\n1 8 2000\n", "no map as SHAPEIT's columns pos, chr, cM, nor as minimac4's columns chr, pos, cM ("),
        ("1 rs1 0 1000\n1 rs2 0 2000\n", "contig 1 needs at least two points with different cM"),
        ("1000 0.5\n2000 0.6\n", "line 1: 2 columns without a header line"),
        ("1 rs1 0 1000 A C\n", "line 1: 6 columns without a header line"),
        ("a 1 b c\n", "(line 1 has other columns)"),
    ],
)
def test_faults(tmp_path, text, expected):
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        GeneticMap.read(path).positions(table(("1", 5), ("2", 5)))
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
    with pytest.raises(UserError, match=r"it has no contig chr21, 7 \(it has 20\)"):
        GeneticMap.read(path).positions(table(("chr20", 5), ("chr21", 5), ("7", 5)))


def test_rates_that_are_rounded_make_no_cm_decrease(tmp_path):
    """An interval after a gap: 1.5 cM less its rate times its length is just below the 1.0 cM before the gap."""
    path = tmp_path / "map.txt"
    path.write_text("Chr Begin End cMperMb cM\n1 0 1000 1000 1\n1 2000 3000 500.001 1.5\n")
    np.testing.assert_allclose(GeneticMap.read(path).points["1"][1], [0, 1, 1, 1.5])


def test_faults_of_a_contig_do_not_matter_where_it_is_not_needed(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("1 . 0 1000\n1 . 1 2000\nY . 0 10\nM . 0 5\nM . 0 9\n")
    read = GeneticMap.read(path)
    assert list(read.points) == ["1"] and list(read.faults) == ["Y", "M"]
    np.testing.assert_allclose(read.positions(table(("chr1", 1500))), [0.5])
    with pytest.raises(UserError, match="contig M needs at least two points"):
        read.positions(table(("1", 1500), ("chrMT", 6)))


def test_names_of_contigs_are_reconciled(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("20 . 0 1000\n20 . 1 2000\n23 . 0 1000\n23 . 2 3000\n")
    read = GeneticMap.read(path)
    np.testing.assert_allclose(read.positions(table(("CHR20", 1500), ("X", 2000))), [0.5, 1])
    read.write_plink(tmp_path / "out", ["chr21", "chr20", "chrX"])
    names = [line.split()[0] for line in (tmp_path / "out").read_text().splitlines()]
    assert names == ["chr20", "chr20", "chrX", "chrX"]
    read.write_plink(tmp_path / "out", [])
    assert GeneticMap.read(tmp_path / "out").points.keys() == read.points.keys()
    with pytest.raises(UserError, match="it has no contig 21, 22"):
        read.write_plink(tmp_path / "out", ["21", "22"])


def test_a_map_without_contig_is_for_the_only_contig(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text(FORMATS["shapeit 2"])
    read = GeneticMap.read(path)
    np.testing.assert_allclose(read.positions(table(("anything", 1500))), [1.25])
    read.write_plink(tmp_path / "out", ["chr20"])
    assert (tmp_path / "out").read_text().startswith("chr20 . 1.00000000 1000\n")
    for contigs in (["1", "2"], []):
        with pytest.raises(UserError, match="its columns name no contig"):
            read.write_plink(tmp_path / "out", contigs)


DOUBTS = [
    ([1000, 1500, 4000], "", ""),
    ([500, 1500, 4000], "WARNING", "1 of 3 panel sites lie outside it: 1 before 1,000 or after 4,000 on contig 20, "),
    ([500, 1500, 5000], "WARNING", "2 of 3 panel sites lie outside it: 2 before 1,000 or after 4,000 on contig 20, "),
    (
        [5000, 6000],
        "WARNING",
        "2 of 2 panel sites lie outside it: all 2 of contig 20, which it maps from 1,000 to 4,000",
    ),
    ([999, *range(1000, 1200)], "INFO", "1 of 201 panel sites lie outside it"),
    ([*range(1000, 1200), 5201], "WARNING", "1 of 201 panel sites lie outside it"),  # by 1.001 cM
]


@pytest.mark.parametrize(("pos", "level", "expected"), DOUBTS)
def test_sites_outside_the_map_are_counted(tmp_path, caplog, pos, level, expected):
    path = tmp_path / "map.txt"
    path.write_text(FORMATS["plink"])
    with caplog.at_level(logging.INFO, logger="embrag_ds"):
        GeneticMap.read(path).log_doubts(table(*(("20", each) for each in pos)))
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [each for each, _ in lines] == [level] * bool(level)
    for _, text in lines:
        assert text.startswith(f"map {path}: {expected}") and "extrapolated at 833 cM/Mb" in text
        assert text.endswith("does it belong to the panel's region and genome build?") == (min(pos) >= 5000)


def test_doubts_of_many_contigs_are_one_line(tmp_path, caplog):
    path = tmp_path / "map.txt"
    path.write_text("".join(f"{contig} . 0 1000\n{contig} . 1 3000\n" for contig in range(1, 6)))
    GeneticMap.read(path).log_doubts(table(*((f"chr{contig}", pos) for contig in range(1, 6) for pos in (2000, 4000))))
    (text,) = caplog.messages
    assert (
        "5 of 10 panel sites lie outside it: 1 before 1,000 or after 3,000 on contig chr1, extrapolated at 500" in text
    )
    assert text.endswith("on contig chr3, extrapolated at 500 cM/Mb; and 2 more contigs")


def test_a_map_in_morgans_and_jumps_are_doubted(tmp_path, caplog):
    path = tmp_path / "map.txt"
    path.write_text("1 . 0 1000\n1 . 0.012 1001000\n2 . 0 1000\n2 . 0 1001\n2 . 9 1005\n2 . 9.1 100000\n")
    read = GeneticMap.read(path)
    read.log_doubts(table(("1", 5000)))
    read.log_doubts(table(("2", 5000)))
    assert [text.removeprefix(f"map {path}: ") for text in caplog.messages] == [
        "0.012 cM/Mb on average on contig 1: its cM may be Morgans, which are 100 cM",
        "jumps on contig 2: 1, the first of 9 cM from 1,001 to 1,005; is a line missing or misplaced?",
    ]


def test_the_uniform_map_has_no_doubts(caplog):
    GeneticMap.uniform(1e-3).log_doubts(table(("1", 1_000_000)))
    assert caplog.messages == []


@pytest.mark.real
def test_the_real_map_has_no_doubts(real_data, caplog):
    read = GeneticMap.read(real_data / "chr20.plink.map.gz")
    read.log_doubts(table(("20", 60_479), *(("20", pos) for pos in range(62_000, 2_286_028, 100))))
    assert caplog.messages == []


WRITERS: dict[str, Callable[[str, list[int], list[float]], list[str]]] = {
    "plink": lambda contig, bp, cm: [f"{contig} rs{b} {c!r} {b}" for b, c in zip(bp, cm, strict=True)],
    "eagle": lambda contig, bp, cm: [f"{contig} {b} 1.25 {c!r}" for b, c in zip(bp, cm, strict=True)],
    "shapeit": lambda contig, bp, cm: [f"{b} {contig} {c!r}" for b, c in zip(bp, cm, strict=True)],
    "minimac": lambda contig, bp, cm: [f"{contig} {b} {c!r}" for b, c in zip(bp, cm, strict=True)],
    "decode": lambda contig, bp, cm: [
        f"{contig} {b} {e} {(d - c) / (e - b) * 1e6!r} {d!r}"
        for b, e, c, d in zip(bp[:-1], bp[1:], cm[:-1], cm[1:], strict=True)
    ],
}
HEADERS = {
    "plink": "chr id cM bp",
    "eagle": "chr position COMBINED_rate(cM/Mb) Genetic_Map(cM)",
    "shapeit": "pos chr cM",
    "minimac": "#chrom pos cM",
    "decode": "Chr Begin End cMperMb cM",
}
STEPS = st.lists(st.tuples(st.integers(1, 1_000_000), st.floats(0.01, 50)), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(chromosomes=st.lists(STEPS, min_size=1, max_size=3), start=st.floats(0, 5), header=st.booleans())
@pytest.mark.parametrize("form", WRITERS)
def test_any_map_reads_the_same_in_any_format(tmp_path, form, chromosomes, start, header):
    lines, expected = [HEADERS[form]] * header, {}
    for number, steps in enumerate(chromosomes):
        bp = np.cumsum([1000 * (number + 1), *(step for step, _ in steps)]).tolist()
        cm = np.cumsum([start, *(step * rate * 1e-6 for step, rate in steps)]).tolist()
        expected[f"chr{20 + number}"] = (bp, cm)
        lines += WRITERS[form](f"chr{20 + number}", bp, cm)
    path = tmp_path / "map.txt"
    path.write_text("\n".join(lines) + "\n")
    points = GeneticMap.read(path).points
    assert points.keys() == expected.keys()
    for contig, (bp, cm) in expected.items():
        np.testing.assert_array_equal(points[contig][0], bp)
        np.testing.assert_allclose(points[contig][1], cm, rtol=1e-9, atol=1e-9)


WORDS = ["1", "20", "chr1", "0", "1000", "2000", "0.5", "1.5", ".", "rs1", "nan", "1e999", "-1", "1e300", "pos", "chr"]
WORDS += ["cM", "#", "begin", "end", "rate", "bp", '"', "1_0", "\u0661", "99999999999"]
LINES = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(LINES, max_size=6).map(lambda lines: "\n".join(lines).encode()),
        st.lists(LINES, max_size=6).map(lambda lines: gzip.compress("\n".join(lines).encode())[:-3]),
    )
)
def test_junk_is_an_error_of_one_line(tmp_path, content):
    path = tmp_path / "map.txt"
    path.write_bytes(content)
    try:
        read = GeneticMap.read(path)
        sites = table(("1", 5), ("1", 1500))
        assert np.isfinite(read.positions(sites)).all()
        read.log_doubts(sites)
    except UserError as fault:
        assert re.fullmatch(rf"{re.escape(str(path))}: .*[;:] .*", str(fault), flags=re.ASCII)
        assert len(str(fault).splitlines()) == 1


number = st.one_of(
    st.integers(0, 9).map(str),
    st.sampled_from(
        ["1.5", "-1", "1e3", "1_0", "nan", "inf", "3e9", "1e6", "x", "", "\u0663", "2147483647", "2147483648"]
    ),
)
row = st.one_of(
    st.tuples(st.sampled_from(["1", "2", '"1"', "#1", "chr"]), st.just("."), number, number).map(" ".join),
    st.sampled_from(["", "# comment", "chr id cM bp", "1 . 0 0 0", "1 ."]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=8), st.lists(row, max_size=4), st.randoms(use_true_random=False))
def test_whole_columns_are_read_as_single_lines_are(steps: list[int], rows: list[str], random) -> None:
    """Wherever columns are read at once, the points are those of the lines, and where a line is at fault they are not
    read at once."""
    good = [f"{1 + place % 2} . {place} {1000 + place + step}" for place, step in enumerate(steps)]
    lines = good + rows
    random.shuffle(lines)
    columns, first = formats.Columns("PLINK", contig=0, cm=2, bp=3), ["chr", "id", "cM", "bp"]
    at_once = formats._points_at_once(lines, columns, first)
    try:
        expected = formats._points_line_by_line(Path("map"), lines, columns, first)
    except UserError:
        assert at_once is None
        return
    if at_once is None:
        assert any('"' in line or "inf" in line or "_" in line for line in lines)
        return
    assert list(at_once) == list(expected)
    for contig, both in expected.items():
        for one, other in zip(at_once[contig], both, strict=True):
            np.testing.assert_array_equal(one, other)


def test_whole_columns_are_read_at_once() -> None:
    lines = [f"{1 + place // 5} . {place / 7} {place % 5 + 1}" for place in range(10)]
    found = formats._points_at_once(lines, formats.Columns("PLINK", contig=0, cm=2, bp=3), lines[0].split())
    assert found is not None and [len(bp) for bp, _ in found.values()] == [5, 5]


VCF = b"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tA\n"
VCF += b"20\t9\t.\tA\tC\t.\t.\t.\tGT\t0|1\n"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (VCF, "a VCF"),
        (gzip.compress(VCF, mtime=0), "a VCF"),
        (bgzipped(VCF), "a VCF"),
        (VCF.partition(b"\n")[2], "a VCF"),
        (bgzipped(b"BCF\2\2" + bytes(40)), "a BCF"),
        (bgzipped(b"TBI\1" + bytes(40)), "an index of a variant file"),
        (b"\x6c\x1b\x01\0\0", "PLINK's .bed"),
    ],
)
def test_a_file_of_variants_is_no_map(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "map"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        GeneticMap.read(path)
    remedy = "give --map a PLINK, HapMap or SHAPEIT genetic map, or leave it out"
    assert str(caught.value) == f"{path}: it is {kind}, not a genetic map; {remedy}"


def test_what_is_no_known_kind_keeps_its_error(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(b"\x1f\x8b" + bytes(20))
    with pytest.raises(UserError, match="cannot read the genetic map"):
        GeneticMap.read(path)
    path.write_bytes(b"20 1 1\n\0")
    with pytest.raises(UserError, match="cannot read the genetic map"):
        GeneticMap.read(path)
