"""The imputer: embed, fuse, transformer once, log-odds of ALT at every site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from embrag_ds.data.tokens import ALT, REF
from embrag_ds.errors import require
from embrag_ds.model.confidence import ConfidenceHead
from embrag_ds.model.embedding import HaplotypeEmbedding, gather_embeddings
from embrag_ds.model.fusion import GatedFusion
from embrag_ds.model.pooling import CopyingPooling, DistancePooling, pooled_embedding
from embrag_ds.model.transformer import Transformer
from embrag_ds.retrieval.cache import site_weights
from embrag_ds.retrieval.collate import Batch

POOLINGS: dict[str, type[nn.Module]] = {"rare_variant": DistancePooling, "copying": CopyingPooling}
"""How a fusion weighs the neighbours; to add one, copy :class:`DistancePooling` and name it here."""


@dataclass(frozen=True)
class ModelConfig:
    """The network's shape."""

    dims: int = 256
    layers: int = 12
    heads: int = 8
    ffn_multiple: int = 4
    dropout: float = 0.0
    fusion: Literal["rare_variant", "copying"] = "copying"
    turing: bool = False
    """Correct the prior's odds of the rarest alleles by the panel's own spectrum of copies (Good and Turing)."""

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
    """Log-odds of ALT in the core, float32 [B, L]: the model's, and its starting point from retrieval alone."""

    logits: Tensor
    prior: Tensor


class Imputer(nn.Module):
    """V18: retrieved haplotypes are fused before a single pass through the transformer.

    The output is the prior's log-odds plus a learned residual that starts at zero, so an untrained
    network already imputes as well as its retrieval does.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.turing = config.turing
        self.embedding = HaplotypeEmbedding(config.dims)
        self.pooling = POOLINGS[config.fusion]()
        self.fusion = GatedFusion(config.dims)
        self.transformer = Transformer(config.dims, config.layers, config.heads, config.ffn_multiple, config.dropout)
        self.confidence = ConfidenceHead() if self.pooling.gives_evidence else None
        self.head = nn.Linear(config.dims, 1)
        # Share of the prior that comes from allele frequency rather than from the neighbours.
        self.background = nn.Parameter(torch.tensor([-4.0]))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Prediction:
        """Log-odds of ALT at every site of the core, the shown ones included."""
        sites, retrieved = batch.sites, batch.retrieved
        whole = self.embedding.codebook(sites)
        own = whole[batch.core]
        query = gather_embeddings(own, batch.tokens)
        if retrieved is None:
            # Without retrieval the frequency itself stands in for the reference haplotypes.
            dosage = expected = batch.frequency
            step = own[:, ALT] - own[:, REF]
            reference = own[:, REF] + dosage[..., None].to(step.dtype) * step
            evidence = None
        else:
            weight = site_weights(whole)
            pooled = self.pooling(batch, retrieved, weight / weight.mean())
            codebook = own if retrieved.codebook is None else retrieved.codebook
            reference = pooled_embedding(pooled, retrieved, codebook)
            dosage, evidence = pooled.dosage, pooled.evidence
            expected = (pooled.ancestry * batch.population_frequency).sum(1)
        share = torch.sigmoid(self.background.float())
        prior = torch.logit((1 - share) * dosage + share * expected, eps=1e-5)
        if self.turing:
            prior = prior + batch.turing
        fused = self.fusion(query, reference.to(query.dtype), batch.frequency, expected)
        residual = self.head(self.transformer(fused, sites.position[batch.core]))[..., 0].float()
        if self.confidence is not None and evidence is not None:
            residual = residual + self.confidence(prior, evidence, batch.frequency)
        return Prediction(prior + residual, prior)
