"""Backend ``auto``: the fastest of the backends is taken, and each must find the nearest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.retrieval import fastest, search
from embrag_ds.retrieval.fastest import FirstSearch
from embrag_ds.retrieval.search import TorchSearch, backends_on
from embrag_ds.retrieval.settings import LocalRetrieval

CPU = torch.device("cpu")
Answer = tuple[Tensor, Tensor]


class Backend(TorchSearch):
    """Search as torch does it, after ``seconds`` of sleep; ``change`` spoils the answer."""

    def __init__(self, seconds: float = 0.0, change: Callable[[Tensor, Tensor, Tensor], Answer] | None = None):
        self.seconds = seconds
        self.change = change
        self.calls = 0

    def nearest(self, *given: Any) -> Answer:
        self.calls += 1
        time.sleep(self.seconds)
        found = super().nearest(*given)
        return found if self.change is None else self.change(*found, given[4])


@pytest.fixture
def first(build) -> FirstSearch:
    world = build(build.random_alleles(1, 40, 12))
    tokens = torch.from_numpy(world.batch_of(0, [0, 1], np.zeros((2, 40), dtype=bool)).alleles).long()
    excluded = torch.zeros(4, 24, dtype=torch.bool)
    excluded[torch.arange(4), torch.arange(4)] = True
    query = world.query(0, tokens, np.arange(40), excluded)
    code = world.cache(world.embedding()).code(0, 0)
    return FirstSearch(query, code, 6, LocalRetrieval(10, 5, 2), CPU)


Use = Callable[..., None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Function that replaces the backends torch and faiss-cpu."""

    def replace(**backends: Backend) -> None:
        for name, backend in backends.items():
            monkeypatch.setitem(search._BACKENDS, name.replace("_", "-"), lambda backend=backend: backend)

    return replace


@pytest.mark.parametrize("slow", ["torch", "faiss-cpu"])
def test_the_fastest_is_taken_and_one_line_says_all_times(
    first: FirstSearch, use: Use, slow: str, caplog: pytest.LogCaptureFixture
) -> None:
    backends = {name: Backend(0.02 if name == slow else 0.0) for name in ("torch", "faiss-cpu")}
    use(torch=backends["torch"], faiss_cpu=backends["faiss-cpu"])
    caplog.set_level(logging.INFO)
    assert first.fastest() == ({"torch", "faiss-cpu"} - {slow}).pop()
    (line,) = [record.message for record in caplog.records if "is taken" in record.message]
    assert all(f"{name} " in line for name in backends) and line.count(" ms") == 2
    assert backends["torch"].calls == backends["faiss-cpu"].calls >= 2 * (1 + 3)  # a warm-up, and some rounds


def test_the_real_backends_agree(first: FirstSearch) -> None:
    assert backends_on(CPU) == ["torch", "faiss-cpu"]
    assert first.fastest() in backends_on(CPU)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda distance, ids, excluded: (distance + 0.1, ids), "gives distances that are wrong"),
        (lambda distance, ids, excluded: (distance, ids[:, :1].expand_as(ids)), "finds a haplotype twice"),
        (lambda distance, ids, excluded: (distance, torch.cat([excluded_of(excluded), ids[:, 1:]], 1)), "an excluded"),
    ],
)
def test_a_backend_with_a_wrong_answer_ends_the_run(
    first: FirstSearch, use: Use, change: Callable[..., Answer], fault: str
) -> None:
    use(faiss_cpu=Backend(change=change))
    with pytest.raises(RuntimeError, match=f"search backend faiss-cpu .*{fault}"):
        first.fastest()


class MissesTheNearest(Backend):
    """Search that finds the second nearest and so on, with their right distances."""

    def nearest(self, *given: Any) -> Answer:
        distance, ids = super().nearest(*given[:-1], given[-1] + 1)
        return distance[:, 1:], ids[:, 1:]


def test_a_backend_that_misses_the_nearest_ends_the_run(first: FirstSearch, use: Use) -> None:
    use(faiss_cpu=MissesTheNearest())
    with pytest.raises(RuntimeError, match="search backend faiss-cpu does not find the nearest in the first window"):
        first.fastest()


def excluded_of(excluded: Tensor) -> Tensor:
    return excluded.min(dim=1, keepdim=True).values


def test_neighbours_as_near_are_right_whatever_their_order(first: FirstSearch, use: Use, build) -> None:
    """Every haplotype twice: a backend may find either."""
    twice = torch.cat([first.query.alleles[:, 4:]] * 2, dim=1)
    none = torch.full((4, 1), twice.shape[1])
    query = fastest.Query(**{**vars(first.query), "alleles": twice, "excluded": none})

    def the_other(distance: Tensor, ids: Tensor, excluded: Tensor) -> Answer:
        return distance, (ids + twice.shape[1] // 2) % twice.shape[1]

    use(faiss_cpu=Backend(change=the_other))
    FirstSearch(query, first.code, 6, None, CPU).fastest()


def test_a_backend_that_cannot_answer_is_left_out(
    first: FirstSearch, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(fault: Exception) -> Callable[..., Answer]:
        def change(*given: Tensor) -> Answer:
            raise fault

        return change

    for fault, level in ((UserError("finds at most 2048"), "INFO"), (RuntimeError("no kernel image"), "WARNING")):
        caplog.clear()
        caplog.set_level(logging.INFO)
        use(faiss_cpu=Backend(change=refuses(fault)))
        assert first.fastest() == "torch"
        assert [record.levelname for record in caplog.records if str(fault) in record.message] == [level]
    use(torch=Backend(change=refuses(RuntimeError("out of memory"))))
    with pytest.raises(RuntimeError, match="out of memory"):
        first.fastest()
