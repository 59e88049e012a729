"""Alignment of truth and imputed files to the panel: its site order, its REF and ALT, and the truth's samples.

Files differ in how they write a haploid sample, such as a male on X. Our files and those of Beagle and minimac4 have
a dosage from 0 to 1, others a homozygote with a dosage from 0 to 2. Here all are on the diploid scale: the allele of a
haploid sample counts twice. The truth tells which genotypes are haploid (:attr:`AlignedFile.haploid`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.left_out import NO_TABLE, LeftOutTable
from embrag_ds.data.panel import Panel, skipped_records
from embrag_ds.errors import UserError
from embrag_ds.evaluation import metrics
from embrag_ds.variants.dosages import DosageFile, spool_dosages
from embrag_ds.variants.genotypes import HAPLOID, UNKNOWN
from embrag_ds.variants.harmonise import Harmonised, harmonise
from embrag_ds.variants.records import Duplicates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignedFile:
    """File of dosages that is read by rows of the panel, with REF and ALT as in the panel.

    It must have every row that is read. ``samples`` int64 [N] are the columns of the file that are returned. ``truth``
    is None if it is the truth itself.
    """

    file: DosageFile
    match: Harmonised
    samples: np.ndarray
    truth: AlignedFile | None = None

    def dosage(self, rows: np.ndarray) -> np.ndarray:
        """ALT dosage on the diploid scale (0 to 2) at panel rows int64 [n], float32 [n, N]."""
        at = self._at(rows)
        in_file = self.match.target_index[at]
        dosage = self.file.dosage(in_file, self.samples)
        if self.file.ploidies & {HAPLOID, UNKNOWN}:
            ploidy = self.file.ploidy(in_file, self.samples)
            haploid = ploidy == HAPLOID
            if self.truth is not None and UNKNOWN in self.file.ploidies:
                haploid |= self._haploid_as_truth(rows, dosage, ploidy == UNKNOWN)
            dosage[haploid] *= 2.0
        swapped = self.match.swapped[at]
        dosage[swapped] = 2.0 - dosage[swapped]
        return dosage

    def haploid(self, rows: np.ndarray) -> np.ndarray | None:
        """Haploid genotypes at panel rows int64 [n], bool [n, N]; None if the whole file has none."""
        if HAPLOID not in self.file.ploidies:
            return None
        found: np.ndarray = self.file.ploidy(self.match.target_index[self._at(rows)], self.samples) == HAPLOID
        return found

    def _haploid_as_truth(self, rows: np.ndarray, dosage: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        """Genotypes without GT, HDS or GP, so of ``unknown`` ploidy, that are haploid in the truth: bool [n, N]."""
        assert self.truth is not None
        haploid = self.truth.haploid(rows)
        if haploid is None:
            return np.zeros_like(unknown)
        found: np.ndarray = haploid & unknown
        if (dosage[found] > 1).any():
            row, sample = np.argwhere(found & (dosage > 1))[0].tolist()
            at = int(self.match.target_index[self._at(rows[row])])
            raise UserError(
                f"{self.file.path}: {self.file.sites.where(at)}: sample "
                f"{self.file.samples[self.samples[sample]]} has dosage {dosage[row, sample]:g}, but is haploid in "
                f"{self.truth.file.path}; give a file that has GT as well, which tells the ploidy"
            )
        return found

    def has_gp(self, rows: np.ndarray) -> bool:
        """Whether the file has genotype probabilities at all these panel rows int64 [n]."""
        return bool(self.file.has_gp[self.match.target_index[self._at(rows)]].all())

    def gp(self, rows: np.ndarray) -> np.ndarray:
        """Genotype probabilities on the diploid scale at panel rows int64 [n], float32 [n, N, 3]."""
        at = self._at(rows)
        in_file = self.match.target_index[at]
        gp = self.file.gp(in_file, self.samples)
        if HAPLOID in self.file.ploidies:
            haploid = self.file.ploidy(in_file, self.samples) == HAPLOID
            gp[haploid] = gp[haploid][:, [0, 2, 1]]
        swapped = self.match.swapped[at]
        gp[swapped] = gp[swapped][..., ::-1]
        return gp

    def of_haplotypes(self, rows: np.ndarray, dosage: np.ndarray) -> np.ndarray:
        """Genotype probabilities of a file with haplotype dosages, as products of these: float32 [n, N, 3].

        They are those at panel rows int64 [n], whose :meth:`dosage` [n, N] is given, on the diploid scale.
        """
        at = self._at(rows)
        in_file = self.match.target_index[at]
        pair = self.file.haplotype_dosage(in_file, self.samples).reshape(*dosage.shape, 2)
        swapped = self.match.swapped[at]
        pair[swapped] = 1.0 - pair[swapped]
        # A file may leave out those of haplotypes that are alike.
        pair = np.where(np.isnan(pair), 0.5 * dosage[..., None], pair)
        gp = metrics.independent(pair[..., 0], pair[..., 1])
        if HAPLOID in self.file.ploidies:
            gp = metrics.without_heterozygotes(gp, self.file.ploidy(in_file, self.samples) == HAPLOID)
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
def aligned(
    path: Path,
    panel: Panel,
    folder: Path,
    truth: AlignedFile | None = None,
    name: str = "truth",
    duplicates: Duplicates = "first",
    left_out: LeftOutTable = NO_TABLE,
) -> Iterator[AlignedFile]:
    """Open a file of dosages aligned to the panel; scratch files lie in ``folder`` until the block ends.

    With ``truth``, it is an imputed file and has the truth's samples, matched by name. Without, it is the truth itself,
    which may lack genotypes. A truth without GT has dosages for counts. ``duplicates`` is the rule for sites that the
    file has twice. The sites left out are added to ``left_out`` under the file's ``name``.

    Raises :class:`UserError` for a faulty file, for no site of the panel, and for missing samples.
    """
    logger.info("reading %s", path)
    with spool_dosages(path, folder, truth is None, duplicates, lambda each: left_out.add(name, each)) as file:
        match = harmonise(file.sites, panel.sites, str(path), str(panel.path))
        logger.info("%s: %s", path, match.report())
        if reconciled := match.reconciled():
            logger.info("%s: %s", path, reconciled)
        left_out.add_dropped(name, match, file.sites)
        if skipped := skipped_records(file.skipped):
            logger.info("%s: %s", path, skipped)
        if truth is None and not file.is_called:
            logger.warning("%s: records lack GT; their dosages are the truth, rounded to compare genotypes", path)
        names = file.samples if truth is None else truth.file.samples
        truth_path = path if truth is None else truth.file.path
        yield AlignedFile(file, match, columns_of(names, file.samples, path, truth_path), truth)


def columns_of(names: tuple[str, ...], samples: tuple[str, ...], path: Path, truth_path: Path) -> np.ndarray:
    """Columns int64 [N] of the truth's samples ``names`` among ``samples``, those of the file at ``path``.

    Raises :class:`UserError` if a name is missing.
    """
    column = {sample: number for number, sample in enumerate(samples)}
    missing = [name for name in names if name not in column]
    for own, file, others in ((names, truth_path, column), (samples, path, set(names))):
        joined = next((each for each in own if _apart(each) != each and _apart(each) in others), None)
        if missing and joined is not None:
            raise UserError(
                f"{file}: its sample {joined} is {_apart(joined)} in {truth_path if file == path else path}, as PLINK "
                f"joins family and sample; rename all such samples: bcftools query -l {file} | sed -E "
                f"'s/^(.*)_\\1$/\\1/; s/^0_//' > names && bcftools reheader -s names -o renamed.vcf.gz {file}"
            )
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of the {len(names)} samples of {truth_path} are missing "
            f"({_some(missing)}); impute them, or take them out of the truth (bcftools view -s)"
        )
    return np.array([column[name] for name in names], dtype=np.int64)


def refuse_overlap(truth: DosageFile, panel: Panel) -> None:
    """Raise :class:`UserError` for truth samples that are in the panel: their haplotypes are copied, not imputed."""
    both = sorted(set(truth.samples) & set(panel.samples))
    if len(both) == len(panel.samples) == len(truth.samples):
        raise UserError(
            f"{panel.path}: its samples are also in the truth {truth.path}, all {len(both)} of both, so it is no "
            "reference panel; give the panel to --panel, and the file of typed sites to --target"
        )
    if both:
        raise UserError(
            f"{truth.path}: {len(both)} samples are also in {panel.path} ({_some(both)}); "
            "take them out of the truth or, to score them, out of the panel, and impute again (bcftools view -s ^...)"
        )


def _apart(name: str) -> str:
    """Name of a sample without the family that PLINK puts in front: that of ``T1_T1`` and ``0_T1`` is T1."""
    half = name[: len(name) // 2]
    return half if name == f"{half}_{half}" else name.removeprefix("0_")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
