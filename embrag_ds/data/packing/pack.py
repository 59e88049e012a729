"""Packing of a whole file."""

from __future__ import annotations

from pathlib import Path

from embrag_ds.data.packing.helpers import Helpers
from embrag_ds.data.packing.packer import Packer
from embrag_ds.data.packing.reading import Reading
from embrag_ds.progress import Progress
from embrag_ds.variants.container.text import Part
from embrag_ds.variants.records import VariantReader


def pack(path: Path, directory: Path, reading: Reading, progress: bool) -> None:
    """Pack the file at ``path`` into the folder ``directory``; see :mod:`embrag_ds.data.panel` for its files.

    A large file is read by several processes (:mod:`embrag_ds.data.packing.helpers`), and the folder is the same.
    Raises :class:`UserError` for a faulty file, and for one without sites.
    """
    with (
        VariantReader(path, duplicates=reading.duplicates, without_alt=reading.without_alt) as vcf,
        Packer(vcf, directory, reading) as packer,
        Helpers(vcf, directory, reading) as helpers,
        Progress(f"packing {path.name}", None, "sites", shown=progress) as bar,
    ):
        for site in vcf.sites(Part(seams=helpers.seams, goes_on=helpers.leave)):
            bar.advance()
            packer.add(site)
        for part, folder in helpers.taken():
            packer.take_over(part, folder)
            bar.advance(len(part.rows))
        packer.save()
