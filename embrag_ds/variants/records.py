"""Records of variant files, split into biallelic sites; the one reader of panels, targets, truths and imputed files.

A record with several ALTs becomes several sites, as ``bcftools norm -m -any`` splits it. A site is known by contig,
position, REF, ALT and, for a symbolic ALT, by its extent. What is left out is counted by reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.variants.container.text import WHOLE, Part, VariantText, regular_file
from embrag_ds.variants.genotypes import BadGenotype, Calls, GenotypeDecoder, decode_biallelic
from embrag_ds.variants.header import FIXED_COLUMNS, Header, as_text, shown
from embrag_ds.variants.sites import SiteTable

Duplicates = Literal["first", "error"]
"""Rule for a site that a file has twice: keep the first and count the others, or refuse the file."""
NO_ALT = "."
"""ALT of a record in which no sample has another allele than REF."""
_NO_ID = "."
_LARGEST_POS = 2**31 - 1
_MOST_DIGITS = 20
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CONTIG = re.compile(r"[^\s,<>\"]+")
_BASES = frozenset("ACGT")
_SEQUENCE = re.compile(r"[A-Z]+", re.IGNORECASE | re.ASCII)
_OTHER_ALT = re.compile(r"\*|<[^<>]+>|.*[\[\]].*|\.[A-Z]+|[A-Z]+\.", re.IGNORECASE | re.ASCII)
_INTEGER = re.compile(rb"-?[0-9]{1,20}")
_EXTENT = re.compile(rb"(?:^|;)(END|SVLEN)=([^;]*)")
_NOT_AN_ALLELE = ("<*>", "<NON_REF>")
_Self = TypeVar("_Self", bound="VariantReader")


class Site(NamedTuple):
    """A biallelic site: one ALT of a record.

    ``extent`` identifies a symbolic ALT further (:class:`SiteTable`). ``record`` is the number of its record in the
    file. ``allele`` is the number of its ALT among the record's ``alleles``, from 1 on; 0 of 0 for a record without
    ALT. ``info``, ``format`` and ``body`` (the sample columns) are the record's text.
    """

    contig_code: int
    pos: int
    id: str
    ref: str
    alt: str
    extent: str
    record: int
    allele: int
    alleles: int
    info: bytes
    format: bytes
    body: bytes

    def bare(self) -> Site:
        """The site without its record's text, which is large."""
        # Faster than `_replace`, by a few hundredths of the time that packing takes.
        return Site._make((*self[:-3], b"", b"", b""))


class Excluded(NamedTuple):
    """A record, or one ALT of it, that is left out, and the reason."""

    contig: str
    pos: int
    id: str
    ref: str
    alt: str
    reason: str

    @classmethod
    def at(cls, sites: SiteTable, row: int, reason: str) -> Excluded:
        """The site in a ``row`` of a table."""
        where = sites.contigs[sites.contig[row]], int(sites.pos[row])
        return cls(*where, sites.id[row], sites.ref[row], sites.alt[row], reason)


class Span(NamedTuple):
    """Where the records of a part of a file lie: its contigs in order, the first position and the last."""

    contigs: tuple[str, ...]
    first: int
    last: int

    def followed_by(self, other: Span) -> Span | None:
        """Span of both parts; None where the file is not sorted, or has a contig twice."""
        if not self.contigs or not other.contigs:
            return self if self.contigs else other
        goes_on = self.contigs[-1] == other.contigs[0]
        if goes_on and other.first <= self.last:
            return None
        contigs = self.contigs + other.contigs[goes_on:]
        return Span(contigs, self.first, other.last) if len(set(contigs)) == len(contigs) else None


class VariantReader:
    """Reader of the biallelic sites of a variant file with N samples, in any container.

    ``samples`` [N], ``contigs``, ``contig_lengths``, ``info_keys`` and ``sources`` come from the header; contigs that
    it lacks are added as they come. ``records`` counts the records read so far, and ``skipped`` what was left out,
    by reason; ``on_excluded`` is called with each. With ``without_alt``, records without ALT are sites with the ALT
    ``.``. A file without sample columns is refused if it ``needs_samples``; otherwise its sites have an empty ``body``.

    Raises :class:`UserError` for faulty files: when opened, and while it is iterated.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        duplicates: Duplicates = "first",
        without_alt: bool = False,
        needs_samples: bool = True,
        on_excluded: Callable[[Excluded], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.records = 0
        self.skipped: dict[str, int] = {}
        self.on_excluded = on_excluded
        self._duplicates = duplicates
        self._without_alt = without_alt
        self._contigs_read: dict[str, None] = {}  # a set in order
        self._first_pos = self._last_pos = -1
        with ExitStack() as stack:
            self._text = VariantText(stack.enter_context(regular_file(self.path)), self.path)
            header = Header.parse(self.path, self._text.header, needs_samples)
            self._open = stack.pop_all()
        self.samples, self.info_keys, self.sources = header.samples, header.info_keys, header.sources
        self.contigs, self.contig_lengths = header.contigs, header.contig_lengths
        self._decoder = GenotypeDecoder()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._open.__exit__(exc_type, exc, tb)

    @property
    def remarks(self) -> list[str]:
        """What is doubtful about the file's container, as it was logged."""
        return self._text.remarks

    @property
    def span(self) -> Span:
        """Where the records read so far lie."""
        return Span(tuple(self._contigs_read), self._first_pos, self._last_pos)

    def seams(self, pieces: int) -> list[int]:
        """Places that divide the file into up to ``pieces`` parts, each of whole positions; none where it cannot be."""
        return self._text.seams(pieces)

    def codes_of(self, names: Sequence[str]) -> list[int]:
        """Numbers of contigs, which are added where the header lacks them."""
        code_of = {name: code for code, name in enumerate(self.contigs)}
        for name in names:
            if name not in code_of:
                code_of[name] = len(code_of)
                self._add_contig(name)
        return [code_of[name] for name in names]

    def _add_contig(self, name: str) -> None:
        self.contigs, self.contig_lengths = (*self.contigs, name), (*self.contig_lengths, 0)

    def fault(self, where: str, what: str, remedy: str) -> UserError:
        """A :class:`UserError` about this file."""
        return UserError(f"{self.path}: {where}: {what}; {remedy}")

    def where(self, site: Site) -> str:
        """Contig and position of a site, for errors."""
        return f"{self.contigs[site.contig_code]}:{site.pos}"

    def sites(self, part: Part = WHOLE) -> Iterator[Site]:
        """Iterate over the sites in file order, from the first one on, or over those of a part of the file."""
        self.records = 0
        self.skipped = {}
        self._contigs_read = {}
        self._first_pos = self._last_pos = -1
        code_of = {name: code for code, name in enumerate(self.contigs)}
        at_pos: set[tuple[str, str, str]] = set()
        contig, code, pos = b"", -1, -1
        for line in self._text.lines(part):
            fields = line.split(b"\t", FIXED_COLUMNS)
            if not self.samples:
                fields = self._without_samples(line, fields)
            if len(fields) <= FIXED_COLUMNS or not fields[1].isdigit() or not fields[0]:
                raise self._malformed(line)
            if _CONTROL.search(line, 0, len(line) - len(fields[9])):
                raise self._malformed(line, "it has a control character, such as a carriage return, in a field")
            here = int(fields[1]) if len(fields[1]) <= _MOST_DIGITS else _LARGEST_POS + 1
            if fields[0] != contig:
                contig, name = fields[0], as_text(fields[0])
                if name in self._contigs_read:
                    raise self.fault(
                        f"{name}:{here}", f"contig {name} appears a second time", "sort it (bcftools sort)"
                    )
                self._contigs_read[name] = None
                if not _CONTIG.fullmatch(name):
                    raise self.fault(
                        f"{name}:{here}",
                        "the contig's name has a blank or one of , < > \"",
                        "rename it (bcftools annotate --rename-chrs)",
                    )
                if name not in code_of:
                    code_of[name] = len(code_of)
                    self._add_contig(name)
                code, pos = code_of[name], -1
            if here != pos:
                if here < pos:
                    raise self.fault(
                        f"{self.contigs[code]}:{here}", f"it follows position {pos}", "sort the file (bcftools sort)"
                    )
                if here > _LARGEST_POS:
                    raise self.fault(
                        f"{self.contigs[code]}:{as_text(fields[1][:_MOST_DIGITS])}",
                        f"no position exceeds {_LARGEST_POS:,}",
                        "correct the record",
                    )
                at_pos.clear()
                pos = self._last_pos = here
                self._first_pos = here if self._first_pos < 0 else self._first_pos
            yield from self._split(code, pos, fields, at_pos)
            self.records += 1

    def _split(self, code: int, pos: int, fields: list[bytes], at_pos: set[tuple[str, str, str]]) -> Iterator[Site]:
        """The sites of a record; ``at_pos`` holds (REF, ALT, extent) of those before it at its position."""
        name, ref, text = as_text(fields[2]) or _NO_ID, as_text(fields[3]), as_text(fields[4])
        if ref not in _BASES and not _SEQUENCE.fullmatch(ref):
            raise self.fault(f"{self.contigs[code]}:{pos}", f"REF is {shown(ref)!r}", "give a sequence of bases")
        ref = ref.upper()
        if text == NO_ALT or text in _NOT_AN_ALLELE:
            if self._without_alt:
                yield Site(code, pos, name, ref, NO_ALT, "", self.records, 0, 0, *fields[7:10])
            else:
                self._exclude(code, pos, name, ref, text, "no ALT")
            return
        alts = text.split(",")
        for number, alt in enumerate(alts, start=1):
            extent = ""
            if alt in _BASES or _SEQUENCE.fullmatch(alt):
                alt = alt.upper()
            elif alt in _NOT_AN_ALLELE:
                self._exclude(code, pos, name, ref, alt, f"ALT {alt} is no allele")
                continue
            elif not _OTHER_ALT.fullmatch(alt):
                raise self.fault(
                    f"{self.contigs[code]}:{pos}",
                    f"ALT is {shown(text)!r}",
                    "give bases, *, a breakend or a symbolic allele such as <DEL>, separated by commas",
                )
            elif alt.startswith("<"):
                extent = self._extent(f"{self.contigs[code]}:{pos}", fields[7], number, len(alts))
            if alt == ref:
                raise self.fault(
                    f"{self.contigs[code]}:{pos}", f"REF and ALT are both {shown(ref)}", "correct the record"
                )
            if (ref, alt, extent) in at_pos:
                if self._duplicates == "error":
                    raise self.fault(
                        f"{self.contigs[code]}:{pos}",
                        f"site {shown(ref)}>{shown(alt)} appears twice",
                        "remove one (bcftools norm --rm-dup exact), or keep the first with --duplicates first",
                    )
                self._exclude(code, pos, name, ref, alt, "duplicate")
                continue
            at_pos.add((ref, alt, extent))
            yield Site(code, pos, name, ref, alt, extent, self.records, number, len(alts), *fields[7:10])

    def _without_samples(self, line: bytes, fields: list[bytes]) -> list[bytes]:
        """Columns of a record of a file without sample columns, with empty ones in place of FORMAT and samples."""
        if len(fields) not in (FIXED_COLUMNS - 1, FIXED_COLUMNS):
            raise self._malformed(line, "it is not a VCF record without genotypes, of a header without samples")
        return fields + [b""] * (FIXED_COLUMNS + 1 - len(fields))

    def _extent(self, where: str, info: bytes, allele: int, alleles: int) -> str:
        """END and SVLEN of a symbolic ALT, as INFO gives them: a value each, or one for each ALT."""
        found: dict[str, int] = {}
        for key, value in sorted(_EXTENT.findall(info)):
            each = value.split(b",")
            value = each[allele - 1] if len(each) == alleles else value
            if value == b".":
                continue
            if not _INTEGER.fullmatch(value) or abs(int(value)) > _LARGEST_POS:
                raise self.fault(
                    where,
                    f"INFO {key.decode()} is {shown(value)!r}",
                    "give a whole number for each symbolic ALT",
                )
            found.setdefault(key.decode(), int(value))
        return ";".join(f"{key}={value}" for key, value in found.items())

    def exclude(self, site: Site, reason: str) -> None:
        """Leave out a site that was read, and count it."""
        self._exclude(site.contig_code, site.pos, site.id, site.ref, site.alt, reason)

    def _exclude(self, code: int, pos: int, name: str, ref: str, alt: str, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if self.on_excluded is not None:
            self.on_excluded(Excluded(self.contigs[code], pos, name, ref, alt, reason))

    def _malformed(self, line: bytes, what: str = "it is not a VCF record with genotypes") -> UserError:
        start = as_text(line[:60]).replace("\t", " ")
        if line.startswith(b"#"):
            what = "it is a header line among the records, as of files put together without `bcftools concat`"
        return self.fault(f"record {start!r}", what, "correct it or remove it")

    def columns(self, site: Site) -> list[bytes]:
        """Sample columns of a site's record, N texts; raises :class:`UserError` if their number is wrong."""
        number = site.body.count(b"\t") + 1  # before they are split, as they may be millions
        if number != len(self.samples):
            raise self.fault(
                self.where(site),
                f"it has {number} genotype columns for {len(self.samples)} samples",
                "write or copy the file again",
            )
        return site.body.split(b"\t")

    def calls(self, site: Site) -> Calls:
        """Calls of all samples at a site; raises :class:`UserError` for a genotype that is none."""
        if site.format == b"GT":
            if site.alleles <= 1 and (found := decode_biallelic(site.body, len(self.samples))) is not None:
                if site.alleles == 0 and found.alleles.any():
                    raise self._bad_genotype(site, int(found.alleles.argmax()) // 2, "has an allele above 0")
                return found
            texts = self.columns(site)
        else:
            texts = self.genotypes(site)
        try:
            return self._decoder.decode(texts, site.allele, site.alleles)
        except BadGenotype as error:
            raise self._bad_genotype(site, error.sample, error.problem) from error

    def genotypes(self, site: Site) -> list[bytes]:
        """GT texts of a site's record, N; raises :class:`UserError` if FORMAT has no GT."""
        keys = site.format.split(b":")
        if b"GT" not in keys:
            raise self.fault(
                self.where(site), f"FORMAT {as_text(site.format)} has no GT", "give a file with genotypes (GT)"
            )
        columns = self.columns(site)
        # As many colons as FORMAT has for every sample is the usual case; a column may have fewer, but not more.
        if site.body.count(b":") != (len(keys) - 1) * len(columns):
            for sample, column in enumerate(columns):
                if column.count(b":") >= len(keys):
                    raise self.fault(
                        self.where(site),
                        f"sample {self.samples[sample]} has {shown(column)!r}, more values than FORMAT "
                        f"{shown(site.format)} has keys",
                        "correct the record",
                    )
        place = keys.index(b"GT")
        if place == 0:
            return [column.partition(b":")[0] for column in columns]
        parts = (column.split(b":") for column in columns)
        return [each[place] if place < len(each) else b"." for each in parts]

    def _bad_genotype(self, site: Site, sample: int, problem: str) -> UserError:
        text = as_text(self.genotypes(site)[sample])
        return self.fault(
            self.where(site),
            f"the genotype {shown(text)!r} of sample {self.samples[sample]} {problem}",
            f"correct the record or drop it (bcftools view -t ^{self.where(site)})",
        )


def site_table(reader: VariantReader, rows: list[Site]) -> SiteTable:
    """Site table of sites read by ``reader``."""
    return SiteTable(
        contigs=reader.contigs,
        contig_lengths=reader.contig_lengths,
        contig=np.array([row.contig_code for row in rows], dtype=np.int32),
        pos=np.array([row.pos for row in rows], dtype=np.int64),
        ref=[row.ref for row in rows],
        alt=[row.alt for row in rows],
        id=[row.id for row in rows],
        extent={number: row.extent for number, row in enumerate(rows) if row.extent},
        record=np.array([row.record for row in rows], dtype=np.int64),
    )
