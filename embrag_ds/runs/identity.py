"""Identity of what a run trains on: digests of its inputs' contents, so that other inputs under old names are seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.windows import WindowedPanel

INPUTS = {
    "samples": "the panel's samples (--panel)",
    "sites": "the panel's sites (--panel)",
    "alleles": "the panel's alleles (--panel)",
    "ploidy": "the panel's haploid samples (--panel)",
    "positions": "genetic positions (--map, --cm-per-mb, --effective-size)",
    "populations": "the sample table (--samples)",
    "windows": "the windows (embrag.data)",
    "array": "the array's sites (embrag.masking.array_manifest)",
    "relatives": "the relatives (embrag.retrieval.relatives)",
}
"""What each digest is of, in words that name the option or setting behind it."""


def identity_of(inputs: PanelInputs, data: WindowedPanel, exclusions: np.ndarray) -> dict[str, str]:
    """Digests of a run's inputs by the names of :data:`INPUTS`.

    They are of contents, not of files: a panel that was moved, compressed anew or renamed is the same. ``exclusions``
    int64 [N, E] are those of :func:`embrag_ds.data.sampler.exclusion_table`.
    """
    sites, ploidy = inputs.panel.sites, inputs.panel.ploidy
    cores = [(each.start, each.core_start, each.core_stop, each.stop) for each in data.windows]
    return {
        "samples": _of_texts(inputs.panel.samples),
        "sites": _of_texts("\t".join(map(str, each)) for each in sites.identities()),
        "alleles": inputs.panel.alleles_sha256,
        "ploidy": "" if ploidy is None else _of_array(ploidy.start) + _of_array(ploidy.haploid),
        "positions": _of_array(data.position_cm),
        "populations": _of_texts(inputs.populations.names[code] for code in inputs.populations.of.tolist()),
        "windows": _of_array(np.array(cores)),
        "array": "" if data.manifest is None else _of_array(data.manifest),
        "relatives": _of_array(exclusions),
    }


def differing_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two identities, in the words of :data:`INPUTS`."""
    return [words for name, words in INPUTS.items() if then.get(name) != now.get(name)]


def _of_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogateescape")
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def _of_array(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
