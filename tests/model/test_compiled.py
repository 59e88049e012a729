"""Padding and compilation of the network behind the copying model, against the network as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from embrag_ds.model.compiled import padding_multiple
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.poolings import fusions
from embrag_ds.model.settings import LossConfig
from embrag_ds.retrieval.batch import Batch

pytestmark = pytest.mark.long

LOSS = LossConfig(rarity=0.5)


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding alone: the compiled function is the function."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def batch_of_length(build, length: int, network: Imputer, mode: str = "factored", seed: int = 3) -> Batch:
    """Batch whose core has ``length`` sites."""
    world = build(seed, sites=length, samples=12, window_sites=max(length, 2), overlap=0, flank=0)
    return world.collator(network.embedding, mode=mode)(world.batch_of(0, [0, 4, 9], world.masked(0, 3, seed)))


def passes(network: Imputer, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, and the gradients of the parameters that have one."""
    network.zero_grad()
    losses = network(batch, loss=LOSS)
    losses.total.backward()
    found = {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
    return [each.detach() for each in losses], found


def assert_same(one: tuple[list[Tensor], dict[str, Tensor]], other: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        torch.testing.assert_close(one[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)


@pytest.mark.parametrize("fusion", fusions())
@pytest.mark.parametrize("mode", ["none", "token", "factored", "dense", "live"])
def test_padding_changes_neither_losses_nor_gradients(build, without_compiler, mode: str, fusion: str) -> None:
    network = build.imputer(fusion=fusion, layers=2, good_turing=True).train()
    for length in torch.randint(2, 70, (3,), generator=torch.Generator().manual_seed(len(mode))).tolist():
        batch = batch_of_length(build, length, network, mode)
        network.compiled = None
        expected = passes(network, batch)
        network.compile_losses(False, [length])
        assert_same(passes(network, batch), expected)


class Attention(TorchDispatchMode):
    """Dispatch mode that records the numbers of queries and keys of attention, and its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("aten._scaled_dot_product_flash_attention_for_cpu.default"):
            self.seen.append((args[0].shape[2], args[1].shape[2]))
            assert (kwargs or {}).get("attn_mask") is None
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("length", "sites"), [(32, 32), (33, 48), (47, 48)])
def test_attention_is_fused_and_has_no_mask(build, without_compiler, length: int, sites: int) -> None:
    network = build.imputer()
    batch = batch_of_length(build, length, network)
    network.compile_losses(False, [length])
    with Attention() as attention:
        network(batch, loss=LOSS)
    assert attention.seen == [(sites, length)]


def test_what_is_traced_is_one_graph_for_all_lengths_of_one_padding(build, compiler) -> None:
    """The graph is whole (``fullgraph``), and a length that needs no padding has one of its own."""
    compiler("eager")
    network = build.imputer().train()
    batches = [batch_of_length(build, length, network) for length in (46, 41, 48)]
    expected = [passes(network, batch) for batch in batches]
    network.compile_losses(False, [46, 41, 48])
    for batch, theirs, graphs in zip(batches, expected, (1, 1, 2), strict=True):
        assert_same(passes(network, batch), theirs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_code_stores_no_norms_and_activations(build, compiler, kept_bytes) -> None:
    """They are computed again there, too. Without that, a block would keep seven times its input more."""
    compiler("aot_eager_decomp_partition")
    network = build.imputer(dims=64, layers=3).train()
    batch = batch_of_length(build, 48, network)
    eager = kept_bytes(lambda: network(batch, loss=LOSS).total)
    network.compile_losses(False, [48])
    compiled = kept_bytes(lambda: network(batch, loss=LOSS).total)
    assert compiled < eager + 24 * 4 * batch.core.tokens.numel() * 64


@given(lengths=st.sets(st.integers(1, 3000), min_size=1, max_size=40))
def test_at_most_four_padded_lengths_remain(lengths: set[int]) -> None:
    multiple = padding_multiple(lengths)
    assert multiple % 16 == 0 and len({-(-length // multiple) for length in lengths}) <= 4
    assert multiple == 16 or len({-(-length // (multiple // 2)) for length in lengths}) > 4


def test_windows_of_one_contig_have_one_padded_length(build) -> None:
    windows = build(1, sites=3001, window_sites=1024, overlap=128).data.windows
    lengths = {window.core_stop - window.core_start for window in windows}
    assert len(lengths) == 2 and padding_multiple(lengths) == 16 and len({-(-length // 16) for length in lengths}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "best"), [(47, False), (48, False), (47, True)])  # the best take a minute to find
def test_on_a_gpu_compiled_code_is_the_network(build, monkeypatch, length: int, best: bool) -> None:
    network = build.imputer(dims=64, layers=2).train()
    taken = []
    network.compiled = lambda given, loss: taken.append(given) or network._losses(given, None, loss)
    expected = passes(network, batch_of_length(build, length, network))
    network.cuda().compile_losses(best, [length])
    for _ in range(3):  # results stay what they are in later calls
        network.zero_grad()
        there = torch.utils._pytree.tree_map_only(Tensor, lambda each: each.detach().cuda(), taken[0])
        losses = network.compiled(there, LOSS)
        losses.total.backward()
        torch.testing.assert_close(losses.total.detach().cpu(), expected[0][0], rtol=1e-3, atol=1e-4)
    gradient = network.head.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient.cpu(), expected[1]["head.weight"], rtol=1e-2, atol=1e-4)
