"""Packing of a variant file's genotypes into a folder of bits: what panels and targets are read from."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embrag_ds.data.ploidy import PloidyRecorder
from embrag_ds.errors import UserError
from embrag_ds.files import source_of
from embrag_ds.ops.bits import pack_host
from embrag_ds.progress import Progress
from embrag_ds.variants.genotypes import Calls
from embrag_ds.variants.header import as_bytes
from embrag_ds.variants.records import Duplicates, Excluded, Site, VariantReader, site_table

FORMAT = 5
"""Version of the folder's layout."""
PanelMissing = Literal["error", "major", "drop"]
"""Rule for a panel's site with missing or unphased calls, see :class:`Reading`."""
Missing = PanelMissing | Literal["keep"]
"""Rule for such a site of any file."""


@dataclass(frozen=True)
class Reading:
    """Rules by which a file is read.

    A panel must have every allele and its phase. ``missing`` says what happens where it has not: ``error`` refuses the
    file, ``drop`` leaves the site out, and ``major`` takes the site's major allele for missing alleles and for both
    alleles of an unphased heterozygote. ``keep``, for targets, keeps missing and unphased calls as such.
    ``without_alt`` keeps records without ALT (:class:`embrag_ds.variants.records.VariantReader`).
    """

    duplicates: Duplicates = "first"
    missing: Missing = "error"
    without_alt: bool = False


PANEL = Reading()
"""Rules for panels, unless the user asks for others."""
TARGET = Reading(missing="keep", without_alt=True)
"""Rules for targets."""


def packed_folder(path: Path, cache_dir: Path, reading: Reading) -> Path | None:
    """A file's folder in the cache, there or not; None for a pipe. Raises :class:`UserError` if it cannot be read."""
    identity = _identity(path, reading)
    return None if identity is None else cache_dir / f"panel-{identity}"


def _identity(path: Path, reading: Reading) -> str | None:
    """Cache key of a file: a digest of its size, times of change, first and last MiB, and rules; None for a pipe."""
    path = source_of(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return None
        with path.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, status.st_size - (1 << 20)))
            tail = stream.read()
    except OSError as fault:
        raise UserError(f"{path}: it cannot be read ({fault.strerror}); check the path and its permissions") from fault
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    digest = hashlib.sha256(f"{FORMAT} {reading} {status.st_size} {times} ".encode())
    digest.update(head)
    digest.update(tail)
    return digest.hexdigest()[:20]


def pack(path: Path, directory: Path, reading: Reading, progress: bool) -> None:
    """Pack the file at ``path`` into the folder ``directory``; see :mod:`embrag_ds.data.panel` for its files.

    Raises :class:`UserError` for a faulty file, and for one without sites.
    """
    rows: list[Site] = []
    filled = 0
    digest = hashlib.sha256()
    with (
        (directory / "excluded.tsv").open("wb") as listed,
        VariantReader(
            path,
            duplicates=reading.duplicates,
            without_alt=reading.without_alt,
            on_excluded=lambda each: _list(listed, each),
        ) as vcf,
        (directory / "alleles.bits").open("wb") as bits,
        _sparse_bits(directory / "missing.bits", (2 * len(vcf.samples) + 7) // 8) as missing,
        _sparse_bits(directory / "unphased.bits", (len(vcf.samples) + 7) // 8) as unphased,
        Progress(f"packing {path.name}", None, "sites", shown=progress) as bar,
    ):
        ploidy = PloidyRecorder(len(vcf.samples))
        for site in vcf.sites():
            bar.advance()
            calls = vcf.calls(site)
            lacking = calls.missing
            if calls.missing is not None or calls.unphased is not None:
                if reading.missing == "keep":
                    missing.put(len(rows), calls.missing)
                    unphased.put(len(rows), calls.unphased)
                elif reading.missing == "error":
                    raise _incomplete(vcf, site, calls)
                elif reading.missing == "drop":
                    vcf.exclude(site, "missing or unphased calls")
                    continue
                else:
                    calls = _with_major_allele(calls)
                    filled += 1
            row = pack_host(calls.alleles).data
            bits.write(row)
            digest.update(row)
            ploidy.add(calls.ploidy, lacking)
            rows.append(site.bare())
        if not rows:
            raise UserError(f"{path}: {_nothing(vcf)}; check the file")
        site_table(vcf, rows).save(directory / "sites.npz")
        meta = {
            "format": FORMAT,
            "samples": list(vcf.samples),
            "records": vcf.records,
            "skipped": dict(vcf.skipped),
            "filled": filled,
            "alleles_sha256": digest.hexdigest(),
            "remarks": vcf.remarks,
        }
        missing.finish(len(rows))
        unphased.finish(len(rows))
    ranges = ploidy.result()
    if ranges is not None:
        ranges.save(directory / "ploidy.npz")
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _nothing(vcf: VariantReader) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in vcf.skipped.items())
    return f"none of its {vcf.records} records is a site ({left_out})" if left_out else "it has no records"


def _list(listed: Any, each: Excluded) -> None:
    listed.write(as_bytes("\t".join(map(str, each)) + "\n"))


def _incomplete(vcf: VariantReader, site: Site, calls: Calls) -> UserError:
    """Error for a panel's site with a missing or unphased call."""
    if calls.missing is not None:
        sample, problem = int(calls.missing.argmax()) // 2, "missing"
    else:
        assert calls.unphased is not None
        sample, problem = int(calls.unphased.argmax()), "not phased"
    return vcf.fault(
        vcf.where(site),
        f"the genotype {vcf.genotypes(site)[sample].decode()} of sample {vcf.samples[sample]} is {problem}",
        "phase the panel with a tool that fills in missing calls (Beagle, SHAPEIT, Eagle), or leave such sites out "
        "(--panel-missing drop) or take their major allele (--panel-missing major); "
        "if it is the file to impute, it belongs to --target",
    )


def _with_major_allele(calls: Calls) -> Calls:
    """Calls with the major allele in place of missing ones, and of both alleles of unphased heterozygotes."""
    unknown = np.zeros(len(calls.alleles), dtype=bool) if calls.missing is None else calls.missing.copy()
    if calls.unphased is not None:
        unknown |= np.repeat(calls.unphased, 2)
    known = calls.alleles[~unknown]
    major = int(2 * int(known.sum()) > len(known))
    return Calls(np.where(unknown, major, calls.alleles).astype(np.uint8), ploidy=calls.ploidy)


class _SparseBits:
    """File with a row of bits for each site, of which most are empty."""

    def __init__(self, path: Path, row_bytes: int) -> None:
        self._path = path
        self._row_bytes = row_bytes
        self._file = path.open("wb")
        self._used = False

    def put(self, row: int, marked: np.ndarray | None) -> None:
        """Set a row to the bits of ``marked`` bool [n]; None leaves it empty."""
        if marked is not None:
            self._file.seek(row * self._row_bytes)
            self._file.write(pack_host(marked).tobytes())
            self._used = True

    def finish(self, rows: int) -> None:
        """Make the file ``rows`` rows long."""
        self._file.truncate(rows * self._row_bytes)

    def close(self) -> None:
        """Close the file, and remove it if no bit was set."""
        self._file.close()
        if not self._used:
            self._path.unlink()


@contextmanager
def _sparse_bits(path: Path, row_bytes: int) -> Iterator[_SparseBits]:
    bits = _SparseBits(path, row_bytes)
    try:
        yield bits
    finally:
        bits.close()
