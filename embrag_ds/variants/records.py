"""Phased VCF and BCF files, and bgzipped output. The only module that imports pysam.

A site is a record with exactly one ALT. Records with more than one ALT, without ALT (``.``) or with ALT ``*`` are
skipped and counted by reason. A symbolic ALT such as ``<DEL>`` is kept like any other allele. Multi-allelic records are
kept if they are split beforehand (``bcftools norm -m -any``).

A VCF is parsed from its text, one line a record; a BCF from the text that htslib makes of it. A record of thousands of
samples is then one numpy operation instead of a Python loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pysam

from embrag_ds.errors import UserError
from embrag_ds.files import written_together
from embrag_ds.variants.sites import SiteTable

# Our errors name file, record and remedy; htslib's messages on stderr would only repeat them.
pysam.set_verbosity(0)

_BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_TBI_LIMIT = 2**29
_FIXED_COLUMNS = 9
_Self = TypeVar("_Self", bound="BiallelicFile")


class VcfRow(NamedTuple):
    """A kept record; ``info``, ``format`` and ``body`` (the sample columns) are text that is not parsed."""

    contig_code: int
    pos: int
    id: str
    ref: str
    alt: str
    info: bytes
    format: bytes
    body: bytes


class BiallelicFile:
    """Reader of the biallelic records of a bgzipped VCF or a BCF; raises :class:`UserError` for faulty files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.skipped: dict[str, int] = {}
        self._is_bcf = _check_container(self.path)
        try:
            text = _header_text(self.path, self._is_bcf)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: its header is damaged ({error}); write or copy the file again") from error
        columns = text[-1].split("\t")
        self.samples = tuple(columns[_FIXED_COLUMNS:])
        self.contigs, self.contig_lengths = _declared_contigs(text)
        self.info_keys = set(re.findall(r"^##INFO=<ID=([^,]+)", "\n".join(text), flags=re.MULTILINE))
        self._check_samples()
        self._file: Any = self._open()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        # After damage htslib reports the same error again when closing.
        with suppress(OSError):
            self._file.close()

    def _open(self) -> Any:
        if not self._is_bcf:
            return _bgzf(self.path, "rb")
        try:
            return pysam.VariantFile(str(self.path), "rb")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: its header cannot be used; check it with `bcftools view -h {self.path}`"
            ) from error

    def _check_samples(self) -> None:
        if not self.samples:
            raise UserError(f"{self.path}: it has no samples; give a file with genotype columns")
        seen: set[str] = set()
        for name in self.samples:
            if name in seen:
                raise UserError(f"{self.path}: sample {name} appears twice; rename one (bcftools reheader -s)")
            seen.add(name)

    def fault(self, where: str, what: str, remedy: str) -> UserError:
        """A :class:`UserError` about this file."""
        return UserError(f"{self.path}: {where}: {what}; {remedy}")

    def _declare(self, contig: str, where: str) -> None:
        """Add a contig that the header lacks; Beagle, among others, writes such files."""
        self.contigs = (*self.contigs, contig)
        self.contig_lengths = (*self.contig_lengths, 0)

    def _lines(self) -> Iterator[bytes]:
        """Iterate over the text of every record, from the first one on."""
        last = b"the header"
        try:
            if self._is_bcf:
                self._file.reset()
                for record in self._file:
                    line = str(record).rstrip("\n").encode()
                    yield line
                    last = line
            else:
                self._file.seek(0)
                for line in self._file:
                    if line[:1] == b"#":
                        continue
                    yield line
                    last = line
        except OSError as error:
            where = "after " + ":".join(last[:200].decode(errors="replace").split("\t")[:2])
            raise self.fault(
                where, "the next record is damaged or malformed", "write or copy the file again"
            ) from error

    def rows(self) -> Iterator[VcfRow]:
        """Iterate over the kept records in file order; counts the others in ``skipped``."""
        self.skipped = {"more than one ALT": 0, "no ALT": 0, "ALT is *": 0}
        code_of = {name: code for code, name in enumerate(self.contigs)}
        finished: set[str] = set()
        at_pos: set[tuple[str, str]] = set()
        contig, pos = "", -1
        for line in self._lines():
            fields = line.split(b"\t", _FIXED_COLUMNS)
            name = fields[0].decode()
            if len(fields) <= _FIXED_COLUMNS or not fields[1].isdigit():
                raise self.fault(
                    f"record {line[:60].decode(errors='replace').replace(chr(9), ' ')!r}",
                    "it is not a VCF record with genotypes",
                    "correct it or remove it",
                )
            here, where = int(fields[1]), f"{name}:{int(fields[1])}"
            if name != contig:
                if name not in code_of:
                    code_of[name] = len(code_of)
                    self._declare(name, where)
                if name in finished:
                    raise self.fault(where, f"contig {name} appears a second time", "sort it (bcftools sort)")
                finished.add(name)
                contig, pos = name, -1
            if here < pos:
                raise self.fault(where, f"it follows position {pos}", "sort the file (bcftools sort)")
            if here > pos:
                at_pos.clear()
                pos = here
            ref, alt = fields[3].decode(), fields[4].decode()
            reason = _skip_reason(alt)
            if reason:
                self.skipped[reason] += 1
                continue
            if (ref, alt) in at_pos:
                raise self.fault(where, f"site {ref}>{alt} appears twice", "remove one (bcftools norm --rm-dup exact)")
            at_pos.add((ref, alt))
            yield VcfRow(code_of[name], here, fields[2].decode(), ref, alt, fields[7], fields[8], fields[9])

    def sample_fields(self, row: VcfRow) -> list[bytes]:
        """Sample columns of a record, N texts; raises :class:`UserError` if their number is wrong."""
        fields = row.body.split(b"\t")
        if len(fields) != len(self.samples):
            raise self.fault(
                f"{self.contigs[row.contig_code]}:{row.pos}",
                f"it has {len(fields)} genotype columns for {len(self.samples)} samples",
                "write or copy the file again",
            )
        return fields


class PhasedRecord(NamedTuple):
    """A biallelic site with its phased alleles, uint8 [2N]; sample i owns 2i and 2i + 1, and ALT is 1."""

    contig_code: int
    pos: int
    id: str
    ref: str
    alt: str
    alleles: np.ndarray


class PhasedVcf(BiallelicFile):
    """Reader of a phased, indexed VCF.gz or BCF of N samples without missing genotypes.

    ``samples`` [N], ``contigs`` and ``contig_lengths`` (base pairs, 0 where not given) come from the header.
    ``skipped`` counts the records that are not biallelic, by reason, while :meth:`records` is iterated.

    Raises :class:`UserError` when opened, for a file that is missing, truncated, not bgzipped or not indexed, or has no
    or repeated samples. Iteration raises it for an undeclared or reappearing contig and an unsorted or repeated site.
    It also does so for a damaged record and a genotype that is not two phased alleles.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if not any(Path(f"{self.path}{suffix}").exists() for suffix in (".tbi", ".csi")):
            raise UserError(f"{self.path}: it has no index (.tbi or .csi); run `bcftools index {self.path}`")

    def _declare(self, contig: str, where: str) -> None:
        raise self.fault(
            where, f"contig {contig} is not declared in the header", "add it (bcftools reheader --fai REFERENCE.fai)"
        )

    def records(self) -> Iterator[PhasedRecord]:
        """Iterate over the biallelic records in file order."""
        for row in self.rows():
            yield PhasedRecord(row.contig_code, row.pos, row.id, row.ref, row.alt, self._alleles(row))

    def _alleles(self, row: VcfRow) -> np.ndarray:
        """Alleles uint8 [2N] of a record's genotype columns."""
        if row.format == b"GT":
            alleles = _decode_phased(row.body, len(self.samples))
            if alleles is not None:
                return alleles
        elif row.format.partition(b":")[0] != b"GT":
            raise self.fault(
                f"{self.contigs[row.contig_code]}:{row.pos}",
                f"FORMAT {row.format.decode()} does not start with GT",
                "give a file with phased genotypes",
            )
        genotypes = [field.partition(b":")[0] for field in self.sample_fields(row)]
        alleles = _decode_phased(b"\t".join(genotypes), len(self.samples))
        if alleles is None:
            raise self._genotype_fault(row, genotypes)
        return alleles

    def _genotype_fault(self, row: VcfRow, genotypes: list[bytes]) -> UserError:
        sample = next(i for i, genotype in enumerate(genotypes) if _decode_phased(genotype, 1) is None)
        genotype = genotypes[sample].decode()
        if "." in genotype or not genotype:
            problem, remedy = "missing", "phase the file with a tool that fills it in, or drop the record"
        elif "/" in genotype:
            problem, remedy = "not phased", "phase the file first (Beagle, SHAPEIT, Eagle)"
        elif genotype.isdigit():
            problem, remedy = "haploid", "make it diploid (bcftools +fixploidy) or leave the contig out"
        else:
            problem, remedy = "not one of 0|0, 0|1, 1|0, 1|1", "correct the record or drop it"
        return self.fault(
            f"{self.contigs[row.contig_code]}:{row.pos}",
            f"the genotype {genotype} of sample {self.samples[sample]} is {problem}",
            remedy,
        )


@dataclass(frozen=True)
class PhasedData:
    """A whole phased file: ``alleles`` uint8 [S, 2N], where sample i owns columns 2i and 2i + 1.

    ``skipped`` counts the records that are not biallelic by reason.
    """

    sites: SiteTable
    samples: tuple[str, ...]
    alleles: np.ndarray
    skipped: dict[str, int]


def read_phased(path: str | Path) -> PhasedData:
    """Read a whole phased file. Raises :class:`UserError` as :class:`PhasedVcf` does."""
    with PhasedVcf(path) as vcf:
        rows = list(vcf.records())
        alleles = np.empty((len(rows), 2 * len(vcf.samples)), dtype=np.uint8)
        for site, row in enumerate(rows):
            alleles[site] = row.alleles
        return PhasedData(site_table(vcf, rows), vcf.samples, alleles, vcf.skipped)


def _check_container(path: Path) -> bool:
    """Whether ``path`` is a BCF (else a VCF). Raises :class:`UserError` unless bgzipped and complete."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; check the path")
    try:
        with path.open("rb") as raw:
            start = raw.read(18)
            raw.seek(max(0, path.stat().st_size - len(_BGZF_EOF)))
            end = raw.read()
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror}); check its permissions") from error
    if start.startswith(b"##fileformat=VCF"):
        raise UserError(f"{path}: it is not compressed; run `bgzip {path} && tabix -p vcf {path}.gz` and give that")
    if start.startswith(b"\x1f\x8b") and start[12:14] != b"BC":
        raise UserError(f"{path}: it is compressed with gzip, not bgzip; decompress it, then run bgzip and tabix")
    if not start.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: it is not a bgzipped VCF or a BCF; give one (bcftools view -Oz)")
    if end != _BGZF_EOF:
        raise UserError(f"{path}: it is truncated (no BGZF end marker); write or copy the file again")
    try:
        with _bgzf(path, "rb") as file:
            magic = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: its first block is damaged; write or copy the file again") from error
    if not magic.startswith((b"BCF\2", b"##fileformat=VCF")):
        raise UserError(f"{path}: it is not a VCF or BCF; give one (bcftools view -Oz)")
    return bool(magic.startswith(b"BCF"))


def _bgzf(path: Path, mode: Any) -> pysam.BGZFile:
    # `Any`: pysam's stub knows no compression level in the mode and demands the third argument.
    return pysam.BGZFile(str(path), mode, None)


def _header_text(path: Path, is_bcf: bool) -> list[str]:
    """Header lines, of which the last has the column names.

    They are read here because htslib's own header gains the undeclared contigs of the records and of the index.
    """
    with _bgzf(path, "rb") as file:
        if is_bcf:
            file.read(5)
            length = int.from_bytes(file.read(4), "little")
            lines = file.read(length).rstrip(b"\0\n").decode().split("\n")
        else:
            lines = []
            for line in file:
                if line[:1] != b"#":
                    break
                lines.append(line.decode().rstrip("\r"))
    if not lines[-1].startswith("#CHROM\t"):
        raise UserError(f"{path}: its header does not end in a #CHROM line; add it (bcftools reheader)")
    return lines


def _declared_contigs(header: list[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names: list[str] = []
    lengths: list[int] = []
    for line in header:
        found = re.match(r"##contig=<(?:.*,)?ID=([^,>]+)", line)
        if found:
            length = re.search(r"[<,]length=(\d+)", line)
            names.append(found.group(1))
            lengths.append(int(length.group(1)) if length else 0)
    return tuple(names), tuple(lengths)


def _skip_reason(alt: str) -> str | None:
    if "," in alt:
        return "more than one ALT"
    if alt == ".":
        return "no ALT"
    if alt == "*":
        return "ALT is *"
    return None


def _decode_phased(text: bytes, samples: int) -> np.ndarray | None:
    """Alleles uint8 [2 samples] of tab-separated ``a|b`` with a and b 0 or 1; None for any other text."""
    if len(text) != 4 * samples - 1:
        return None
    words = np.frombuffer(text + b"\t", dtype="<u4")
    # '0' and '1' differ in their lowest bit: with it masked, every sample must read "0|0<tab>".
    if not ((words & 0xFFFEFFFE) == int.from_bytes(b"0|0\t", "little")).all():
        return None
    return (words.view(np.uint8).reshape(samples, 4)[:, 0:3:2] & 1).reshape(-1)


def site_table(vcf: BiallelicFile, rows: list[PhasedRecord] | list[VcfRow]) -> SiteTable:
    """Site table of records read from ``vcf``."""
    return SiteTable(
        contigs=vcf.contigs,
        contig_lengths=vcf.contig_lengths,
        contig=np.array([row.contig_code for row in rows], dtype=np.int32),
        pos=np.array([row.pos for row in rows], dtype=np.int64),
        ref=[row.ref for row in rows],
        alt=[row.alt for row in rows],
        id=[row.id for row in rows],
    )


@contextmanager
def published(path: Path, sites: SiteTable) -> Iterator[Any]:
    """Context with a BGZF file that becomes ``path``, with its index, on success; a failure leaves nothing."""
    # A .tbi cannot hold positions from 512 Mb on, which some plant and animal chromosomes reach.
    suffix, other = (".tbi", ".csi") if sites.pos.max(initial=0) < _TBI_LIMIT else (".csi", ".tbi")
    files = written_together(path, Path(f"{path}{suffix}"), obsolete=[Path(f"{path}{other}")])
    with files as (temporary, index):
        try:
            # Level 3 takes a third of the default level's time for a quarter more bytes.
            with _bgzf(temporary, "wb3") as out:
                yield out
            pysam.tabix_index(str(temporary), preset="vcf", force=True, csi=suffix == ".csi", index=str(index))
        except OSError as fault:
            if fault.errno is None:  # pysam's: it knows no more
                raise UserError(f"{path}: cannot write it ({fault}); free some space in {path.parent}") from fault
            raise
