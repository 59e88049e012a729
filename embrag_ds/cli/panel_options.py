"""Options of every command that reads a panel: the rules by which it is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.packing.reading import PanelMissing, Reading
from embrag_ds.errors import UserError
from embrag_ds.variants.records import Duplicates


def add_panel(group: argparse._ArgumentGroup, several: bool = False) -> None:
    """Add the panel with its map and its sample table, the cache, and the rules of :func:`add_reading`.

    Panel and map may be ``several`` files, for :func:`several_panel_files`.
    """
    also: dict[str, Any] = {"nargs": "+"} if several else {}
    or_more = "; or several, of different contigs" if several else ""
    group.add_argument("--panel", type=Path, metavar="VCF", help=f"phased VCF or BCF{or_more}", **also)
    group.add_argument(
        "--map",
        type=Path,
        metavar="MAP",
        help="genetic map: PLINK, SHAPEIT, Eagle, HapMap, minimac4 or deCODE (default: 1 cM/Mb)"
        + ("; one for all panel files, or one for each" if several else ""),
        **also,
    )
    group.add_argument("--cm-per-mb", type=float, metavar="RATE", help="recombination everywhere, in place of a map")
    group.add_argument(
        "--effective-size", type=float, metavar="N", help="of the population: scales cM by N / 10000 (default: 10000)"
    )
    group.add_argument("--samples", type=Path, metavar="TSV", help="panel sample and population, one sample a line")
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="packed panels and scratch (~/.cache/embrag_ds)")
    add_reading(group)


def add_reading(group: argparse._ArgumentGroup) -> None:
    """Add the rules for what a panel lacks, and for sites that a file has twice."""
    group.add_argument(
        "--panel-missing",
        choices=get_args(PanelMissing),
        default="error",
        help="panel sites with missing or unphased calls: refused, filled with the major allele, or left out (error)",
    )
    group.add_argument(
        "--duplicates",
        choices=get_args(Duplicates),
        default="first",
        help="sites that a file has twice: the first counts, or an error (first)",
    )


def reading(options: argparse.Namespace) -> Reading:
    """The rules for the panel that the options give."""
    return Reading(duplicates=options.duplicates, missing=options.panel_missing)


def panel_files(options: argparse.Namespace) -> PanelFiles:
    """The panel, its map and its sample table, as the options give them."""
    return PanelFiles(
        options.panel, options.map, options.samples, options.cm_per_mb, options.effective_size, reading(options)
    )


def several_panel_files(options: argparse.Namespace) -> list[PanelFiles]:
    """The panel files of the options, each with its map; raises :class:`UserError` for another number of maps."""
    panels, maps = options.panel or [None], options.map or [None]
    if len(maps) not in (1, len(panels)):
        raise UserError(
            f"--map names {len(maps)} files and --panel {len(panels)}: give one map for all, or one for each in the "
            "same order"
        )
    pairs = zip(panels, maps * (len(panels) // len(maps)), strict=True)
    own = (argparse.Namespace(**{**vars(options), "panel": panel, "map": each}) for panel, each in pairs)
    return [panel_files(each) for each in own]
