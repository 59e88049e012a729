"""The 1000 Genomes data: rebuilt from a release by the committed lists, and the rule by which arrays are drawn."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import make_array
import numpy as np
import pysam
import pysam.bcftools
import pytest
import rebuild
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.data.simulate import DefaultData
from embrag_ds.errors import UserError
from embrag_ds.seeds import Purpose, generator
from embrag_ds.variants.container.bgzf import bgzf_written
from embrag_ds.variants.container.text import VariantText
from embrag_ds.variants.sites import SiteTable
from tests.whole_files import read_phased

SAMPLES = [f"S{number:02}" for number in range(12)]
ALLELES = [("A", "C,T"), ("A", "C"), ("A", "G"), ("AT", "A"), ("A", "C")]
"""REF and ALT of the records at every position of the made-up release; the last one repeats the first."""
POSITIONS = range(1_000, 3_000, 100)
COLUMNS = "%CHROM\\t%POS\\t%ID\\t%REF\\t%ALT\\t%FILTER[\\t%GT]\\n"
PALINDROMIC = ({"A", "T"}, {"C", "G"})
Calls = dict[tuple[int, str, str], list[str]]


@pytest.fixture(scope="module")
def calls() -> Calls:
    """Genotypes of the made-up release's first records of each site, by position, REF and ALT."""
    rng = np.random.default_rng(3)
    drawn = {(pos, ref, alt): rng.integers(2, size=(12, 2)) for pos in POSITIONS for ref, alt in ALLELES}
    return {site: [f"{a}|{b}" for a, b in pairs] for site, pairs in drawn.items()}


@pytest.fixture(scope="module")
def text(calls: Calls) -> bytes:
    """A release of 12 samples with records that no list names."""
    lines = [
        "##fileformat=VCFv4.1",
        "##contig=<ID=20,length=63025520>",
        "##contig=<ID=21>",
        '##INFO=<ID=AC,Number=A,Type=Integer,Description="Copies">',
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
        "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *SAMPLES]),
    ]
    for pos in POSITIONS:
        for number, (ref, alt) in enumerate(ALLELES):
            body = ["1|1"] * 12 if number == 4 else calls[pos, ref, alt]
            copies = ",".join("1" for _ in alt.split(","))
            lines.append("\t".join(["20", str(pos), f"rs{pos}", ref, alt, "100", "PASS", f"AC={copies}", "GT", *body]))
    return "\n".join([*lines, ""]).encode()


@pytest.fixture
def lists() -> rebuild.Lists:
    """Some sites of the made-up release, and some of its samples in another order."""
    sites = [rebuild.Site(pos, "A", alt) for pos in range(1_200, 2_800, 200) for alt in ("C", "G")]
    arrays = {"sparse": np.array([0, 5, 9]), "dense": np.array([1, 2, 4, 15])}
    return rebuild.Lists(sites, ["S07", "S02", "S10", "S03"], ["S11", "S00", "S05"], arrays)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """URL of the folder ``served``, whose files an HTTP server gives out."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def samples_of(path: Path) -> list[str]:
    with pysam.VariantFile(str(path)) as file:
        return list(file.header.samples)


def records(path: Path) -> list[str]:
    return str(pysam.bcftools.query("-f", COLUMNS, str(path))).splitlines()


@pytest.mark.parametrize("kind", ["vcf", "vcf.gz", "bcf", "URL"])
def test_files_are_cut_out_by_the_lists(kind, text, calls, lists, tmp_path: Path, served: str) -> None:
    release = tmp_path / "served" / f"release.{'vcf.gz' if kind == 'URL' else kind}"
    release.write_bytes(gzip.compress(text) if release.suffix == ".gz" else text)
    if kind == "bcf":
        (tmp_path / "plain.vcf").write_bytes(text)
        pysam.bcftools.view("-Ob", "-o", str(release), str(tmp_path / "plain.vcf"), catch_stdout=False)
    alleles = rebuild.cut_out(f"{served}/release.vcf.gz" if kind == "URL" else str(release), lists)
    paths = rebuild.write_all(tmp_path, lists, alleles)
    assert [path.name for path in paths] == [
        f"{name}.vcf.gz" for name in ("panel", "truth", "target.sparse", "target.dense")
    ]
    rows = [range(16), range(16), [0, 5, 9], [1, 2, 4, 15]]
    for path, chosen, names in zip(paths, rows, [lists.panel, *3 * [lists.targets]], strict=True):
        assert samples_of(path) == names
        expected = []
        for pos, ref, alt in (lists.sites[row] for row in chosen):
            of = dict(zip(SAMPLES, calls[pos, ref, alt], strict=True))
            called = [of[name] for name in names]
            expected.append("\t".join(["20", str(pos), f"20:{pos}:{ref}:{alt}", ref, alt, "PASS", *called]))
        assert records(path) == expected
        assert Path(f"{path}.tbi").is_file()


def test_a_url_is_read_as_far_as_the_last_site(text: bytes, lists, tmp_path: Path, served: str) -> None:
    rest = np.random.default_rng(1).bytes(2_000_000).hex().encode()
    whole = gzip.compress(text) + gzip.compress(rest) + b"no gzip"
    (tmp_path / "served" / "long.vcf.gz").write_bytes(whole)
    assert rebuild.cut_out(f"{served}/long.vcf.gz", lists).any()


def faulty(fault: str, text: bytes) -> bytes:
    """The made-up release with a fault."""
    match fault:
        case "another contig":
            return text.replace(b"\n20\t", b"\nchr20\t")
        case "a sample is missing":
            return text.replace(b"S05", b"S50")
        case "a site is missing":
            return text.replace(b"\n20\t1400\trs1400\tA\tG", b"\n20\t1400\trs1400\tA\tT")
        case "the last site is missing":
            return re.sub(rb"\n20\t2600\t[^\n]*", b"", text)
        case "its end is missing":
            return text[: text.index(b"\n20\t2000")]
        case "unphased":
            return b"".join(
                line.replace(b"0|1", b"0/1").replace(b"1|0", b"0/1") if line.startswith(b"20\t1600") else line
                for line in text.splitlines(keepends=True)
            )
        case "missing call":
            return text.replace(b"GT\t0|", b"GT\t.|").replace(b"GT\t1|", b"GT\t.|")
        case "other fields":
            return re.sub(rb"([01]\|[01])", rb"\1:0", text.replace(b"\tGT\t", b"\tGT:DS\t"))
        case "no header":
            return text[: text.index(b"#CHROM")]
        case "no columns":
            return text.replace(b"\tGT\t", b"\n")
    raise AssertionError(fault)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("another contig", "16 of 16 sites are not in it, the first is 20:1200 A>C; give chromosome 20 of phase 3"),
        ("a sample is missing", "1 of 7 samples are not in it, the first is S05; give the release with"),
        ("a site is missing", "1 of 16 sites are not in it, the first is 20:1400 A>G"),
        ("the last site is missing", "2 of 16 sites are not in it, the first is 20:2600 A>C"),
        ("its end is missing", "it ends at 20:1900, before 8 of 16 sites; download the file"),
        ("unphased", "20:1600: its columns are not all phased"),
        ("missing call", "20:1200: its columns are not all phased"),
        ("other fields", "20:1200: its columns are not all phased"),
        ("no header", "it ends before its samples are named; download"),
        ("no columns", "is not a record of a VCF; download"),
    ],
)
def test_a_release_that_does_not_fit_is_refused(fault, said, text, lists, tmp_path: Path, served: str) -> None:
    (tmp_path / "served" / "release.vcf.gz").write_bytes(gzip.compress(faulty(fault, text)))
    with pytest.raises(UserError) as refused:
        rebuild.cut_out(f"{served}/release.vcf.gz", lists)
    assert said in str(refused.value) and str(refused.value).startswith(served[:5])


@pytest.mark.parametrize("content", [None, b"plain text", b"cut"])
def test_a_url_that_cannot_be_read_is_refused(content, text: bytes, lists, tmp_path: Path, served: str) -> None:
    if content is not None:
        whole = gzip.compress(text)
        (tmp_path / "served" / "release.vcf.gz").write_bytes(whole[: len(whole) // 4] if content == b"cut" else content)
    with pytest.raises(UserError, match=r"it cannot be read \(.+\); download the file and name it"):
        rebuild.cut_out(f"{served}/release.vcf.gz", lists)


def test_a_digest_is_what_bcftools_gives(text: bytes, lists, tmp_path: Path) -> None:
    (tmp_path / "release.vcf").write_bytes(text)
    alleles = rebuild.cut_out(str(tmp_path / "release.vcf"), lists)
    paths = rebuild.write_all(tmp_path, lists, alleles)
    expected = {}
    for path in paths:
        genotypes = str(pysam.bcftools.query("-f", "%CHROM\\t%POS\\t%REF\\t%ALT[\\t%GT]\\n", str(path)))
        names = "".join(f"{name}\n" for name in samples_of(path))
        expected[path.name] = hashlib.sha256((names + genotypes).encode()).hexdigest()
    table = tmp_path / "digests.tsv"
    table.write_text("".join(f"{name}\t{found}\n" for name, found in expected.items()))
    assert rebuild.differing(paths, table) == []
    alleles[3, 2] ^= 1  # of a panel sample
    assert rebuild.differing(rebuild.write_all(tmp_path, lists, alleles), table) == [tmp_path / "panel.vcf.gz"]
    renamed = replace(lists, targets=["S11", "S00", "S06"])
    alleles[3, 2] ^= 1
    assert rebuild.differing(rebuild.write_all(tmp_path, renamed, alleles), table) == paths[1:]


def test_the_command_refuses_in_one_line_and_writes_nothing(root: Path, text: bytes, tmp_path: Path) -> None:
    (tmp_path / "release.vcf").write_bytes(text)
    done = run(root, "rebuild.py", "--release", tmp_path / "release.vcf", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "2,504 of 2,504 samples are not in it" in line
    assert list((tmp_path / "out").iterdir()) == []


def run(root: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "examples" / "1000genomes" / script, *arguments]
    return subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)


def test_the_lists_are_in_order_and_small(root: Path) -> None:
    lists = rebuild.Lists.read()
    assert len(lists.sites) == 24_802 and [len(lists.arrays[name]) for name in rebuild.ARRAYS] == [549, 1642]
    assert (len(lists.panel), len(lists.targets)) == (2254, 250) and not {*lists.panel} & {*lists.targets}
    for rows in (np.array([site.pos for site in lists.sites]), *lists.arrays.values()):
        assert (np.diff(rows) > 0).all()
    assert (lists.sites[0].pos, lists.sites[-1].pos) == (60_479, 2_286_028)
    table = (root / "examples" / "1000genomes" / "samples.tsv").read_text().splitlines()
    groups = [line.split("\t")[1] for line in table if line.endswith("target")]
    assert sorted(groups) == sorted(50 * ["AFR", "AMR", "EAS", "EUR", "SAS"])
    assert max(path.stat().st_size for path in rebuild.LISTS.iterdir() if path.is_file()) < 200_000


def test_the_readme_is_short(root: Path) -> None:
    assert len((root / "examples" / "1000genomes" / "README.md").read_text().split()) < 400


# The rule of arrays.


def stretches(sites: SiteTable, maf: np.ndarray, spacing_bp: int) -> dict[tuple[str, int], list[int]]:
    """Rows of the candidates in every stretch that has any."""
    begins: dict[str, int] = {}
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row, (contig, pos, ref, alt) in enumerate(sites.identities()):
        begin = begins.setdefault(contig, pos)
        if len(ref) == len(alt) == 1 and "*" not in (ref, alt) and {ref, alt} not in PALINDROMIC and maf[row] >= 0.05:
            found[contig, (pos - begin) // spacing_bp].append(row)
    return found


@st.composite
def tables(draw: st.DrawFn) -> tuple[SiteTable, np.ndarray]:
    """Sites of two contigs and their frequencies."""
    places = sorted(draw(st.sets(st.tuples(st.integers(0, 1), st.integers(1, 400)), min_size=1, max_size=40)))
    letters = st.sampled_from(["A", "C", "G", "T", "AT", "*"])
    alleles = [draw(st.tuples(letters, letters).filter(lambda pair: pair[0] != pair[1])) for _ in places]
    maf = [draw(st.sampled_from([0.0, 0.049, 0.05, 0.3])) for _ in places]
    contig, pos = np.array(places).T
    ref, alt = ([each[side] for each in alleles] for side in (0, 1))
    ids = ["."] * len(places)
    return SiteTable(("1", "2"), (0, 0), contig.astype(np.int32), pos, ref, alt, ids), np.array(maf)


@given(table=tables(), spacing_bp=st.integers(1, 150), seed=st.integers(0, 9))
def test_an_array_has_one_candidate_in_every_stretch_that_has_any(table, spacing_bp: int, seed: int) -> None:
    sites, maf = table
    rows = make_array.make_array(sites, maf, spacing_bp, generator(Purpose.ARRAY_SITES, seed)).tolist()
    expected = stretches(sites, maf, spacing_bp)
    assert len(rows) == len(expected) and rows == sorted(rows)
    chosen = {row: stretch for stretch, candidates in expected.items() for row in candidates}
    assert {chosen[row] for row in rows} == set(expected)


def test_every_candidate_of_a_stretch_is_as_likely() -> None:
    pos = np.arange(1, 9)
    sites = SiteTable(("1",), (0,), np.zeros(8, dtype=np.int32), pos, ["A"] * 8, ["C"] * 8, ["."] * 8)
    draws = [make_array.make_array(sites, np.full(8, 0.2), 4, generator(Purpose.ARRAY_SITES, s)) for s in range(800)]
    counts = np.bincount(np.concatenate(draws), minlength=8)
    assert (abs(counts - 200) < 60).all()  # five standard deviations


def test_the_command_draws_an_array_of_a_panel(root: Path, simulated: DefaultData, tmp_path: Path) -> None:
    lists = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{number}.tsv.gz"
        done = run(
            root, "make_array.py", "--panel", simulated.panel, "--spacing-bp", 5_000, "--seed", seed, "--out", out
        )
        assert done.returncode == 0, done.stderr
        lists.append(gzip.decompress(out.read_bytes()).decode().splitlines())
    assert lists[0] == lists[1] != lists[2]
    whole = read_phased(simulated.panel)
    sites, frequency = whole.sites, whole.alleles.mean(axis=1)
    maf = np.minimum(frequency, 1 - frequency)
    row = {"\t".join(map(str, each)): number for number, each in enumerate(sites.identities())}
    chosen = {number: key for key, rows in stretches(sites, maf, 5_000).items() for number in rows}
    assert sorted(chosen[row[line]] for line in lists[0]) == sorted(set(chosen.values()))
    done = run(root, "make_array.py", "--panel", simulated.panel, "--spacing-bp", 0, "--out", tmp_path / "none")
    assert done.returncode == 2 and done.stderr == "error: --spacing-bp must be at least 1\n"


# With the data themselves.


@pytest.fixture(scope="module")
def stand_in(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Panel and truth in one file, as the release would have them: samples by name, and records that no list names."""
    path = tmp_path_factory.mktemp("release") / "release.vcf.gz"
    panel, truth = (VariantText(real_data / f"{name}.vcf.gz") for name in ("panel", "truth"))
    names = [name for part in (panel, truth) for name in part.header[-1].split(b"\t")[9:]]
    order = np.argsort(names)
    with bgzf_written(path, 1) as out:
        header = panel.header[-1].split(b"\t")[:9] + sorted(names)
        out.write(b"\n".join([*panel.header[:-1], b"\t".join(header), b""]))
        for left, right in zip(panel.lines(), truth.lines(), strict=True):
            *fixed, body = left.split(b"\t", 9)
            both = np.frombuffer(b"\t".join((body, right.split(b"\t", 9)[9], b"")), dtype="<u4")
            calls = both[order].tobytes()[:-1]
            fixed[2] = b"."
            out.write(b"\t".join((*fixed, calls)) + b"\n")
            if fixed[1].endswith(b"7"):
                fixed[4] += b"T"
                out.write(b"\t".join((*fixed, calls)) + b"\n")
    return path


@pytest.mark.long
@pytest.mark.real
def test_the_data_set_comes_out_record_by_record(root: Path, real_data: Path, stand_in: Path, tmp_path: Path) -> None:
    done = run(root, "rebuild.py", "--release", stand_in, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "are those of docs/results.md, by sha256" in done.stderr and "warning" not in done.stderr
    for name in ("panel", "truth", "target.sparse", "target.dense"):
        made, given = VariantText(tmp_path / f"{name}.vcf.gz"), VariantText(real_data / f"{name}.vcf.gz")
        assert made.header[-1] == given.header[-1]
        assert all(one == other for one, other in zip(made.lines(), given.lines(), strict=True)), name


@pytest.mark.real
@pytest.mark.parametrize(("name", "spacing_bp"), [("sparse", 4_000), ("dense", 1_200)])
def test_the_committed_arrays_keep_to_the_rule(real_data: Path, name: str, spacing_bp: int) -> None:
    sites, maf = make_array.read_panel(real_data / "panel.vcf.gz")
    chosen = {row: key for key, rows in stretches(sites, maf, spacing_bp).items() for row in rows}
    listed = [chosen[row] for row in rebuild.Lists.read().arrays[name].tolist()]
    assert listed == sorted(set(chosen.values()))
