"""Phases of retrieval in a timeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.ops import cuda
from embrag_ds.retrieval.collate import receive
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.schedule import RefreshConfig
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.runtime.timeline import Timeline
from tests.cuda_rules import Machine

CPU = torch.device("cpu")


def retrieve(world, device: torch.device, timeline: Timeline) -> None:
    """Collate four batches, the last of which uses the second generation."""
    embedding = HaplotypeEmbedding(4).to(device).requires_grad_(False)
    refresh = RefreshConfig(every_steps=2, lag_steps=1)
    settings = RetrievalConfig(k=4, refresh=refresh, backend="torch")
    reference = Reference(settings, world.data, embedding, device, np.arange(10)[:, None], timeline=timeline)
    collate = reference.collator(2, slots=4)
    for step in range(4):
        reference.begin_refresh(step)
        receive(collate(world.batch_of(step % 2, [1, 2], world.masked(step % 2, 2, step)), step))
    reference.close()


@pytest.fixture(scope="module")
def world(build):
    return build(build.random_alleles(1, 60, 10), window_sites=30, overlap=4, flank=5)


def test_retrieval_records_its_phases(world) -> None:
    timeline = Timeline(CPU)
    retrieve(world, CPU, timeline)
    counts = {(each.name, each.thread): each.count for each in timeline.totals()}
    main = {(name, "MainThread"): 4 for name in ("collate", "search", "h2d")}
    assert counts == {**main, ("refresh", "reference-refresh_0"): 2}
    by_name = {name: [span for span in timeline.spans() if span.name == name] for name in ("collate", "search", "h2d")}
    for part in ("search", "h2d"):
        for outer, inner in zip(by_name["collate"], by_name[part], strict=True):
            assert outer.start_s <= inner.start_s and inner.stop_s <= outer.stop_s


def check_streams(world, device: torch.device) -> None:
    timeline = Timeline(device)
    retrieve(world, device, timeline)
    torch.cuda.synchronize(device)
    found = {(each.name, each.stream) for each in timeline.totals()}
    assert found == {(name, "side stream") for name in ("collate", "search", "h2d", "refresh")}
    assert all(0 <= span.start_s <= span.stop_s for span in timeline.spans())


@pytest.mark.gpu
def test_retrieval_on_the_gpu_is_measured_on_its_streams(world) -> None:
    check_streams(world, torch.device("cuda", 0))


def test_retrieval_on_a_gpu_is_measured_on_its_streams(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: False)  # torch's operations in place of the kernels
    with Machine() as machine:
        check_streams(world, machine.device)
