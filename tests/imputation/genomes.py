"""A simulated genome of two contigs: files of each, and files that hold both."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

from embrag_ds.data.simulate import SimulationSettings, simulate_default

CONTIGS = ("1", "2")


@dataclass(frozen=True)
class GenomeFiles:
    """Panels, targets and maps of the contigs 1 and 2, and in the third place of both."""

    panels: tuple[Path, Path, Path]
    targets: tuple[Path, Path, Path]
    maps: tuple[Path, Path, Path]


def simulate_genome(folder: Path) -> GenomeFiles:
    """Simulate 40 panel samples and 5 targets; every header has both contigs."""
    texts: dict[str, list[bytes]] = {"panel.vcf": [], "target.vcf": [], "genetic.map": []}
    for number, contig in enumerate(CONTIGS):
        settings = SimulationSettings(
            length_bp=60_000 + 30_000 * number,
            panel_samples=40,
            target_samples=5,
            typed_spacing_bp=2_000,
            seed=3 + number,
        )
        made = simulate_default(folder / f"simulated{contig}", settings)
        for name, path in (("panel.vcf", made.panel), ("target.vcf", made.target), ("genetic.map", made.genetic_map)):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            texts[name].append(b"".join(renamed(line, contig.encode()) for line in content.splitlines(keepends=True)))
    for name, (first, second) in texts.items():
        records = b"".join(line for line in second.splitlines(keepends=True) if not line.startswith(b"#"))
        for number, text in enumerate((first, second, first + records)):
            (folder / f"{number}-{name}").write_bytes(text)
    files = (tuple(folder / f"{number}-{name}" for number in range(3)) for name in texts)
    return GenomeFiles(*files)  # type: ignore[arg-type]


def renamed(line: bytes, contig: bytes) -> bytes:
    """A line of a VCF or a map with another contig; both are in the header."""
    if line.startswith(b"##contig"):
        return b"##contig=<ID=1,length=60000>\n##contig=<ID=2,length=90000>\n"
    if line.startswith(b"#"):
        return line
    return contig + line.removeprefix(b"1")
