"""Panels of the benchmark of adaptation: a panel, targets that were held out of it, and their truth."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import chr_x
import numpy as np
import pysam.bcftools as bcftools

from embrag_ds.data.simulate import SimulationSettings, simulate_default
from embrag_ds.files import folder_written, make_folder, write_text
from embrag_ds.seeds import Purpose, generator
from embrag_ds.variants.records import VariantReader

HELD_OUT_SEED = 17
"""Seed of the choice of targets, and of the panel samples that the other tools are tuned on."""
TARGETS = 100
SPLIT = "-split"
"""What the names of panels, which are splits of the same samples by other seeds, have before the seed."""
COMMON_MAF = 0.05
"""Least minor-allele frequency in the panel (a fraction) of a typed site that is chosen by its distance."""
WRONG_CM_PER_MB = 15.0
"""Recombination rate in place of a human map, which has about 1 cM/Mb."""


@dataclass(frozen=True)
class Site:
    """A record of a panel. ``maf`` is its minor-allele frequency, None unless it is one SNV, alone at its position."""

    contig: str
    pos: int
    maf: float | None


@dataclass(frozen=True)
class Prepared:
    """Files of a prepared panel. Its genetic map is None, and the rate ``cm_per_mb`` may stand for it."""

    panel: Path
    target: Path
    truth: Path
    genetic_map: Path | None
    cm_per_mb: float | None = None

    @staticmethod
    def of(folder: Path, cm_per_mb: float | None = None) -> Prepared:
        """The files in ``folder``, in which they have the names of a simulated data set."""
        panel, target, truth = (folder / f"{name}.vcf.gz" for name in ("panel", "target", "truth"))
        genetic_map = folder / "genetic.map"
        return Prepared(panel, target, truth, genetic_map if genetic_map.exists() else None, cm_per_mb)


Typed = Callable[[Path, Sequence[Site]], list[int]]
"""Rows of the typed sites among those of a panel; the folder is the one with all data sets."""


def listed(path: str | Path) -> Typed:
    """The positions of another file, a path in the folder of data or from the root."""

    def rows(data: Path, sites: Sequence[Site]) -> list[int]:
        named = set(str(bcftools.query("-f", "%CHROM\\t%POS\\n", str(data / path))).splitlines())
        return [row for row, site in enumerate(sites) if f"{site.contig}\t{site.pos}" in named]

    return rows


def every(number: int) -> Typed:
    """Every ``number``-th site."""
    return lambda data, sites: list(range(0, len(sites), number))


def spaced(spacing_bp: int) -> Typed:
    """The first common SNV in every stretch of ``spacing_bp``."""

    def rows(data: Path, sites: Sequence[Site]) -> list[int]:
        first: dict[tuple[str, int], int] = {}
        for row, site in enumerate(sites):
            if site.maf is not None and site.maf >= COMMON_MAF:
                first.setdefault((site.contig, site.pos // spacing_bp), row)
        return sorted(first.values())

    return rows


def sites_of(panel: Path) -> list[Site]:
    """The sites of a file that bcftools has counted alleles in, as :func:`hold_out` writes it."""
    text = str(bcftools.query("-f", "%CHROM\\t%POS\\t%REF\\t%ALT\\t%AC\\t%AN\\n", str(panel)))
    rows = [line.split("\t") for line in text.splitlines()]
    alone = Counter((contig, pos) for contig, pos, *_ in rows)
    sites = []
    for contig, pos, ref, alt, copies, total in rows:
        snv = len(ref) == 1 and alt in ("A", "C", "G", "T") and alone[contig, pos] == 1
        frequency = int(copies) / int(total) if snv else 0.0
        sites.append(Site(contig, int(pos), min(frequency, 1 - frequency) if snv else None))
    return sites


def hold_out(
    variants: Path,
    folder: Path,
    typed: Typed,
    *,
    data: Path = Path(),
    targets: int = TARGETS,
    panel_samples: int | None = None,
    region: str = "",
    seed: int = HELD_OUT_SEED,
) -> None:
    """Split samples, drawn at random by ``seed``, into panel, target and truth in ``folder``.

    The panel has ``panel_samples`` of the others, or all of them, and the sites that vary among these. All three files
    are indexed.
    """
    with VariantReader(variants) as vcf:
        names = vcf.samples
    order = generator(Purpose.SPLIT, seed).permutation(len(names))
    last = None if panel_samples is None else targets + panel_samples
    chosen = {"targets": sorted(order[:targets].tolist()), "others": sorted(order[targets:last].tolist())}
    for name, rows in chosen.items():
        write_text(folder / f"{name}.txt", "".join(f"{names[row]}\n" for row in rows))
    paths = {name: str(folder / f"{name}.vcf.gz") for name in ("panel", "truth", "target")}
    others, held_out = ["-S", str(folder / "others.txt")], ["-S", str(folder / "targets.txt")]
    within = ["-r", region] if region else []
    rest = folder / "rest.bcf"
    bcftools.view(*within, *others, "-Ob", "-o", str(rest), str(variants), catch_stdout=False)
    # In a second step, because `-c` counts the alleles before `-S` leaves samples out.
    bcftools.view("-c1:nonmajor", "-Oz", "-o", paths["panel"], str(rest), catch_stdout=False)
    rest.unlink()
    bcftools.view(*within, *held_out, "-Oz", "-o", paths["truth"], str(variants), catch_stdout=False)
    sites = sites_of(Path(paths["panel"]))
    cut(Path(paths["truth"]), Path(paths["target"]), [sites[row] for row in typed(data, sites)])
    for path in paths.values():
        bcftools.index("-t", "-f", path)


def cut(variants: Path, out: Path, sites: Sequence[Site]) -> None:
    """Write the records of a file that are at these sites."""
    chosen = out.parent / "sites.tsv"
    write_text(chosen, "".join(f"{site.contig}\t{site.pos}\n" for site in sites))
    bcftools.view("-T", str(chosen), "-Oz", "-o", str(out), str(variants), catch_stdout=False)


@dataclass(frozen=True)
class Held:
    """A panel made of real data by :func:`hold_out`; paths lie in the folder of data."""

    source: str
    typed: Typed
    genetic_map: str | None = None
    cm_per_mb: float | None = None
    targets: int = TARGETS
    panel_samples: int | None = None
    region: str = ""
    seed: int = HELD_OUT_SEED

    def prepare(self, data: Path, folder: Path) -> None:
        """Make the files in ``folder``."""
        with folder_written(folder) as building:
            hold_out(
                data / self.source,
                building,
                self.typed,
                data=data,
                targets=self.targets,
                panel_samples=self.panel_samples,
                region=self.region,
                seed=self.seed,
            )
            if self.genetic_map:
                shutil.copyfile(data / self.genetic_map, building / "genetic.map")


@dataclass(frozen=True)
class ChromosomeX:
    """The panel of ``chr_x.py``, with haploid males."""

    source: str
    cm_per_mb: float | None = None

    def prepare(self, data: Path, folder: Path) -> None:
        """Make the files in ``folder``."""
        with folder_written(folder) as building:
            chr_x.split(data / self.source, building)


@dataclass(frozen=True)
class Simulated:
    """A simulated panel, of which ``sites`` keeps that many, evenly spaced among all; None keeps all.

    Of the typed sites as many are kept as make a fifth of those.
    """

    settings: SimulationSettings
    sites: int | None = None
    source: str = ""
    cm_per_mb: float | None = None

    def prepare(self, data: Path, folder: Path) -> None:
        """Make the files in ``folder``."""
        if self.sites is None:
            simulate_default(folder, self.settings)
            return
        made = Prepared.of(simulate_default(folder.with_name("simulated"), self.settings).panel.parent)
        assert made.genetic_map is not None
        positions = [
            str(bcftools.query("-f", "%CHROM\\t%POS\\n", str(path))).splitlines() for path in (made.panel, made.target)
        ]
        typed = _evenly(positions[1], self.sites // 5)
        untyped = _evenly([each for each in positions[0] if each not in set(positions[1])], self.sites - len(typed))
        kept = {}
        for name, lines in (("target", typed), ("panel", typed + untyped)):
            kept[name] = [Site(contig, int(pos), None) for contig, pos in (line.split("\t") for line in lines)]
        kept["truth"] = kept["panel"]
        with folder_written(folder) as building:
            for name, sites in kept.items():
                out = building / f"{name}.vcf.gz"
                cut(made.panel.with_name(out.name), out, sites)
                bcftools.index("-t", "-f", str(out))
            shutil.copyfile(made.genetic_map, building / "genetic.map")


def _evenly(values: list[str], number: int) -> list[str]:
    """``number`` of the values, evenly spaced."""
    return [values[row] for row in np.linspace(0, len(values) - 1, number).round().astype(int).tolist()]


Spec = Held | ChromosomeX | Simulated


def _chr20(array: str, panel_samples: int | None = None) -> Held:
    typed = listed(f"kgp_chr20/target.{array}.vcf.gz")
    return Held("kgp_chr20/panel.vcf.gz", typed, "kgp_chr20/chr20.plink.map.gz", panel_samples=panel_samples)


def _simulated(megabases: float, panel_samples: int, seed: int, **more: str | float) -> SimulationSettings:
    return SimulationSettings(
        length_bp=round(megabases * 1e6),
        panel_samples=panel_samples,
        target_samples=TARGETS,
        seed=seed,
        **more,  # type: ignore[arg-type]
    )


_CHR22 = "kgp_chr22_start/kgp3.chr22_16.05-16.64Mb.phased.vcf.gz"
_CHR22_SPACING_BP = {"sparse": 4_000, "dense": 1_200}
_MAIZE = "maize/maize.drops246.phased.vcf.gz"
_MAIZE_TARGETS = 46
SPECS: dict[str, Spec] = {
    "tiny": Simulated(_simulated(1, 20, 1701)),
    "few-sites": Simulated(_simulated(1, 750, 1702), sites=200),
    "chrX26": ChromosomeX("chrX_kgp26/chrX.kgp26.phased.vcf.gz"),
    "maize": Held(_MAIZE, every(10), targets=_MAIZE_TARGETS, region="10"),
    **{f"chr22-{array}": Held(_CHR22, spaced(spacing_bp)) for array, spacing_bp in _CHR22_SPACING_BP.items()},
    "chr20-50": _chr20("sparse", panel_samples=50),
    "chr20-500": _chr20("sparse", panel_samples=500),
    "chr20-sparse": _chr20("sparse"),
    "chr20-dense": _chr20("dense"),
    "chr20-wrong-map": Held(
        "kgp_chr20/panel.vcf.gz", listed("kgp_chr20/target.sparse.vcf.gz"), cm_per_mb=WRONG_CM_PER_MB
    ),
    "growth": Simulated(_simulated(3, 1_000, 1703, demography="growth")),
    "out-of-africa": Simulated(_simulated(2.5, 1_500, 1704, switch_errors_per_mb=0.4, missed_calls=0.03)),
    "american-admixture": Simulated(
        _simulated(2.5, 1_500, 1705, demography="american-admixture", switch_errors_per_mb=2.0, missed_calls=0.01)
    ),
    "growth-5000": Simulated(_simulated(1, 5_000, 1706, demography="growth")),
    **{
        f"chr22-{array}{SPLIT}{seed}": Held(_CHR22, spaced(spacing_bp), targets=500, seed=seed)
        for array, spacing_bp in _CHR22_SPACING_BP.items()
        for seed in (1, 2, 3)
    },
    "maize-genome": Held(_MAIZE, every(10), targets=_MAIZE_TARGETS),
}
"""Name -> what the panel is made of, the quick ones first."""


def prepare(spec: Spec, data: Path, folder: Path) -> Prepared:
    """Make the files of a panel in ``folder / "data"``, or take those that are there."""
    made = folder / "data"
    if not made.is_dir():
        make_folder(folder)
        spec.prepare(data, made)
    return Prepared.of(made, spec.cm_per_mb)
