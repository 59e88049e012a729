"""Imputation network: embedding, pooling of neighbours, fusion, transformer, and log-odds of ALT at every site."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from embrag_ds.errors import require
from embrag_ds.model.confidence import ConfidenceHead
from embrag_ds.model.embedding import HaplotypeEmbedding, gather_embeddings
from embrag_ds.model.fusion import GatedFusion
from embrag_ds.model.pooling import CopyingPooling, DistancePooling, Pooled, mixed_embedding, pooled_embedding
from embrag_ds.model.recompute import computed_again
from embrag_ds.model.transformer import Transformer
from embrag_ds.retrieval.batch import Batch
from embrag_ds.settings import strict_settings

POOLINGS: dict[str, type[nn.Module]] = {"rare_variant": DistancePooling, "copying": CopyingPooling}
"""Pooling modules by the setting ``model.fusion``; a new one follows the interface of :class:`DistancePooling`."""


@strict_settings
class ModelConfig:
    """Settings of the network's shape. Raises UserError for values that break a rule."""

    dims: int = 256
    """Width D of embeddings and transformer, a multiple of 2 x heads."""
    layers: int = 12
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of a block."""
    ffn_multiple: int = 4
    """Width of the feed-forward's hidden layer, as a multiple of ``dims``."""
    dropout: float = 0.0
    """Dropout probability after attention and feed-forward."""
    fusion: Literal["rare_variant", "copying"] = "copying"
    """Pooling of the neighbours, by one distance per neighbour or by the Li and Stephens copying model."""
    good_turing: bool = False
    """Correct the prior's odds of the rarest alleles by the panel's allele count spectrum (Good and Turing)."""

    def __post_init__(self) -> None:
        require(self.dims >= 8, "model.dims", "must be at least 8")
        require(self.layers >= 1, "model.layers", "must be at least 1")
        require(self.heads >= 1, "model.heads", "must be at least 1")
        require(self.ffn_multiple >= 1, "model.ffn_multiple", "must be at least 1")
        require(
            self.dims % (2 * self.heads) == 0,
            "model.heads",
            f"dims ({self.dims}) must be a multiple of 2 x heads ({self.heads})",
        )
        require(0 <= self.dropout < 1, "model.dropout", "must lie in [0, 1)")


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
    small learned share of the expected population frequency.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.good_turing = config.good_turing
        self.embedding = HaplotypeEmbedding(config.dims)
        self.pooling = POOLINGS[config.fusion]()
        self.fusion = GatedFusion(config.dims)
        self.transformer = Transformer(config.dims, config.layers, config.heads, config.ffn_multiple, config.dropout)
        self.confidence = ConfidenceHead() if self.pooling.gives_evidence else None
        self.head = nn.Linear(config.dims, 1)
        # Log-odds of the share of the prior that comes from allele frequency rather than from the neighbours.
        self.background = nn.Parameter(torch.tensor([-4.0]))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, transformer: bool = True) -> Prediction:
        """Log-odds of ALT at every site of the core, the observed ones included.

        Without ``transformer`` its residual is not computed, and the result is the prior with the correction of the
        confidence head.
        """
        pooled = None
        # Without retrieval, the allele frequency replaces the dosage of the neighbours.
        dosage = expected = batch.core.frequency
        if batch.retrieved is not None:
            # No autocast: products of probabilities along the whole window are too inexact in bf16.
            with torch.autocast(batch.core.tokens.device.type, enabled=False):
                weight = computed_again(self.embedding.site_weights, batch.window.sites)
                pooled = self.pooling(batch, batch.retrieved, weight / weight.mean())
            dosage = pooled.dosage
            expected = (pooled.ancestry * batch.core.population_frequency).sum(1)
        share = torch.sigmoid(self.background.float())
        prior = torch.logit((1 - share) * dosage + share * expected, eps=1e-5)
        if self.good_turing:
            prior = prior + batch.core.good_turing
        residual = torch.zeros_like(prior)
        if transformer:
            residual = self.head(self._states(batch, pooled, expected))[..., 0].float()
        if self.confidence is not None and pooled is not None and pooled.evidence is not None:
            residual = residual + self.confidence(prior, pooled.evidence, batch.core.frequency)
        return Prediction(prior + residual, prior)

    def _states(self, batch: Batch, pooled: Pooled | None, expected: Tensor) -> Tensor:
        """Final hidden states of the query, [B, L, D]; ``expected`` [B, L] is the expected ALT frequency."""
        retrieved = batch.retrieved
        position = batch.core.sites.position
        codebook = self.embedding.codebook(batch.core.sites)
        if retrieved is not None and retrieved.tokens is not None:
            embedded = gather_embeddings(codebook, torch.cat([batch.core.tokens[:, None], retrieved.tokens], dim=1))
            passed = self.transformer(embedded.flatten(0, 1), position).unflatten(0, embedded.shape[:2])
            reference = passed[:, 1:].mean(1)
            return computed_again(self.fusion, passed[:, 0], reference, batch.core.frequency, expected)

        def fused() -> Tensor:
            query = gather_embeddings(codebook, batch.core.tokens)
            if retrieved is None or pooled is None:
                reference = mixed_embedding(codebook, batch.core.frequency)
            else:
                reference = pooled_embedding(pooled, retrieved, codebook)
            return self.fusion(query, reference.to(query.dtype), batch.core.frequency, expected)

        return self.transformer(computed_again(fused), position)
