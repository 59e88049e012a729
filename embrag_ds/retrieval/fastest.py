"""Backend ``auto``: the search backends of this machine are timed on a run's first window, and the fastest is taken.

All are exact, and that is checked, too: a backend whose neighbours are not the nearest ends the run.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.retrieval.codebooks import WindowCodebook
from embrag_ds.retrieval.schedule import Generation
from embrag_ds.retrieval.search import Search, backends_on, make_search
from embrag_ds.retrieval.settings import LocalRetrieval
from embrag_ds.retrieval.store import FactoredStore, Query, Store

logger = logging.getLogger(__name__)

_ROUNDS = 5
_TOLERANCE = 1e-4
"""Largest difference between two distances that count as equal, as a share of the sum of a query's weights."""


@dataclass(frozen=True)
class FirstSearch:
    """The search of a run's first batch, to be repeated with every backend."""

    query: Query
    code: WindowCodebook
    k: int
    local: LocalRetrieval | None
    device: torch.device

    def fastest(self) -> str:
        """Name of the backend that answers fastest; one line of the log gives the times of all.

        A backend that cannot answer is left out, with a warning. Raises RuntimeError if the neighbours that a backend
        finds are not the nearest ones.
        """
        stores, answers = {}, {}
        for name in backends_on(self.device):
            try:
                search = make_search(name, self.device)
                watched = _Watched(search)
                # The first search compiles kernels and allocates scratch memory.
                FactoredStore(watched, self.local).search(self.query, self.code, self.k)
                self._synchronise()
            except UserError as fault:
                logger.info("search %s is left out: %s", name, fault)
            except Exception as fault:  # whatever a faulty installation raises: the others go on
                if name == "torch":
                    raise
                logger.warning("search %s is left out, because it fails here: %s", name, fault)
            else:
                stores[name], answers[name] = FactoredStore(search, self.local), watched.answer
        _check_nearest(self.query.alleles, answers)
        seconds = dict.fromkeys(stores, float("inf"))
        for _ in range(_ROUNDS):
            for name, store in stores.items():
                self._synchronise()
                began = time.perf_counter()
                store.search(self.query, self.code, self.k)
                self._synchronise()
                # The shortest, because whatever else the machine does only adds to a time.
                seconds[name] = min(seconds[name], time.perf_counter() - began)
        taken = min(seconds, key=seconds.__getitem__)
        times = ", ".join(f"{name} {1000 * each:.2f} ms" for name, each in seconds.items())
        logger.info("search in the first window: %s; %s is taken", times, taken)
        return taken

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class FirstSearchStore:
    """Store that keeps what the first search of a collator is given; it searches with torch."""

    backend = "torch"

    def __init__(self, local: LocalRetrieval | None, device: torch.device):
        self._local = local
        self._device = device
        self._store: Store = FactoredStore(make_search("torch", device), local)
        self.first: FirstSearch | None = None

    def search(self, query: Query, code: WindowCodebook, k: int) -> Tensor:
        """Ids int64 [B, k] as :meth:`embrag_ds.retrieval.store.FactoredStore.search` gives them."""
        if self.first is None:
            self.first = FirstSearch(query, code, k, self._local, self._device)
        return self._store.search(query, code, k)

    def embeddings(self, window: int, ids: Tensor, generation: Generation) -> None:
        """None: embeddings follow from the codebook."""
        return None


@dataclass(frozen=True)
class _Answer:
    """A search over the whole window: its queries, what it must not find, and what it found."""

    tokens: Tensor
    weights: Tensor
    excluded: Tensor
    distance: Tensor
    ids: Tensor


class _Watched:
    """Search backend that keeps its first answer, which is that over the whole window."""

    def __init__(self, search: Search):
        self.name = search.name
        self.packed = search.packed
        self._search = search
        self._answer: _Answer | None = None

    @property
    def answer(self) -> _Answer:
        assert self._answer is not None
        return self._answer

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        distance, ids = self._search.nearest(tokens, weights, reference, count, excluded, k)
        if self._answer is None:
            self._answer = _Answer(tokens, weights, excluded, distance, ids)
        return distance, ids


def _check_nearest(alleles: Tensor, answers: dict[str, _Answer]) -> None:
    """Raise RuntimeError unless all ``answers``, by backend, are the same nearest haplotypes up to ties.

    ``alleles`` uint8 [T, H] are the reference haplotypes at the sites searched. Distances are computed again from the
    ids, by their definition. So neighbours that no other backend finds pass only if they are as near.
    """
    expected: Tensor | None = None
    for name, answer in answers.items():
        ids = answer.ids
        exact = torch.stack(
            [
                weights @ (alleles[:, row] != tokens[:, None]).float()
                for row, tokens, weights in zip(ids, answer.tokens, answer.weights, strict=True)
            ]
        )
        expected = exact if expected is None else expected
        allowed = _TOLERANCE * answer.weights.sum(1, keepdim=True)
        ordered = ids.sort(dim=1).values
        faults = {
            "finds a haplotype twice": (ordered[:, 1:] == ordered[:, :-1]).any(),
            "finds an excluded haplotype": (ids[:, :, None] == answer.excluded[:, None, :]).any(),
            "gives distances that are wrong": ((answer.distance - exact).abs() > allowed).any(),
            "does not find the nearest": (
                (exact.sort(dim=1).values - expected.sort(dim=1).values).abs() > allowed
            ).any(),
        }
        for fault, found in faults.items():
            if found:
                raise RuntimeError(
                    f"search backend {name} {fault} in the first window; set embrag.retrieval.backend to another of "
                    f"{', '.join(answers)}, and report it"
                )
