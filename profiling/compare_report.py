"""Report of the comparison of V17 and V18: a table and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepper import MemoryCurve

from embrag_ds.files import written

CLAIMED: dict[str, tuple[str, str]] = {
    "peak memory, batch 16": ("19 GB", "10 GB"),
    "time per step, batch 16": ("210 ms", "115 ms"),
    "largest batch": ("16", "48"),
}
"""Figures that V18 was proposed with, of V17 and V18: another machine, another width, batch 16."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one variant.

    ``step_ms`` is the median over blocks. ``activation_gb`` is the peak memory above what is held between steps,
    ``peak_gb`` that of the whole run, in GB (1e9 bytes). ``build_s`` is the time to build the run, of which
    ``encoding_s`` encodes the panel. ``phase_ms`` has the milliseconds of each phase per step.
    """

    name: str
    step_ms: float
    samples_per_second: float
    activation_gb: float
    peak_gb: float
    build_s: float
    encoding_s: float | None
    phase_ms: dict[str, float]
    memory: MemoryCurve

    def as_dict(self) -> dict[str, Any]:
        """All measurements but the memory curve, which is in the plot."""
        return {name: value for name, value in asdict(self).items() if name not in ("name", "memory")}


def markdown(result: dict[str, Any], measured: list[Measured]) -> str:
    """Table of claimed and measured figures, the phases, the largest batches and the ratios, in Markdown."""
    batches, unsettled = result["largest_batch"], result["largest_batch_unsettled"]
    shape = ", ".join(f"{name} {value}" for name, value in result["shapes"].items())
    limit = "the GPU's memory" if result["budget_gb"] is None else f"{result['budget_gb']:g} GB"

    rows: list[list[str]] = [
        ["activations and gradients, GB", "", "", *(f"{each.activation_gb:.3f}" for each in measured)],
        ["peak memory, GB", *CLAIMED["peak memory, batch 16"], *(f"{each.peak_gb:.3f}" for each in measured)],
        ["time per step, ms", *CLAIMED["time per step, batch 16"], *(f"{each.step_ms:.0f}" for each in measured)],
        ["samples a second", "", "", *(f"{each.samples_per_second:.2f}" for each in measured)],
        ["largest batch, samples", *CLAIMED["largest batch"], *(str(batches.get(each.name, "")) for each in measured)],
        ["start, s", "", "", *(f"{each.build_s:.1f}" for each in measured)],
        ["encoding the panel, s", "", "", *(_optional(each.encoding_s) for each in measured)],
    ]
    phases = list(dict.fromkeys(name for each in measured for name in each.phase_ms))
    rows += [[f"{name}, ms a step", "", "", *(_phase(each, name) for each in measured)] for name in phases]
    header = ["", "V17 claimed", "V18 claimed", *(each.name for each in measured)]
    lines = [
        f"# V17 beside V18, {result['date']}",
        "",
        f"{result['device']}; {result['precision']}; {shape}.",
        "",
        *_table(header, rows),
        "",
        "Claimed: the figures that V18 was proposed with, for another machine and width. collate, search, h2d and",
        "refresh run beside the step, on threads of their own. Lean: with `embrag.train.recompute_projections`.",
        "",
        *_table(
            [f"largest batch within {limit}", "samples"],
            [[name, f"at least {most}" if name in unsettled else str(most)] for name, most in batches.items()],
        ),
        "",
        *_table(["V18 (refresh) over V17", "measured", "bar"], _ratios(result)),
        "",
        f"MFU {_optional(result['mfu'])} of {result['matrix_tflops']:.3g} TFLOP/s measured for its matrix products.",
    ]
    return "\n".join(lines) + "\n"


def _ratios(result: dict[str, Any]) -> list[list[str]]:
    return [
        ["time per step", _optional(result["v18_over_v17_step_time"]), "0.50"],
        ["peak of activations and gradients", _optional(result["v18_over_v17_peak_memory"]), "0.50"],
        ["largest batch", _optional(result["largest_batch_ratio"]), "3"],
        ["time per step, V18 lean", _optional(result["lean_v18_over_v17_step_time"]), "0.50"],
        ["peak of activations and gradients, V18 lean", _optional(result["lean_v18_over_v17_peak_memory"]), "0.50"],
        ["largest batch, V18 lean", _optional(result["largest_batch_ratio_v18_lean"]), "3"],
        ["largest batch, both lean", _optional(result["largest_batch_ratio_lean"]), ""],
        [
            "largest batch, V18 with activation checkpointing",
            _optional(result["largest_batch_ratio_v18_recomputed"]),
            "",
        ],
        ["largest batch, both with it", _optional(result["largest_batch_ratio_recomputed"]), ""],
        ["largest batch, 2 neighbours (token_k) in V17", _optional(result["largest_batch_ratio_2_neighbours"]), ""],
    ]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(header), "|---" * len(header) + "|", *map(_row, rows)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _phase(measured: Measured, name: str) -> str:
    return f"{measured.phase_ms[name]:.1f}" if name in measured.phase_ms else ""


def draw(measured: list[Measured], result: dict[str, Any], path: Path) -> None:
    """Plot memory over two steps, and time per phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8), layout="constrained")
    for each in measured:
        above.plot(each.memory.seconds, [held / 1e9 for held in each.memory.held_bytes], label=each.name)
    above.set(xlabel="seconds", ylabel="GB held by the run", title=f"two steps, {result['shapes']['samples']} samples")
    above.legend()
    left = [0.0] * len(measured)
    names = [each.name for each in measured]
    for phase in ("forward", "backward", "step"):
        taken = [each.phase_ms.get(phase, 0.0) for each in measured]
        below.barh(names, taken, left=left, label=phase)
        left = [start + more for start, more in zip(left, taken, strict=True)]
    below.invert_yaxis()
    below.set(xlabel="ms a step", title=result["device"])
    below.legend()
    with written(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
