"""Build the 1000 Genomes data of docs/results.md from the public release.

    python examples/1000genomes/rebuild.py --out DIR

Panel, truth and targets of two arrays are cut out of the phased chromosome 20 of phase 3 (GRCh37), by the lists of
sites and samples in this folder. The release is read from its start, and only as far as the last listed site.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import logging
import urllib.request
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embrag_ds.cli.command import run_command, show
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, read_lines
from embrag_ds.progress import Progress
from embrag_ds.variants.container.text import VariantText, regular_file
from embrag_ds.variants.genotypes import decode_biallelic
from embrag_ds.variants.header import FIXED_COLUMNS, Header, shown
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable

LISTS = Path(__file__).resolve().parent
RELEASE = (
    "https://ftp.1000genomes.ebi.ac.uk/vol1/ftp/release/20130502/"
    "ALL.chr20.phase3_shapeit2_mvncall_integrated_v5b.20130502.genotypes.vcf.gz"
)
CONTIG = "20"
CONTIG_LENGTH = 63_025_520
ARRAYS = ("sparse", "dense")
_SECONDS = 60
_REMEDY = "download the file and name it (--release FILE)"

logger = logging.getLogger("embrag_ds.examples.rebuild")


class Site(NamedTuple):
    """A listed SNV of :data:`CONTIG`; ``pos`` is 1-based."""

    pos: int
    ref: str
    alt: str


@dataclass(frozen=True)
class Lists:
    """What is cut out: S sites in order, names of samples, and the rows, int64 [T], of each array's sites."""

    sites: list[Site]
    panel: list[str]
    targets: list[str]
    arrays: dict[str, np.ndarray]

    @staticmethod
    def read(folder: Path = LISTS) -> Lists:
        """Read ``sites.tsv.gz``, ``samples.tsv`` and the arrays' ``*.tsv.gz`` of a folder."""
        sites = read_sites(folder / "sites.tsv.gz")
        row = {site: number for number, site in enumerate(sites)}
        arrays = {name: [row[site] for site in read_sites(folder / f"{name}.tsv.gz")] for name in ARRAYS}
        table = [line.split("\t") for line in read_lines(folder / "samples.tsv", "sample table")[1:]]
        return Lists(
            sites,
            [name for name, _, role in table if role == "panel"],
            [name for name, _, role in table if role == "target"],
            {name: np.array(rows, dtype=np.int64) for name, rows in arrays.items()},
        )


def read_sites(path: Path) -> list[Site]:
    """Sites of a list with lines ``contig pos ref alt``."""
    rows = (line.split("\t") for line in read_lines(path, "list of sites"))
    return [Site(int(pos), ref, alt) for _, pos, ref, alt in rows]


def release_lines(release: str) -> Generator[bytes, None, None]:
    """Iterate over the lines of a variant file, those of its header first; a URL is read only as far as they are taken.

    Raises :class:`UserError` for what cannot be read.
    """
    if "://" not in release:
        with regular_file(Path(release)) as path:
            text = VariantText(path, Path(release))
            yield from text.header
            yield from text.lines()
        return
    try:
        with urllib.request.urlopen(release, timeout=_SECONDS) as stream, gzip.GzipFile(fileobj=stream) as unzipped:
            for line in unzipped:
                yield line.rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error, ValueError, HTTPException) as fault:
        raise UserError(f"{release}: it cannot be read ({fault}); {_REMEDY}") from fault


def cut_out(release: str, lists: Lists) -> np.ndarray:
    """Alleles uint8 [S, 2N] of the release at all sites, of the panel's samples and then the targets'.

    Raises :class:`UserError` if it lacks a listed site or sample, or has a genotype that is not phased and diploid.
    """
    alleles = np.zeros((len(lists.sites), 2 * (len(lists.panel) + len(lists.targets))), dtype=np.uint8)
    wanted = {(b"%d" % pos, ref.encode(), alt.encode()): row for row, (pos, ref, alt) in enumerate(lists.sites)}
    with Progress("reading the release", len(wanted), "sites") as bar, closing(release_lines(release)) as lines:
        names = _samples(release, lines)
        columns = _columns(release, names, [*lists.panel, *lists.targets])
        last, end = 0, lists.sites[-1].pos
        for line in lines:
            contig, pos, _, ref, alt, *rest = _fields(release, line)
            if contig != CONTIG.encode() or int(pos) > end:
                last = end
                break
            last = int(pos)
            # A site given twice counts once, by its first record, as everywhere in the package.
            row = wanted.pop((pos, ref, alt), None)
            if row is not None:
                found = _phased(rest[-1], len(names), f"{release}: {CONTIG}:{int(pos)}")
                alleles[row] = found[columns].reshape(-1)
                bar.advance()
    if wanted:
        first = lists.sites[min(wanted.values())]
        lacking = f"{len(wanted):,} of {len(lists.sites):,} sites"
        if last < first.pos:
            # A stream may be cut where a block of its compression ends, which looks like the end of the file.
            raise UserError(f"{release}: it ends at {CONTIG}:{last}, before {lacking}; {_REMEDY}")
        raise UserError(
            f"{release}: {lacking} are not in it, the first is "
            f"{CONTIG}:{first.pos} {first.ref}>{first.alt}; give chromosome 20 of phase 3 in GRCh37"
        )
    return alleles


def _samples(release: str, lines: Iterator[bytes]) -> tuple[str, ...]:
    """Names of the samples, from the header, which this takes from ``lines``."""
    header = []
    for line in lines:
        header.append(line)
        if not line.startswith(b"##"):
            return Header.parse(Path(release), header).samples
    raise UserError(f"{release}: it ends before its samples are named; {_REMEDY}")


def _columns(release: str, names: Sequence[str], samples: Sequence[str]) -> list[int]:
    """Places of the listed samples among ``names``."""
    place = {name: number for number, name in enumerate(names)}
    missing = [name for name in samples if name not in place]
    if missing:
        raise UserError(
            f"{release}: {len(missing):,} of {len(samples):,} samples are not in it, the first is {missing[0]}; "
            "give the release with all 2,504 samples"
        )
    return [place[name] for name in samples]


def _fields(release: str, line: bytes) -> list[bytes]:
    """Fields of a record, of which the last is the text of all sample columns."""
    fields = line.split(b"\t", FIXED_COLUMNS)
    if len(fields) <= FIXED_COLUMNS or not fields[1].isdigit():
        raise UserError(f"{release}: {shown(line)!r} is not a record of a VCF; {_REMEDY}")
    return fields


def _phased(body: bytes, samples: int, where: str) -> np.ndarray:
    """Alleles uint8 [N, 2] of sample columns that hold GT alone."""
    calls = decode_biallelic(body, samples)
    if calls is None or calls.missing is not None or calls.unphased is not None:
        raise UserError(
            f"{where}: its columns are not all phased diploid genotypes and nothing else; give the phased release, "
            "without other fields (bcftools annotate -x ^FORMAT/GT)"
        )
    return calls.alleles.reshape(-1, 2)


def write_all(folder: Path, lists: Lists, alleles: np.ndarray) -> list[Path]:
    """Write panel, truth and the arrays' targets from ``alleles`` uint8 [S, 2N] of the panel and then the targets."""
    sites = _site_table(lists.sites)
    panel, truth = np.split(alleles, [2 * len(lists.panel)], axis=1)
    contents = [("panel", lists.panel, sites, panel), ("truth", lists.targets, sites, truth)]
    contents += [
        (f"target.{name}", lists.targets, sites.take(rows), truth[rows]) for name, rows in lists.arrays.items()
    ]
    paths = []
    for name, samples, table, part in contents:
        paths.append(folder / f"{name}.vcf.gz")
        write_phased(paths[-1], table, samples, part)
        logger.info("%s: %s sites, %s samples", paths[-1], f"{len(table):,}", f"{len(samples):,}")
    return paths


def _site_table(sites: Sequence[Site]) -> SiteTable:
    return SiteTable(
        contigs=(CONTIG,),
        contig_lengths=(CONTIG_LENGTH,),
        contig=np.zeros(len(sites), dtype=np.int32),
        pos=np.array([site.pos for site in sites], dtype=np.int64),
        ref=[site.ref for site in sites],
        alt=[site.alt for site in sites],
        id=[f"{CONTIG}:{site.pos}:{site.ref}:{site.alt}" for site in sites],
    )


def digest(path: Path) -> str:
    r"""sha256 of a file's sites and genotypes, as one gets it from bcftools.

    ``bcftools query -f '%CHROM\t%POS\t%REF\t%ALT[\t%GT]\n' FILE | sha256sum``, and of the samples' names before it
    (``bcftools query -l FILE``).
    """
    text = VariantText(path)
    names = text.header[-1].split(b"\t")[FIXED_COLUMNS:]
    found = hashlib.sha256(b"".join(name + b"\n" for name in names))
    for line in text.lines():
        contig, pos, _, ref, alt, _, _, _, _, body = line.split(b"\t", FIXED_COLUMNS)
        found.update(b"\t".join((contig, pos, ref, alt, body)) + b"\n")
    return found.hexdigest()


def differing(paths: Sequence[Path], digests: Path = LISTS / "digests.tsv") -> list[Path]:
    """Those of the files whose :func:`digest` is not the listed one (lines ``name sha256``)."""
    expected = dict(line.split("\t") for line in read_lines(digests, "list of digests"))
    return [path for path in paths if digest(path) != expected[path.name]]


def next_commands(folder: Path) -> str:
    """Commands that impute the two arrays and score them beside Beagle and minimac4."""
    lines = ["", "Next, with a genetic map of GRCh37 as MAP (README.md says where from):"]
    for name in ARRAYS:
        files = f"--panel {folder}/panel.vcf.gz --map MAP --target {folder}/target.{name}.vcf.gz"
        imputed = f"{folder}/imputed.{name}.vcf.gz"
        lines += [
            "",
            f"embrag impute {files} \\\n    --out {imputed}",
            f"embrag evaluate {files} \\\n    --truth {folder}/truth.vcf.gz --imputed embrag_ds={imputed} \\\n"
            f"    --samples {LISTS}/samples.tsv --run-tools {folder}/tools.{name}",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--release", default=RELEASE, metavar="FILE_OR_URL", help="default: %(default)s")
    options = parser.parse_args()
    lists = Lists.read()
    make_folder(options.out)
    paths = write_all(options.out, lists, cut_out(options.release, lists))
    others = differing(paths)
    for path in others:
        logger.warning("%s: its genotypes are not those of docs/results.md; scores may differ", path)
    if not others:
        logger.info("genotypes, sites and samples are those of docs/results.md, by sha256")
    show(next_commands(options.out))


if __name__ == "__main__":
    run_command(main)
