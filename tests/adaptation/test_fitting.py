"""The optimiser of an adaptation beside one written by hand, and the order in which parts move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from embrag_ds.adaptation.fitting import FROZEN, FROZEN_AMONG_FEW, Fit
from embrag_ds.adaptation.learner import Learner, Source
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.export import ExportedModel
from embrag_ds.model.imputer import Imputer

MakeSource = Callable[..., Source]
MakeModel = Callable[..., ExportedModel]
STEPS = 30
FIRST = 3
"""Steps of which the copying model alone moves."""


@pytest.fixture
def source(make_source: MakeSource, inputs: PanelInputs) -> Source:
    """Source with a map so long that windows have several places, or the prior's reach would have no gradient."""
    return make_source(inputs=replace(inputs, position_cm=30 * inputs.position_cm))


@pytest.fixture
def learner(source: Source, model: ExportedModel) -> Learner:
    return Learner(source, model, source.windows(model), 1.0)


def loss_of(learner: Learner, number: int) -> Tensor:
    """Loss of a batch; every other one is scaled up until its gradient is clipped."""
    batch = learner._batch(learner._sampler.queries(number))
    total: Tensor = learner.network(batch, loss=learner._loss).total
    return total * (100.0 if number % 2 else 1.0)


def is_copying(name: str) -> bool:
    return name.startswith("pooling.") or name == "background"


def stays(name: str) -> bool:
    return name.startswith(FROZEN)


def moved(network: Imputer, model: ExportedModel) -> set[str]:
    """Names of the tensors that differ from the model's."""
    return {name for name, value in network.state_dict().items() if not torch.equal(value, model.weights[name])}


def test_a_step_is_adamw_with_clipped_gradients_and_a_pull_to_the_start(
    learner: Learner, source: Source, model: ExportedModel
) -> None:
    """The twin has Adam's formulas (Kingma and Ba 2015) and no optimiser of torch."""
    fit = Fit(learner.network, STEPS)
    twin = Learner(source, model, source.windows(model), 1.0)
    weights = {name: each for name, each in twin.network.named_parameters() if not stays(name)}
    start = {name: each.detach().clone() for name, each in weights.items()}
    means, squares = ({name: torch.zeros_like(each) for name, each in weights.items()} for _ in range(2))
    norms = []
    for number in range(6):
        fit.step(number, loss_of(learner, number))
        cosine = 0.5 * (1 + math.cos(math.pi * number / STEPS))
        copying_rate = 0.02 * cosine * min(1, (number + 1) / 10)
        other_rate = 0.003 * cosine * max(0, min(1, (number + 1 - FIRST) / 10))
        gradients = torch.autograd.grad(loss_of(twin, number), list(weights.values()))
        norm = math.sqrt(sum(float((each.double() ** 2).sum()) for each in gradients))
        norms.append(norm)
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                rate = copying_rate if is_copying(name) else other_rate
                clipped = gradient * min(1.0, 1.0 / (norm + 1e-6))
                means[name] = 0.9 * means[name] + 0.1 * clipped
                squares[name] = 0.95 * squares[name] + 0.05 * clipped**2
                mean = means[name] / (1 - 0.9 ** (number + 1))
                square = squares[name] / (1 - 0.95 ** (number + 1))
                weight += 0.3 * rate * (start[name] - weight)
                weight -= rate * mean / (square.sqrt() + 1e-8)
    assert min(norms) < 0.5 and max(norms) > 2
    for name, value in learner.network.named_parameters():
        if name in weights:
            torch.testing.assert_close(value, weights[name], atol=2e-6, rtol=1e-5)
            assert not torch.equal(value, start[name]), name
        assert value.grad is None


def test_copying_moves_first_then_all_but_the_embedding(learner: Learner, model: ExportedModel) -> None:
    fit = Fit(learner.network, STEPS)
    for number in range(FIRST):
        fit.step(number, loss_of(learner, number))
    names = {name for name, _ in learner.network.named_parameters()}
    copying = {name for name in names if is_copying(name) and not stays(name)}
    assert len(copying) > 3 and moved(learner.network, model) == copying
    for number in range(FIRST, FIRST + 2):
        fit.step(number, loss_of(learner, number))
    frozen = set(filter(stays, names))
    assert frozen and moved(learner.network, model) == names - frozen


def test_nothing_moves_without_a_gradient(learner: Learner, model: ExportedModel) -> None:
    fit = Fit(learner.network, STEPS)
    for number in (0, 10, 20):
        fit.step(number, sum((each.sum() for each in learner.network.parameters()), torch.zeros(())) * 0)
    assert moved(learner.network, model) == set()


def test_rates_warm_up_and_fall_along_half_a_cosine(model: ExportedModel) -> None:
    fit = Fit(Imputer(model.config.model), 200)
    copying, others = zip(*map(fit.rates, range(200)), strict=True)
    assert copying[0] == pytest.approx(0.002) and others[:20] == (0.0,) * 20
    assert others[20] == pytest.approx(0.0003 * 0.5 * (1 + math.cos(0.1 * math.pi)))
    assert copying[100] == pytest.approx(0.01) and others[100] == pytest.approx(0.0015)
    assert copying.index(max(copying)) == 9 and others.index(max(others)) == 29
    assert all(one > 6 * other for one, other in zip(copying, others, strict=True))
    for rates, peak in ((copying, 9), (others, 29)):
        assert list(rates[peak:]) == sorted(rates[peak:], reverse=True) and 0 < rates[-1] < 1e-4 * rates[peak]


@pytest.mark.parametrize("steps", [20, 23, 300])
def test_every_part_has_a_rate_above_0_at_last(model: ExportedModel, steps: int) -> None:
    fit = Fit(Imputer(model.config.model), steps)
    assert all(min(fit.rates(number)) > 0 for number in range(math.ceil(steps / 10), steps))
    assert all(fit.rates(number)[0] > 0 for number in range(steps))


def test_learning_without_the_transformer_leaves_its_weights(make_source: MakeSource, model: ExportedModel) -> None:
    source = make_source(transformer=False)
    learner = Learner(source, model, source.windows(model), 1.0)
    learner.learn(4)
    parts = {name.partition(".")[0] for name in moved(learner.network, model)}
    assert parts == {"pooling", "background", "confidence"}
    assert not learner.network.training


def test_dropout_repeats_whatever_was_drawn_before(source: Source, make_model: MakeModel) -> None:
    model = make_model("embrag.model.dropout=0.5")
    made = []
    for drawn in range(2):
        torch.rand(1 + drawn)
        learner = Learner(source, model, source.windows(model), 1.0)
        learner.learn(3)
        made.append(learner.weights())
    state = torch.random.get_rng_state()
    learner.learn(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(made[0][name], value) for name, value in made[1].items())


def test_the_prior_stays_where_most_haplotypes_are_no_neighbours(
    source: Source, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    haplotypes = len(source.reference)
    for k, frozen in ((haplotypes // 2 + 2, FROZEN), (haplotypes // 2 - 2, (*FROZEN, *FROZEN_AMONG_FEW))):
        model = make_model(f"embrag.retrieval.k={k}")
        learner = Learner(source, model, source.windows(model), 1.0)
        learner.learn(2)
        for name, value in learner.network.state_dict().items():
            if name.startswith(frozen):
                assert torch.equal(value, model.weights[name]), name
        assert ("pooling.closeness" in moved(learner.network, model)) == (frozen == FROZEN)
