"""Imputation network: embedding, pooling of neighbours, fusion, transformer, and log-odds of ALT at every site."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from embrag_ds.model.compiled import Compiled, CoreInputs
from embrag_ds.model.confidence import ConfidenceHead, minor_is_likely
from embrag_ds.model.embedding import HaplotypeEmbedding, gather_embeddings
from embrag_ds.model.fusion import GatedFusion
from embrag_ds.model.losses import Losses, imputation_loss
from embrag_ds.model.numbers import LEAST_TRANSFORMED
from embrag_ds.model.pooling import Evidence, Pooled, pooled_embedding
from embrag_ds.model.poolings import pooling_class
from embrag_ds.model.recompute import computed_again
from embrag_ds.model.row_blocks import RowBlocks
from embrag_ds.model.settings import LossConfig, ModelConfig
from embrag_ds.model.site_tiles import SiteTiles
from embrag_ds.model.transformer import Transformer
from embrag_ds.retrieval.batch import Batch, SiteTensors


class Prediction(NamedTuple):
    """Log-odds of ALT in the core, float32 [B, L]: ``logits`` of the network, and ``prior`` from retrieval alone."""

    logits: Tensor
    prior: Tensor


class Imputer(nn.Module):
    """Imputation network that fuses retrieved haplotypes with the query before one pass through a transformer (V18).

    For batches in retrieval mode ``token`` (V17), neighbours pass through embedding and transformer like the query, and
    are fused after it. The parameters are the same, so a run may change from one mode to the other.

    The output is the log-odds of a prior plus a learned residual. The residual is zero before training, so an untrained
    network imputes as well as its retrieval does. Its prior is the dosage copied from the neighbours, mixed with a
    small learned share of the expected population frequency. Where copied haplotypes leave the minor allele a prior
    below :data:`LEAST_TRANSFORMED`, the transformer corrects nothing: that is most sites, and little would change.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.good_turing = config.good_turing
        self.compiled: Compiled | None = None
        self.row_blocks: RowBlocks | None = None
        self.site_tiles: SiteTiles | None = None
        self.embedding = HaplotypeEmbedding(config.dims)
        self.pooling = pooling_class(config.fusion)()
        self.fusion = GatedFusion(config.dims)
        self.transformer = Transformer(config.dims, config.layers, config.heads, config.ffn_multiple, config.dropout)
        self.confidence = ConfidenceHead() if self.pooling.gives_evidence else None
        self.head = nn.Linear(config.dims, 1)
        # Log-odds of the share of the prior that comes from allele frequency rather than from the neighbours.
        self.background = nn.Parameter(torch.tensor([-4.0]))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @overload
    def forward(self, batch: Batch, transformer: bool = True) -> Prediction: ...

    @overload
    def forward(self, batch: Batch, transformer: bool = True, *, loss: LossConfig) -> Losses: ...

    def forward(self, batch: Batch, transformer: bool = True, loss: LossConfig | None = None) -> Prediction | Losses:
        """Log-odds of ALT at every site of the core, the observed ones included; with ``loss`` their losses instead.

        Without ``transformer`` its residual is not computed, and the result is the prior with the correction of the
        confidence head.
        """
        pooled = None
        if batch.retrieved is not None:
            # No autocast: products of probabilities along the whole window are too inexact in bf16.
            with torch.autocast(batch.core.tokens.device.type, enabled=False):
                weight = self.embedding.site_weights(batch.window.sites.frequency)
                pooled = self.pooling(batch, batch.retrieved, weight / weight.mean())
        given = _core_inputs(batch, pooled)
        if loss is None:
            if self.site_tiles is not None and transformer:
                return Prediction(*self.site_tiles(self._predict, given))
            if self.row_blocks is not None:
                return Prediction(*self.row_blocks(lambda block: self._predict(block, transformer), given))
            return self._predict(given, transformer)
        if self.compiled is not None and transformer:
            losses: Losses = self.compiled(given, loss)
            return losses
        return self._losses(given, None, loss, transformer)

    def compile_losses(self, best: bool, lengths: Collection[int]) -> None:
        """Compile what follows the copying model, up to the losses, at the first call of :meth:`forward` for losses.

        ``best`` and ``lengths`` are those of :class:`~embrag_ds.model.compiled.Compiled`.
        """
        self.compiled = Compiled(self._losses, best, lengths)

    def _losses(self, given: CoreInputs, sites: int | None, loss: LossConfig, transformer: bool = True) -> Losses:
        """Losses of a core, computed with padding up to ``sites`` sites."""
        length = given.tokens.shape[-1]
        if self.row_blocks is not None and torch.is_grad_enabled():
            logits = self.row_blocks.differentiable(
                lambda block: self._predict(block, transformer).logits, given, self.parameters()
            )
        elif sites is None or sites == length:
            logits = self._predict(given, transformer).logits
        else:
            given = given.padded(sites)
            logits = self._predict(given, transformer, length).logits
        return imputation_loss(logits, given.alleles, given.scored, given.site_frequency, loss)

    def _predict(self, given: CoreInputs, transformer: bool = True, length: int | None = None) -> Prediction:
        """Prediction after the copying model; sites from ``length`` on are padding."""
        prior, expected = self._prior(given)
        residual = torch.zeros_like(prior)
        if transformer:
            residual = self._transformed(given, prior, expected, length)
        if self.confidence is not None and given.evidence is not None:
            residual = residual + self.confidence(prior, Evidence(*given.evidence), given.frequency)
        return Prediction(prior + residual, prior)

    def _prior(self, given: CoreInputs) -> tuple[Tensor, Tensor]:
        """Log-odds of ALT before any correction, and its expected frequency, both float32 [B, L]."""
        dosage, expected = given.dosage, given.frequency
        if dosage is None or given.ancestry is None:
            dosage = given.frequency  # Without retrieval, the allele frequency replaces the dosage of the neighbours.
        else:
            expected = (given.ancestry * given.population_frequency).sum(1)
        share = torch.sigmoid(self.background.float())
        prior = torch.logit((1 - share) * dosage + share * expected, eps=1e-5)
        if self.good_turing:
            prior = prior + given.good_turing
        return prior, expected

    def _transformed(self, given: CoreInputs, prior: Tensor, expected: Tensor, length: int | None) -> Tensor:
        """The transformer's correction float32 [B, L] of the ``prior`` float32 [B, L]."""
        if given.dosage is None:  # the frequency alone says nothing about a sample
            return self.head(self._states(given, expected, length))[..., 0].float()
        likely = minor_is_likely(prior, given.frequency, LEAST_TRANSFORMED)
        whole = prior.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole or given.neighbours is not None:
            return torch.where(likely, self.head(self._states(given, expected, length))[..., 0].float(), 0.0)
        # A CPU takes less time for the few sites that count, which are others in every row.
        correction = torch.zeros_like(prior)
        correction[likely] = self.head(self._states(given, expected, length, likely))[..., 0].float()
        return correction

    def _states(self, given: CoreInputs, expected: Tensor, length: int | None, wanted: Tensor | None = None) -> Tensor:
        """Final hidden states of the query, [B, L, D]; ``expected`` [B, L] is the expected ALT frequency.

        Where ``wanted`` bool [B, L] is given, they are those of its n sites, row by row, [n, D], without gradients.
        """
        position = given.position
        own = self.embedding.codebook(SiteTensors(position, given.site_frequency))
        if given.neighbours is not None:
            embedded = gather_embeddings(own, torch.cat([given.tokens[:, None], given.neighbours], dim=1))
            passed = self.transformer(embedded.flatten(0, 1), position, length).unflatten(0, embedded.shape[:2])
            reference = passed[:, 1:].mean(1)
            return computed_again(self.fusion, passed[:, 0], reference, given.frequency, expected)

        def fused() -> Tensor:
            query = gather_embeddings(own, given.tokens)
            dosage = given.frequency if given.dosage is None else given.dosage
            codebook = own if given.codebook is None else given.codebook
            reference = pooled_embedding(dosage, codebook, given.weights, given.embeddings)
            return self.fusion(query, reference.to(query.dtype), given.frequency, expected)

        return self.transformer(computed_again(fused), position, length, wanted)


def _core_inputs(batch: Batch, pooled: Pooled | None) -> CoreInputs:
    core, retrieved = batch.core, batch.retrieved
    given = CoreInputs(
        position=core.sites.position,
        site_frequency=core.sites.frequency,
        tokens=core.tokens,
        alleles=core.alleles,
        scored=core.scored,
        frequency=core.frequency,
        population_frequency=core.population_frequency,
        good_turing=core.good_turing,
    )
    if pooled is None or retrieved is None:
        return given
    evidence = pooled.evidence
    return given._replace(
        dosage=pooled.dosage,
        ancestry=pooled.ancestry,
        weights=pooled.weights,
        evidence=None if evidence is None else tuple(getattr(evidence, each.name) for each in fields(evidence)),
        codebook=retrieved.codebook,
        embeddings=retrieved.embeddings,
        neighbours=retrieved.tokens,
    )
