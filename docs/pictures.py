"""Draw the pictures of docs/how-it-works.md: ``python docs/pictures.py`` writes ``docs/pictures/*.svg``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).resolve().parent / "pictures"
DATA, WORK, NETWORK, RESULT, GROUP = "#e8f1fb", "#fdf3dc", "#e3f3e6", "#f6e4ef", "#f4f4f4"
EDGE = "#5b6770"
Place = tuple[float, float, float, float]
"""Left, bottom, width and height of a box."""


def canvas(width: float, height: float) -> Axes:
    """Axes of ``width`` x ``height`` units, with nothing drawn."""
    figure = plt.figure(figsize=(width * 0.9, height * 0.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return axes


def box(axes: Axes, place: Place, text: str, colour: str, bold: bool = False) -> Place:
    """Draw a box with text in its middle; returns its place."""
    left, bottom, width, height = place
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=colour, ec=EDGE)
    )
    weight = "bold" if bold else "normal"
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=11, weight=weight)
    return place


def group(axes: Axes, place: Place, text: str) -> None:
    """Draw a field behind boxes, with a title in its upper left corner."""
    left, bottom, width, height = place
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.02,rounding_size=0.1", fc=GROUP, ec="none")
    )
    axes.text(left + 0.1, bottom + height - 0.1, text, ha="left", va="top", fontsize=10, color=EDGE, style="italic")


def arrow(axes: Axes, start: tuple[float, float], stop: tuple[float, float], bend: float = 0.0) -> None:
    """Draw an arrow."""
    axes.add_patch(
        FancyArrowPatch(
            start, stop, arrowstyle="-|>", mutation_scale=13, color=EDGE, connectionstyle=f"arc3,rad={bend}"
        )
    )


def right(place: Place) -> tuple[float, float]:
    """Middle of a box's right edge."""
    return place[0] + place[2] + 0.03, place[1] + place[3] / 2


def left(place: Place) -> tuple[float, float]:
    """Middle of a box's left edge."""
    return place[0] - 0.03, place[1] + place[3] / 2


def top(place: Place) -> tuple[float, float]:
    """Middle of a box's upper edge."""
    return place[0] + place[2] / 2, place[1] + place[3] + 0.03


def bottom(place: Place) -> tuple[float, float]:
    """Middle of a box's lower edge."""
    return place[0] + place[2] / 2, place[1] - 0.03


def batch() -> None:
    """The way of a batch, from queries to log-odds."""
    axes = canvas(10, 7.4)
    group(axes, (0.1, 3.55, 9.8, 3.75), "collate: on the prefetch thread and a side stream, batches ahead of training")
    query = box(axes, (0.4, 4.0, 2.6, 0.95), "query haplotypes,\nmost alleles masked", DATA)
    panel = box(axes, (0.4, 5.7, 2.6, 0.95), "packed panel,\n1 bit an allele", DATA)
    search = box(axes, (3.9, 4.85, 2.6, 1.1), "exact search of\nK nearest haplotypes\n(torch, FAISS, CuPy)", WORK)
    found = box(axes, (7.2, 4.85, 2.4, 1.1), "neighbours:\nalleles, mismatches", DATA)
    arrow(axes, right(panel), (3.87, 5.7))
    arrow(axes, right(query), (3.87, 5.1))
    arrow(axes, right(search), left(found))
    copying = box(axes, (7.2, 2.15, 2.4, 1.0), "copying model:\nweights by site", WORK)
    arrow(axes, bottom(found), top(copying))
    codebook = box(axes, (0.4, 2.15, 2.6, 1.0), "codebook from the\nreference cache", DATA)
    fusion = box(axes, (3.9, 2.15, 2.6, 1.0), "fusion: query with\npooled embedding", NETWORK)
    arrow(axes, left(copying), right(fusion))
    arrow(axes, right(codebook), left(fusion))
    arrow(axes, bottom(query), (4.3, 3.18))
    transformer = box(axes, (3.9, 0.4, 2.6, 1.0), "transformer,\none pass", NETWORK, bold=True)
    arrow(axes, bottom(fusion), top(transformer))
    head = box(axes, (7.2, 0.4, 2.4, 1.0), "confidence head,\nper site", NETWORK)
    arrow(axes, bottom(copying), top(head))
    result = box(axes, (0.4, 0.4, 2.6, 1.0), "log-odds of ALT =\nprior + corrections", RESULT, bold=True)
    arrow(axes, left(transformer), right(result))
    arrow(axes, (7.8, 0.37), (2.4, 0.37), -0.12)
    save("batch")


def cache() -> None:
    """The factored reference cache and its generations."""
    axes = canvas(10, 5.3)
    full = box(axes, (0.3, 3.3, 2.9, 1.5), "embeddings of a window,\nwritten out:\nH x L x D numbers", WORK)
    books = box(axes, (4.3, 4.1, 2.6, 0.95), "codebook:\n2 x L x D numbers", DATA, bold=True)
    bits = box(axes, (4.3, 2.85, 2.6, 0.95), "packed alleles:\nH x L bits", DATA, bold=True)
    arrow(axes, right(full), left(books))
    arrow(axes, right(full), left(bits))
    axes.text(1.75, 2.95, "equal, bit for bit", ha="center", fontsize=9.5, color=EDGE, style="italic")
    never = box(axes, (7.5, 2.85, 2.2, 0.95), "never change:\non the GPU once", RESULT)
    generation = box(axes, (7.5, 4.1, 2.2, 0.95), "a generation:\nall windows", RESULT)
    arrow(axes, right(bits), left(never))
    arrow(axes, right(books), left(generation))
    group(axes, (0.3, 0.15, 9.4, 2.3), "pinned host memory, two buffers")
    front = box(axes, (0.7, 0.6, 3.3, 1.1), "front: generation n,\nread by training", NETWORK)
    back = box(axes, (6.0, 0.6, 3.3, 1.1), "back: generation n + 1,\nbeing encoded", NETWORK)
    arrow(axes, left(back), right(front))
    axes.text(5.0, 1.25, "swap at a step\nknown beforehand", ha="center", fontsize=9.5, color=EDGE, style="italic")
    save("cache")


def streams() -> None:
    """What runs at the same time in training on a GPU."""
    axes = canvas(10, 4.3)
    rows = {
        "worker\nprocesses": 3.3,
        "prefetch thread,\nside stream": 2.4,
        "training\nstream": 1.5,
        "refresh thread\nand stream": 0.6,
    }
    for name, height in rows.items():
        axes.text(0.1, height + 0.3, name, va="center", fontsize=10.5)
        axes.plot([2.0, 9.9], [height - 0.07] * 2, color="#d5d9dc", lw=0.8)
    for n in range(4):
        box(axes, (2.1 + 1.9 * n, rows["worker\nprocesses"], 1.2, 0.6), f"draw {n + 3}", DATA)
        box(axes, (2.1 + 1.9 * n, rows["prefetch thread,\nside stream"], 1.5, 0.6), f"copy, search {n + 2}", WORK)
        box(axes, (2.1 + 1.9 * n, rows["training\nstream"], 1.85, 0.6), f"step {n + 1}", NETWORK, bold=True)
    box(
        axes,
        (2.5, rows["refresh thread\nand stream"], 4.7, 0.6),
        "encode every window with the snapshot of step 1",
        RESULT,
    )
    axes.text(
        7.45, rows["refresh thread\nand stream"] + 0.3, "used from step 1 + lag", va="center", fontsize=10, color=EDGE
    )
    arrow(axes, (2.0, 0.25), (9.9, 0.25))
    axes.text(9.9, 0.05, "time", ha="right", fontsize=10, color=EDGE)
    save("streams")


def imputing() -> None:
    """Imputation along a stretch."""
    axes = canvas(10, 3.6)
    typed = box(axes, (0.2, 2.3, 2.1, 1.0), "targets' typed\nalleles", DATA)
    adapt = box(axes, (3.0, 2.3, 2.9, 1.0), "adaptation, once for\na panel and an array", NETWORK)
    copy = box(axes, (6.6, 2.3, 3.2, 1.0), "forward-backward over\nall haplotypes, two models", WORK, bold=True)
    sums = box(axes, (6.6, 0.4, 3.2, 1.0), "sums by distinct sequence,\nthen dosages by site", WORK)
    head = box(axes, (3.0, 0.4, 2.9, 1.0), "confidence head where\nan allele is likely", NETWORK)
    out = box(axes, (0.2, 0.4, 2.1, 1.0), "GT, DS, HDS, GP", RESULT, bold=True)
    for start, stop in ((right(typed), left(adapt)), (right(adapt), left(copy)), (bottom(copy), top(sums))):
        arrow(axes, start, stop)
    arrow(axes, left(sums), right(head))
    arrow(axes, left(head), right(out))
    save("imputing")


def save(name: str) -> None:
    """Write the current figure, the same bytes every time."""
    HERE.mkdir(exist_ok=True)
    plt.savefig(HERE / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    plt.close()


if __name__ == "__main__":
    with matplotlib.rc_context({"svg.hashsalt": "embrag_ds", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for draw in (batch, cache, streams, imputing):
            draw()
