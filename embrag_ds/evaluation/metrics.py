"""Accuracy measures of imputed genotypes, in numpy.

Conventions of all functions: n sites of a block, N samples, G bins, R bootstrap resamples. The bins are the seven of
the MAF, or with those of the minor-allele count 15.

- ``truth`` [n, N] is the ALT count 0, 1 or 2; NaN where the true genotype is unknown.
- ``dosage`` [n, N] is the expected ALT count, in [0, 2].
- ``haploid`` bool [n, N] marks haploid genotypes, None if there are none. Their one allele counts twice in ``truth``
  and ``dosage``, so that they are homozygotes where genotypes are compared. Both r2 halve their counts to 0 and 1.
- ``panel_af`` [n] is the ALT frequency in the reference panel.
- ``minor_count`` [n] is the number of the panel's haplotypes that have its minor allele.

The panel decides which allele is minor: the one with a frequency of at most 0.5, ALT at exactly 0.5. Neither target nor
truth does, so the bins are the same for every tool and every cohort.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embrag_ds.seeds import Purpose, generator


@dataclass(frozen=True)
class MafBin:
    """Sites whose panel minor-allele frequency (a fraction) lies in [low, high)."""

    name: str
    low: float
    high: float


# The last edge is above 0.5 because a frequency of exactly 0.5 belongs to the last bin.
MAF_BINS: tuple[MafBin, ...] = (
    MafBin("<0.1 %", 0.0, 0.001),
    MafBin("0.1-0.5 %", 0.001, 0.005),
    MafBin("0.5-1 %", 0.005, 0.01),
    MafBin("1-5 %", 0.01, 0.05),
    MafBin("5-50 %", 0.05, 0.51),
    MafBin("all <1 %", 0.0, 0.01),
    MafBin("all", 0.0, 0.51),
)
"""Bins of the minor-allele frequency: five disjoint ones, and two that pool them."""
BIN_NAMES: tuple[str, ...] = tuple(each.name for each in MAF_BINS)
DISJOINT_BINS = tuple(name for name in BIN_NAMES if not name.startswith("all"))


@dataclass(frozen=True)
class CountBin:
    """Sites whose minor allele has ``low`` to ``high`` copies in the panel, both included; None is no end."""

    name: str
    low: int
    high: int | None


COUNT_BINS: tuple[CountBin, ...] = (
    CountBin("1", 1, 1),
    CountBin("2", 2, 2),
    CountBin("3-5", 3, 5),
    CountBin("6-10", 6, 10),
    CountBin("11-20", 11, 20),
    CountBin("21-50", 21, 50),
    CountBin("51-100", 51, 100),
    CountBin(">100", 101, None),
)
"""Bins of the minor-allele count, disjoint. A site without the minor allele in the panel is in none."""
COUNT_NAMES: tuple[str, ...] = tuple(each.name for each in COUNT_BINS)
EVERY_NAME: tuple[str, ...] = (*BIN_NAMES, *COUNT_NAMES)
CALIBRATION_BINS = 15
RARE_MAF = 0.01


def minor_allele_frequency(panel_af: np.ndarray) -> np.ndarray:
    """Frequency of the rarer allele, float64 [n].

    It is rounded to 12 decimals, so that 4995 and 5 copies in 5000 (0.999 and 0.001) share a bin.
    """
    panel_af = np.asarray(panel_af, dtype=np.float64)
    return np.round(np.minimum(panel_af, 1.0 - panel_af), 12)


def bin_members(panel_af: np.ndarray) -> np.ndarray:
    """Sites of each of :data:`MAF_BINS`, bool [G, n]. The two pooled bins overlap the others."""
    maf = minor_allele_frequency(panel_af)
    return np.stack([(maf >= each.low) & (maf < each.high) for each in MAF_BINS])


def every_member(panel_af: np.ndarray, minor_count: np.ndarray) -> np.ndarray:
    """Sites of each of :data:`MAF_BINS`, then of each of :data:`COUNT_BINS`, bool [G, n]: rows as ``EVERY_NAME``."""
    at_least = [minor_count >= each.low for each in COUNT_BINS]
    at_most = [True if each.high is None else minor_count <= each.high for each in COUNT_BINS]
    by_count = [least & most for least, most in zip(at_least, at_most, strict=True)]
    return np.concatenate([bin_members(panel_af), np.stack(by_count)])


def polarise(counts: np.ndarray, panel_af: np.ndarray) -> np.ndarray:
    """Counts of the panel's minor allele, float64 [n, N], from ALT counts or dosages [n, N]."""
    counts = np.asarray(counts, dtype=np.float64)
    return np.where(np.asarray(panel_af)[:, None] > 0.5, 2.0 - counts, counts)


def halved(counts: np.ndarray, haploid: np.ndarray | None) -> np.ndarray:
    """Counts [n, N] of which those of haploid genotypes are halved."""
    return counts if haploid is None else np.where(haploid, 0.5 * counts, counts)


def best_guess(
    dosage: np.ndarray, probabilities: np.ndarray | None = None, haploid: np.ndarray | None = None
) -> np.ndarray:
    """Called genotype, int64 [n, N]: the most probable one of ``probabilities`` [n, N, 3], else the nearest count.

    A dosage half way between two counts goes to the homozygote, which treats REF and ALT alike. A haploid genotype is 0
    or 2.
    """
    if probabilities is not None:
        return np.argmax(probabilities, axis=-1)
    called = np.rint(dosage).astype(np.int64)
    return called if haploid is None else np.where(haploid, 2 * (np.asarray(dosage) > 1), called)


def without_heterozygotes(probabilities: np.ndarray, haploid: np.ndarray) -> np.ndarray:
    """Probabilities [n, N, 3] in which haploid genotypes are homozygous, each with half of the heterozygote's."""
    half = 0.5 * probabilities[..., 1]
    homozygous = np.stack([probabilities[..., 0] + half, np.zeros_like(half), probabilities[..., 2] + half], axis=-1)
    return np.where(haploid[..., None], homozygous, probabilities)


def by_bin(values: np.ndarray, panel_af: np.ndarray) -> dict[str, float]:
    """Mean of per-site ``values`` [n] in each bin, by name, over the sites where they are defined (not NaN)."""
    defined = np.isfinite(values)
    means = {}
    for name, member in zip(BIN_NAMES, bin_members(panel_af), strict=True):
        chosen = member & defined
        means[name] = float(values[chosen].mean()) if chosen.any() else float("nan")
    return means


def squared_correlation(moments: np.ndarray) -> np.ndarray:
    """Squared Pearson correlation [...] from moments [..., 6] = (n, sx, sy, sxx, syy, sxy).

    NaN where either variable has no variance.
    """
    n, sx, sy, sxx, syy, sxy = np.moveaxis(moments, -1, 0)
    var_x = n * sxx - sx * sx
    var_y = n * syy - sy * sy
    covariance = n * sxy - sx * sy
    # Sums of a constant cancel only up to rounding, hence the relative threshold.
    defined = (var_x > 1e-12 * n * sxx) & (var_y > 1e-12 * n * syy)
    scale = np.where(defined, var_x * var_y, 1.0)
    return np.where(defined, covariance * covariance / scale, np.nan)


class AggregateR2:
    """Aggregate dosage r2 by bin, accumulated over blocks of sites.

    Minor-allele dosage and true count are pooled over the sites of a bin and over samples. The result is their squared
    Pearson correlation (Das et al. 2016; Browning et al. 2018). Six moments are kept for each sample: ``moments``
    float64 [G, N, 6]. The value of a group of samples, or of a bootstrap resample, then follows from a weighted sum.
    The G bins have ``names``.
    """

    def __init__(self, samples: int, names: tuple[str, ...] = BIN_NAMES) -> None:
        self.names = names
        self.moments = np.zeros((len(names), samples, 6), dtype=np.float64)
        self.site_counts = np.zeros(len(names), dtype=np.int64)

    def add(
        self,
        truth: np.ndarray,
        dosage: np.ndarray,
        panel_af: np.ndarray,
        haploid: np.ndarray | None = None,
        members: np.ndarray | None = None,
    ) -> None:
        """Add a block: truth [n, N], dosage [n, N], panel_af [n], haploid bool [n, N].

        ``members`` bool [G, n] are the sites of each bin. They are those of :func:`bin_members` if None.
        """
        if members is None:
            members = bin_members(panel_af)
        self.site_counts += members.sum(axis=1)
        known = np.isfinite(truth)
        x = np.where(known, halved(polarise(truth, panel_af), haploid), 0.0)
        y = np.where(known, halved(polarise(dosage, panel_af), haploid), 0.0)
        weight = members.astype(np.float64)
        for column, values in enumerate((known.astype(np.float64), x, y, x * x, y * y, x * y)):
            self.moments[:, :, column] += weight @ values

    def result(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Aggregate r2 by bin name; NaN where a bin is empty or lacks variance.

        ``weights`` [N] counts each sample that often: 0 and 1 choose a population.
        """
        if weights is None:
            weights = np.ones(self.moments.shape[1])
        values = self.resample(np.asarray(weights, dtype=np.float64)[None, :])[0]
        return dict(zip(self.names, values.tolist(), strict=True))

    def sites(self) -> dict[str, int]:
        """Number of sites by bin name."""
        return dict(zip(self.names, self.site_counts.tolist(), strict=True))

    def resample(self, weights: np.ndarray) -> np.ndarray:
        """Aggregate r2, [R, G], of R weightings of the samples, ``weights`` [R, N]."""
        return squared_correlation(np.einsum("rp,gpm->rgm", weights, self.moments, optimize=True))


def bootstrap_weights(samples: int, resamples: int, seed: int) -> np.ndarray:
    """Number of times each sample is drawn in each of R bootstrap resamples, with replacement: float64 [R, N].

    Samples are resampled, not sites or genotypes, which are correlated (Efron & Tibshirani 1993). Use the same weights
    for every tool: the differences are then paired.
    """
    draws = generator(Purpose.BOOTSTRAP, seed).multinomial(samples, np.full(samples, 1.0 / samples), size=resamples)
    return draws.astype(np.float64)


def interval(values: np.ndarray, names: tuple[str, ...] = BIN_NAMES) -> dict[str, tuple[float, float]]:
    """95 % percentile interval by bin name, from resampled values [R, G] of bins with ``names``.

    NaN where no value is defined. For a paired difference, pass ``a.resample(weights) - b.resample(weights)``.
    """
    limits = {}
    for name, column in zip(names, values.T, strict=True):
        defined = column[np.isfinite(column)]
        low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
        limits[name] = (float(low), float(high))
    return limits


def site_r2(truth: np.ndarray, dosage: np.ndarray, haploid: np.ndarray | None = None) -> np.ndarray:
    """Squared Pearson correlation of truth and dosage over samples, at each site: float64 [n].

    NaN where the truth has no variance, so that nothing can be measured; the caller counts those sites. 0 where only
    the dosage has none, because the tool missed all variation.
    """
    known = np.isfinite(truth)
    x = np.where(known, halved(truth, haploid), 0.0).astype(np.float64)
    y = np.where(known, halved(dosage, haploid), 0.0).astype(np.float64)
    n = known.sum(axis=1)
    sums = [values.sum(axis=1) for values in (x, y, x * x, y * y, x * y)]
    r2 = squared_correlation(np.stack([n, *sums], axis=-1))
    # The difference of counts is an integer, 0 or at least 1; that of dosages may be any number.
    truth_varies = n * sums[2] - sums[0] ** 2 > np.minimum(0.5, 1e-9 * n * sums[2])
    return np.where(truth_varies, np.where(np.isnan(r2), 0.0, r2), np.nan)


class Concordance:
    """Concordance of best-guess genotypes by MAF bin, accumulated over blocks of sites.

    *Concordance* is the fraction of genotypes whose best guess is the true one. *Non-reference concordance* is the same
    among genotypes whose truth or best guess carries the panel's minor allele. The many homozygotes of the major allele
    do not raise it.
    """

    def __init__(self) -> None:
        self._counts = np.zeros((len(MAF_BINS), 4), dtype=np.float64)

    def add(self, truth: np.ndarray, called: np.ndarray, panel_af: np.ndarray) -> None:
        """Add a block: truth [n, N], called genotypes 0, 1 or 2 [n, N], panel_af [n]."""
        known = np.isfinite(truth)
        agree = known & (truth == called)
        carrier = known & ((polarise(truth, panel_af) > 0) | (polarise(called, panel_af) > 0))
        columns = [each.sum(axis=1) for each in (agree, known, agree & carrier, carrier)]
        self._counts += bin_members(panel_af).astype(np.float64) @ np.stack(columns, axis=-1)

    def result(self) -> tuple[dict[str, float], dict[str, float]]:
        """Concordance and non-reference concordance by bin name; NaN where nothing can be compared."""
        agree, known, agree_carrier, carrier = self._counts.T
        with np.errstate(invalid="ignore"):
            overall = agree / known
            non_reference = agree_carrier / carrier
        return (
            dict(zip(BIN_NAMES, overall.tolist(), strict=True)),
            dict(zip(BIN_NAMES, non_reference.tolist(), strict=True)),
        )


def one_hot(called: np.ndarray) -> np.ndarray:
    """Genotype probabilities [n, N, 3] with all weight on the called genotypes [n, N]."""
    return np.eye(3)[called]


def independent(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Genotype probabilities [n, N, 3] of two independent haplotypes with these ALT probabilities [n, N]."""
    one = first * (1 - second) + second * (1 - first)
    return np.stack([(1 - first) * (1 - second), one, first * second], axis=-1)


def iqs(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Imputation quality score of each site, float64 [n] (Lin et al. 2010, PLoS ONE 5:e9697).

    It is the chance-corrected agreement ``(Po - Pc) / (1 - Pc)`` of the truth with ``probabilities`` [n, N, 3]. Po is
    the mean probability of the true genotype, and Pc the agreement expected from the margins. NaN where Pc is 1: truth
    and imputation then hold one and the same genotype only.
    """
    known = np.isfinite(truth)
    true_class = one_hot(np.where(known, truth, 0).astype(np.int64)) * known[..., None]
    given = np.asarray(probabilities, dtype=np.float64) * known[..., None]
    n = np.maximum(known.sum(axis=1), 1).astype(np.float64)
    observed = (true_class * given).sum(axis=(1, 2)) / n
    chance = (true_class.sum(axis=1) * given.sum(axis=1)).sum(axis=1) / n**2
    defined = known.any(axis=1) & (chance < 1.0 - 1e-9)
    return np.where(defined, (observed - chance) / np.where(defined, 1.0 - chance, 1.0), np.nan)


class Calibration:
    """Expected calibration error of genotype probabilities (Guo et al. 2017, ICML), accumulated over blocks of sites.

    Genotypes are sorted into 15 equal bins on [0, 1] by the probability of the called (most probable) genotype. The
    error is the mean over genotypes of |fraction called correctly - mean probability| of their bin. 0 is perfect.
    """

    def __init__(self) -> None:
        self.sums = np.zeros((CALIBRATION_BINS, 3), dtype=np.float64)

    def add(self, truth: np.ndarray, probabilities: np.ndarray, chosen: np.ndarray | None = None) -> None:
        """Add a block: truth [n, N], probabilities [n, N, 3]; only genotypes ``chosen`` bool [n, N], if given."""
        known = np.isfinite(truth) if chosen is None else np.isfinite(truth) & chosen
        confidence = probabilities.max(axis=-1)[known].astype(np.float64)
        correct = (probabilities.argmax(axis=-1) == truth)[known]
        row = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        for column, values in enumerate((np.ones_like(confidence), confidence, correct)):
            self.sums[:, column] += np.bincount(row, weights=values, minlength=CALIBRATION_BINS)

    def result(self) -> float:
        """Expected calibration error, a fraction; NaN before any genotype was added."""
        count, confidence, correct = self.sums.T
        return float(np.abs(correct - confidence).sum() / count.sum()) if count.sum() else float("nan")

    def curve(self) -> list[tuple[float, float, int]]:
        """Calibration curve: (mean probability, fraction called correctly, genotypes) of every bin with genotypes."""
        return [(confidence / n, correct / n, int(n)) for n, confidence, correct in self.sums.tolist() if n]


def estimate_correlation(estimated_r2: np.ndarray, true_r2: np.ndarray, panel_af: np.ndarray) -> dict[str, float]:
    """Pearson correlation, by bin name, of a tool's own DR2 [n] with the true per-site r2 [n].

    Sites where either is NaN are left out. NaN when fewer than two sites remain or either is constant.
    """
    both = np.isfinite(estimated_r2) & np.isfinite(true_r2)
    found = {}
    for name, member in zip(BIN_NAMES, bin_members(panel_af), strict=True):
        x = np.asarray(estimated_r2, dtype=np.float64)[both & member]
        y = np.asarray(true_r2, dtype=np.float64)[both & member]
        varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
        found[name] = float(np.corrcoef(x, y)[0, 1]) if varies else float("nan")
    return found
