"""Files: text that the user names, and results, which appear whole or not at all."""

from __future__ import annotations

import codecs
import errno
import glob
import gzip
import io
import json
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embrag_ds.errors import UserError

_GZIP = b"\x1f\x8b"
_MOST_TEXT_BYTES = 1 << 28
_NO_TEXT = "not plain or gzipped text"
_MARKS = {  # the longer one first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_LAST_POSITION = 1 << 62
_LONGEST_NUMBER = 20
_TOKEN_BYTES = 4
_LONGEST_NAME = 60  # characters; in UTF-8 and with our prefix they fit the 255 bytes that a name may have
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def read_lines(path: Path, what: str) -> list[str]:
    """Lines of a plain, gzipped or bgzipped text file; ``what`` describes it in errors.

    Lines end with LF, CRLF or CR, and only there. A byte-order mark is left out, and one of UTF-16 or UTF-32 decides
    the encoding. Otherwise the text is UTF-8. A byte that is not becomes a surrogate (``surrogateescape``), as in names
    from variant files, so that equal names are equal strings and the same byte is written again. Raises
    :class:`UserError` for what cannot be read, is no text, or has more than 256 MiB.
    """
    try:
        text = decode_text(_content(path))
    except (OSError, EOFError, zlib.error, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or (fault if type(fault) is ValueError else _NO_TEXT)
        raise UserError(f"{path}: cannot read the {what} ({reason}); check the path or write it again") from fault
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def split_fields(line: str) -> list[str]:
    """Fields of a line, without blanks around them: between tabs where it has any, else between spaces.

    Fields between tabs may be empty, but not the last ones: trailing blanks and tabs are no fields. A blank line has no
    field.
    """
    line = line.rstrip()
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def read_position(text: str) -> int:
    """A position in base pairs as a table gives it, and at most 2^62; raises ValueError for anything but digits.

    ``int`` alone takes ``1_000``, signs and the digits of any script.
    """
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return min(int(text), _LAST_POSITION) if len(text) < _LONGEST_NUMBER else _LAST_POSITION


def _content(path: Path) -> bytes:
    """Bytes of a file, decompressed."""
    with path.open("rb") as stream:
        head = stream.read(len(_GZIP))
        # A pipe cannot be read twice.
        whole = io.BytesIO(head + stream.read(_MOST_TEXT_BYTES + 1)) if not stream.seekable() else stream
        whole.seek(0)
        # Bounded, because a small file may expand to any size.
        limited = gzip.GzipFile(fileobj=whole) if head == _GZIP else whole
        content = limited.read(_MOST_TEXT_BYTES + 1)
    if len(content) > _MOST_TEXT_BYTES:
        raise ValueError(f"it has more than {_MOST_TEXT_BYTES:,} bytes of text")
    return content


def decode_text(content: bytes) -> str:
    """Text of a file's bytes, as :func:`read_lines` has it, but with its line ends; raises ValueError for no text."""
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            errors = "surrogateescape" if encoding == "utf-8" else "strict"
            text = content[len(mark) :].decode(encoding, errors)
            break
    else:
        text = content.decode("utf-8", "surrogateescape")
    if "\0" in text:
        raise ValueError(_NO_TEXT)
    return text


def source_of(path: Path) -> Path:
    """The file that ``path`` names; ``-`` is standard input."""
    return Path("/dev/stdin") if str(path) == "-" else path


def write_text(path: Path, text: str) -> None:
    """Write a text file as :func:`written` does."""
    with written(path) as temporary:
        # Surrogates stand for bytes that are no UTF-8: the same bytes come out.
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, as :func:`written` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def written_over(path: Path, content: bytes) -> bool:
    """Write over a file in place, and say whether that was possible.

    What is shorter than a block of the disk needs no space, unlike a new file. But a reader may see half of it.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            length = file.write(content)
            file.truncate()
            os.fsync(file.fileno())
    except OSError:
        return False
    return length == len(content)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file that replaces ``path`` when the block ends without an exception.

    It lies in the same folder and its name ends as ``path`` does, so that suffixes keep their meaning. It is flushed to
    the disk before it takes the name, and gets the permissions of any new file of the user. After an exception (SIGTERM
    is one under :func:`embrag_ds.cli.command.run_command`) ``path`` is what it was, and nothing else is left. A link is
    followed. What is no regular file (``/dev/stdout``) is written directly. Raises :class:`UserError` for a missing or
    unwritable folder, a folder in place of ``path``, and a full disk.
    """
    with written_together(path) as (temporary,):
        yield temporary


@contextmanager
def written_together(path: Path, *companions: Path, obsolete: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Like :func:`written` for ``path`` and companions of no use without it, such as its index.

    Old companions and ``obsolete`` ones are removed just before ``path`` is replaced, and the new ones come after it.
    So a process that is killed in between leaves a file without companions, never one with another file's.
    """
    targets = [_followed(each) for each in (path, *companions)]
    temporaries = [_temporary(each) if _is_regular(each) else each for each in targets]
    replaced = [pair for pair in zip(temporaries, targets, strict=True) if pair[0] != pair[1]]
    with _faults_of(path, {*temporaries, *targets, *obsolete}):
        try:
            modes = [_create(temporary, target) for temporary, target in replaced]
            yield temporaries
            for (temporary, _), mode in zip(replaced, modes, strict=True):
                temporary.chmod(mode)  # some libraries set another, or put a file of their own in its place
                flush(temporary)
            for each in (*targets[1:], *obsolete):
                each.unlink(missing_ok=True)
            for temporary, target in replaced:
                os.replace(temporary, target)
            for folder in {target.parent for _, target in replaced}:
                flush(folder)
        finally:
            for temporary, _ in replaced:
                temporary.unlink(missing_ok=True)


@contextmanager
def folder_written(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces the folder ``path`` when the block ends without an exception.

    Otherwise like :func:`written`. An old folder has to make room first, so for a moment there is none.
    """
    target = _followed(path)
    temporary, old = _temporary(target), _temporary(target)
    with _faults_of(path, {temporary, target, old}):
        try:
            if os.path.exists(target) and not os.path.isdir(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            temporary.mkdir()
            yield temporary
            for each in (*temporary.rglob("*"), temporary):
                flush(each)
            _exchange(target, temporary, old)
            flush(target.parent)
        finally:
            for each in (temporary, old):
                shutil.rmtree(each, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of folders for ``path``; nobody else may be writing one now."""
    name = glob.escape(path.name[-_LONGEST_NAME:])
    for leftover in path.parent.glob(f".tmp-{'?' * 2 * _TOKEN_BYTES}-{name}"):
        shutil.rmtree(leftover, ignore_errors=True)


def unused(path: Path) -> Path:
    """The path, or one with a number behind its name if something is there."""
    tried, number = path, 1
    while os.path.lexists(tried):
        number += 1
        tried = path.with_name(f"{path.name}-{number}")
    return tried


def make_folder(path: Path) -> None:
    """Make a folder for results, and those above it, unless it is there. Raises :class:`UserError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(f"{path}: cannot make this folder ({fault.strerror}); choose another") from fault


def require_writable(path: Path) -> None:
    """Raise the :class:`UserError` that :func:`written` would begin with: for before work that takes a while."""
    target = _followed(path)
    temporary = _temporary(target)
    with _faults_of(path, {target, temporary}):
        if _is_regular(target):
            _create(temporary, target)
            temporary.unlink()


def _followed(path: Path) -> Path:
    # Here and below by `os.path`, which takes what it may not look at for absent: what follows says why it fails.
    return path.resolve() if os.path.islink(path) else path


def _is_regular(path: Path) -> bool:
    """Whether a regular file is there, or nothing yet (or a folder, which is refused later)."""
    return not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path)


def _temporary(path: Path) -> Path:
    # Not by process number: machines may share the folder, and threads the process.
    return path.with_name(f".tmp-{secrets.token_hex(_TOKEN_BYTES)}-{path.name[-_LONGEST_NAME:]}")


def _create(temporary: Path, target: Path) -> int:
    """Make an empty file and return its permissions."""
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as fault:
        if fault.errno != errno.EINVAL:  # of a file system that cannot
            raise OSError(fault.errno, fault.strerror, str(path)) from fault
    finally:
        os.close(descriptor)


def _exchange(target: Path, temporary: Path, old: Path) -> None:
    try:
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


@contextmanager
def _faults_of(path: Path, own: set[Path]) -> Iterator[None]:
    """Turn the system's faults in writing ``path`` into a :class:`UserError`: of its ``own`` files, and of a full disk.

    Whatever else fails in the block is raised as it is.
    """
    try:
        yield
    except OSError as fault:
        named = None if fault.filename is None else Path(os.fsdecode(fault.filename))
        inside = named is None or not own.isdisjoint(named.parents)
        if named in own or (inside and fault.errno in _NO_ROOM):
            raise UserError(f"{path}: {_complaint(fault, _followed(path).parent)}") from fault
        raise


def _complaint(fault: OSError, folder: Path) -> str:
    if fault.errno in _NO_ROOM:
        return f"cannot write it ({fault.strerror}); free some space in {folder}, or choose another folder"
    if fault.errno in _FORBIDDEN:
        return f"the folder {folder} cannot be written to; check its permissions, or choose another"
    if isinstance(fault, IsADirectoryError):
        return "it is a folder; give the name of a file"
    if isinstance(fault, FileExistsError):
        return "it is a file; choose another folder"
    if not os.path.isdir(folder):
        return f"the folder {folder} does not exist; create it"
    return f"cannot write it ({fault.strerror}); choose another folder"
