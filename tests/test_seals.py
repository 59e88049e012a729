"""Seals of folders: what is missing, cut, changed or foreign is named."""

from __future__ import annotations

from pathlib import Path

from embrag_ds.seals import damage, files_below, sealed_file


def test_every_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    contents = {"a": b"alpha", "inner/b": b"beta" * 1000, "c.bits": b"gamma", "seal": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert files_below(tmp_path) == sorted(contents)
    seal = {name: sealed_file(tmp_path / name, not name.endswith("bits")) for name in contents if name != "seal"}
    assert damage(tmp_path, seal, besides=["seal"]) is None
    assert damage(tmp_path, seal) == "seal does not belong there"
    found = {}
    for name, spoilt in {"a": b"alphb", "inner/b": b"beta", "c.bits": b"delta"}.items():
        (tmp_path / name).write_bytes(spoilt)
        found[name] = damage(tmp_path, seal, besides=["seal"])
        (tmp_path / name).write_bytes(contents[name])
    # Large files of alleles are compared by their size alone.
    assert found == {"a": "a has changed", "inner/b": "inner/b has 4 of 4,000 bytes", "c.bits": None}
    (tmp_path / "a").unlink()
    assert damage(tmp_path, seal, besides=["seal"]) == "a is missing"
