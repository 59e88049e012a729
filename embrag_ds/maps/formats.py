"""Formats of genetic maps: which columns of a file are contig, bp and cM, and whether their values can be a map."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.files import read_lines
from embrag_ds.variants.header import A_MAP, foreign

ANY_CONTIG = ""
"""Contig of the points of a map without a column for it."""
LEAST_RATE, MOST_RATE = 1e-3, 1e3
"""Bounds of a contig's mean rate, in cM per Mb; that of humans is about 1, of yeast about 300."""
_MOST_BP = 2**31 - 1
_MOST_CM = 1e5
_LONGEST_NAME = 60  # characters of a contig in errors
_GIVE_A_MAP = "give --map a PLINK, HapMap or SHAPEIT genetic map, or leave it out"
_VCF = ("##fileformat=VCF", "#CHROM\tPOS\tID\tREF")
_FIRST_BYTES = 64
_NO_POINTS = "it has no points; give a PLINK, HapMap or SHAPEIT genetic map"

Points = dict[str, tuple[np.ndarray, np.ndarray]]
"""Points (bp, cM) of every contig, two float64 [n]. bp increases and cM does not decrease."""


@dataclass(frozen=True)
class Columns:
    """Numbers of a map's columns, from 0. ``form`` names the whole file in errors.

    A map of intervals has ``begin`` too: its cM hold at the end of the interval, which is ``bp``. With ``rate``, in
    cM/Mb, those at its beginning follow.
    """

    form: str
    bp: int
    cm: int
    contig: int | None = None
    begin: int | None = None
    rate: int | None = None


@dataclass(frozen=True)
class MapFile:
    """Points of a map's contigs, and of those without a plausible map the reason, ready to be an error's end."""

    points: Points
    faults: dict[str, str]


_NAMES = {
    "contig": ("chr", "chrom", "chromosome", "contig", "seqnames"),
    "bp": ("pos", "position", "bp", "pposition"),
    "cM": ("cm", "map", "genetic_map", "gposition"),
    "begin": ("begin", "start"),
    "end": ("end",),
    "rate": ("rate", "combined_rate", "rrate", "cmpermb"),
}
"""Names of columns, in small letters, up to a parenthesis: ``Map(cM)`` is ``map``."""

_WITHOUT_HEADER = {
    3: (
        Columns("SHAPEIT's columns pos, chr, cM", contig=1, bp=0, cm=2),
        Columns("minimac4's columns chr, pos, cM", contig=0, bp=1, cm=2),
    ),
    4: (
        Columns("PLINK's columns chr, id, cM, bp", contig=0, cm=2, bp=3),
        Columns("Eagle's columns chr, pos, cM/Mb, cM", contig=0, bp=1, cm=3),
    ),
    5: (Columns("deCODE's columns chr, begin, end, cM/Mb, cM", contig=0, begin=1, bp=2, rate=3, cm=4),),
}
"""Forms of a file without a header line, by the number of columns."""
_WITHOUT_CONTIG = Columns("SHAPEIT's columns pos, cM/Mb, cM", bp=0, cm=2)
"""Form of three columns of which the second has decimal numbers."""
_NAME_THEM = "write a first line that names each column, such as 'chr pos cM'"


def read_map_file(path: Path) -> MapFile:
    """Read a plain, gzipped or bgzipped map of columns between blanks; lines that start with ``#`` are comments.

    A first line without numbers names the columns, or else the comment above the first line that has as many words as
    there are columns. Without either, the number of columns tells the form, or else the values do: with one form alone
    they have to make a map.

    Raises :class:`UserError` for columns that cannot be told, values that are no whole bp or finite cM, bp that do not
    increase and cM that decrease, and if no contig has a plausible map.
    """
    lines = _lines(path)
    first = next(_rows(lines), None)
    if first is None:
        raise UserError(f"{path}: {_NO_POINTS}")
    number, fields = first
    if not any(map(_is_number, fields)):
        return _read(path, lines, _named_columns(path, number, fields), fields)
    named = _commented_columns(path, lines[: number - 1], len(fields))
    if named is not None:
        return _read(path, lines, named, fields)
    return _told_by_values(path, lines, number, fields)


def _lines(path: Path) -> list[str]:
    """Lines of the map; raises :class:`UserError` for another kind of file, by its name where it is known."""
    try:
        lines = read_lines(path, "genetic map")
    except UserError:
        if (kind := _binary_kind(path)) is None:
            raise
        raise UserError(f"{path}: it is {kind}, not a genetic map; {_GIVE_A_MAP}") from None
    first = next((line for line in lines if line.strip()), "")
    if first.startswith(_VCF):
        raise UserError(f"{path}: it is a VCF, not a genetic map; {_GIVE_A_MAP}")
    return lines


def _binary_kind(path: Path) -> str | None:
    """What a file is that is no text, None where it is not known or cannot be read a second time."""
    if not path.is_file():
        return None
    for opened in (gzip.open, open):
        with suppress(OSError, EOFError, zlib.error), opened(path, "rb") as stream:
            start = stream.read(_FIRST_BYTES)
            if start.startswith(b"BCF"):
                return "a BCF"
            found = foreign(start, path)
            return None if found is None or found[0] == A_MAP else found[0]
    return None


def subject(contig: str) -> str:
    """The contig as the subject of a sentence about a map."""
    return "it" if contig == ANY_CONTIG else f"contig {contig[:_LONGEST_NAME]}"


def _rows(lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line but blank ones and comments."""
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if fields and not fields[0].startswith("#"):
            yield number, fields


def _named_columns(path: Path, number: int, fields: list[str]) -> Columns:
    """Columns by the names in a header line."""
    names = [field.lower().strip('"').lstrip("#").partition("(")[0] for field in fields]
    found = {what: next((names.index(each) for each in known if each in names), None) for what, known in _NAMES.items()}
    intervals = found["bp"] is None and found["begin"] is not None
    bp, cm = found["end"] if intervals else found["bp"], found["cM"]
    listed = ", ".join(fields)[:200]
    if bp is None or cm is None:
        what, known = ("cM", _NAMES["cM"]) if bp is not None else ("bp", _NAMES["end" if intervals else "bp"])
        raise UserError(
            f"{path}: line {number}: no {what} column among {listed}; name one of them {' or '.join(sorted(known))}"
        )
    begin, rate = (found["begin"], found["rate"]) if intervals else (None, None)
    return Columns(f"the header's columns {listed}", bp=bp, cm=cm, contig=found["contig"], begin=begin, rate=rate)


def _commented_columns(path: Path, above: Sequence[str], width: int) -> Columns | None:
    """Columns by the nearest comment of ``width`` words that names them (``#chrom pos cM``), or None."""
    for number, line in reversed(list(enumerate(above, start=1))):
        fields = line.replace("#", " ").split()
        if len(fields) == width:
            try:
                return _named_columns(path, number, fields)
            except UserError:
                continue
    return None


def _told_by_values(path: Path, lines: Sequence[str], number: int, first: list[str]) -> MapFile:
    """Read a file without a header line, whose first line with numbers is ``first``, line ``number``."""
    forms = _WITHOUT_HEADER.get(len(first), ())
    if len(first) == 3 and any(len(fields) > 1 and _is_decimal(fields[1]) for _, fields in _rows(lines)):
        forms = (_WITHOUT_CONTIG,)
    if not forms:
        raise UserError(
            f"{path}: line {number}: {len(first)} columns without a header line are no known map; {_NAME_THEM}"
        )
    fitting = [form for form in forms if _has_numbers(first, form)]
    found: list[tuple[Columns, MapFile]] = []
    faults: list[UserError] = []
    for form in fitting:
        try:
            found.append((form, _read(path, lines, form, first)))
        except UserError as fault:
            faults.append(fault)
    if len(found) == 1:
        return found[0][1]
    if found:
        both = " and as ".join(form.form for form, _ in found)
        raise UserError(f"{path}: no header line, and its numbers make a map as {both}; {_NAME_THEM}")
    if _is_without_cm(lines):
        raise UserError(
            f"{path}: line {number}: three columns that end with bp are PLINK's .map without cM (chr, id, bp); "
            "give a map with cM, or leave out --map"
        )
    if len(faults) == 1:
        raise faults[0]
    why = [str(fault).removeprefix(f"{path}: ").partition(";")[0] for fault in faults]
    raise UserError(
        f"{path}: no header line, and its numbers make no map as {', nor as '.join(form.form for form in forms)} "
        f"({', and '.join(why) or f'line {number} has other columns'}); {_NAME_THEM}, or correct the map"
    )


def _has_numbers(fields: list[str], form: Columns) -> bool:
    """Whether a line has numbers where the form has them."""
    columns = (form.bp, form.cm, form.begin, form.rate)
    return all(_is_number(fields[column]) for column in columns if column is not None)


def _is_without_cm(lines: Sequence[str]) -> bool:
    """Whether all lines look like contig, id and bp."""
    return all(len(row) == 3 and not _is_number(row[1]) and row[2].isdecimal() for _, row in _rows(lines))


def _read(path: Path, lines: Sequence[str], columns: Columns, first: list[str]) -> MapFile:
    """Points by the columns, of which ``first`` is the first line."""
    points = _points(path, lines, columns, first)
    if not points:
        raise UserError(f"{path}: {_NO_POINTS}")
    faults = {contig: fault for contig in points if (fault := _fault(*points[contig], columns))}
    if len(faults) == len(points):
        contig, fault = next(iter(faults.items()))
        raise UserError(f"{path}: {subject(contig)} {fault}")
    return MapFile({contig: each for contig, each in points.items() if contig not in faults}, faults)


def _points(path: Path, lines: Sequence[str], columns: Columns, first: list[str]) -> Points:
    """Points of every contig; raises :class:`UserError` for the first line that is at fault."""
    found = _points_at_once(lines, columns, first)
    return _points_line_by_line(path, lines, columns, first) if found is None else found


def _points_at_once(lines: Sequence[str], columns: Columns, first: list[str]) -> Points | None:
    """Points of every contig by operations on whole columns; None where lines are intervals or at fault."""
    if columns.begin is not None:
        return None
    header = None if any(map(_is_number, first)) else first
    texts: tuple[list[str], list[str], list[str]] = ([], [], [])
    at, there, names = (each.append for each in texts)
    for line in lines:  # as _rows, which takes a third of the time for itself
        fields = line.split()
        if not fields or fields[0][0] == "#" or fields == header:
            continue
        if len(fields) != len(first):
            return None
        at(fields[columns.bp])
        there(fields[columns.cm])
        names(ANY_CONTIG if columns.contig is None else fields[columns.contig])
    try:
        if any("_" in "".join(each) for each in texts[:2]):  # float takes it
            return None
        bp, cm = (np.array(list(map(float, each))) for each in texts[:2])
    except ValueError:
        return None
    with np.errstate(invalid="ignore"):  # of infinities
        good = (bp >= 0) & (bp <= _MOST_BP) & (bp == np.floor(bp)) & (np.abs(cm) <= _MOST_CM)
    if not good.all():
        return None
    codes: dict[str, int] = {}
    contigs = np.array([codes.setdefault(name, len(codes)) for name in texts[2]])
    if any('"' in name for name in codes):  # one contig may have several spellings
        return None
    points = {name: (bp[contigs == code], cm[contigs == code]) for name, code in codes.items()}
    return points if all(_increase(*each) for each in points.values()) else None


def _increase(bp: np.ndarray, cm: np.ndarray) -> bool:
    """Whether bp increase and cM do not decrease."""
    return bool((np.diff(bp) > 0).all() and (np.diff(cm) >= 0).all())


def _points_line_by_line(path: Path, lines: Sequence[str], columns: Columns, first: list[str]) -> Points:
    bps: dict[str, list[float]] = {}
    cms: dict[str, list[float]] = {}
    header = None if any(map(_is_number, first)) else first
    for number, fields in _rows(lines):
        if fields == header:
            continue  # files that were joined repeat it
        where = f"{path}: line {number}"
        if len(fields) != len(first):
            raise UserError(
                f"{where}: cannot find numbers for bp and cM: it has {len(fields)} columns, "
                f"the first line {len(first)}; correct the line"
            )
        contig = ANY_CONTIG if columns.contig is None else fields[columns.contig].strip('"')
        bp, cm = bps.setdefault(contig, []), cms.setdefault(contig, [])
        for at, there in _points_of_line(where, fields, columns, (bp[-1], cm[-1]) if bp else (-1.0, -_MOST_CM)):
            if bp and at <= bp[-1]:
                raise UserError(
                    f"{where}: position {at:.0f} of {_owner(contig)} follows {bp[-1]:.0f}; "
                    "sort the map by bp and keep one line a position"
                )
            if cm and there < cm[-1]:
                raise UserError(
                    f"{where}: {there:g} cM on {_owner(contig)} follows {cm[-1]:g} cM; "
                    "correct the map: cM cannot decrease"
                )
            bp.append(at)
            cm.append(there)
    return {contig: (np.array(bps[contig]), np.array(cms[contig])) for contig in bps}


def _points_of_line(
    where: str, fields: list[str], columns: Columns, last: tuple[float, float]
) -> list[tuple[float, float]]:
    """Points (bp, cM) of a line: one, or two for an interval that begins beyond ``last``, the point before."""
    try:
        bp, cm = _number(fields[columns.bp]), _number(fields[columns.cm])
        begin = bp if columns.begin is None else _number(fields[columns.begin])
        rate = 0.0 if columns.rate is None else _number(fields[columns.rate])
    except ValueError as error:
        raise UserError(
            f"{where}: cannot find numbers for bp and cM in {' '.join(fields)[:60]!r}; correct the line"
        ) from error
    points = [(bp, cm)]
    if columns.begin is not None and begin >= bp:
        raise UserError(f"{where}: the interval begins at {begin:.15g} and ends at {bp:.15g}; correct the line")
    if columns.rate is not None and begin > last[0]:
        points.insert(0, (begin, max(last[1], cm - rate * (bp - begin) * 1e-6)))
    for at, there in points:
        if not (math.isfinite(at) and math.isfinite(there)):
            raise UserError(f"{where}: bp and cM must be finite; correct the line")
        if not (0 <= at <= _MOST_BP and at == int(at)):
            raise UserError(
                f"{where}: {at:.15g} bp, by {columns.form}, is no whole number from 0 to {_MOST_BP}; "
                f"cM and bp may be exchanged: {_NAME_THEM}, or correct the line"
            )
        if abs(there) > _MOST_CM:
            raise UserError(
                f"{where}: {there:g} cM, by {columns.form}, is beyond {_MOST_CM:.0f}; "
                f"cM and bp may be exchanged: {_NAME_THEM}, or correct the line"
            )
    return points


def _fault(bp: np.ndarray, cm: np.ndarray, columns: Columns) -> str | None:
    """Reason why points are no map, with a remedy, or None."""
    if len(bp) < 2 or cm[0] == cm[-1]:
        return f"needs at least two points with different cM, by {columns.form}; give its whole map, or leave out --map"
    rate = mean_rate(bp, cm)
    if not LEAST_RATE <= rate <= MOST_RATE:
        return (
            f"has {rate:.3g} cM/Mb on average, by {columns.form}, which is not within {LEAST_RATE:g} to {MOST_RATE:g}; "
            f"cM and bp may be exchanged: {_NAME_THEM}, or correct the map"
        )
    return None


def mean_rate(bp: np.ndarray, cm: np.ndarray) -> float:
    """Mean rate between the first and the last point, in cM per Mb."""
    return float((cm[-1] - cm[0]) / (bp[-1] - bp[0]) * 1e6)


def _owner(contig: str) -> str:
    return "the map" if contig == ANY_CONTIG else f"contig {contig[:_LONGEST_NAME]}"


def _number(text: str) -> float:
    if "_" in text:  # Python's way to group digits, which no map has
        raise ValueError(text)
    return float(text)


def _is_number(text: str) -> bool:
    try:
        _number(text)
    except ValueError:
        return False
    return True


def _is_decimal(text: str) -> bool:
    """Whether a text is a number that no contig is called by."""
    return _is_number(text) and ("." in text or not _number(text).is_integer())
