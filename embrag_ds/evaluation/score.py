"""Scoring of imputed files against a truth, at the same untyped sites and samples for every tool.

Panel and target are opened packed (:mod:`embrag_ds.data.panel`). The truth and every imputed file are read once and
spooled (:mod:`embrag_ds.variants.spool`). All measures are sums over blocks of sites.

Peak memory, with N samples in a file, R resamples and T tools, is the sum of

- ``200 min(2048 N, 2^19)`` bytes for a block of sites while it is scored, 105 MB at most;
- ``28 max(2^16, 4 N)`` bytes for every file, a page of its spool;
- about ``300 max(2^16, 4 N)`` bytes, once, while a file is read: 20 MB up to 16,384 samples;
- with baselines, at most 64 MB and about 1 KB for every panel haplotype: the nearest haplotype's scores;
- ``(1080 T + 8 R) N`` bytes for the sums of every sample;
- about ``0.5 + 0.1 (T + 1)`` KB for every site of the panel: site tables, matches, and 16 bytes of measures a tool.

Only the last term grows with the sites, and none with sites times samples. Packed alleles are memory-mapped, so the
system may drop their pages. Scratch files take 2 to 32 bytes per genotype of a file, the more its values differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from embrag_ds.data.cache import default_cache_dir, scratch_folder
from embrag_ds.data.left_out import LeftOutTable, left_out_table
from embrag_ds.data.packing.reading import PANEL, TARGET, Reading
from embrag_ds.data.panel import Panel, open_panel, read_populations
from embrag_ds.data.targets import Targets, match_targets, open_targets
from embrag_ds.errors import UserError
from embrag_ds.evaluation.alignment import AlignedFile, aligned, columns_of, refuse_overlap
from embrag_ds.evaluation.baselines import NearestHaplotype, allele_frequency_dosage
from embrag_ds.evaluation.report import Report
from embrag_ds.evaluation.scoring import Scored, Tool, score
from embrag_ds.variants.harmonise import Harmonised
from embrag_ds.variants.records import Excluded
from embrag_ds.variants.sites import SiteTable

logger = logging.getLogger(__name__)

ALLELE_FREQUENCY = "allele frequency"
NEAREST_HAPLOTYPE = "nearest haplotype"
PathLike = str | Path


def evaluate(
    truth_path: PathLike,
    imputed: Mapping[str, PathLike],
    panel_path: PathLike,
    target_path: PathLike,
    baselines: bool = False,
    samples_path: PathLike | None = None,
    bootstrap: int = 200,
    seed: int = 0,
    cache_dir: PathLike | None = None,
    *,
    reading: Reading = PANEL,
    excluded: PathLike | None = None,
) -> Report:
    """Score imputed files {name: path} against the truth.

    Sites are scored if they are in the panel, in the truth and in every imputed file, and if the target is not typed
    there. Samples are those of the truth, matched by name. Missing genotypes of the truth are counted and not scored.

    ``baselines`` adds two cheap methods, computed from panel and target. ``samples_path`` is a table of sample and
    population and adds scores by population. ``bootstrap`` resamples, drawn with ``seed``, give the intervals. Packed
    panels and scratch files lie in ``cache_dir`` (default: :func:`default_cache_dir`). ``reading`` holds the rules for
    the panel, and its rule for duplicates is that of every file. The sites of each file that were left out go to the
    table ``excluded``. Raises :class:`UserError` for faulty files, and if there is nothing to score.
    """
    if not imputed and not baselines:
        raise UserError("nothing to score: give an imputed file, or ask for the baselines")
    for name in imputed:
        if name in (ALLELE_FREQUENCY, NEAREST_HAPLOTYPE):
            raise UserError(f"{imputed[name]}: the name {name!r} belongs to a baseline; choose another name")

    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    with scratch_folder(cache, "evaluation-") as folder, ExitStack() as files:
        left_out = files.enter_context(left_out_table(None if excluded is None else Path(excluded)))

        def opened(name: str, path: PathLike, truth: AlignedFile | None = None) -> AlignedFile:
            return files.enter_context(aligned(Path(path), panel, folder, truth, name, reading.duplicates, left_out))

        panel = _open(Path(panel_path), cache, reading)
        left_out.add_packed("panel", panel)
        truth = opened("truth", truth_path)
        refuse_overlap(truth.file, panel)
        samples = truth.file.samples
        populations = _population_members(samples_path, samples) if samples_path is not None else {}
        target = _open(Path(target_path), folder, replace(TARGET, duplicates=reading.duplicates))
        match = match_targets(target, panel, "report", allow_overlap=True)
        left_out.add_packed("target", target)
        left_out.add_dropped("target", match, target.sites)
        tools = {name: opened(name, path, truth) for name, path in imputed.items()}
        sites, lacking = _scored_sites(panel, truth, match, tools)
        for name, rows in lacking.items():
            _say_what_is_lacking(tools[name].file.path, rows, len(sites), name, panel.sites, left_out)
        logger.info(
            "scoring %d untyped sites of %d in the panel, %d samples", len(sites), len(panel.sites), len(samples)
        )
        panel_af = panel.alt_count / panel.allele_count
        minor_count = np.minimum(panel.alt_count, panel.allele_count - panel.alt_count)
        scored = {
            name: Tool(
                tool.dosage,
                tool.gp if tool.has_gp(sites) else None,
                tool.dr2(sites),
                tool.of_haplotypes if tool.file.has_haplotypes else None,
            )
            for name, tool in tools.items()
        }
        if baselines:
            columns = columns_of(samples, target.samples, Path(target_path), Path(truth_path))
            scored |= _baselines(
                panel, panel_af, open_targets(target, match, panel, "leave out the baselines"), columns
            )
        found = score(
            Scored(
                sites,
                panel_af[sites],
                minor_count[sites],
                len(samples),
                truth.dosage,
                populations,
                truth.haploid,
                truth.file.is_called,
            ),
            scored,
            files={"truth": str(truth_path), "panel": str(panel_path), "target": str(target_path)}
            | {f"imputed: {name}": str(path) for name, path in imputed.items()},
            typed_sites=len(match.panel_index),
            bootstrap=bootstrap,
            seed=seed,
        )
        matches = {"target": (match, target.skipped), "truth": (truth.match, truth.file.skipped)}
        matches |= {f"imputed: {name}": (tool.match, tool.file.skipped) for name, tool in tools.items()}
        read = {name: {**each.numbers(), "left_out": skipped} for name, (each, skipped) in matches.items()}
        for name, rows in lacking.items():
            read[f"imputed: {name}"]["lacking"] = len(rows)
        return replace(found, harmonisation=read)


def _open(path: Path, cache: Path, reading: Reading) -> Panel:
    logger.info("reading %s", path)
    return open_panel(path, cache, progress=logger.isEnabledFor(logging.INFO), reading=reading)


def _population_members(path: PathLike, samples: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Members of each population among the samples, bool [N], in alphabetical order of the populations."""
    populations = read_populations(Path(path), samples)
    return {name: populations.of == code for code, name in enumerate(populations.names)}


def _scored_sites(
    panel: Panel, truth: AlignedFile, targets: Harmonised, tools: Mapping[str, AlignedFile]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Panel rows that the truth and every tool have and at which the targets are not typed, int64 [S].

    The second result are the rows of the truth that each tool lacks. A site that the targets may be typed at on the
    other strand, say, counts as typed: a tool may have used it.
    """
    known = np.zeros(len(panel.sites), dtype=bool)
    known[truth.match.panel_index] = True
    known[targets.related] = False
    untyped = np.flatnonzero(known)
    lacking = {name: np.setdiff1d(untyped, each.match.panel_index) for name, each in tools.items()}
    for rows in lacking.values():
        known[rows] = False
    sites = np.flatnonzero(known)
    if len(sites) == 0:
        files = ", ".join(str(each.file.path) for each in (truth, *tools.values()))
        raise UserError(f"{files}: no untyped site of {panel.path} is in all of them; check that they cover one region")
    return sites, lacking


def _say_what_is_lacking(
    path: Path, rows: np.ndarray, scored: int, name: str, sites: SiteTable, left_out: LeftOutTable
) -> None:
    """Warn of untyped sites int64 [n] that an imputed file lacks: nothing else would say why so few are ``scored``."""
    if not len(rows):
        return
    logger.warning(
        "%s: it lacks %d untyped sites that panel and truth have; the other %d are scored, for all files. If it was "
        "filtered (by DR2, say), r2 is that of sites that are easy to impute",
        path,
        len(rows),
        scored,
    )
    for row in rows.tolist():
        left_out.add(name, Excluded.at(sites, row, "no site of the file matches"))


def _baselines(panel: Panel, panel_af: np.ndarray, targets: Targets, columns: np.ndarray) -> dict[str, Tool]:
    """Both baselines, for the samples in these columns int64 [N] of the target."""
    haplotypes = np.stack([2 * columns, 2 * columns + 1], axis=1).reshape(-1)
    all_samples = slice(0, len(targets.samples))
    nearest = NearestHaplotype(
        panel, targets.sites, lambda typed: targets.typed_alleles(typed, all_samples)[:, haplotypes]
    )
    return {
        ALLELE_FREQUENCY: Tool(lambda rows: allele_frequency_dosage(panel_af[rows], len(columns))),
        NEAREST_HAPLOTYPE: Tool(nearest.dosage),
    }
