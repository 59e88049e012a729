"""Simulated data sets: a panel with targets and their truth; a small one is the default data set of all commands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.files import folder_written, make_folder
from embrag_ds.seeds import Purpose, generator
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.sites import SiteTable

if TYPE_CHECKING:
    import msprime

POPULATIONS = {
    "out-of-africa": ("YRI", "CEU", "CHB"),
    "american-admixture": ("AFR", "EUR", "EAS", "ADMIX"),
    "growth": ("GROWN",),
}
"""Demographic model -> populations that are sampled under it."""
CONTIG = "1"
MIN_COPIES = 2
"""Least number of copies of each allele in the panel, at every site."""
MIN_TYPED_MAF = 0.05
"""Least minor-allele frequency (a fraction) of a typed site."""
MUTATION_RATE = 1.25e-8
"""Mutations per base pair and generation."""
BACKGROUND = 0.1
"""Fraction of the mean recombination rate that lies outside hotspots."""
HOTSPOT_SPACING_BP = 50_000
"""Typical distance of recombination hotspots, in base pairs."""
RECIPE_VERSION = 2
"""Raised whenever the same settings come to mean other data, so that cached data sets are rebuilt."""

_DATA_FILES = (
    "panel.vcf.gz",
    "panel.vcf.gz.tbi",
    "truth.vcf.gz",
    "truth.vcf.gz.tbi",
    "target.vcf.gz",
    "target.vcf.gz.tbi",
    "genetic.map",
    "samples.tsv",
    "settings.json",
)

_MOST = {
    "length_bp": 1_000_000_000,
    "panel_samples": 1_000_000,
    "target_samples": 1_000_000,
    "typed_spacing_bp": 1_000_000_000,
}
_MOST_SWITCH_ERRORS, _MOST_CM_PER_MB = 1_000, 1_000


@dataclass(frozen=True)
class SimulationSettings:
    """Settings of a simulated data set; a value out of range raises :class:`UserError` that names its option."""

    length_bp: int = 1_000_000
    """Length of the region in base pairs."""
    panel_samples: int = 750
    """Number of panel samples, split evenly over the populations."""
    target_samples: int = 60
    """Number of target samples, split evenly over the populations."""
    typed_spacing_bp: int = 4_000
    """Length in base pairs of the stretches in each of which the targets are typed at one common site."""
    seed: int = 1
    """Seed of everything random."""
    switch_errors_per_mb: float = 0.0
    """Phasing errors: mean number of places per sample and Mb where the two haplotypes change sides."""
    missed_calls: float = 0.0
    """Calling errors: fraction of minor-allele copies that are read as the major allele. Sequencing at low depth misses
    a carrier far more often than it invents one.
    """
    call_set_copies: int = MIN_COPIES
    """Least minor-allele count of a site in panel and targets together, as if both came from one filtered call set. An
    allele with fewer copies in the panel is then more frequent in the targets than in the panel.
    """
    cm_per_mb: float = 1.0
    """Mean recombination rate in cM per Mb; along human chromosomes it varies several times over."""
    demography: str = "out-of-africa"
    """Demographic model, a key of :data:`POPULATIONS`."""

    def __post_init__(self) -> None:
        for name in ("length_bp", "panel_samples", "target_samples", "typed_spacing_bp"):
            if getattr(self, name) < 3:
                raise UserError(f"--{name.replace('_', '-')} must be at least 3")
            if getattr(self, name) > _MOST[name]:
                raise UserError(f"--{name.replace('_', '-')} must not exceed {_MOST[name]}")
        if not 0 <= self.switch_errors_per_mb <= _MOST_SWITCH_ERRORS:
            raise UserError(f"--switch-errors-per-mb must lie between 0 and {_MOST_SWITCH_ERRORS}")
        if not 0 <= self.missed_calls < 1:
            raise UserError("--missed-calls must lie in [0, 1)")
        if not 0 < self.cm_per_mb <= _MOST_CM_PER_MB:
            raise UserError(f"--cm-per-mb must be positive, and {_MOST_CM_PER_MB} at most")
        if not 0 < self.seed < 2**32:  # msprime takes no other
            raise UserError("--seed must lie between 1 and 2^32 - 1")

    @property
    def populations(self) -> tuple[str, ...]:
        """Names of the sampled populations."""
        return POPULATIONS[self.demography]


@dataclass(frozen=True)
class DefaultData:
    """Files of a simulated data set; ``truth`` holds the target samples at every site of the panel."""

    panel: Path
    target: Path
    truth: Path
    genetic_map: Path
    samples: Path


def simulate_default(directory: Path, settings: SimulationSettings) -> DefaultData:
    """Simulate a data set into ``directory``, or reuse one that was made there with the same settings.

    ``out-of-africa`` has three populations under the model of Gutenkunst et al. (2009, PLoS Genet. 5:e1000695).
    ``american-admixture`` has four under that of Browning et al. (2018, PLoS Genet. 14:e1007385), one of them admixed.
    ``growth`` has one population, which keeps one size and then grows as Europeans do in Tennessen et al. (2012,
    Science 337:64): rare variants abound. All recombine along a map with hotspots. The same settings and version of
    msprime give the same genotypes.

    The directory appears only when complete, and replaces one with other settings. Raises :class:`UserError` if it
    holds anything else.
    """
    data = DefaultData(
        panel=directory / "panel.vcf.gz",
        target=directory / "target.vcf.gz",
        truth=directory / "truth.vcf.gz",
        genetic_map=directory / "genetic.map",
        samples=directory / "samples.tsv",
    )
    described = json.dumps({"recipe_version": RECIPE_VERSION, **asdict(settings)}, indent=2) + "\n"
    if _is_made(directory, described):
        return data
    _check_replaceable(directory)
    make_folder(directory.parent)
    with folder_written(directory) as building:
        _build(building, settings)
        (building / "settings.json").write_text(described, encoding="utf-8")
    return data


def _is_made(directory: Path, described: str) -> bool:
    """Whether the directory holds all of a data set that was made with the settings described."""
    marker = directory / "settings.json"
    try:
        return marker.read_text(encoding="utf-8") == described and all(
            (directory / name).is_file() and (directory / name).stat().st_size for name in _DATA_FILES
        )
    except (OSError, ValueError):
        return False


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory}: it is a file; choose another folder for the simulated data")
    present = sorted(entry.name for entry in directory.iterdir())
    foreign = [name for name in present if name not in _DATA_FILES]
    if present and "settings.json" not in present:
        # The user's own panel may well be called panel.vcf.gz.
        foreign = present
    if foreign:
        raise UserError(f"{directory}: it holds {foreign[0]}, which is not simulated data; choose another folder")


def _build(directory: Path, settings: SimulationSettings) -> None:
    rng = generator(Purpose.SIMULATION, settings.seed)
    breakpoints, rates = _hotspot_map(settings.length_bp, settings.cm_per_mb, rng)
    panel_counts = equal_shares(settings.panel_samples, len(settings.populations))
    target_counts = equal_shares(settings.target_samples, len(settings.populations))
    samples = [panel + target for panel, target in zip(panel_counts, target_counts, strict=True)]
    positions, alleles = _simulate(settings, samples, breakpoints, rates)
    _spoil(alleles, positions, settings)

    # Within a population samples are exchangeable, so its last ones can be the target.
    population = np.repeat(np.arange(len(samples)), samples)
    rank = np.concatenate([np.arange(count) for count in samples])
    names = [f"{settings.populations[p]}{r + 1:04d}" for p, r in zip(population.tolist(), rank.tolist(), strict=True)]
    in_panel = rank < np.array(panel_counts)[population]

    panel_alleles = alleles[:, np.repeat(in_panel, 2)]
    minor_allele_count = _minor_allele_count(panel_alleles)
    kept = (minor_allele_count >= MIN_COPIES) & (_minor_allele_count(alleles) >= settings.call_set_copies)
    sites = _site_table(positions[kept], settings.length_bp, rng)
    maf = minor_allele_count[kept] / panel_alleles.shape[1]
    typed = _choose_typed(sites.pos, maf, settings.typed_spacing_bp, rng)

    truth_alleles = alleles[kept][:, np.repeat(~in_panel, 2)]
    panel_names = [name for name, panel in zip(names, in_panel, strict=True) if panel]
    target_names = [name for name, panel in zip(names, in_panel, strict=True) if not panel]
    write_phased(directory / "panel.vcf.gz", sites, panel_names, panel_alleles[kept])
    write_phased(directory / "truth.vcf.gz", sites, target_names, truth_alleles)
    write_phased(directory / "target.vcf.gz", _select(sites, typed), target_names, truth_alleles[typed])
    _write_map(directory / "genetic.map", breakpoints, rates)
    with (directory / "samples.tsv").open("w", encoding="utf-8") as out:
        out.write("sample\tpopulation\n")
        for name, code in zip(names, population.tolist(), strict=True):
            out.write(f"{name}\t{settings.populations[code]}\n")


def _minor_allele_count(alleles: np.ndarray) -> np.ndarray:
    """Number of copies of the rarer allele, int64 [S], among ``alleles`` [S, H]."""
    copies = alleles.sum(axis=1, dtype=np.int64)
    return np.minimum(copies, alleles.shape[1] - copies)


def equal_shares(samples: int, populations: int) -> list[int]:
    """Sizes of equal shares of ``samples``; the first populations take the remainder."""
    share, rest = divmod(samples, populations)
    return [share + (i < rest) for i in range(populations)]


def _hotspot_map(length_bp: int, cm_per_mb: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Recombination map with hotspots: breakpoints [n + 1] in bp and rates [n] in cM/Mb, with mean ``cm_per_mb``."""
    edges = [0]
    rates = []
    while True:
        start = edges[-1] + int(rng.uniform(0.3, 1.5) * HOTSPOT_SPACING_BP)
        stop = start + int(rng.uniform(1_000, 2_000))
        intensity = rng.gamma(2.0)
        if stop >= length_bp:
            break
        edges += [start, stop]
        rates += [0.0, intensity]
    edges.append(length_bp)
    rates.append(0.0)
    breakpoints = np.array(edges)
    widths = np.diff(breakpoints)
    hot = np.array(rates)
    if not hot.any():
        return breakpoints, np.full(len(hot), cm_per_mb)
    hot *= (1 - BACKGROUND) * length_bp / (hot * widths).sum()
    return breakpoints, cm_per_mb * (BACKGROUND + hot)


def _out_of_africa() -> msprime.Demography:
    """Three populations with the maximum-likelihood parameters of Gutenkunst et al. (2009), table 1."""
    import msprime

    years_per_generation = 25
    split_eurasia = 21.2e3 / years_per_generation
    split_africa = 140e3 / years_per_generation
    expansion = 220e3 / years_per_generation
    growth_ceu, growth_chb = 0.004, 0.0055
    demography = msprime.Demography()
    demography.add_population(name="YRI", initial_size=12_300)
    demography.add_population(
        name="CEU", initial_size=1_000 * np.exp(growth_ceu * split_eurasia), growth_rate=growth_ceu
    )
    demography.add_population(name="CHB", initial_size=510 * np.exp(growth_chb * split_eurasia), growth_rate=growth_chb)
    demography.add_population(name="OOA", initial_size=2_100)
    demography.add_population(name="AMH", initial_size=12_300)
    demography.add_population(name="ANC", initial_size=7_300)
    demography.set_symmetric_migration_rate(["YRI", "CEU"], 3e-5)
    demography.set_symmetric_migration_rate(["YRI", "CHB"], 1.9e-5)
    demography.set_symmetric_migration_rate(["CEU", "CHB"], 9.6e-5)
    demography.add_population_split(time=split_eurasia, derived=["CEU", "CHB"], ancestral="OOA")
    demography.add_symmetric_migration_rate_change(time=split_eurasia, populations=["YRI", "OOA"], rate=25e-5)
    demography.add_population_split(time=split_africa, derived=["YRI", "OOA"], ancestral="AMH")
    demography.add_population_split(time=expansion, derived=["AMH"], ancestral="ANC")
    return demography


def _american_admixture() -> msprime.Demography:
    """Four populations of Browning et al. (2018): all but AFR grow until today, and ADMIX mixed 12 generations ago."""
    import msprime

    split_eurasia, split_africa, expansion = 920, 2040, 5920
    demography = msprime.Demography()
    demography.add_population(name="AFR", initial_size=14_474)
    demography.add_population(name="EUR", initial_size=34_039, growth_rate=0.0038)
    demography.add_population(name="EAS", initial_size=45_852, growth_rate=0.0048)
    demography.add_population(name="ADMIX", initial_size=54_664, growth_rate=0.05)
    demography.add_population(name="OOA", initial_size=1_861)
    demography.add_population(name="AMH", initial_size=14_474)
    demography.add_population(name="ANC", initial_size=7_310)
    demography.set_symmetric_migration_rate(["AFR", "EUR"], 2.5e-5)
    demography.set_symmetric_migration_rate(["AFR", "EAS"], 0.78e-5)
    demography.set_symmetric_migration_rate(["EUR", "EAS"], 3.11e-5)
    demography.add_admixture(12, derived="ADMIX", ancestral=["AFR", "EUR", "EAS"], proportions=[1 / 6, 2 / 6, 3 / 6])
    demography.add_population_split(time=split_eurasia, derived=["EUR", "EAS"], ancestral="OOA")
    demography.add_symmetric_migration_rate_change(time=split_eurasia, populations=["AFR", "OOA"], rate=15e-5)
    demography.add_population_split(time=split_africa, derived=["OOA", "AFR"], ancestral="AMH")
    demography.add_population_split(time=expansion, derived=["AMH"], ancestral="ANC")
    return demography


def _growth() -> msprime.Demography:
    """One population of 10,000 that grew by 1.95 % in each of the last 204 generations, to 534,000 today.

    The growth is that of the European population of Tennessen et al. (2012), without the bottlenecks before it.
    """
    import msprime

    generations, growth, ancestral_size = 204, 0.0195, 10_000
    demography = msprime.Demography()
    size_today = ancestral_size * np.exp(growth * generations)
    demography.add_population(name="GROWN", initial_size=size_today, growth_rate=growth)
    demography.add_population_parameters_change(
        time=generations, initial_size=ancestral_size, growth_rate=0, population="GROWN"
    )
    return demography


DEMOGRAPHIES = {"out-of-africa": _out_of_africa, "american-admixture": _american_admixture, "growth": _growth}
"""Demographic model -> what makes it for msprime."""


def _simulate(
    settings: SimulationSettings, samples: list[int], breakpoints: np.ndarray, rates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Simulated 1-based positions int64 [S] and alleles uint8 [S, 2N], samples in the order of the populations."""
    # Imported here, because msprime takes a second and only simulation needs it.
    import msprime

    tree_sequence = msprime.sim_ancestry(
        dict(zip(settings.populations, samples, strict=True)),
        demography=DEMOGRAPHIES[settings.demography](),
        recombination_rate=msprime.RateMap(position=breakpoints, rate=rates * 1e-8),
        random_seed=settings.seed,
    )
    tree_sequence = msprime.sim_mutations(
        tree_sequence, rate=MUTATION_RATE, random_seed=settings.seed, model=msprime.BinaryMutationModel()
    )
    # The genome is discrete: positions are distinct integers from 0 on.
    positions = tree_sequence.tables.sites.position.astype(np.int64) + 1
    return positions, tree_sequence.genotype_matrix().astype(np.uint8)


def _spoil(alleles: np.ndarray, positions: np.ndarray, settings: SimulationSettings) -> None:
    """Add switch errors and missed calls to ``alleles`` [S, 2N], in place."""
    rng = generator(Purpose.SIMULATED_ERRORS, settings.seed)
    if settings.switch_errors_per_mb > 0:
        for sample in range(alleles.shape[1] // 2):
            count = rng.poisson(settings.switch_errors_per_mb * settings.length_bp * 1e-6)
            places = np.sort(rng.uniform(0, settings.length_bp, count))
            swapped = np.searchsorted(places, positions) % 2 == 1
            pair = slice(2 * sample, 2 * sample + 2)
            alleles[swapped, pair] = alleles[swapped, pair][:, ::-1]
    if settings.missed_calls > 0:
        for row in alleles:
            minor = int(2 * row.sum(dtype=np.int64) <= len(row))
            carriers = np.flatnonzero(row == minor)
            row[carriers[rng.random(len(carriers)) < settings.missed_calls]] = 1 - minor


def _site_table(positions: np.ndarray, length_bp: int, rng: np.random.Generator) -> SiteTable:
    letters = np.array(["A", "C", "G", "T"])
    ref = rng.integers(4, size=len(positions))
    alt = (ref + rng.integers(1, 4, size=len(positions))) % 4
    return SiteTable(
        contigs=(CONTIG,),
        contig_lengths=(length_bp,),
        contig=np.zeros(len(positions), dtype=np.int32),
        pos=positions,
        ref=letters[ref].tolist(),
        alt=letters[alt].tolist(),
        id=["."] * len(positions),
    )


def _choose_typed(pos: np.ndarray, maf: np.ndarray, spacing_bp: int, rng: np.random.Generator) -> np.ndarray:
    """Rows [T] of the typed sites: one common site, chosen at random, in every stretch of ``spacing_bp``."""
    common = np.flatnonzero(maf >= MIN_TYPED_MAF)
    shuffled = rng.permutation(common)
    _, first = np.unique(pos[shuffled] // spacing_bp, return_index=True)
    return np.sort(shuffled[first])


def _select(sites: SiteTable, rows: np.ndarray) -> SiteTable:
    chosen = rows.tolist()
    return SiteTable(
        contigs=sites.contigs,
        contig_lengths=sites.contig_lengths,
        contig=sites.contig[rows],
        pos=sites.pos[rows],
        ref=[sites.ref[row] for row in chosen],
        alt=[sites.alt[row] for row in chosen],
        id=[sites.id[row] for row in chosen],
    )


def _write_map(path: Path, breakpoints: np.ndarray, rates: np.ndarray) -> None:
    """Write the map in PLINK's format; base ``b`` of the simulation is position ``b + 1`` of the files."""
    cm = np.concatenate([[0.0], np.cumsum(rates * np.diff(breakpoints) * 1e-6)])
    with path.open("w", encoding="utf-8") as out:
        for bp, value in zip((breakpoints + 1).tolist(), cm.tolist(), strict=True):
            out.write(f"{CONTIG} . {value:.8f} {bp}\n")
