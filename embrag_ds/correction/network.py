"""A network's part of the loop over tiles, from its weights, without torch.

The formulas are those of :class:`embrag_ds.model.embedding.HaplotypeEmbedding`,
:class:`embrag_ds.model.fusion.GatedFusion` and :class:`embrag_ds.model.transformer.Block`. What depends on a site alone
is linear in its features: embeddings, and their products with the weights of the fusion. So weights are multiplied once
for a network, in float64, and the loop multiplies features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from embrag_ds.compiled.functions import LOG2_E
from embrag_ds.compiled.instructions import COLUMNS, ROWS
from embrag_ds.copying.model import frequency_features
from embrag_ds.correction.records import NetworkPart
from embrag_ds.data.tokens import ALT, MASK, REF
from embrag_ds.model import numbers
from embrag_ds.model.settings import ModelConfig


def network_part(
    weights: Mapping[str, np.ndarray], snapshot: Mapping[str, np.ndarray], config: ModelConfig
) -> NetworkPart:
    """The weights of a network with these settings, by name, as the loop takes them.

    ``snapshot`` are those of the layer that encodes panels; if there are none, it is the network's own.
    """
    known = {name: each.astype(np.float64) for name, each in weights.items()}
    of_panel = {f"embedding.{name}": each.astype(np.float64) for name, each in snapshot.items()} or known
    dims, width = config.dims, config.dims // config.heads
    blocks = [f"transformer.blocks.{layer}" for layer in range(config.layers)]

    def of_all(name: str) -> np.ndarray:
        return np.stack([known[f"{block}.{name}"] for block in blocks])

    def norms(first: str, second: str) -> np.ndarray:
        return np.stack([known[f"{name}.{kind}"] for name in (first, second) for kind in ("weight", "bias")])

    mixing = np.concatenate([known[f"fusion.{name}.weight"] for name in ("gate", "mix")])
    by_query, by_reference, by_rarity = np.split(mixing, 3, axis=1)
    overall, expected = np.split(by_rarity @ known["fusion.frequency.weight"], 2, axis=1)
    ref, alt, masked = (_embedding(known, token) for token in (REF, ALT, MASK))
    reference = _embedding(of_panel, REF)
    step = _embedding(of_panel, ALT) - reference
    fused = by_query @ masked + by_reference @ reference
    fused[:, 0] += np.concatenate([known["fusion.gate.bias"], known["fusion.mix.bias"]])
    fused[:, 0] += by_rarity @ known["fusion.frequency.bias"]
    typed = [part for each in (ref - masked, alt - masked) for part in (each, by_query @ each)]

    qkv, qkv_bias = of_all("qkv.weight"), of_all("qkv.bias")
    scale = LOG2_E / math.sqrt(width)
    behind = np.zeros((config.layers, config.heads, _rounded(width, COLUMNS), dims))
    behind[:, :, :width] = of_all("attention_out.weight").swapaxes(1, 2).reshape(-1, config.heads, width, dims)
    of_norms = [norms(f"{block}.attention_norm", f"{block}.ffn_norm") for block in blocks]
    return NetworkPart(
        sites=_whole_rows([masked, reference, step, fused, by_reference @ step]),
        typed=_whole_rows(typed),
        overall=overall.astype(np.float32),
        expected=expected.astype(np.float32),
        norms=np.stack([*of_norms, norms("fusion.norm", "transformer.norm")]).astype(np.float32),
        keys=qkv[:, dims:].astype(np.float32),
        keys_bias=qkv_bias[:, dims:].astype(np.float32),
        query=widened(scale * qkv[:, :dims].swapaxes(1, 2)),
        query_bias=widened(scale * qkv_bias[:, :dims]),
        out=widened(behind.reshape(config.layers, -1, dims)),
        out_bias=of_all("attention_out.bias").astype(np.float32),
        wider=widened(of_all("ffn_in.weight").swapaxes(1, 2)),
        wider_bias=widened(of_all("ffn_in.bias")),
        narrower=widened(widened(of_all("ffn_out.weight")).swapaxes(1, 2)),
        narrower_bias=of_all("ffn_out.bias").astype(np.float32),
        head=weights["head.weight"][0],
        head_bias=np.float32(weights["head.bias"][0]),
        heads=config.heads,
        background=np.float32(1 / (1 + math.exp(-known["background"][0]))),
        least=np.float32(numbers.LEAST_TRANSFORMED / (1 - numbers.LEAST_TRANSFORMED)),
    )


def site_features(frequency: np.ndarray) -> np.ndarray:
    """Features [53, L] of sites with these ALT frequencies float32 [L]: those of :func:`_embedding` but the last."""
    minor = frequency_features(np.minimum(frequency, np.float32(1) - frequency))
    return np.concatenate([np.ones((1, len(frequency))), frequency_features(frequency).T, minor.T])


def position_features(position: np.ndarray) -> np.ndarray:
    """Sines and cosines [24, L] of positions [L] in cM."""
    angles = _angles(position, numbers.SHORTEST_WAVE_CM, numbers.LONGEST_WAVE_CM, numbers.WAVELENGTHS)
    return np.concatenate([np.sin(angles), np.cos(angles)])


def rotary_angles(position: np.ndarray, width: int) -> np.ndarray:
    """Angles [W / 2, L] of rotary positions [L] in cM."""
    return _angles(position, numbers.SHORTEST_ROTARY_CM, numbers.LONGEST_ROTARY_CM, width // 2)


def widened(values: np.ndarray, multiple: int = COLUMNS) -> np.ndarray:
    """``values`` [..., n] as float32, with zeros up to a ``multiple`` of numbers."""
    made = np.zeros((*values.shape[:-1], _rounded(values.shape[-1], multiple)), dtype=np.float32)
    made[..., : values.shape[-1]] = values
    return made


def _embedding(weights: Mapping[str, np.ndarray], token: int) -> np.ndarray:
    """Matrix [D, 77] from a site's features to the embedding of a ``token``.

    The features are 1, those of ALT's frequency, of the minor allele's, and of the position.
    """
    effect = weights["embedding.effect.weight"][token]
    modulation = effect[:, None] * weights["embedding.modulation.weight"]
    constant = weights["embedding.token.weight"][token] + effect * weights["embedding.modulation.bias"]
    constant += weights["embedding.frequency.bias"]
    by_minor, by_position = np.split(modulation, [numbers.FREQUENCY_FEATURES], axis=1)
    of_position = by_position + weights["embedding.position.weight"]
    return np.concatenate([constant[:, None], weights["embedding.frequency.weight"], by_minor, of_position], axis=1)


def _angles(position: np.ndarray, shortest: float, longest: float, number: int) -> np.ndarray:
    """Angles [number, L] of positions [L] in waves that form a geometric sequence."""
    ladder = np.logspace(math.log10(shortest), math.log10(longest), number)
    found: np.ndarray = (2 * math.pi / ladder)[:, None] * position.astype(np.float64)
    return found


def _whole_rows(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of all parts as float32, and rows of zeros up to a multiple of four."""
    return np.ascontiguousarray(widened(np.concatenate(parts).T, ROWS).T)


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
