"""Evidence of a dosage against explicit loops, and the confidence head's symmetry in REF and ALT."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.model import confidence
from embrag_ds.model.confidence import ConfidenceHead
from embrag_ds.model.pooling import Evidence
from embrag_ds.ops.dosage import dense_alleles
from embrag_ds.ops.li_stephens import Near, match_lengths


@given(seed=st.integers(0, 2**32), sites=st.integers(1, 9), rate=st.sampled_from([0.0, 0.2, 0.6, 1.0]))
def test_match_lengths_are_those_of_a_walk_to_either_side(seed: int, sites: int, rate: float) -> None:
    maker = torch.Generator().manual_seed(seed)
    count = torch.randint(1, sites + 1, (3,), generator=maker)
    position = torch.rand(3, sites, generator=maker).sort(1).values
    mismatch = (torch.rand(3, sites, 4, generator=maker) < rate) & (torch.arange(sites) < count[:, None])[..., None]
    count_near = 1 + seed % sites
    firsts = torch.randint(0, sites - count_near + 1, (3,), generator=maker)
    near = Near(firsts, count_near, int(firsts.min()), int(firsts.max()) + count_near)
    found = match_lengths(mismatch, position, count, near)
    for row in range(3):
        typed = int(count[row])
        first = int(firsts[row])
        for site in range(first, min(typed, first + count_near)):
            for neighbour in range(4):
                left = right = site
                while left > 0 and not mismatch[row, left, neighbour]:
                    left -= 1
                while right < typed - 1 and not mismatch[row, right, neighbour]:
                    right += 1
                expected = float(position[row, right] - position[row, left])
                assert float(found[row, site - first, neighbour]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.gpu
def test_match_lengths_on_the_gpu_are_those_of_the_cpu() -> None:
    maker = torch.Generator().manual_seed(1)
    position = torch.rand(5, 40, generator=maker).sort(1).values
    mismatch = torch.rand(5, 40, 30, generator=maker) < 0.2
    count = torch.full((5,), 40)
    there = match_lengths(mismatch.cuda(), position.cuda(), count.cuda())
    torch.testing.assert_close(there.cpu(), match_lengths(mismatch, position, count))


def test_the_evidence_is_what_its_docstring_states(build) -> None:
    world = build(5, samples=12, cm_per_site=0.1)
    network = build.imputer(fusion="copying")
    # With the dense store the copying probabilities are part of the result.
    collate = world.collator(network.embedding, k=8, mode="dense")
    batch = collate(world.batch_of(1, [0, 1], world.masked(1, 2, 1, 0.8)))
    found = batch.retrieved
    even = torch.ones(len(batch.window.sites.position))
    network.pooling.slow.data[0] = -100.0
    fast = network.pooling(batch, found, even)
    network.pooling.slow.data[0] = 100.0  # the slow copying model alone, whose evidence is given
    pooled = network.pooling(batch, found, even)
    apart = torch.logit(pooled.dosage, eps=1e-4) - torch.logit(fast.dosage, eps=1e-4)
    torch.testing.assert_close(pooled.evidence.disagreement, apart, rtol=1e-3, atol=1e-3)
    assert float(apart.detach().abs().max()) > 0.1
    position, evidence = batch.window.sites.position, pooled.evidence
    checked = 0
    lengths = match_lengths(found.mismatch, position[batch.window.typed], batch.window.typed_count)
    for row in range(4):
        typed = batch.window.typed[row, : int(batch.window.typed_count[row])]
        for place, site in enumerate(range(batch.window.core.start, batch.window.core.stop)):
            left = typed[typed < site].max() if (typed < site).any() else typed.min()
            right = typed[typed >= site].min() if (typed >= site).any() else typed.max()
            carriers = dense_alleles(found.alleles)[row, :, place].float()
            assert float(evidence.share[row, place]) == pytest.approx(float(carriers.mean()))
            assert float(evidence.gap[row, place]) == pytest.approx(
                abs(float(position[right] - position[left])), abs=1e-5
            )
            nearest = min(abs(float(position[each] - position[site])) for each in (left, right))
            assert float(evidence.nearest[row, place]) == pytest.approx(nearest, abs=1e-5)
            assert 0 <= float(evidence.uncertainty[row, place]) <= 1 + 1e-6
            if site in typed.tolist():
                here = typed.tolist().index(site)
                weights, reach = pooled.weights[row, :, place].detach(), lengths[row, here]
                entropy = -(weights * weights.clamp_min(1e-30).log()).sum() / math.log(8)
                assert float(evidence.uncertainty[row, place]) == pytest.approx(float(entropy), abs=1e-4)
                for value, of in ((evidence.alt_length, carriers), (evidence.ref_length, 1 - carriers)):
                    if float((weights * of).sum()) > 1e-3:
                        mean = (weights * of * reach).sum() / (weights * of).sum()
                        assert float(value[row, place]) == pytest.approx(float(mean), rel=1e-2, abs=1e-4)
                        checked += 1
    assert checked > 10


def random_evidence(seed: int, shape: tuple[int, int]) -> Evidence:
    maker = torch.Generator().manual_seed(seed)
    return Evidence(*(torch.rand(shape, generator=maker) for _ in range(8)))


def trained_head() -> ConfidenceHead:
    torch.manual_seed(3)
    head = ConfidenceHead()
    torch.nn.init.normal_(head.layers[-1].weight)
    return head


def test_the_correction_starts_at_zero() -> None:
    torch.manual_seed(1)
    assert (ConfidenceHead()(torch.randn(2, 5), random_evidence(1, (2, 5)), torch.rand(2, 5)) == 0).all()


def test_exchanging_alleles_reverses_the_correction() -> None:
    prior, frequency, evidence = torch.randn(4, 30), torch.rand(4, 30), random_evidence(2, (4, 30))
    turned = Evidence(
        alt_length=evidence.ref_length,
        ref_length=evidence.alt_length,
        uncertainty=evidence.uncertainty,
        share=1 - evidence.share,
        nearest=evidence.nearest,
        gap=evidence.gap,
        density=evidence.density,
        disagreement=-evidence.disagreement,
    )
    head = trained_head()
    one, other = head(prior, evidence, frequency), head(-prior, turned, 1 - frequency)
    torch.testing.assert_close(one, -other, rtol=1e-4, atol=1e-5)
    assert one.std() > 0.1


def test_the_correction_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, frequency, evidence = torch.randn(4, 30), torch.rand(4, 30), random_evidence(6, (4, 30))
    head = trained_head()
    whole = head(prior, evidence, frequency)
    monkeypatch.setattr(confidence, "_SITES_AT_ONCE", 7)
    with torch.no_grad():
        torch.testing.assert_close(head(prior, evidence, frequency), whole.detach())


def test_the_correction_is_finite_at_the_edges() -> None:
    nothing = Evidence(*(torch.zeros(2, 3) for _ in range(6)), torch.full((2, 3), 0.01), torch.zeros(2, 3))
    for frequency in (0.0, 1.0, 0.5):
        prior = torch.tensor([[-11.6, 0.0, 11.6]]).repeat(2, 1)
        correction = trained_head()(prior, nothing, torch.full((2, 3), frequency))
        assert torch.isfinite(correction).all()
