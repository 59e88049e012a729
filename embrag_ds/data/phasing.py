"""Phasing of targets by Beagle against the panel that they are imputed from."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.panel import Panel
from embrag_ds.data.programs import run_logged
from embrag_ds.errors import UserError
from embrag_ds.files import write_text
from embrag_ds.variants.container.bgzf import bgzf_written
from embrag_ds.variants.records import VariantReader
from embrag_ds.variants.sites import SiteTable

PROGRAM = "beagle"
_SITES_AT_ONCE = 4096
_ADDED = "added"
_SEEDS = (1, 2, 3)
"""Of the runs whose phase is put together."""
Genotypes = Callable[[slice], tuple[np.ndarray, np.ndarray | None]]
"""Function of some of T sites: their alleles uint8 [n, 2N], and the missing ones bool [n, 2N] or None."""


@dataclass(frozen=True)
class Phased:
    """What phased targets: the program's version and command."""

    version: str
    command: str


def command_for(target: Path, panel: Path) -> str:
    """Shell command that phases a target file against a panel with Beagle.

    Beagle reads no BCF, and its start script does not quote its arguments: such files are converted first.
    """
    steps, given = [], []
    for path, name in ((target, "target.vcf.gz"), (panel, "panel.vcf.gz")):
        quoted = shlex.quote(str(path))
        readable = quoted == str(path) and quoted.endswith((".vcf", ".vcf.gz"))
        given.append(quoted if readable else name)
        steps += [] if readable else [f"bcftools view -Oz -o {name} {quoted}"]
    return " && ".join([*steps, f"{PROGRAM} gt={given[0]} ref={given[1]} out=phased impute=false"])


def require_beagle(target: Path, panel: Path) -> None:
    """Raise :class:`UserError` unless Beagle is installed."""
    if shutil.which(PROGRAM) is None:
        raise UserError(
            f"{target}: --phase beagle: Beagle is not installed; install it (apt-get install beagle), or phase the "
            f"targets elsewhere (`{command_for(target, panel)}`) and give the result as --target"
        )


def phase_with_beagle(
    target: Genotypes,
    samples: Sequence[str],
    panel: Panel,
    rows: np.ndarray,
    position_cm: np.ndarray,
    folder: Path,
    log: Path,
    threads: int,
) -> tuple[np.ndarray, Phased]:
    """Phase targets with Beagle 5 (Browning et al. 2021, Am. J. Hum. Genet. 108:1880) at the panel's sites ``rows``.

    Beagle draws phase at random. Between two neighbouring heterozygotes, the phase is that of most of three runs.

    ``target`` gives the genotypes of ``samples`` at these T sites, whose positions are ``position_cm`` float64 [T]. Of
    the panel, Beagle sees the same sites only, since others do not bear on phase. Its input lies in ``folder``, and its
    output goes to ``log``. Returns the alleles, uint8 [T, 2N], and what phased them. Raises :class:`UserError` if it
    fails.
    """
    sites = panel.sites.take(rows)
    names = [f"s{number}" for number in range(len(samples))]
    _write_genotypes(folder / "target.vcf.gz", sites, names, target, b"/")
    _write_genotypes(
        folder / "panel.vcf.gz",
        sites,
        [f"p{number}" for number in range(len(panel.samples))],
        lambda span: (panel.alleles_at(rows[span]), None),
        b"|",
    )
    _write_map(folder / "genetic.map", sites, position_cm)
    # Beagle's start script does not quote its arguments, so that no path may be among them.
    given = ["gt=target.vcf.gz", "ref=panel.vcf.gz", "map=genetic.map", "out=phased", "impute=false"]
    consensus = _Consensus(target, len(rows), len(samples))
    said = [f"(its input: the targets and the panel at the {len(rows)} sites of both)\n"]
    commands = []
    for seed in _SEEDS:
        command = [PROGRAM, *given, f"nthreads={threads}", f"seed={seed}"]
        commands.append(" ".join(command))
        run_logged(command, log, folder)
        text = log.read_text(encoding="utf-8", errors="replace")
        said.append(f"command: {commands[-1]}\n{text}")
        consensus.add(_read_phased(folder / "phased.vcf.gz", len(rows), len(samples), log))
    write_text(log, "".join(said))
    version = re.search(r"^(beagle\.\S+\.jar.*)$", text, flags=re.MULTILINE)
    return consensus.alleles(), Phased(version.group(1) if version else "", "; ".join(commands))


class _Consensus:
    """Phase that most of several runs agree on, for N samples at T sites with known heterozygotes.

    Runs agree on a sample's genotypes, and a run has no haplotype of its own to call the first. So they are compared
    between neighbouring heterozygotes: whether the phase changes there relative to the first run.
    """

    def __init__(self, target: Genotypes, sites: int, samples: int) -> None:
        self._heterozygous = np.empty((sites, samples), dtype=bool)
        for start in range(0, sites, _SITES_AT_ONCE):
            span = slice(start, start + _SITES_AT_ONCE)
            alleles, missing = target(span)
            differ = alleles[:, 0::2] != alleles[:, 1::2]
            self._heterozygous[span] = differ if missing is None else differ & ~(missing[:, 0::2] | missing[:, 1::2])
        self._first: np.ndarray | None = None
        self._changes = np.zeros((sites, samples), dtype=np.uint8)
        self._runs = 0

    def add(self, alleles: np.ndarray) -> None:
        """Add a run's alleles, uint8 [T, 2N]."""
        self._runs += 1
        if self._first is None:
            self._first = alleles
            return
        for sample, (places, ours) in enumerate(self._places()):
            same = alleles[places, 2 * sample] == ours[places, 0]
            self._changes[places[1:], sample] += same[1:] != same[:-1]

    def alleles(self) -> np.ndarray:
        """Alleles uint8 [T, 2N] with the consensus phase."""
        assert self._first is not None
        for sample, (places, ours) in enumerate(self._places()):
            changed = np.cumsum(self._changes[places, sample] > self._runs / 2) % 2 == 1
            ours[places[changed]] = ours[places[changed], ::-1]
        return self._first

    def _places(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each sample, its heterozygous sites int64 [n], and its alleles in the first run, a view [T, 2]."""
        assert self._first is not None
        for sample in range(self._heterozygous.shape[1]):
            yield np.flatnonzero(self._heterozygous[:, sample]), self._first[:, 2 * sample : 2 * sample + 2]


def _places(sites: SiteTable) -> np.ndarray:
    """Number of each site's position among all positions, from 1 on, int64 [T]: what Beagle gets as positions."""
    changed = (np.diff(sites.contig) != 0) | (np.diff(sites.pos) != 0)
    return np.cumsum(np.concatenate([[1], changed]))


def _write_genotypes(path: Path, sites: SiteTable, samples: list[str], genotypes: Genotypes, separator: bytes) -> None:
    """Write genotypes as Beagle reads them: diploid, with numbers in place of contigs, positions and IDs.

    The bases are others, too. They do not bear on phase, and so symbolic alleles are no matter. Those of sites at one
    position differ. A contig of one position, which Beagle refuses, gets a second one at which all alleles are REF.
    """
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]
    texts = np.array([[b + separator + a + b"\t" for a in (b"0", b"1", b".")] for b in (b"0", b"1", b".")])
    places = _places(sites).tolist()
    alone = {stop - 1 for start, stop in sites.contig_runs() if places[start] == places[stop - 1]}
    before = 0  # sites at the same position
    with bgzf_written(path, 3) as out:
        out.write(("##fileformat=VCFv4.3\n" + "\t".join(columns) + "\n").encode())
        for start in range(0, len(sites), _SITES_AT_ONCE):
            alleles, missing = genotypes(slice(start, start + _SITES_AT_ONCE))
            codes = alleles if missing is None else np.where(missing, 2, alleles)
            for number, row in enumerate(codes, start=start):
                contig, place = sites.contig[number], places[number]
                before = before + 1 if number and place == places[number - 1] else 0
                alt = "A" * (before + 1) if before else "C"
                prefix = f"{contig}\t{place}\t{number}\tA\t{alt}\t.\tPASS\t.\tGT\t"
                out.write(prefix.encode() + texts[row[0::2], row[1::2]].tobytes()[:-1] + b"\n")
                if number in alone:
                    prefix = f"{contig}\t{place + 1}\t{_ADDED}\tA\tC\t.\tPASS\t.\tGT\t"
                    out.write(prefix.encode() + (texts[0, 0] * len(samples))[:-1] + b"\n")


def _write_map(path: Path, sites: SiteTable, position_cm: np.ndarray) -> None:
    """Write a PLINK map of the positions that :func:`_write_genotypes` writes.

    Beagle does not end where no position of a contig differs from the others in cM, and fails where a window of 40 cM
    has one position only. So steps are at least 1e-7 cM, and at most 1 cM, over which phase is lost anyway.
    """
    places = _places(sites)
    lines = []
    for start, stop in sites.contig_runs():
        place, first = np.unique(places[start:stop], return_index=True)
        steps = np.clip(np.diff(position_cm[start:stop][first]), 1e-7, 1.0)
        if not len(steps):
            place, steps = np.array([place[0], place[0] + 1]), np.ones(1)
        cm = np.concatenate([[0.0], np.cumsum(steps)])
        lines += [f"{sites.contig[start]}\t.\t{c:.8f}\t{b}\n" for b, c in zip(place.tolist(), cm.tolist(), strict=True)]
    write_text(path, "".join(lines))


def _read_phased(path: Path, sites: int, samples: int, log: Path) -> np.ndarray:
    alleles = np.empty((sites, 2 * samples), dtype=np.uint8)
    found = np.zeros(sites, dtype=bool)
    with VariantReader(path) as vcf:
        for site in vcf.sites():
            calls = vcf.calls(site)
            if site.id.isdecimal() and int(site.id) < sites and calls.missing is None and calls.unphased is None:
                alleles[int(site.id)] = calls.alleles
                found[int(site.id)] = True
    if not found.all():
        raise UserError(
            f"Beagle's output lacks {sites - found.sum()} of {sites} sites, or their phase; use Beagle 5.4, see {log}"
        )
    return alleles
