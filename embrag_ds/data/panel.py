"""Reference panels: a phased VCF or BCF packed into an on-disk cache, and views of subsets of its samples.

A cached panel is a directory named after a digest of the input:

================  ===========================================================================
file              content
================  ===========================================================================
``alleles.bits``  uint8 [S, ceil(2N / 8)], bit h of row s is haplotype h's allele at site s;
                  memory-mapped, so a window is one contiguous read
``sites.tsv``     the site table (:meth:`embrag_ds.variants.sites.SiteTable.save`)
``meta.json``     format number, sample ids, counts of skipped records
================  ===========================================================================

A directory is built by :func:`embrag_ds.files.folder_written`, so that it is there only when complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from embrag_ds.errors import UserError
from embrag_ds.files import folder_written, read_lines, remove_leftovers
from embrag_ds.ops.bits import pack_host, unpack_chosen, unpack_host
from embrag_ds.variants.records import PhasedVcf
from embrag_ds.variants.sites import SiteTable

FORMAT = 1
"""Version of the cache's layout."""
RARE = 0.01
"""Frequency (a fraction) below which an allele is rare."""
FEW = 10
"""Number of copies below which an allele is rare in any set: among n haplotypes the limit is max(RARE n, FEW)."""
_SITES_PER_READ = 2048
_STEADY = 10


@dataclass(frozen=True)
class Panel:
    """A cached panel of N samples at S sites, with one bit per allele.

    ``packed`` uint8 [S, ceil(2N / 8)] is memory-mapped; sample i owns the bits 2i and 2i + 1. ``skipped`` counts the
    input's skipped records by reason.
    """

    path: Path
    sites: SiteTable
    samples: tuple[str, ...]
    packed: np.ndarray
    skipped: dict[str, int]

    def alleles(self, start: int, stop: int, haplotypes: np.ndarray | None = None) -> np.ndarray:
        """Alleles of the sites [start, stop), uint8 [H, L]: of all haplotypes, or of those numbered (int64 [H])."""
        bits = unpack_host(self.packed[start:stop], 0, 2 * len(self.samples))
        chosen = bits if haplotypes is None else bits[:, haplotypes]
        return np.ascontiguousarray(chosen.T)

    def alleles_at(self, sites: np.ndarray, haplotypes: np.ndarray | None = None) -> np.ndarray:
        """Alleles at any site rows int64 [L], uint8 [L, H]: of all haplotypes, or of those numbered (int64 [H])."""
        rows = self.packed[sites]
        if haplotypes is None:
            return unpack_host(rows, 0, 2 * len(self.samples))
        return unpack_chosen(rows, haplotypes)

    @cached_property
    def alt_count(self) -> np.ndarray:
        """Number of ALT copies at every site, int64 [S]; takes one pass over the packed alleles."""
        copies = np.empty(len(self.packed), dtype=np.int64)
        for start in range(0, len(copies), _SITES_PER_READ):
            block = self.packed[start : start + _SITES_PER_READ]
            copies[start : start + _SITES_PER_READ] = np.bitwise_count(block).sum(1, dtype=np.int64)
        return copies

    @cached_property
    def minimum_allele_count(self) -> int:
        """Least minor-allele count, above 0, of the panel's sites: the filter that its call set had passed."""
        minor = np.minimum(self.alt_count, 2 * len(self.samples) - self.alt_count)
        return int(minor[minor > 0].min(initial=2 * len(self.samples)))


def skipped_records(skipped: dict[str, int]) -> str:
    """Text that lists skipped records by reason, for the log; empty if there are none."""
    return ", ".join(f"{count} records skipped ({reason})" for reason, count in skipped.items() if count)


def default_cache_dir() -> Path:
    """Default cache folder: ``$XDG_CACHE_HOME/embrag_ds``, or ``~/.cache/embrag_ds``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embrag_ds"


def open_panel(path: Path, cache_dir: Path, progress: bool = True) -> Panel:
    """Open a phased VCF.gz or BCF through the cache; it is packed on first use, with a bar if ``progress``.

    Raises :class:`UserError` as :class:`PhasedVcf` does, and for a file without biallelic records.
    """
    directory = cache_dir / f"panel-{_identity(path)}"
    with building(directory) as target:
        if target is not None:
            _pack(path, target, progress)
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    sites = SiteTable.load(directory / "sites.tsv")
    samples = tuple(meta["samples"])
    packed = map_packed(directory / "alleles.bits", (len(sites), (2 * len(samples) + 7) // 8))
    return Panel(path, sites, samples, packed, meta["skipped"])


def map_packed(path: Path | str, shape: tuple[int, ...]) -> np.memmap:
    """Map a file of packed alleles into memory, read-only: uint8 of ``shape`` [S, bytes]."""
    return np.memmap(path, dtype=np.uint8, mode="r", shape=shape)


@contextmanager
def building(directory: Path) -> Iterator[Path | None]:
    """Yield a temporary directory that becomes ``directory`` on success, or None if ``directory`` exists.

    A lock makes concurrent ranks and runs wait for the one that builds. A failure leaves nothing behind. What a killed
    process left is removed by the next build.
    """
    with locked(directory):
        if directory.exists():
            yield None
            return
        remove_leftovers(directory)
        with folder_written(directory) as temporary:
            yield temporary


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``directory`` among the processes of this machine, by a lock file beside it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f".{directory.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _identity(path: Path) -> str:
    """Cache key of a file: a digest of its size, modification time, first MiB and last MiB."""
    try:
        status = path.stat()
        with path.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, status.st_size - (1 << 20)))
            tail = stream.read()
    except OSError as fault:
        raise UserError(f"{path}: cannot read the panel: {fault.strerror}") from fault
    digest = hashlib.sha256(f"{FORMAT} {status.st_size} {status.st_mtime_ns} ".encode())
    digest.update(head)
    digest.update(tail)
    return digest.hexdigest()[:20]


def _pack(path: Path, directory: Path, progress: bool) -> None:
    codes: list[int] = []
    positions: list[int] = []
    refs: list[str] = []
    alts: list[str] = []
    ids: list[str] = []
    with PhasedVcf(path) as vcf, (directory / "alleles.bits").open("wb") as bits:
        records = tqdm(vcf.records(), desc=f"packing {path.name}", unit=" records", disable=not progress, mininterval=1)
        for record in records:
            codes.append(record.contig_code)
            positions.append(record.pos)
            refs.append(record.ref)
            alts.append(record.alt)
            ids.append(record.id)
            bits.write(pack_host(record.alleles).tobytes())
        if not codes:
            raise UserError(f"{path}: no biallelic record: the panel is empty; check the file")
        sites = SiteTable(
            vcf.contigs,
            vcf.contig_lengths,
            np.array(codes, dtype=np.int32),
            np.array(positions, dtype=np.int64),
            refs,
            alts,
            ids,
        )
        meta = {"format": FORMAT, "samples": list(vcf.samples), "skipped": dict(vcf.skipped)}
    sites.save(directory / "sites.tsv")
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


@dataclass(frozen=True)
class Populations:
    """Population of every sample: the P ``names``, and ``of`` int64 [N], indices into them."""

    names: tuple[str, ...]
    of: np.ndarray


def read_populations(path: Path | None, samples: tuple[str, ...]) -> Populations:
    """Read the population of every one of ``samples`` from a table with lines ``sample <tab> population``.

    More columns, other samples and a header line are ignored. Without a file all samples form the one population
    ``all``. Raises :class:`UserError` for a malformed line, contradictory lines, or a sample without a line.
    """
    if path is None:
        return Populations(("all",), np.zeros(len(samples), dtype=np.int64))
    table: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, "sample table"), start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not fields:
            continue
        if len(fields) < 2:
            raise UserError(f"{path}: line {number}: expected sample and population, separated by a tab")
        if table.setdefault(fields[0], fields[1]) != fields[1]:
            raise UserError(f"{path}: line {number}: {fields[0]} has another population further up; keep one")
    missing = [sample for sample in samples if sample not in table]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} samples have no line, the first is {missing[0]}; add them, or omit --samples"
        )
    names = tuple(sorted({table[sample] for sample in samples}))
    code = {name: number for number, name in enumerate(names)}
    return Populations(names, np.array([code[table[sample]] for sample in samples], dtype=np.int64))


class PanelSubset:
    """Reference set: a subset of a panel's samples, with allele frequencies computed from it alone.

    Haplotypes are numbered 0 to H - 1 within the set. ``haplotypes`` int64 [H] are their numbers in the panel,
    ``sample_of`` int64 [H] the panel indices of their samples, and ``population_of`` int64 [H] their populations.
    """

    def __init__(self, panel: Panel, populations: Populations, samples: np.ndarray):
        self.panel = panel
        self.samples = np.sort(np.asarray(samples, dtype=np.int64))
        self.populations = populations
        self.haplotypes = (2 * self.samples[:, None] + np.arange(2)).reshape(-1)
        self.sample_of = np.repeat(self.samples, 2)
        self.population_of = populations.of[self.sample_of]

    def __len__(self) -> int:
        return len(self.haplotypes)

    def alleles(self, start: int, stop: int) -> np.ndarray:
        """Alleles of the sites [start, stop), uint8 [H, L]."""
        whole = len(self.samples) == len(self.panel.samples)
        return self.panel.alleles(start, stop, None if whole else self.haplotypes)

    @cached_property
    def population_sizes(self) -> np.ndarray:
        """Number of haplotypes in every population, float32 [P]."""
        return np.bincount(self.population_of, minlength=len(self.populations.names)).astype(np.float32)

    @cached_property
    def population_counts(self) -> np.ndarray:
        """Number of ALT copies in every population, float32 [P, S]."""
        members = np.zeros((len(self), len(self.populations.names)), dtype=np.float32)
        members[np.arange(len(self)), self.population_of] = 1
        counts = np.empty((members.shape[1], len(self.panel.sites)), dtype=np.float32)
        for start in range(0, counts.shape[1], _SITES_PER_READ):
            block = self.alleles(start, start + _SITES_PER_READ).astype(np.float32)
            counts[:, start : start + _SITES_PER_READ] = members.T @ block
        return counts

    @cached_property
    def allele_frequency(self) -> np.ndarray:
        """ALT frequency in the set, float32 [S]."""
        return self.population_counts.sum(0) / len(self)

    @cached_property
    def minor_allele_count(self) -> np.ndarray:
        """Number of copies of the minor allele in the set, float32 [S]."""
        copies = self.population_counts.sum(0)
        return np.minimum(copies, len(self) - copies)

    @cached_property
    def good_turing_odds(self) -> np.ndarray:
        """Good-Turing correction of a minor allele's log odds, float32 [FEW + 1], by its number r of copies.

        Let n_r alleles have r copies among H haplotypes. Then a new haplotype carries each of them with probability
        ``(r + 1) n_{r+1} / (n_r H)`` (Good 1953, Biometrika 40:237). The correction is the logarithm of this over the
        plain estimate ``r / H``. It is 0 for counts that are not rare; the last entry stands for all greater counts.

        The estimate holds for any new haplotype from the same source as the set's. It matters where sites were filtered
        by their allele count in more samples than the set has. Alleles with few copies in the set are then scarce, and
        likelier in the other samples than their count suggests. Ten sites without any correction are added to every
        n_r, which keeps small panels steady.
        """
        most = min(FEW - 1, len(self) // 4)
        sites = np.bincount(self.minor_allele_count.astype(np.int64), minlength=FEW + 2).astype(np.float64)
        copies = np.arange(max(1, self.panel.minimum_allele_count), most + 1)
        odds = np.zeros(FEW + 1, dtype=np.float32)
        more = (copies + 1) * sites[copies + 1] + _STEADY * copies
        odds[copies] = np.log(more / (copies * sites[copies] + _STEADY * copies))
        return odds

    @property
    def passes_minimum_count(self) -> np.ndarray:
        """Sites whose minor-allele count in the set reaches the panel's minimum allele count, bool [S].

        Any other site is in the panel only because of the copies that samples outside the set have.
        """
        return self.minor_allele_count >= self.panel.minimum_allele_count
