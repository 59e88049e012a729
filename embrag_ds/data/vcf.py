"""VCF and BCF files: phased input, imputed output. The only module that knows pysam.

What counts as a site is the same everywhere: a record with exactly one ALT. Records with more than
one ALT, without ALT (``.``) or with ALT ``*`` are skipped and counted by reason; a symbolic ALT such
as ``<DEL>`` is an allele like any other and is kept. Splitting multi-allelic records beforehand
(``bcftools norm -m -any``) keeps them.

A VCF is read as its decompressed text, one line a record, and a BCF as the text htslib formats from
it, so that a record of thousands of people becomes one numpy operation instead of a Python loop.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pysam

from embrag_ds.data.sites import SiteTable
from embrag_ds.errors import UserError

# Our errors name the file, the record and the remedy; htslib's would only repeat them on stderr.
pysam.set_verbosity(0)

_BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_TBI_LIMIT = 2**29
_FIXED_COLUMNS = 9
_Self = TypeVar("_Self", bound="_BiallelicFile")


class _Row(NamedTuple):
    """One kept record as text: ``info``, ``format`` and ``body`` (the sample columns) are undecoded."""

    contig_code: int
    pos: int
    id: str
    ref: str
    alt: str
    info: bytes
    format: bytes
    body: bytes


class _BiallelicFile:
    """Header and biallelic records of a bgzipped VCF or a BCF, checked for order and duplicates."""

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
        self._info_keys = set(re.findall(r"^##INFO=<ID=([^,]+)", "\n".join(text), flags=re.MULTILINE))
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

    def _fault(self, where: str, what: str, remedy: str) -> UserError:
        return UserError(f"{self.path}: {where}: {what}; {remedy}")

    def _declare(self, contig: str, where: str) -> None:
        """Take in a contig the header lacks; tools such as Beagle write their output so."""
        self.contigs = (*self.contigs, contig)
        self.contig_lengths = (*self.contig_lengths, 0)

    def _lines(self) -> Iterator[bytes]:
        """Text of every record, from the first one on."""
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
            raise self._fault(
                where, "the next record is damaged or malformed", "write or copy the file again"
            ) from error

    def _rows(self) -> Iterator[_Row]:
        """Kept records in file order; counts the others in ``skipped``."""
        self.skipped = {"more than one ALT": 0, "no ALT": 0, "ALT is *": 0}
        code_of = {name: code for code, name in enumerate(self.contigs)}
        finished: set[str] = set()
        at_pos: set[tuple[str, str]] = set()
        contig, pos = "", -1
        for line in self._lines():
            fields = line.split(b"\t", _FIXED_COLUMNS)
            name = fields[0].decode()
            if len(fields) <= _FIXED_COLUMNS or not fields[1].isdigit():
                raise self._fault(
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
                    raise self._fault(where, f"contig {name} appears a second time", "sort it (bcftools sort)")
                finished.add(name)
                contig, pos = name, -1
            if here < pos:
                raise self._fault(where, f"it follows position {pos}", "sort the file (bcftools sort)")
            if here > pos:
                at_pos.clear()
                pos = here
            ref, alt = fields[3].decode(), fields[4].decode()
            reason = _skip_reason(alt)
            if reason:
                self.skipped[reason] += 1
                continue
            if (ref, alt) in at_pos:
                raise self._fault(where, f"site {ref}>{alt} appears twice", "remove one (bcftools norm --rm-dup exact)")
            at_pos.add((ref, alt))
            yield _Row(code_of[name], here, fields[2].decode(), ref, alt, fields[7], fields[8], fields[9])

    def _sample_fields(self, row: _Row) -> list[bytes]:
        fields = row.body.split(b"\t")
        if len(fields) != len(self.samples):
            raise self._fault(
                f"{self.contigs[row.contig_code]}:{row.pos}",
                f"it has {len(fields)} genotype columns for {len(self.samples)} samples",
                "write or copy the file again",
            )
        return fields


class PhasedRecord(NamedTuple):
    """A biallelic site with its phased alleles: uint8 [2N], person i owns 2i and 2i + 1; 1 is ALT."""

    contig_code: int
    pos: int
    id: str
    ref: str
    alt: str
    alleles: np.ndarray


class PhasedVcf(_BiallelicFile):
    """A phased, indexed VCF.gz or BCF of N people without missing genotypes.

    ``samples`` [N], ``contigs`` and ``contig_lengths`` (base pairs, 0 where the header does not say)
    come from the header. ``skipped`` counts the records that are not biallelic by reason (see the
    module's docstring) and is filled while :meth:`records` is iterated.

    Raises :class:`UserError` when opened (missing, not bgzipped VCF or BCF, truncated, no index, no or
    repeated samples) and while iterated (undeclared or reappearing contig, unsorted or repeated site,
    damaged record, genotype that is not two phased alleles).
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if not any(Path(f"{self.path}{suffix}").exists() for suffix in (".tbi", ".csi")):
            raise UserError(f"{self.path}: it has no index (.tbi or .csi); run `bcftools index {self.path}`")

    def _declare(self, contig: str, where: str) -> None:
        raise self._fault(
            where, f"contig {contig} is not declared in the header", "add it (bcftools reheader --fai REFERENCE.fai)"
        )

    def records(self) -> Iterator[PhasedRecord]:
        """Every biallelic record, in file order."""
        for row in self._rows():
            yield PhasedRecord(row.contig_code, row.pos, row.id, row.ref, row.alt, self._alleles(row))

    def _alleles(self, row: _Row) -> np.ndarray:
        """uint8 [2N] from the genotype columns."""
        if row.format == b"GT":
            alleles = _decode_phased(row.body, len(self.samples))
            if alleles is not None:
                return alleles
        elif row.format.partition(b":")[0] != b"GT":
            raise self._fault(
                f"{self.contigs[row.contig_code]}:{row.pos}",
                f"FORMAT {row.format.decode()} does not start with GT",
                "give a file with phased genotypes",
            )
        genotypes = [field.partition(b":")[0] for field in self._sample_fields(row)]
        alleles = _decode_phased(b"\t".join(genotypes), len(self.samples))
        if alleles is None:
            raise self._genotype_fault(row, genotypes)
        return alleles

    def _genotype_fault(self, row: _Row, genotypes: list[bytes]) -> UserError:
        person = next(i for i, genotype in enumerate(genotypes) if _decode_phased(genotype, 1) is None)
        genotype = genotypes[person].decode()
        if "." in genotype or not genotype:
            problem, remedy = "missing", "phase the file with a tool that fills it in, or drop the record"
        elif "/" in genotype:
            problem, remedy = "not phased", "phase the file first (Beagle, SHAPEIT, Eagle)"
        elif genotype.isdigit():
            problem, remedy = "haploid", "make it diploid (bcftools +fixploidy) or leave the contig out"
        else:
            problem, remedy = "not one of 0|0, 0|1, 1|0, 1|1", "correct the record or drop it"
        return self._fault(
            f"{self.contigs[row.contig_code]}:{row.pos}",
            f"the genotype {genotype} of sample {self.samples[person]} is {problem}",
            remedy,
        )


@dataclass(frozen=True)
class PhasedData:
    """A whole phased file: ``alleles`` uint8 [S, 2N], person i owns columns 2i and 2i + 1.

    ``skipped`` counts the records that are not biallelic by reason.
    """

    sites: SiteTable
    samples: tuple[str, ...]
    alleles: np.ndarray
    skipped: dict[str, int]


def read_phased(path: str | Path) -> PhasedData:
    """Read a phased file whole. Raises :class:`UserError` as :class:`PhasedVcf` does."""
    with PhasedVcf(path) as vcf:
        rows = list(vcf.records())
        alleles = np.empty((len(rows), 2 * len(vcf.samples)), dtype=np.uint8)
        for site, row in enumerate(rows):
            alleles[site] = row.alleles
        return PhasedData(_site_table(vcf, rows), vcf.samples, alleles, vcf.skipped)


@dataclass(frozen=True)
class Dosages:
    """Imputed dosages of N people at S sites.

    ``dosage`` float32 [S, N] is in ALT copies (0 to 2); ``gp`` float32 [S, N, 3] holds the genotype
    probabilities; ``haplotype_dosage`` float32 [S, 2N] the ALT probability of each haplotype (person i
    owns 2i and 2i + 1); ``dr2`` float32 [S] the file's own estimate of r2, NaN where it gives none;
    ``imputed`` bool [S] marks imputed sites. ``gp`` and ``haplotype_dosage`` are None unless every record
    has them, ``dr2`` and ``imputed`` unless the header defines their INFO key.
    """

    sites: SiteTable
    samples: tuple[str, ...]
    dosage: np.ndarray
    gp: np.ndarray | None
    haplotype_dosage: np.ndarray | None
    dr2: np.ndarray | None
    imputed: np.ndarray | None


def read_dosages(path: str | Path) -> Dosages:
    """Read what this package, Beagle (GT:DS:AP1:AP2:GP) or minimac4 (HDS, GT, DS, GP) wrote.

    The dosage is DS; where FORMAT has no DS, the sum of AP1 and AP2 or of HDS, else GP's, else the
    count of ALT alleles in GT, phased or not. ``dr2`` is INFO DR2 or R2, ``imputed`` the INFO flag IMP
    or IMPUTED. No index is needed. Raises :class:`UserError` on a damaged file, an unsorted or repeated
    site, and a missing or non-numeric value or no value to derive the dosage from.
    """
    parsers: dict[bytes, _DosageFields] = {}
    rows: list[_Row] = []
    parser_of_row: list[_DosageFields] = []
    codes: list[np.ndarray] = []
    with _BiallelicFile(path) as vcf:
        for row in vcf._rows():
            fields = vcf._sample_fields(row)
            where = f"{vcf.contigs[row.contig_code]}:{row.pos}"
            if row.format not in parsers:
                if not _DOSAGE_KEYS & set(row.format.split(b":")):
                    raise vcf._fault(
                        where,
                        f"FORMAT {row.format.decode()} has no DS, HDS, AP1 and AP2, GP or GT",
                        "give a file with imputed dosages",
                    )
                parsers[row.format] = _DosageFields(row.format)
            parser = parsers[row.format]
            try:
                codes.append(np.array([parser[field] for field in fields], dtype=np.int32))
            except (ValueError, IndexError) as error:
                person = next(i for i, field in enumerate(fields) if field not in parser)
                raise vcf._fault(
                    where,
                    f"sample {vcf.samples[person]} has {row.format.decode()} {fields[person].decode()}, "
                    "where a value is missing or not a number",
                    "impute the file again or drop the record",
                ) from error
            parser_of_row.append(parser)
            # The genotype columns are large and their content is in `codes`.
            rows.append(row._replace(body=b""))
        sites, samples, info_keys = _site_table(vcf, rows), vcf.samples, vcf._info_keys
    values = {id(parser): np.array(parser.parsed, dtype=np.float32) for parser in parsers.values()}
    dosage = np.empty((len(rows), len(samples)), dtype=np.float32)
    haplotypes = np.empty((len(rows), 2 * len(samples)), dtype=np.float32)
    gp = np.empty((len(rows), len(samples), 3), dtype=np.float32)
    for site, (parser, code) in enumerate(zip(parser_of_row, codes, strict=True)):
        person_values = values[id(parser)][code]
        dosage[site] = person_values[:, 0]
        haplotypes[site] = person_values[:, 1:3].reshape(-1)
        gp[site] = person_values[:, 3:]
    info = [_info_values(row.info) for row in rows]
    dr2 = [_number_or_nan(entry.get("DR2", entry.get("R2", "."))) for entry in info]
    imputed = ["IMP" in entry or "IMPUTED" in entry for entry in info]
    return Dosages(
        sites=sites,
        samples=samples,
        dosage=dosage,
        gp=gp if all(parser.has_gp for parser in parsers.values()) else None,
        haplotype_dosage=haplotypes if all(parser.has_haplotypes for parser in parsers.values()) else None,
        dr2=np.array(dr2, dtype=np.float32) if info_keys & {"DR2", "R2"} else None,
        imputed=np.array(imputed, dtype=bool) if info_keys & {"IMP", "IMPUTED"} else None,
    )


_DOSAGE_KEYS = {b"DS", b"HDS", b"AP1", b"GP", b"GT"}


class _DosageFields(dict[bytes, int]):
    """Row numbers in ``parsed`` of the sample columns met so far under one FORMAT.

    Few distinct columns make up an imputed file (most are confident), so each text is parsed once.
    A row of ``parsed`` is (dosage, haplotype 0, haplotype 1, GP 0, GP 1, GP 2), NaN where FORMAT does
    not say.
    """

    def __init__(self, format_text: bytes) -> None:
        super().__init__()
        self.parsed: list[tuple[float, ...]] = []
        self._column = {key: i for i, key in enumerate(format_text.split(b":"))}
        self.has_gp = b"GP" in self._column
        self.has_haplotypes = b"HDS" in self._column or b"AP1" in self._column

    def __missing__(self, text: bytes) -> int:
        parts = text.split(b":")
        nan = float("nan")
        haplotypes, gp = (nan, nan), (nan, nan, nan)
        if b"HDS" in self._column:
            first, second = parts[self._column[b"HDS"]].split(b",")
            haplotypes = (float(first), float(second))
        elif b"AP1" in self._column:
            haplotypes = (float(parts[self._column[b"AP1"]]), float(parts[self._column[b"AP2"]]))
        if self.has_gp:
            hom_ref, het, hom_alt = parts[self._column[b"GP"]].split(b",")
            gp = (float(hom_ref), float(het), float(hom_alt))
        if b"DS" in self._column:
            dosage = float(parts[self._column[b"DS"]])
        elif self.has_haplotypes:
            dosage = haplotypes[0] + haplotypes[1]
        elif self.has_gp:
            dosage = gp[1] + 2 * gp[2]
        else:
            left, right = re.split(rb"[|/]", parts[self._column[b"GT"]])
            dosage = float(int(left) + int(right))
        if math.isnan(dosage):
            raise ValueError(text)
        self.parsed.append((dosage, *haplotypes, *gp))
        self[text] = len(self.parsed) - 1
        return self[text]


def write_phased(path: str | Path, sites: SiteTable, samples: tuple[str, ...] | list[str], alleles: np.ndarray) -> None:
    """Write ``alleles`` uint8 [S, 2N] as a bgzipped phased VCF with its index.

    ``path`` must end in ``.vcf.gz``. The file appears only when complete. Raises :class:`UserError`
    when it cannot be written.
    """
    assert alleles.shape == (len(sites), 2 * len(samples)), alleles.shape
    genotype = np.array([list(f"{a}|{b}\t".encode()) for a in (0, 1) for b in (0, 1)], dtype=np.uint8)
    with _published(Path(path), sites) as out:
        out.write(_header(sites, samples, ['##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">']))
        for site, (contig, pos, ref, alt) in enumerate(sites.identities()):
            body = genotype[2 * alleles[site, 0::2] + alleles[site, 1::2]].tobytes()
            prefix = f"{contig}\t{pos}\t{sites.id[site]}\t{ref}\t{alt}\t.\tPASS\t.\tGT\t"
            out.write(prefix.encode() + body[:-1] + b"\n")


_IMPUTED_DEFINITIONS = [
    '##INFO=<ID=AF,Number=A,Type=Float,Description="Estimated ALT allele frequency: mean of HDS">',
    '##INFO=<ID=DR2,Number=1,Type=Float,Description="Estimated squared correlation of dosage and true allele:'
    ' variance of HDS over p(1-p)">',
    '##INFO=<ID=IMP,Number=0,Type=Flag,Description="Imputed site">',
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype: ALT where HDS is above 0.5">',
    '##FORMAT=<ID=DS,Number=A,Type=Float,Description="ALT dosage: sum of HDS">',
    '##FORMAT=<ID=HDS,Number=2,Type=Float,Description="ALT probability of each haplotype">',
    '##FORMAT=<ID=GP,Number=G,Type=Float,Description="Genotype probabilities: products of HDS">',
]


class ImputedVcfWriter:
    """Imputed VCF of N people at ``sites``, written block by block in site order.

    ``FORMAT`` is ``GT:DS:HDS:GP`` to three decimals: HDS is rounded, and GT, DS and GP follow from the
    rounded HDS, so the columns of a person agree exactly and GP sums to 1. ``INFO`` has ``AF``, ``DR2``
    (minimac's Rsq, Das et al. 2016, Nat. Genet. 48:1284: the variance of HDS over p(1-p), 0 where p is 0
    or 1, at most 1, and 1 at typed sites) and the flag ``IMP`` at imputed sites.

    Use it as a context manager; ``path`` must end in ``.vcf.gz``. The file and its index appear when
    the block ends without an exception, and nothing is left otherwise. Raises :class:`UserError` when
    the file cannot be written.
    """

    def __init__(self, path: str | Path, sites: SiteTable, samples: tuple[str, ...] | list[str], source: str) -> None:
        self._sites = sites
        self._people = len(samples)
        self._header = _header(sites, samples, [f"##source={source}", *_IMPUTED_DEFINITIONS])
        self._path = Path(path)
        _check_output(self._path)
        self._next = 0
        self._stack = ExitStack()
        self._person_text = _imputed_person_text()

    def __enter__(self) -> ImputedVcfWriter:
        self._out = self._stack.enter_context(_published(self._path, self._sites))
        self._stack.push(self._check_complete)
        self._out.write(self._header)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def _check_complete(self, exc_type: Any, exc: Any, tb: Any) -> None:
        assert exc_type or self._next == len(self._sites), f"{self._next} of {len(self._sites)} sites written"

    def write(self, first: int, haplotype_dosage: np.ndarray, typed: np.ndarray, alleles_typed: np.ndarray) -> None:
        """Write sites ``first`` to ``first + n``.

        ``haplotype_dosage`` float32 [2N, n] are ALT probabilities, ``typed`` bool [n] marks typed sites,
        at which ``alleles_typed`` uint8 [2N, n] is written unchanged and the dosage is not looked at.
        """
        assert first == self._next, f"sites {first}.. follow {self._next}"
        assert haplotype_dosage.shape == alleles_typed.shape == (2 * self._people, len(typed))
        step = max(1, 2**23 // (_PERSON_WIDTH * self._people))
        for start in range(0, len(typed), step):
            block = slice(start, start + step)
            self._write_block(haplotype_dosage[:, block], typed[block], alleles_typed[:, block])

    def _write_block(self, dosage: np.ndarray, typed: np.ndarray, alleles: np.ndarray) -> None:
        hds = np.where(typed, alleles, dosage).T.astype(np.float64, order="C")
        thousandths = np.rint(hds * 1000).astype(np.int64)
        assert thousandths.min() >= 0 and thousandths.max() <= 1000, "haplotype dosages outside [0, 1]"
        texts = self._person_text[thousandths[:, 0::2] * 1001 + thousandths[:, 1::2]]
        af = hds.mean(axis=1)
        spread = af * (1 - af)
        dr2 = np.divide(hds.var(axis=1), spread, out=np.zeros_like(af), where=spread > 0)
        dr2 = np.where(typed, 1.0, np.minimum(dr2, 1.0))
        parts: list[bytes] = []
        sites = self._sites
        for i in range(len(typed)):
            site = self._next + i
            parts.append(
                f"{sites.contigs[sites.contig[site]]}\t{sites.pos[site]}\t{sites.id[site]}\t{sites.ref[site]}\t"
                f"{sites.alt[site]}\t.\tPASS\tAF={af[i]:.6g};DR2={dr2[i]:.4g}{'' if typed[i] else ';IMP'}"
                "\tGT:DS:HDS:GP\t".encode()
            )
            parts.append(texts[i].tobytes()[:-1])
            parts.append(b"\n")
        self._out.write(b"".join(parts))
        self._next += len(typed)


_PERSON_WIDTH = len("0|0:0.000:0.000,0.000:1.000,0.000,0.000\t")


@cache
def _imputed_person_text() -> np.ndarray:
    """uint64 [1001 * 1001, 5]: the 40 bytes of a person whose HDS are a/1000, b/1000, at 1001 a + b.

    A person's columns depend on these two numbers only, so a block of records is one gather.
    """
    a, b = (part.ravel() for part in np.meshgrid(np.arange(1001), np.arange(1001), indexing="ij"))
    gp_millionths = np.stack([(1000 - a) * (1000 - b), a * (1000 - b) + (1000 - a) * b, a * b], axis=1)
    gp = (gp_millionths + 500) // 1000
    # The largest takes up what rounding left, so that the written values sum to 1.
    gp[np.arange(len(gp)), gp.argmax(axis=1)] += 1000 - gp.sum(axis=1)
    digits = np.array([list(f"{i / 1000:.3f}".encode()) for i in range(2001)], dtype=np.uint8)
    text = np.empty((len(a), _PERSON_WIDTH), dtype=np.uint8)
    text[:] = np.frombuffer(b"0|0:0.000:0.000,0.000:1.000,0.000,0.000\t", dtype=np.uint8)
    text[:, 0] += a > 500
    text[:, 2] += b > 500
    for start, value in ((4, a + b), (10, a), (16, b), (22, gp[:, 0]), (28, gp[:, 1]), (34, gp[:, 2])):
        text[:, start : start + 5] = digits[value]
    return text.view(np.uint64)


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
    """Header lines, the last being the column names.

    Read here because htslib's own header gains the undeclared contigs of the records and of the index.
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


def _decode_phased(text: bytes, people: int) -> np.ndarray | None:
    """uint8 [2 people] from tab-separated ``a|b`` with a and b 0 or 1; None where anything else is there."""
    if len(text) != 4 * people - 1:
        return None
    words = np.frombuffer(text + b"\t", dtype="<u4")
    # '0' and '1' differ in their lowest bit: with it masked, every person must read "0|0<tab>".
    if not ((words & 0xFFFEFFFE) == int.from_bytes(b"0|0\t", "little")).all():
        return None
    return (words.view(np.uint8).reshape(people, 4)[:, 0:3:2] & 1).reshape(-1)


def _site_table(vcf: _BiallelicFile, rows: list[PhasedRecord] | list[_Row]) -> SiteTable:
    return SiteTable(
        contigs=vcf.contigs,
        contig_lengths=vcf.contig_lengths,
        contig=np.array([row.contig_code for row in rows], dtype=np.int32),
        pos=np.array([row.pos for row in rows], dtype=np.int64),
        ref=[row.ref for row in rows],
        alt=[row.alt for row in rows],
        id=[row.id for row in rows],
    )


def _info_values(info: bytes) -> dict[str, str]:
    entries = (entry.partition("=") for entry in info.decode().split(";"))
    return {key: value for key, _, value in entries}


def _number_or_nan(text: str) -> float:
    return float("nan") if text == "." else float(text)


def _header(sites: SiteTable, samples: tuple[str, ...] | list[str], definitions: list[str]) -> bytes:
    lines = ["##fileformat=VCFv4.3", '##FILTER=<ID=PASS,Description="All filters passed">']
    for name, length in zip(sites.contigs, sites.contig_lengths, strict=True):
        lines.append(f"##contig=<ID={name},length={length}>" if length else f"##contig=<ID={name}>")
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]
    return "\n".join([*lines, *definitions, "\t".join(columns), ""]).encode()


def _check_output(path: Path) -> None:
    if not path.name.endswith(".vcf.gz"):
        raise UserError(f"{path}: the output is a bgzipped VCF; give it a name ending in .vcf.gz")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist; create it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} cannot be written to; check its permissions")


@contextmanager
def _published(path: Path, sites: SiteTable) -> Iterator[Any]:
    """BGZF file that becomes ``path``, with its index, when the block ends; nothing is left otherwise."""
    _check_output(path)
    temporary = path.with_name(f".{path.name.removesuffix('.vcf.gz')}.{os.getpid()}.tmp.vcf.gz")
    # A .tbi cannot hold positions from 512 Mb on, which some plant and animal chromosomes reach.
    suffix, other = (".tbi", ".csi") if sites.pos.max(initial=0) < _TBI_LIMIT else (".csi", ".tbi")
    index = Path(f"{temporary}{suffix}")
    try:
        # Level 3 takes a third of the default level's time for a quarter more bytes.
        with _bgzf(temporary, "wb3") as out:
            yield out
        pysam.tabix_index(str(temporary), preset="vcf", force=True, csi=suffix == ".csi")
        # An older index of the other kind would be found first, and would not fit the new file.
        Path(f"{path}{other}").unlink(missing_ok=True)
        os.replace(index, f"{path}{suffix}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
