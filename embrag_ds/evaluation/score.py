"""Score imputed files against the truth: the same untyped sites and samples for every tool.

The panel and the target are opened packed (:mod:`embrag_ds.data.panel`), the truth and every imputed file are read
once and spooled (:mod:`embrag_ds.data.spool`), and all measures are added up over blocks of sites.

Peak memory, with N samples in a file, R resamples and T tools, is the sum of

- ``200 min(2048 N, 2^19)`` bytes: a block of sites while it is scored, 105 MB at most;
- ``24 max(2^16, 4 N)`` bytes for every file: a page of its spool; and about 300 bytes for each of these entries, once,
  while a file is read: 20 MB up to 16,384 samples;
- with baselines, at most 64 MB and about 1 KB for every panel haplotype: the nearest haplotype's scores;
- ``(336 T + 8 R) N`` bytes: sums of every sample;
- about ``0.5 + 0.1 (T + 1)`` KB for every site of the panel: site tables, their matching, 16 bytes of measures a tool.

Only the last grows with the sites, and nothing with sites times samples. Packed alleles are mapped, not read, so their
pages are the system's to drop. Scratch takes 2 to 28 bytes of disk a genotype of a file, as its values differ.
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
    """Compare imputed files, by name, with the truth.

    Scored are the panel's sites that are in the truth and in every imputed file and that the target
    was not typed at; samples are those of the truth, matched by name. Missing genotypes of the truth are
    counted and not scored. ``baselines`` adds two cheap methods, computed from the panel and the target.
    ``samples_path`` is a tab-separated table (first column sample, second population) and adds scores by
    population. The packed panel is kept in ``cache_dir`` (default: :func:`default_cache_dir`), and scratch
    files lie there while this runs. Raises :class:`UserError`.
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
    """A folder in the cache, where there is room as a rule; nothing is left of it."""
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
    """Which samples [N] bool are of each population, in alphabetical order of the populations."""
    populations = read_populations(Path(path), samples)
    return {name: populations.of == code for code, name in enumerate(populations.names)}


def _scored_sites(panel: Panel, truth: AlignedFile, targets: Targets, tools: Mapping[str, AlignedFile]) -> np.ndarray:
    """Rows of the panel that the truth and every tool have and the targets were not typed at, int64 [S]."""
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
    """Both cheap methods, for the samples in these columns of the target."""
    haplotypes = np.stack([2 * columns, 2 * columns + 1], axis=1).reshape(-1)
    everybody = slice(0, len(targets.samples))
    nearest = NearestHaplotype(
        panel, targets.match.panel_index, lambda typed: targets.typed_alleles(typed, everybody)[:, haplotypes]
    )
    return {
        ALLELE_FREQUENCY: Tool(lambda rows: allele_frequency_dosage(panel_af[rows], len(columns))),
        NEAREST_HAPLOTYPE: Tool(nearest.dosage),
    }
