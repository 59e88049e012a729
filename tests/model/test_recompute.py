"""Recomputed activations: equal gradients from less stored memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embrag_ds.model import confidence, imputer
from embrag_ds.model.recompute import computed_again, through

KeptBytes = Callable[[Callable[[], Tensor]], int]


def test_what_comes_first_is_not_kept_for_what_comes_then() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    first, then = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)
    with_gradients: list[bool] = []
    first.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    made = through(first, then, x)
    assert with_gradients == [True]
    made.square().sum().backward()
    assert with_gradients == [True, False]
    mine = [x.grad, *(each.grad for part in (first, then) for each in part.parameters())]
    other = x.detach().clone().requires_grad_()
    expected = torch.autograd.grad(then(first(other)).square().sum(), [other, *first.parameters(), *then.parameters()])
    for mine_, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(mine_, theirs)


def test_of_what_is_computed_again_the_arguments_are_kept(kept_bytes: KeptBytes) -> None:
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(16, 16, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ weight).exp().tanh()

    assert kept_bytes(lambda: computed_again(function, x)) == x.nbytes < kept_bytes(lambda: function(x))
    mine = torch.autograd.grad(computed_again(function, x).sum(), [x, weight])
    for one, other in zip(mine, torch.autograd.grad(function(x).sum(), [x, weight]), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(computed_again(function, x), function(x))


@pytest.mark.parametrize("mode", ["none", "token", "factored", "dense", "live"])
def test_the_network_keeps_little_around_its_transformer(
    build, mode: str, kept_bytes: KeptBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = build(2, samples=12)
    network = build.imputer(dims=64)
    for part in (network.head, network.confidence.layers[-1]):
        torch.nn.init.normal_(part.weight)  # at 0, as they start, no gradient would pass through them
    batch = world.collator(network.embedding, mode=mode)(world.batch_of(1, [0, 3, 7], world.masked(1, 3, 1)))
    size = 4 * batch.core.tokens.numel() * 64  # [B, L, D]

    def measured() -> tuple[int, list[Tensor]]:
        kept = kept_bytes(lambda: network(batch).logits)
        network.zero_grad()
        network(batch).logits.square().sum().backward()
        return kept, [each.grad.clone() for each in network.parameters() if each.grad is not None]

    lean, mine = measured()
    for module in (imputer, confidence):
        monkeypatch.setattr(module, "computed_again", lambda function, *given: function(*given))
    plain, theirs = measured()
    # Query, reference and frequency, concatenated and apart, gates and mixture: nine to twelve times the output.
    assert plain - lean >= 9 * size
    assert len(mine) == len(theirs) > 20
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
