"""Options of every command that reads a panel: the rules by which it is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from embrag_ds.data.inputs import PanelFiles
from embrag_ds.data.packing import PanelMissing, Reading
from embrag_ds.variants.records import Duplicates


def add_panel(group: argparse._ArgumentGroup) -> None:
    """Add the panel with its map and its sample table, the cache, and the rules of :func:`add_reading`."""
    group.add_argument("--panel", type=Path, metavar="VCF", help="phased VCF or BCF")
    group.add_argument(
        "--map", type=Path, help="genetic map: PLINK, SHAPEIT, Eagle, HapMap, minimac4 or deCODE (default: 1 cM/Mb)"
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
