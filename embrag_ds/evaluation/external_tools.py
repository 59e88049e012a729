"""External imputation tools, Beagle, minimac4 and Selphi, run with their default settings."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from embrag_ds.data.programs import run_logged
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder
from embrag_ds.maps.genetic_map import GeneticMap
from embrag_ds.variants.records import VariantReader

logger = logging.getLogger(__name__)
Run = Callable[[Sequence[str | Path], Path], None]
"""Runs a command, writes its output to a log file, and raises :class:`UserError` if it fails."""


def beagle(panel: Path, target: Path, genetic_map: Path | None, folder: Path, threads: int, run: Run) -> Path:
    """Impute with Beagle 5 (Browning et al. 2018, Am. J. Hum. Genet. 103:338) and return the output file."""
    given = [f"map={genetic_map}"] if genetic_map else []
    arguments = [
        f"ref={panel}",
        f"gt={target}",
        f"out={folder / 'beagle'}",
        "gp=true",
        "ap=true",
        f"nthreads={threads}",
    ]
    run(["beagle", *arguments, *given], folder / "beagle.out")
    return folder / "beagle.vcf.gz"


def minimac4(panel: Path, target: Path, genetic_map: Path | None, folder: Path, threads: int, run: Run) -> Path:
    """Convert the panel, impute with minimac4 (Das et al. 2016, Nat. Genet. 48:1284) and return the output file."""
    out, converted = folder / "minimac4.vcf.gz", folder / "panel.msav"
    run(["minimac4", "--compress-reference", panel, "-o", converted], folder / "minimac4-panel.out")
    given: list[str | Path] = ["--map", genetic_map] if genetic_map else []
    how = ["-f", "GT,DS,HDS,GP", "-O", "vcf.gz", "-t", str(threads)]
    run(["minimac4", converted, target, "-o", out, *how, *given], folder / "minimac4.out")
    return out


def selphi(panel: Path, target: Path, genetic_map: Path | None, folder: Path, threads: int, run: Run) -> Path:
    """Convert the panel, impute with Selphi 1 and return the output file.

    Source: De Marino et al. 2023, medRxiv 2023.12.18.23300143. It needs a genetic map, and an index beside the panel.
    """
    assert genetic_map is not None
    converted = folder / "selphi-panel"
    cores = ["--cores", str(threads)]
    prepared: list[str | Path] = ["--prepare_reference", "--ref_source_vcf", panel, "--refpanel", converted]
    run(["selphi", *prepared, *cores], folder / "selphi-panel.out")
    given: list[str | Path] = ["--refpanel", converted, "--target", target, "--map", genetic_map]
    run(["selphi", *given, "--outvcf", folder / "selphi", *cores], folder / "selphi.out")
    return folder / "selphi.vcf.gz"


_FILES = (
    "genetic.map",
    "beagle.vcf.gz",
    "beagle.log",
    "beagle.out",
    "panel.msav",
    "minimac4-panel.out",
    "minimac4.vcf.gz",
    "minimac4.out",
    "selphi-panel.pbwt",
    "selphi-panel.samples",
    "selphi-panel.sites",
    "selphi-panel.srp",
    "selphi-panel.out",
    "selphi.vcf.gz",
    "selphi.out",
)
TOOLS = {"beagle": beagle, "minimac4": minimac4, "selphi": selphi}
"""Name of the program -> function that imputes with it."""
NEED_MAP = ("selphi",)
"""Tools that do not run without a genetic map."""


def tool_files(folder: Path) -> tuple[Path, ...]:
    """Files that :func:`impute_with_tools` may write."""
    return tuple(folder / name for name in _FILES)


def not_run(genetic_map: Path | None) -> dict[str, str]:
    """Tools that cannot run here with this map, or without one: name -> the reason."""
    reasons = {name: "not installed" for name in TOOLS if not shutil.which(name)}
    if genetic_map is None:
        reasons |= {name: "needs a genetic map" for name in NEED_MAP if name not in reasons}
    return reasons


def able(genetic_map: Path | None) -> list[str]:
    """Names of the tools that can run here with this map, or without one."""
    reasons = not_run(genetic_map)
    return [name for name in TOOLS if name not in reasons]


def plink_map(genetic_map: Path, panel: Path, folder: Path) -> Path:
    """Rewrite a genetic map in PLINK's format, which all tools read, with the panel's contig names.

    Returns the path of the new map in ``folder``.
    """
    path = folder / "genetic.map"
    with VariantReader(panel) as vcf:
        if not vcf.contigs:
            # A header without contigs: they are known when the records are read.
            for _ in vcf.sites():
                pass
        GeneticMap.read(genetic_map).write_plink(path, vcf.contigs)
    return path


def impute_with_tools(
    panel: Path, target: Path, genetic_map: Path | None, folder: Path, threads: int
) -> tuple[dict[str, Path], dict[str, str]]:
    """Impute with every tool that can run here, into ``folder``: {name: output file}, and {name: why it failed}.

    :func:`not_run` tells of the others. Raises :class:`UserError` if no tool can run.
    """
    names = able(genetic_map)
    if not names:
        why = ", ".join(f"{name} ({reason})" for name, reason in not_run(genetic_map).items())
        raise UserError(f"--run-tools: no tool can run: {why}; apt-get install beagle minimac4")
    make_folder(folder)
    if genetic_map is not None:
        genetic_map = plink_map(genetic_map, panel, folder)
    files, failed = {}, {}
    for name in names:
        logger.info("imputing with %s (output in %s)", name, folder)
        try:
            files[name] = TOOLS[name](panel, target, genetic_map, folder, threads, run_logged)
        except UserError as fault:  # the others are scored, and so are the user's own files
            logger.warning(str(fault))
            failed[name] = str(fault)
    return files, failed
