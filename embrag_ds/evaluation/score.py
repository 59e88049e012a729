"""Scoring of imputed files against a truth, at the same untyped sites and samples for every tool.

Panel and target are opened packed (:mod:`embrag_ds.data.panel`). The truth and every imputed file are read once and
spooled (:mod:`embrag_ds.variants.spool`). All measures are sums over blocks of sites.

Peak memory, with N samples in a file, R resamples and T tools, is the sum of

- ``200 min(2048 N, 2^19)`` bytes for a block of sites while it is scored, 105 MB at most;
- ``24 max(2^16, 4 N)`` bytes for every file, a page of its spool;
- about ``300 max(2^16, 4 N)`` bytes, once, while a file is read: 20 MB up to 16,384 samples;
- with baselines, at most 64 MB and about 1 KB for every panel haplotype: the nearest haplotype's scores;
- ``(336 T + 8 R) N`` bytes for the sums of every sample;
- about ``0.5 + 0.1 (T + 1)`` KB for every site of the panel: site tables, matches, and 16 bytes of measures a tool.

Only the last term grows with the sites, and none with sites times samples. Packed alleles are memory-mapped, so the
system may drop their pages. Scratch files take 2 to 28 bytes per genotype of a file, the more its values differ.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from embrag_ds.data.panel import Panel, default_cache_dir, open_panel, read_populations
from embrag_ds.data.targets import Targets, harmonise_targets
from embrag_ds.errors import UserError
from embrag_ds.evaluation.alignment import AlignedFile, aligned, columns_of, refuse_overlap
from embrag_ds.evaluation.baselines import NearestHaplotype, allele_frequency_dosage
from embrag_ds.evaluation.report import Report
from embrag_ds.evaluation.scoring import Scored, Tool, score

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
) -> Report:
    """Score imputed files {name: path} against the truth.

    Sites are scored if they are in the panel, in the truth and in every imputed file, and if the target is not typed
    there. Samples are those of the truth, matched by name. Missing genotypes of the truth are counted and not scored.

    ``baselines`` adds two cheap methods, computed from panel and target. ``samples_path`` is a table of sample and
    population and adds scores by population. ``bootstrap`` resamples, drawn with ``seed``, give the intervals. Packed
    panels and scratch files lie in ``cache_dir`` (default: :func:`default_cache_dir`). Raises :class:`UserError` for
    faulty files, and if there is nothing to score.
    """
    if not imputed and not baselines:
        raise UserError("nothing to score: give an imputed file, or ask for the baselines")
    for name in imputed:
        if name in (ALLELE_FREQUENCY, NEAREST_HAPLOTYPE):
            raise UserError(f"{imputed[name]}: the name {name!r} belongs to a baseline; choose another name")

    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    with _scratch(cache) as folder, ExitStack() as files:
        panel = _open(Path(panel_path), cache)
        truth = files.enter_context(aligned(Path(truth_path), panel, folder))
        refuse_overlap(truth.file, panel)
        samples = truth.file.samples
        populations = _population_members(samples_path, samples) if samples_path is not None else {}
        targets = harmonise_targets(_open(Path(target_path), folder), panel, allow_overlap=True)
        tools = {
            name: files.enter_context(aligned(Path(path), panel, folder, truth.file)) for name, path in imputed.items()
        }
        sites = _scored_sites(panel, truth, targets, tools)
        logger.info(
            "scoring %d untyped sites of %d in the panel, %d samples", len(sites), len(panel.sites), len(samples)
        )
        panel_af = panel.alt_count / (2 * len(panel.samples))
        scored = {
            name: Tool(tool.dosage, tool.gp if tool.file.has_gp else None, tool.dr2(sites))
            for name, tool in tools.items()
        }
        if baselines:
            columns = columns_of(samples, targets.samples, Path(target_path), Path(truth_path))
            scored |= _baselines(panel, panel_af, targets, columns)
        return score(
            Scored(sites, panel_af[sites], len(samples), truth.dosage, populations),
            scored,
            files={"truth": str(truth_path), "panel": str(panel_path), "target": str(target_path)}
            | {f"imputed: {name}": str(path) for name, path in imputed.items()},
            typed_sites=len(targets.match.panel_index),
            bootstrap=bootstrap,
            seed=seed,
        )


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A temporary folder in the cache, where there is usually room."""
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluation-", dir=cache))
        except OSError as fault:
            raise UserError(
                f"{cache}: cannot write to the cache ({fault.strerror}); set XDG_CACHE_HOME to a folder that you can "
                "write to"
            ) from fault
        yield Path(folder)


def _open(path: Path, cache: Path) -> Panel:
    logger.info("reading %s", path)
    return open_panel(path, cache, progress=logger.isEnabledFor(logging.INFO))


def _population_members(path: PathLike, samples: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Members of each population among the samples, bool [N], in alphabetical order of the populations."""
    populations = read_populations(Path(path), samples)
    return {name: populations.of == code for code, name in enumerate(populations.names)}


def _scored_sites(panel: Panel, truth: AlignedFile, targets: Targets, tools: Mapping[str, AlignedFile]) -> np.ndarray:
    """Panel rows that the truth and every tool have and at which the targets are not typed, int64 [S]."""
    scored = ~targets.typed
    for each in (truth, *tools.values()):
        in_file = np.zeros(len(panel.sites), dtype=bool)
        in_file[each.match.panel_index] = True
        scored &= in_file
    sites = np.flatnonzero(scored)
    if len(sites) == 0:
        files = ", ".join(str(each.file.path) for each in (truth, *tools.values()))
        raise UserError(f"{files}: no untyped site of {panel.path} is in all of them; check that they cover one region")
    return sites


def _baselines(panel: Panel, panel_af: np.ndarray, targets: Targets, columns: np.ndarray) -> dict[str, Tool]:
    """Both baselines, for the samples in these columns int64 [N] of the target."""
    haplotypes = np.stack([2 * columns, 2 * columns + 1], axis=1).reshape(-1)
    all_samples = slice(0, len(targets.samples))
    nearest = NearestHaplotype(
        panel, targets.match.panel_index, lambda typed: targets.typed_alleles(typed, all_samples)[:, haplotypes]
    )
    return {
        ALLELE_FREQUENCY: Tool(lambda rows: allele_frequency_dosage(panel_af[rows], len(columns))),
        NEAREST_HAPLOTYPE: Tool(nearest.dosage),
    }
