"""Every container of each file: compressed, piped, damaged, or another format."""

from __future__ import annotations

import gzip
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cases.files import FILES, ROLES, Cases, assert_base, assert_refused, at, bgzipped, column, converted, encoded

EOF = 28
"""Bytes of the block that ends a bgzipped file."""


def _cut(path: Path, end: int) -> Path:
    path.write_bytes(path.read_bytes()[:end])
    return path


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


MakeFile = Callable[[bytes, Path], Path]
TAKEN: dict[str, tuple[MakeFile, tuple[str, ...]]] = {
    "bgzip": (lambda text, folder: bgzipped(text, folder / "in.vcf.gz"), ()),
    "bgzip without its last block": (
        lambda text, folder: _cut(bgzipped(text, folder / "in.vcf.gz"), -EOF),
        ("it has no end-of-file block",),
    ),
    "gzip": (lambda text, folder: _written(folder / "in.vcf.gz", gzip.compress(text)), ()),
    "gzip in two parts": (
        lambda text, folder: _written(folder / "in.gz", gzip.compress(text[:99]) + gzip.compress(text[99:])),
        (),
    ),
    "BCF": (lambda text, folder: converted(text, folder / "in.bcf"), ()),
    "BCF without its last block": (
        lambda text, folder: _cut(converted(text, folder / "in.bcf"), -EOF),
        ("it has no end-of-file block",),
    ),
    "BCF without compression": (lambda text, folder: converted(text, folder / "in.bcf", "-Ou"), ()),
    "an odd name": (lambda text, folder: _written(folder / "my file, é.txt", text), ()),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", TAKEN)
def test_containers(cases: Cases, name: str, role: str) -> None:
    make, warnings = TAKEN[name]
    path = make(encoded(FILES[role]), cases.new_folder())
    for _ in range(2):  # once from the file, and once from the cache
        assert_base(cases.of(role, path), cases.base(role), *warnings)


@pytest.mark.parametrize("role", ROLES)
def test_a_bcf_with_bytes_that_are_not_utf8(cases: Cases, role: str) -> None:
    text = at(300, column(2, "\udce9"))(FILES[role])
    found = cases.of(role, converted(encoded(text), cases.new_folder() / "in.bcf"))
    assert_base(found, cases.base(role))
    if role == "panel":
        assert [each[2] for each in found.records] == ["a", "b", "\udce9", "d", "e", "f", "g", "h"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("compress", [lambda text: text, gzip.compress])
def test_pipes(cases: Cases, role: str, compress: Callable[[bytes], bytes]) -> None:
    pipe = cases.new_folder() / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(compress(encoded(FILES[role]))))
    writer.start()
    assert_base(cases.of(role, pipe), cases.base(role))
    writer.join()


@pytest.mark.parametrize("role", ROLES)
def test_damage_is_named(cases: Cases, role: str) -> None:
    folder = cases.new_folder()
    text = encoded(FILES[role])
    first, rest = text[: text.index(b"7\t600")], text[text.index(b"7\t600") :]
    cut = _written(folder / "cut.gz", gzip.compress(text)[:-12])
    flipped = bytearray(
        bgzipped(first, folder / "a.gz").read_bytes()[:-EOF] + bgzipped(rest, folder / "b.gz").read_bytes()
    )
    flipped[-EOF - 20] ^= 0xFF
    assert_refused(cases.of(role, cut), role, "copy the file again")
    assert_refused(cases.of(role, _written(folder / "flipped.gz", bytes(flipped))), role, "copy the file again")


OTHERS = {
    "xz": (lzma.compress(b"text"), "xz -d"),
    "UTF-16": (FILES["panel"].encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    ".bed": (b"\x6c\x1b\x01\0\0", "plink2 --bfile"),
    "zip": (b"PK\3\4" + b"\0" * 30, "unzip"),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_have_a_remedy(cases: Cases, name: str, role: str) -> None:
    content, remedy = OTHERS[name]
    assert_refused(cases.of(role, content), role, "not a VCF or BCF", remedy)


@pytest.mark.parametrize("role", ROLES)
def test_what_is_no_file(cases: Cases, role: str) -> None:
    folder = cases.new_folder()
    for path, what in ((folder, "Is a directory"), (folder / "absent", "No such file"), (Path("/dev/null"), "empty")):
        assert_refused(cases.of(role, path), role, what)


def test_a_broken_panel_leaves_nothing_in_the_cache(cases: Cases) -> None:
    before = {each.name for each in cases.cache.iterdir() if each.is_dir()}
    for edit in (column(2, "c\rc"), column(4, "."), column(1, "x")):
        path = _written(cases.new_folder() / "panel.vcf", encoded(at(800, edit)(FILES["panel"])))
        if edit is not None and cases.of("panel", path).status == 2:
            assert {each.name for each in cases.cache.iterdir() if each.is_dir()} == before
            path.write_text(FILES["panel"])
            assert_base(cases.of("panel", path), cases.base("panel"))
            path.unlink()
        before = {each.name for each in cases.cache.iterdir() if each.is_dir()}
