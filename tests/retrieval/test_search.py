"""Search backends on a GPU against the torch backend on a CPU."""

from __future__ import annotations

import pytest
import torch

from embrag_ds.ops.bits import pack
from embrag_ds.retrieval.search import make_search

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "faiss-gpu", "cupy"])
@pytest.mark.parametrize("seed", range(3))
def test_backends_on_the_gpu_find_what_torch_finds_on_the_cpu(name: str, seed: int) -> None:
    maker = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (64, 500), generator=maker)
    weights = torch.rand(64, 500, generator=maker) * (torch.rand(64, 500, generator=maker) < 0.7)
    reference = torch.randint(0, 2, (500, 3001), generator=maker, dtype=torch.uint8)
    excluded = torch.randint(0, 3002, (64, 4), generator=maker)
    expected = make_search("torch", CPU).nearest(tokens, weights, reference, 3001, excluded, 100)
    search = make_search(name, CUDA)
    given_form = pack(reference) if search.packed else reference
    distance, ids = search.nearest(tokens.to(CUDA), weights.to(CUDA), given_form.to(CUDA), 3001, excluded.to(CUDA), 100)
    torch.testing.assert_close(distance.cpu(), expected[0], rtol=1e-4, atol=1e-2)
    assert not (ids.cpu()[:, :, None] == excluded[:, None]).any()
    explicit = (weights[:, :, None] * (tokens[:, :, None] != reference)).sum(1)
    torch.testing.assert_close(explicit.gather(1, ids.cpu()), expected[0], rtol=1e-4, atol=1e-2)
