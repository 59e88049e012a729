"""Numbers of the network that are no weights, and the shapes of those, without torch.

They are those that imputation without torch has, too (:mod:`embrag_ds.copying`).
"""

from __future__ import annotations

from embrag_ds.data.tokens import VOCAB
from embrag_ds.model.poolings import pooling_class
from embrag_ds.model.settings import ModelConfig

FREQUENCY_OCTAVES = 6
FREQUENCY_FEATURES = 4 * FREQUENCY_OCTAVES + 2
"""Features of an allele frequency (:func:`embrag_ds.model.embedding.frequency_features`)."""
SHORTEST_WAVE_CM, LONGEST_WAVE_CM, WAVELENGTHS = 0.01, 20.0, 12
POSITION_FEATURES = 2 * WAVELENGTHS
"""Features of a position (:func:`embrag_ds.model.embedding.position_features`)."""
SHORTEST_ROTARY_CM, LONGEST_ROTARY_CM = 0.02, 40.0
"""Wavelengths of the transformer's rotary positions."""
LEAST_FREQUENCY = 1e-6

NEGLIGIBLE = 3e-3
"""Copying probabilities below this part of their mean count as zero."""
LEAST_TYPED_NEAR = 1e-30
"""Least weight of typed sites near a place, so that a place without any has no prior rather than none at all."""
TYPICAL_DENSITY = 100.0
"""Typed sites per cM that are one unit of their density."""
COPYING_GAIN = 10.0
"""The copying model's few parameters are stored divided by this, so that an optimiser step changes them more."""

CONFIDENCE_FEATURES = 12
CONFIDENCE_WIDTH = 32
CONFIDENCE_LAYERS = ("confidence.layers.0", "confidence.layers.2", "confidence.layers.4")
"""Linear layers of the confidence head, by the names of their weights."""
LEAST_PROBABILITY = 1e-3
"""Probability of the minor allele below which the confidence head corrects nothing."""
LEAST_TRANSFORMED = 5e-3
"""The same for the transformer, which takes more time."""
RAREST = 1e-5
SHORTEST_CM = 1e-3

_COPYING = {"rate": (4,), "penalty": (4,), "closeness": (2,), "reach": (2,), "slow": (2,)}


def network_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of a network with these settings, by name.

    Only for a fusion other than ``copying`` torch is imported, because a module of its own has its weights.
    """
    pooling, gives_evidence = _COPYING, True
    if config.fusion != "copying":
        module = pooling_class(config.fusion)()
        pooling = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        gives_evidence = bool(module.gives_evidence)
    dims, hidden = config.dims, config.ffn_multiple * config.dims
    shapes: dict[str, tuple[int, ...]] = {"background": (1,)}
    shapes |= {f"embedding.{name}": shape for name, shape in embedding_shapes(dims).items()}
    shapes |= {f"pooling.{name}": shape for name, shape in pooling.items()}
    shapes |= _linear("fusion.frequency", 2 * FREQUENCY_FEATURES, dims)
    shapes |= (
        _linear("fusion.gate", 3 * dims, dims) | _linear("fusion.mix", 3 * dims, dims) | _norm("fusion.norm", dims)
    )
    for number in range(config.layers):
        block = f"transformer.blocks.{number}"
        shapes |= _norm(f"{block}.attention_norm", dims) | _linear(f"{block}.qkv", dims, 3 * dims)
        shapes |= _linear(f"{block}.attention_out", dims, dims) | _norm(f"{block}.ffn_norm", dims)
        shapes |= _linear(f"{block}.ffn_in", dims, hidden) | _linear(f"{block}.ffn_out", hidden, dims)
    shapes |= _norm("transformer.norm", dims)
    if gives_evidence:
        widths = (CONFIDENCE_FEATURES, CONFIDENCE_WIDTH, CONFIDENCE_WIDTH, 1)
        for layer, name in enumerate(CONFIDENCE_LAYERS):
            shapes |= _linear(name, widths[layer], widths[layer + 1])
    return shapes | _linear("head", dims, 1)


def embedding_shapes(dims: int) -> dict[str, tuple[int, ...]]:
    """Shapes of an embedding layer's weights, by name."""
    shapes: dict[str, tuple[int, ...]] = {"token.weight": (VOCAB, dims), "effect.weight": (VOCAB, dims)}
    shapes |= _linear("frequency", FREQUENCY_FEATURES, dims) | {"position.weight": (dims, POSITION_FEATURES)}
    return shapes | _linear("modulation", FREQUENCY_FEATURES + POSITION_FEATURES, dims)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, dims: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dims,), f"{name}.bias": (dims,)}
