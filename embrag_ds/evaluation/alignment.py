"""Alignment of truth and imputed files to the panel: its site order, its REF and ALT, and the truth's samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.panel import Panel
from embrag_ds.errors import UserError
from embrag_ds.variants.dosages import DosageFile, spool_dosages
from embrag_ds.variants.sites import Harmonised, harmonise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignedFile:
    """File of dosages that is read by rows of the panel, with REF and ALT as in the panel.

    It must have every row that is read. ``samples`` int64 [N] are the columns of the file that are returned.
    """

    file: DosageFile
    match: Harmonised
    samples: np.ndarray

    def dosage(self, rows: np.ndarray) -> np.ndarray:
        """ALT dosage at panel rows int64 [n], float32 [n, N]."""
        at = self._at(rows)
        dosage = self.file.dosage(self.match.target_index[at], self.samples)
        swapped = self.match.swapped[at]
        dosage[swapped] = 2.0 - dosage[swapped]
        return dosage

    def gp(self, rows: np.ndarray) -> np.ndarray:
        """Genotype probabilities at panel rows int64 [n], float32 [n, N, 3]."""
        at = self._at(rows)
        gp = self.file.gp(self.match.target_index[at], self.samples)
        swapped = self.match.swapped[at]
        gp[swapped] = gp[swapped][..., ::-1]
        return gp

    def dr2(self, rows: np.ndarray) -> np.ndarray | None:
        """The file's own estimate of r2 at panel rows int64 [n], float32 [n]; None if no record has one."""
        # A header may define DR2 though no record gives it.
        if self.file.dr2 is None or np.isnan(self.file.dr2).all():
            return None
        return self.file.dr2[self.match.target_index[self._at(rows)]]

    def _at(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.match.panel_index, rows)


@contextmanager
def aligned(path: Path, panel: Panel, folder: Path, truth: DosageFile | None = None) -> Iterator[AlignedFile]:
    """Open a file of dosages aligned to the panel; scratch files lie in ``folder`` until the block ends.

    With ``truth``, it is an imputed file and has the truth's samples, matched by name. Without, it is the truth itself,
    which may lack genotypes. Raises :class:`UserError` for a faulty file, for no site of the panel, and for missing
    samples.
    """
    logger.info("reading %s", path)
    with spool_dosages(path, folder, allow_missing=truth is None) as file:
        match = harmonise(file.sites, panel.sites, str(path), str(panel.path))
        logger.info("%s: %s", path, match.report())
        names = file.samples if truth is None else truth.samples
        yield AlignedFile(file, match, columns_of(names, file.samples, path, path if truth is None else truth.path))


def columns_of(names: tuple[str, ...], samples: tuple[str, ...], path: Path, truth_path: Path) -> np.ndarray:
    """Columns int64 [N] of the truth's samples ``names`` among ``samples``, those of the file at ``path``.

    Raises :class:`UserError` if a name is missing.
    """
    column = {sample: number for number, sample in enumerate(samples)}
    missing = [name for name in names if name not in column]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of the {len(names)} samples of {truth_path} are missing "
            f"({_some(missing)}); impute them, or take them out of the truth (bcftools view -s)"
        )
    return np.array([column[name] for name in names], dtype=np.int64)


def refuse_overlap(truth: DosageFile, panel: Panel) -> None:
    """Raise :class:`UserError` for truth samples that are in the panel: their haplotypes are copied, not imputed."""
    both = sorted(set(truth.samples) & set(panel.samples))
    if both:
        raise UserError(
            f"{truth.path}: {len(both)} samples are also in {panel.path} ({_some(both)}); "
            "take them out of the panel and impute again (bcftools view -s ^...)"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
