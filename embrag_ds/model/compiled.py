"""Compilation of the network behind the copying model, from embedding to loss, with few shapes.

``torch.compile`` makes the fastest code for fixed shapes, and makes it anew for every shape. So cores are padded to a
multiple of 16 sites. Padding is no key of attention and is not scored; everything else is computed per site. The number
of sites before padding is the one size that the code leaves open. It cuts off attention's keys, without a mask, because
fused attention is slower with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.functional import pad

_MULTIPLE = 16
_MOST_LENGTHS = 4
"""Padded lengths in a run. Each is compiled with and without padding, and torch compiles a function at most 8 times."""
_NUMBER = 0.5
"""Padding of floats, with which every feature and its gradient is finite."""
_PLACES = {"codebook": 0, "embeddings": 2}
_WITHOUT_ROWS = ("position", "site_frequency", "codebook")


class CoreInputs(NamedTuple):
    """What the network reads of a batch after the copying model, over the L sites of a core.

    L is the last dimension, except in ``codebook`` and ``embeddings``. Fields have the names and shapes of
    :class:`~embrag_ds.retrieval.batch.CoreFrame`, of :class:`~embrag_ds.retrieval.batch.Retrieved` (``neighbours`` are
    its ``tokens``) and of :class:`~embrag_ds.model.pooling.Pooled`, whose ``evidence`` is a tuple here.
    ``position`` and ``site_frequency`` float32 [L] are the features of the core's sites.
    """

    position: Tensor
    site_frequency: Tensor
    tokens: Tensor
    alleles: Tensor
    scored: Tensor
    frequency: Tensor
    population_frequency: Tensor
    good_turing: Tensor
    dosage: Tensor | None = None
    ancestry: Tensor | None = None
    weights: Tensor | None = None
    evidence: tuple[Tensor, ...] | None = None
    codebook: Tensor | None = None
    embeddings: Tensor | None = None
    neighbours: Tensor | None = None

    def padded(self, sites: int) -> CoreInputs:
        """The same with padding up to ``sites`` sites: REF, not scored, and numbers that are valid as any feature."""

        def longer(given: Tensor, place: int) -> Tensor:
            beside = [0, 0] * (given.dim() - 1 - place)
            value = _NUMBER if given.is_floating_point() else 0
            return pad(given, [*beside, 0, sites - given.shape[place]], value=value)

        return self._each(longer)

    def apart(self) -> CoreInputs:
        """The same with copies of views. The compiler tells a view that begins where its base does from others."""

        def copied(given: Tensor, place: int) -> Tensor:
            whole = given.is_contiguous() and not given.storage_offset()
            return given if whole else given.clone(memory_format=torch.contiguous_format)

        return self._each(copied)

    def blocks(self, rows: int) -> list[CoreInputs]:
        """The same in blocks of ``rows`` of the B rows."""

        def part(start: int) -> CoreInputs:
            made: dict[str, Any] = {}
            for name, value in zip(self._fields, self, strict=True):
                if isinstance(value, tuple):
                    made[name] = tuple(each[start : start + rows] for each in value)
                elif value is not None and name not in _WITHOUT_ROWS:
                    made[name] = value[start : start + rows]
            return self._replace(**made)

        return [part(start) for start in range(0, len(self.tokens), rows)]

    def sites(self, start: int, stop: int) -> CoreInputs:
        """The same at the sites from ``start`` to ``stop``."""
        return self._each(lambda given, place: given.narrow(place, start, stop - start))

    def mark_dynamic(self) -> None:
        """Tell torch.compile that the number of sites is not the same in every batch."""

        def mark(given: Tensor, place: int) -> Tensor:
            torch._dynamo.maybe_mark_dynamic(given, place)
            return given

        self._each(mark)

    def _each(self, change: Callable[[Tensor, int], Tensor]) -> CoreInputs:
        """The same with ``change(tensor, place)`` for every tensor; ``place`` is that of L among its dimensions."""
        made: dict[str, Any] = {}
        for name, value in zip(self._fields, self, strict=True):
            if isinstance(value, tuple):
                made[name] = tuple([change(each, each.dim() - 1) for each in value])
            elif value is not None:
                made[name] = change(value, _PLACES.get(name, value.dim() - 1))
        return self._replace(**made)


class Compiled:
    """Compiled function of (:class:`CoreInputs`, sites with padding, ...), to be called with inputs without padding."""

    def __init__(self, function: Callable[..., Any], best: bool, lengths: Collection[int]):
        """With ``best`` the compiler tries several kernels for each product. ``lengths`` are the run's core lengths."""
        self._multiple = padding_multiple(lengths)
        mode: Literal["max-autotune-no-cudagraphs"] | None = "max-autotune-no-cudagraphs" if best else None
        self._function = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, given: CoreInputs, *others: Any) -> Any:
        """Call the function; the first call of a length compiles it."""
        length = given.tokens.shape[-1]
        sites = -(-length // self._multiple) * self._multiple
        given = given.apart()
        if sites != length:
            given.mark_dynamic()
        # Computing norms and activations again costs a fused kernel nothing. Without this setting they would be stored.
        with torch._functorch.config.patch(aggressive_recomputation=True):
            return self._function(given, sites, *others)


def padding_multiple(lengths: Collection[int]) -> int:
    """Multiple of 16 to which cores of these ``lengths`` are padded, such that at most 4 padded lengths remain."""
    multiple = _MULTIPLE
    while len({-(-length // multiple) for length in lengths}) > _MOST_LENGTHS:
        multiple *= 2
    return multiple
