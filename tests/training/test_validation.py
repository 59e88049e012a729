"""Validation on frozen masks: scores, masks and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.adaptation.held_out import MaskScores
from embrag_ds.config import ValidationConfig
from embrag_ds.data.masking import VALIDATION_MASKS
from embrag_ds.data.sampler import QueryBatch
from embrag_ds.evaluation.metrics import bin_members
from embrag_ds.model.imputer import Prediction
from embrag_ds.retrieval.batch import Batch
from embrag_ds.training.trainer import Trainer
from embrag_ds.training.validation import Validator

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def trainer(make_trainer: MakeTrainer) -> Trainer:
    trainer = make_trainer("run")
    trainer.engine.eval()
    # An untrained head adds nothing to the prior.
    torch.nn.init.normal_(trainer.engine.module.head.weight, generator=torch.Generator().manual_seed(3))
    return trainer


HELD_OUT = np.array([2, 17, 23, 40, 51])


def validator(trainer: Trainer, block: int, windows: int = 3, samples: int = 5) -> Validator:
    return Validator(trainer.sampler.data, ValidationConfig(windows, samples), HELD_OUT, block, trainer.distributed)


def assert_same(one: dict[str, MaskScores], other: dict[str, MaskScores]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        first, second = asdict(one[name]), asdict(other[name])
        for key, value in first.items():
            assert value == pytest.approx(second[key], abs=1e-6, nan_ok=True), (name, key)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_scores_do_not_depend_on_the_micro_batch(trainer: Trainer, block: int) -> None:
    whole = validator(trainer, 5).scores(trainer.engine, trainer.validation_batch)
    assert_same(validator(trainer, block).scores(trainer.engine, trainer.validation_batch), whole)


def test_scores_are_those_of_the_masked_genotypes(trainer: Trainer) -> None:
    """Compare with a loop that collects every masked genotype."""
    rows: dict[int, list[tuple[float, float, float, float, float]]] = {n: [] for n in range(len(VALIDATION_MASKS))}
    calls = []
    fewest = trainer.sampler.data.reference.panel.minimum_allele_count

    def collate(samples: QueryBatch) -> Batch:
        calls.append(samples)
        return trainer.validation_batch(samples)

    def predict(batch: Batch) -> Prediction:
        noise = torch.randn(batch.core.alleles.shape, generator=torch.Generator().manual_seed(len(calls)))
        logits = 3.0 * batch.core.alleles - 1.5 + 2 * noise
        prior = 3.0 * batch.core.alleles - 1.5 + 3 * noise
        mask = (len(calls) - 1) // (2 * 3)  # two blocks of samples, three windows
        core = trainer.sampler.data.windows[batch.window.number].core_sites
        frequency = trainer.sampler.data.reference.allele_frequency[core]
        passes = trainer.sampler.data.reference.minor_allele_count[core] >= fewest
        for sample in range(len(batch.core.alleles) // 2):
            for site in range(batch.core.alleles.shape[1]):
                if batch.core.masked[2 * sample, site] and passes[site]:
                    pair = slice(2 * sample, 2 * sample + 2)
                    p, q = logits[pair, site].sigmoid().tolist()
                    truth = int(batch.core.alleles[pair, site].sum())
                    best = int(np.argmax([(1 - p) * (1 - q), p * (1 - q) + q * (1 - p), p * q]))
                    copied = float(prior[pair, site].sigmoid().sum())
                    rows[mask].append((truth, p + q, copied, float(frequency[site]), float(best == truth)))
        return Prediction(logits, prior)

    scores = validator(trainer, 3).scores(predict, collate)
    assert len(calls) == len(VALIDATION_MASKS) * 3 * 2
    for number, mask in enumerate(VALIDATION_MASKS):
        truth, dosage, prior, frequency, right = np.array(rows[number]).T
        minor = np.where(frequency > 0.5, -1.0, 1.0)
        for found, values in ((scores[mask.name].r2, dosage), (scores[mask.name].prior_r2, prior)):
            for name, member in zip(found, bin_members(frequency), strict=True):
                turned = [np.where(minor < 0, 2 - each, each)[member] for each in (truth, values)]
                if member.sum() < 2 or np.ptp(turned[0]) == 0:
                    assert np.isnan(found[name])
                else:
                    assert found[name] == pytest.approx(np.corrcoef(*turned)[0, 1] ** 2, rel=1e-4)
        assert scores[mask.name].accuracy == pytest.approx(right.mean())


def recorded(trainer: Trainer, validator: Validator) -> list[QueryBatch]:
    seen: list[QueryBatch] = []

    def collate(samples: QueryBatch) -> Any:
        seen.append(samples)
        return trainer.validation_batch(samples)

    validator.scores(trainer.engine, collate)
    return seen


def test_masks_are_frozen_whatever_the_run(make_trainer: MakeTrainer) -> None:
    """With another scope, width, batch size and step, the same samples have the same masks."""
    one = make_trainer("one")
    other = make_trainer(
        "other", "embrag.masking.scope=window", "embrag.model.dims=8", "train_micro_batch_size_per_gpu=2"
    )
    other.run()
    seen = [recorded(each, validator(each, 5)) for each in (one, other)]
    assert len(seen[0]) == 3 * len(VALIDATION_MASKS)
    for a, b in zip(*seen, strict=True):
        assert a.window == b.window
        np.testing.assert_array_equal(a.masked, b.masked)
        np.testing.assert_array_equal(a.masked, np.repeat(a.masked[:1], 5, axis=0))
        assert 0 < a.masked.mean() < 1


def test_validation_samples_are_not_in_the_reference_set(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run")
    seen = recorded(trainer, trainer.validator)
    samples = set(np.concatenate([each.samples for each in seen]).tolist())
    assert len(samples) == 6 and not samples & set(trainer.sampler.samples.tolist())
    assert not samples & set(trainer.sampler.data.reference.samples.tolist())


def test_as_many_windows_and_samples_as_set_or_all_of_them(trainer: Trainer) -> None:
    few = recorded(trainer, validator(trainer, 5, windows=2, samples=4))
    assert {each.window for each in few} == {0, 4} and all(len(each.samples) == 4 for each in few)
    many = recorded(trainer, validator(trainer, 5, windows=99, samples=99))
    assert {each.window for each in many} == set(range(5)) and all(len(each.samples) == 5 for each in many)
