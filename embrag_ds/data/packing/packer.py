"""The rows of a packed file: written site after site, or taken over from another process."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from embrag_ds.data.packing.reading import FORMAT, Reading
from embrag_ds.data.ploidy import PloidyRecorder
from embrag_ds.errors import UserError
from embrag_ds.ops.bits import pack_host
from embrag_ds.variants.genotypes import Calls
from embrag_ds.variants.header import as_bytes
from embrag_ds.variants.records import Excluded, Site, Span, VariantReader, site_table

ALLELES, MISSING, UNPHASED, EXCLUDED = "alleles.bits", "missing.bits", "unphased.bits", "excluded.tsv"
_COPIED_BYTES = 1 << 16


@dataclass(frozen=True)
class Packed:
    """What is known of the packed sites of a part of a file, beside its files of rows.

    ``names`` are the contigs by the ``contig_code`` of the sites in ``rows``. ``span`` is where its records lie.
    ``records``, ``skipped`` and ``filled`` count as :class:`embrag_ds.data.panel.Panel` has it.
    """

    rows: list[Site]
    names: tuple[str, ...]
    span: Span
    records: int
    skipped: dict[str, int]
    filled: int
    ploidy: PloidyRecorder


class Packer:
    """Writer of packed sites into a folder; see :mod:`embrag_ds.data.panel` for its files. Use it as a context."""

    def __init__(self, vcf: VariantReader, directory: Path, reading: Reading) -> None:
        self._vcf, self._directory, self._reading = vcf, directory, reading
        self._rows: list[Site] = []
        self._filled = 0
        self._digest = hashlib.sha256()
        self._ploidy = PloidyRecorder(len(vcf.samples))
        with ExitStack() as stack:
            self._bits = stack.enter_context((directory / ALLELES).open("wb"))
            self._excluded = stack.enter_context((directory / EXCLUDED).open("wb"))
            haplotype_bytes, sample_bytes = (2 * len(vcf.samples) + 7) // 8, (len(vcf.samples) + 7) // 8
            self._missing = stack.enter_context(_SparseBits(directory / MISSING, haplotype_bytes))
            self._unphased = stack.enter_context(_SparseBits(directory / UNPHASED, sample_bytes))
            self._open = stack.pop_all()
        vcf.on_excluded = self._list

    def __enter__(self) -> Packer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, fault, traceback)

    def add(self, site: Site) -> None:
        """Pack the calls of a site that the reader is at.

        Raises :class:`UserError` for calls that the file must not have by its rules.
        """
        calls = self._vcf.calls(site)
        lacking = calls.missing
        if calls.missing is not None or calls.unphased is not None:
            if self._reading.missing == "keep":
                self._missing.put(len(self._rows), calls.missing)
                self._unphased.put(len(self._rows), calls.unphased)
            elif self._reading.missing == "error":
                raise _incomplete(self._vcf, site, calls)
            elif self._reading.missing == "drop":
                self._vcf.exclude(site, "missing or unphased calls")
                return
            else:
                calls = _with_major_allele(calls)
                self._filled += 1
        row = pack_host(calls.alleles).data
        self._bits.write(row)
        self._digest.update(row)
        self._ploidy.add(calls.ploidy, lacking)
        self._rows.append(site.bare())

    def packed(self) -> Packed:
        """What was packed, once all of it is."""
        vcf = self._vcf
        self._finish()
        return Packed(self._rows, vcf.contigs, vcf.span, vcf.records, vcf.skipped, self._filled, self._ploidy)

    def take_over(self, part: Packed, folder: Path) -> None:
        """Add the sites that another process has packed into ``folder``; they follow all others in the file."""
        vcf, before = self._vcf, len(self._rows)
        code = dict(zip(part.span.contigs, vcf.codes_of(part.span.contigs), strict=True))
        for site in part.rows:
            contig_code = code[part.names[site.contig_code]]
            self._rows.append(site._replace(contig_code=contig_code, record=vcf.records + site.record))
        vcf.records += part.records
        for reason, count in part.skipped.items():
            vcf.skipped[reason] = vcf.skipped.get(reason, 0) + count
        self._filled += part.filled
        self._ploidy.extend(part.ploidy)
        with (folder / ALLELES).open("rb") as bits:
            while content := bits.read(_COPIED_BYTES):
                self._bits.write(content)
                self._digest.update(content)
        self._excluded.write((folder / EXCLUDED).read_bytes())
        self._missing.extend(before, folder / MISSING)
        self._unphased.extend(before, folder / UNPHASED)

    def save(self) -> None:
        """Write all that describes the packed file; raises :class:`UserError` for one without sites."""
        vcf = self._vcf
        if not self._rows:
            raise UserError(f"{vcf.path}: {_nothing(vcf)}; check the file")
        self._finish()
        site_table(vcf, self._rows).save(self._directory / "sites.npz")
        ranges = self._ploidy.result()
        if ranges is not None:
            ranges.save(self._directory / "ploidy.npz")
        meta = {
            "format": FORMAT,
            "samples": list(vcf.samples),
            "records": vcf.records,
            "skipped": dict(vcf.skipped),
            "filled": self._filled,
            "alleles_sha256": self._digest.hexdigest(),
            "remarks": vcf.remarks,
        }
        (self._directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def _finish(self) -> None:
        self._missing.finish(len(self._rows))
        self._unphased.finish(len(self._rows))

    def _list(self, each: Excluded) -> None:
        self._excluded.write(as_bytes("\t".join(map(str, each)) + "\n"))


def _nothing(vcf: VariantReader) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in vcf.skipped.items())
    return f"none of its {vcf.records} records is a site ({left_out})" if left_out else "it has no records"


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

    def __enter__(self) -> _SparseBits:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close the file, and remove it if no bit was set."""
        self._file.close()
        if not self._used:
            self._path.unlink()

    def put(self, row: int, marked: np.ndarray | None) -> None:
        """Set a row to the bits of ``marked`` bool [n]; None leaves it empty."""
        if marked is not None:
            self._file.seek(row * self._row_bytes)
            self._file.write(pack_host(marked).tobytes())
            self._used = True

    def extend(self, row: int, path: Path) -> None:
        """Set the rows from ``row`` on to those of a file, if it is there."""
        if not path.exists():
            return
        self._used = True
        place = row * self._row_bytes
        with path.open("rb") as file:
            while content := file.read(_COPIED_BYTES):
                if content.count(0) < len(content):  # what is empty takes no room on the disk
                    self._file.seek(place)
                    self._file.write(content)
                place += len(content)

    def finish(self, rows: int) -> None:
        """Make the file ``rows`` rows long."""
        self._file.truncate(rows * self._row_bytes)
