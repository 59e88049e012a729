"""Whole network: prior before training, no leak of masked alleles, invariances and gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from embrag_ds.errors import UserError
from embrag_ds.model.compiled import CoreInputs
from embrag_ds.model.embedding import HaplotypeEmbedding, gather_embeddings
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.losses import Losses, imputation_loss
from embrag_ds.model.poolings import copying, fusions
from embrag_ds.model.settings import LossConfig, ModelConfig
from embrag_ds.ops.dosage import Carriers, DenseAlleles, Sequences, dense_alleles
from embrag_ds.retrieval.batch import Batch, SiteTensors
from embrag_ds.retrieval.codebooks import site_weights
from embrag_ds.retrieval.collate import site_tensors

FUSIONS = pytest.mark.parametrize("fusion", fusions())
MODES = pytest.mark.parametrize("mode", ["none", "token", "factored", "dense", "live"])


def loss_of(network: Imputer, batch: Batch) -> Losses:
    frequency = batch.core.sites.frequency
    return imputation_loss(network(batch).logits, batch.core.alleles, batch.core.scored, frequency, LossConfig())


def predict(network, batch):
    with torch.no_grad():
        return network(batch)


@FUSIONS
@MODES
@pytest.mark.parametrize("backend", ["torch", "faiss-cpu"])
def test_the_truth_at_masked_sites_changes_no_prediction(build, fusion: str, mode: str, backend: str) -> None:
    """Strict test of leakage, from the queries to the log-odds, bit by bit."""
    world = build(2, samples=12)
    network = build.imputer(fusion=fusion)
    collate = world.collator(network.embedding, mode=mode, backend=backend)
    for window in range(len(world.data)):
        queries = world.batch_of(window, [0, 3, 7], world.masked(window, 3, window))
        flipped = queries.alleles ^ np.repeat(queries.masked, 2, axis=0)
        one, two = collate(queries), collate(replace(queries, alleles=flipped))
        assert not torch.equal(one.core.alleles, two.core.alleles)
        first, second = predict(network, one), predict(network, two)
        assert torch.equal(first.logits, second.logits) and torch.equal(first.prior, second.prior)


def test_samples_typed_at_the_same_few_sites_are_pooled_by_sequence(build) -> None:
    """Other samples are pooled by carriers, with the same result."""
    world = build(3, samples=30, sites=200, window_sites=100)
    network = build.imputer()
    collate = world.collator(network.embedding)
    few = np.ones((3, len(world.data.windows[0])), dtype=bool)
    few[:, ::20] = False
    own, many = few.copy(), few.copy()
    own[1, 12] = False
    many[:, ::2] = False
    batches = [collate(world.batch_of(0, [0, 3, 7], masked)) for masked in (few, own, many)]
    alleles = [batch.retrieved.alleles for batch in batches]
    assert [type(each) for each in alleles] == [Sequences, Carriers, Carriers]
    table = replace(batches[0].retrieved, alleles=DenseAlleles(dense_alleles(alleles[0])))
    mine, other = (predict(network, batch) for batch in (batches[0], replace(batches[0], retrieved=table)))
    torch.testing.assert_close(mine.logits.sigmoid(), other.logits.sigmoid(), atol=1e-4, rtol=0)


def test_the_panels_spectrum_moves_the_prior_where_it_is_enabled(build) -> None:
    world = build(2, samples=12)
    with_it, without = build.imputer(good_turing=True), build.imputer()
    queries = world.batch_of(1, [0, 3, 7], world.masked(1, 3, 1))
    batch = world.collator(without.embedding)(queries)
    batch = replace(batch, core=replace(batch.core, good_turing=torch.randn_like(batch.core.good_turing)))
    moved, plain = predict(with_it, batch), predict(without, batch)
    torch.testing.assert_close(moved.prior, plain.prior + batch.core.good_turing)
    nothing = replace(batch, core=replace(batch.core, good_turing=torch.zeros_like(batch.core.good_turing)))
    assert torch.equal(predict(without, nothing).logits, plain.logits)


@FUSIONS
@MODES
def test_what_is_observed_does_change_predictions(build, fusion: str, mode: str) -> None:
    """Without which the test above could not fail."""
    world = build(2, samples=12)
    network = build.imputer(fusion=fusion)
    collate = world.collator(network.embedding, mode=mode)
    queries = world.batch_of(1, [0, 3, 7], world.masked(1, 3, 1))
    other = queries.alleles ^ np.repeat(~queries.masked, 2, axis=0)
    one, two = (predict(network, collate(each)) for each in (queries, replace(queries, alleles=other)))
    assert not torch.allclose(one.logits, two.logits, atol=1e-3)


@FUSIONS
@MODES
def test_an_untrained_network_predicts_its_prior(build, fusion: str, mode: str) -> None:
    world = build()
    network = build.imputer(trained=False, fusion=fusion)
    batch = world.collator(network.embedding, mode=mode)(world.batch_of(1, [0, 3], world.masked(1, 2, 1)))
    found = predict(network, batch)
    assert torch.equal(found.logits, found.prior)
    assert found.logits.shape == batch.core.tokens.shape and found.logits.dtype == torch.float32


def test_without_retrieval_the_prior_is_the_allele_frequency(build) -> None:
    world = build(outside=4)
    network = build.imputer()
    batch = world.collator(network.embedding, mode="none")(world.batch_of(1, [0, 3], world.masked(1, 2, 1)))
    frequency = torch.from_numpy(world.data.reference.allele_frequency[world.data.windows[1].core_sites])
    expected = frequency.clamp(1e-5, 1 - 1e-5).expand(4, -1)
    assert torch.allclose(predict(network, batch).prior.sigmoid(), expected, atol=1e-5)


@FUSIONS
def test_the_prior_mixes_copied_dosage_and_the_frequency_of_the_neighbours_populations(build, fusion: str) -> None:
    world = build(populations=3)
    network = build.imputer(fusion=fusion)
    batch = world.collator(network.embedding)(world.batch_of(1, [0, 3], world.masked(1, 2, 1)))
    with torch.no_grad():
        # A site's weight is that at the core's centre, where its position is 0.
        centred = replace(batch.window.sites, position=torch.zeros_like(batch.window.sites.position))
        weight = network.embedding.codebook(centred)
        weight = ((weight[:, 1] - weight[:, 0]) ** 2).sum(-1)
        pooled = network.pooling(batch, batch.retrieved, weight / weight.mean())
    share = float(torch.sigmoid(network.background.detach()))
    found = predict(network, batch).prior.sigmoid()
    frequency = batch.core.population_frequency
    for row in range(4):
        for site in range(found.shape[1]):
            expected = sum(float(pooled.ancestry[row, p, site]) * float(frequency[row, p, site]) for p in range(3))
            mixed = (1 - share) * float(pooled.dosage[row, site]) + share * expected
            assert float(found[row, site]) == pytest.approx(min(max(mixed, 1e-5), 1 - 1e-5), abs=1e-5)


@FUSIONS
@MODES
def test_samples_are_predicted_independently_of_their_place_in_the_batch(build, fusion: str, mode: str) -> None:
    world = build(3)
    network = build.imputer(fusion=fusion)
    collate = world.collator(network.embedding, mode=mode)
    samples, masked = [2, 9, 5], world.masked(1, 3, 1)
    together = predict(network, collate(world.batch_of(1, samples, masked)))
    order = [2, 0, 1]
    permuted = predict(network, collate(world.batch_of(1, [samples[i] for i in order], masked[order])))
    rows = [2 * i + haplotype for i in order for haplotype in range(2)]
    assert torch.allclose(permuted.logits, together.logits[rows], atol=2e-3)
    for place, sample in enumerate(samples):
        alone = predict(network, collate(world.batch_of(1, [sample], masked[place : place + 1])))
        assert torch.allclose(alone.logits, together.logits[2 * place : 2 * place + 2], atol=2e-3)


def test_the_two_haplotypes_of_a_sample_are_predicted_independently(build) -> None:
    world = build(3, outside=2)
    network = build.imputer()
    collate = world.collator(network.embedding)
    queries = world.batch_of(1, [0, 1], world.masked(1, 2, 1))
    swapped = replace(queries, alleles=queries.alleles[[1, 0, 3, 2]])
    one, two = (predict(network, collate(each)).logits for each in (queries, swapped))
    assert torch.allclose(one[[1, 0, 3, 2]], two, atol=1e-4)


@FUSIONS
def test_stores_encodings_and_backends_give_the_same_predictions(build, fusion: str) -> None:
    world = build(3, outside=3, cm_per_site=0.1)
    network = build.imputer(fusion=fusion)
    queries = world.batch_of(1, [0, 1, 2], world.masked(1, 3, 1))
    ways = [("factored", "torch"), ("factored", "faiss-cpu"), ("dense", "torch"), ("live", "torch")]
    # All haplotypes are neighbours, so that ties at the k-th do not matter.
    found = [
        predict(network, world.collator(network.embedding, k=22, mode=mode, backend=backend)(queries)).logits
        for mode, backend in ways
    ]
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-3)


@FUSIONS
@MODES
def test_the_same_weights_serve_another_panel_region_and_number_of_populations(build, fusion: str, mode: str) -> None:
    network = build.imputer(fusion=fusion)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    worlds = (build(1, populations=2), build(7, sites=100, samples=9, populations=5, window_sites=45, flank=3))
    for world in worlds:
        batch = world.collator(network.embedding, k=4, mode=mode)(world.batch_of(0, [1, 8], world.masked(0, 2, 1)))
        found = predict(network, batch)
        assert found.logits.shape == (4, world.data.windows[0].core_stop - world.data.windows[0].core_start)
        assert torch.isfinite(found.logits).all()
    sizes = {dimension for shape in shapes.values() for dimension in shape}
    for world in worlds:
        assert not sizes & {len(window) for window in world.data.windows}, "a weight is as long as a window"
    assert {name: value.shape for name, value in network.state_dict().items()} == shapes


@FUSIONS
@MODES
def test_every_parameter_gets_a_finite_gradient_and_the_pooling_a_real_one(build, fusion: str, mode: str) -> None:
    world = build(3, samples=20)
    network = build.imputer(fusion=fusion).train()
    batch = world.collator(network.embedding, mode=mode)(world.batch_of(1, [0, 4, 9, 2], world.masked(1, 4, 1)))
    loss_of(network, batch).total.backward()
    for name, parameter in network.named_parameters():
        if mode == "none" and (name.startswith(("pooling", "confidence")) or name == "background"):
            continue  # not used, or without effect because the dosage is the frequency
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@FUSIONS
def test_gradients_of_the_retrieval_parameters_equal_finite_differences(
    build, fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all probabilities: where one becomes negligible the loss has a step, which no gradient shows."""
    monkeypatch.setattr(copying, "NEGLIGIBLE", 0.0)
    world = build(3, samples=20, cm_per_site=0.2)
    network = build.imputer(trained=False, fusion=fusion)
    batch = world.collator(network.embedding)(world.batch_of(1, [0, 4, 9, 2], world.masked(1, 4, 1)))

    def loss() -> torch.Tensor:
        return loss_of(network, batch).total

    loss().backward()
    for parameter in (*network.pooling.parameters(), network.background):
        for place in range(parameter.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[place] += sign * 4e-3
                    sides.append(float(loss()))
                    parameter.view(-1)[place] -= sign * 4e-3
            difference = (sides[0] - sides[1]) / 8e-3
            assert float(parameter.grad.view(-1)[place]) == pytest.approx(difference, rel=0.05, abs=2e-3)


@FUSIONS
def test_nothing_observed_or_nothing_masked_stays_finite(build, fusion: str) -> None:
    world = build(3)
    network = build.imputer(fusion=fusion)
    for mode in ("none", "factored", "dense"):
        collate = world.collator(network.embedding, mode=mode)
        for mask_all in (True, False):
            masked = np.full((2, len(world.data.windows[1])), mask_all)
            assert torch.isfinite(predict(network, collate(world.batch_of(1, [0, 1], masked))).logits).all()


@FUSIONS
@MODES
def test_it_runs_under_autocast_and_in_bf16(build, fusion: str, mode: str) -> None:
    """As in DeepSpeed's sections torch_autocast (fp32 parameters, bf16 products) and bf16 (bf16 throughout)."""
    world = build(3, samples=12)
    exact = build.imputer(fusion=fusion)
    queries = world.batch_of(1, [0, 4, 9], world.masked(1, 3, 1))
    expected = predict(exact, world.collator(exact.embedding, mode=mode)(queries))
    for autocast in (True, False):
        network = build.imputer(fusion=fusion)
        if not autocast:
            network.to(torch.bfloat16)
        batch = world.collator(network.embedding, mode=mode)(queries)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(network, batch).total
            found = predict(network, batch)
        loss.backward()
        assert found.logits.dtype == torch.float32
        error = (found.logits.sigmoid() - expected.logits.sigmoid()).abs().mean()
        assert float(error) < 0.05
        assert all(torch.isfinite(each.grad).all() for each in network.parameters() if each.grad is not None)


def test_site_weights_are_the_squared_distance_of_the_two_alleles_at_the_centre(build) -> None:
    world = build(3)
    embedding = build.imputer(dims=32).embedding
    sites = site_tensors(world.data, 1, torch.device("cpu"))
    assert sites.position.abs().min() > 0
    with torch.no_grad():
        weights = embedding.site_weights(sites.frequency)
        centred = replace(sites, position=torch.zeros_like(sites.position))
        expected = site_weights(embedding.codebook(centred))
        assert not torch.allclose(site_weights(embedding.codebook(sites)), expected, rtol=1e-3)
        # A site has the same weight among any others.
        assert torch.allclose(embedding.site_weights(sites.frequency[5:9]), expected[5:9])
    assert weights.std() > 0.01
    torch.testing.assert_close(weights, expected)


def test_site_weights_are_the_same_whichever_allele_is_ref(build) -> None:
    embedding = build.imputer().embedding
    torch.nn.init.normal_(embedding.modulation.weight)
    frequency = torch.tensor([0.01, 0.2, 0.4999, 0.5])
    found, exchanged = embedding.site_weights(frequency), embedding.site_weights(1 - frequency)
    torch.testing.assert_close(found, exchanged, rtol=1e-4, atol=0)
    assert found.max() > 1.05 * found.min()
    position = torch.tensor([-0.3, 0.0, 0.2, 0.1])
    codebooks = [embedding.codebook(SiteTensors(position, each)) for each in (frequency, 1 - frequency)]
    torch.testing.assert_close(*map(site_weights, codebooks), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_transformer_corrects_only_alleles_that_may_be_there(build, layers: int) -> None:
    """Without gradients the last layer computes those sites alone, whatever their number in a row."""
    network = build.imputer(fusion="copying", layers=layers)
    torch.nn.init.normal_(network.head.weight)
    network.background.data.fill_(-40.0)  # the prior is the dosage
    chance = torch.tensor([1e-5, 3e-3, 4.9e-3, 5.1e-3, 0.3, 0.5, 0.9, 0.9951, 0.99999])
    dosage = torch.stack([chance, 1 - chance, chance, chance.flip(0), torch.full_like(chance, 1e-4)])
    frequency = torch.tensor([[0.1], [0.9], [0.5], [0.9], [0.1]]).expand(5, 9)
    likely = torch.stack([chance >= 5e-3, chance >= 5e-3, chance >= 5e-3, 1 - chance.flip(0) >= 5e-3, chance > 1])
    assert likely.sum(1).tolist() == [6, 6, 6, 7, 0]
    given = CoreInputs(
        position=torch.linspace(-0.1, 0.1, 9),
        site_frequency=frequency[0],
        tokens=torch.randint(0, 3, (5, 9)),
        alleles=torch.zeros(5, 9),
        scored=torch.zeros(5, 9),
        frequency=frequency,
        population_frequency=torch.rand(5, 2, 9),
        good_turing=torch.zeros(5, 9),
        dosage=dosage,
        ancestry=torch.full((5, 2, 9), 0.5),
    )
    with torch.no_grad():
        chosen = network._predict(given)
    whole = network._predict(given)
    torch.testing.assert_close(chosen.prior, torch.logit(dosage, eps=1e-5), rtol=1e-4, atol=1e-5)
    residual = chosen.logits - chosen.prior
    assert (residual[~likely] == 0).all() and (residual[likely] != 0).all()
    torch.testing.assert_close(chosen.logits, whole.logits, rtol=1e-5, atol=1e-5)
    (whole.logits.sum() - whole.prior.sum()).backward()
    assert network.head.bias.grad.item() == pytest.approx(int(likely.sum()))


def test_a_window_of_one_site_can_be_predicted(build) -> None:
    world = build(1, sites=1, samples=6, window_sites=2, overlap=0, flank=0)
    network = build.imputer()
    for mask_all in (True, False):
        queries = world.batch_of(0, [0, 1], np.full((2, 1), mask_all))
        assert torch.isfinite(predict(network, world.collator(network.embedding, k=4)(queries)).logits).all()


def test_the_embedding_of_a_haplotype_is_a_gather_from_the_codebook(build) -> None:
    world = build()
    torch.manual_seed(1)
    embedding = HaplotypeEmbedding(16).requires_grad_(False)
    sites = site_tensors(world.data, 1, torch.device("cpu"))
    tokens = torch.randint(0, 4, (5, len(sites.position)))
    assert torch.equal(embedding(tokens, sites), gather_embeddings(embedding.codebook(sites), tokens))


def test_a_mismatch_has_a_weight_of_its_own_at_every_site(build) -> None:
    """Otherwise retrieval would use the Hamming distance, whatever is learned."""
    world = build()
    torch.manual_seed(1)
    embedding = HaplotypeEmbedding(16).requires_grad_(False)
    codebook = embedding.codebook(site_tensors(world.data, 1, torch.device("cpu")))
    weight = ((codebook[:, 1] - codebook[:, 0]) ** 2).sum(-1)
    assert (weight > 0).all() and len(set(weight.tolist())) == len(weight)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"dims": 4}, "model.dims"),
        ({"layers": 0}, "model.layers"),
        ({"dims": 24, "heads": 8}, "model.heads"),
        ({"dropout": 1.0}, "model.dropout"),
    ],
)
def test_bad_settings_are_user_errors_naming_the_key(settings: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        ModelConfig(**settings)
