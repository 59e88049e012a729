"""Exported models: one safetensors file, which is all that imputation needs.

The file holds the network's weights, the section ``"embrag"`` of the configuration, and a snapshot of the embedding
layer. The section is without its paths, which mean nothing on another machine or for another panel. The snapshot
encodes reference panels (encodings ``fixed`` and ``refresh``). It is absent where panels are encoded by the current
weights (``live``) or not at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from embrag_ds.config import EmbragConfig, parse_embrag, without_paths
from embrag_ds.errors import UserError
from embrag_ds.files import written
from embrag_ds.model.imputer import Imputer
from embrag_ds.runtime.weightless import WithoutMemory

logger = logging.getLogger(__name__)

EXPORT_FORMAT = 2
"""Version of the file's layout; other versions are refused."""
MODEL_FILE = "model.safetensors"
"""Name of the exported model in a run folder."""
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / MODEL_FILE
"""The model shipped with the package; docs/results.md describes its training."""
_HEADER = "embrag_ds"
_SNAPSHOT = "snapshot."
_BLOCKS = "transformer.blocks."
_FIRST_BLOCK = f"{_BLOCKS}0."
_WEIGHTLESS: dict[str, Any] = {"dropout": 0.0, "good_turing": False}


def write_export(
    path: Path, weights: dict[str, Tensor], snapshot: dict[str, Tensor] | None, config: EmbragConfig
) -> None:
    """Write an exported model; the file appears only when complete.

    ``weights`` are the network's tensors by name, ``snapshot`` those of the embedding layer that encodes panels, or
    None.
    """
    tensors = dict(weights)
    if snapshot is not None:
        tensors |= {_SNAPSHOT + name: value.contiguous() for name, value in snapshot.items()}
    # One entry: safetensors writes several in random order, and equal models should be equal files.
    header = {"format": EXPORT_FORMAT, "embrag": asdict(without_paths(config)[0])}
    with written(path) as temporary:
        try:
            save_file(tensors, temporary, {_HEADER: json.dumps(header)})
        except SafetensorError as fault:
            raise UserError(f"{path}: cannot write the model ({fault}); free some space in {path.parent}") from fault


@dataclass(frozen=True)
class ExportedModel:
    """Contents of an exported model; all tensors are fp32 on the CPU.

    ``weights`` are the network's tensors by name, ``snapshot`` those of the layer that encodes panels. It is None where
    panels are encoded live or not at all.
    """

    config: EmbragConfig
    weights: dict[str, Tensor]
    snapshot: dict[str, Tensor] | None

    def network(self) -> Imputer:
        """A new network with these weights, for inference, on the CPU."""
        network = Imputer(self.config.model)
        network.load_state_dict(self.weights)
        return network.eval()


def read_export(path: Path) -> ExportedModel:
    """Read a file written by :func:`write_export`; paths of the training in a file of an older version are ignored.

    Raises :class:`UserError` if the file cannot be read, is not an export of this format, or lacks finite weights for
    the network that it describes.
    """
    try:
        if not path.is_file():  # a pipe cannot be mapped into memory, and reading it would wait
            path.stat()
            raise OSError("it is no file")
        with safe_open(path, framework="pt") as stored:
            header = _header(stored.metadata())
            if header is None or header.get("format") != EXPORT_FORMAT or "embrag" not in header:
                raise UserError(f"{path}: not a model written by launch/train.py (or by another version of it)")
            config, dropped = without_paths(parse_embrag(header["embrag"], str(path)))
            names = list(stored.keys())
            # Before any tensor is read: a file may name large ones that are all holes.
            fault_found = _fault_of_shapes(names, lambda name: stored.get_slice(name).get_shape(), config)
            tensors = {} if fault_found else {name: stored.get_tensor(name).float() for name in names}
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{path}: cannot read the model: {fault}; name a model.safetensors of a run folder") from fault
    except (MemoryError, RuntimeError) as fault:
        if "memory" not in str(fault):  # torch has no exception of its own for memory that it does not get
            raise
        size = path.stat().st_size / 1e9
        raise UserError(f"{path}: no memory for its {size:.1f} GB; copy it again, or use a larger machine") from fault
    if dropped:
        logger.info("%s: paths of its training are ignored (%s)", path, ", ".join(dropped))
    if fault_found := fault_found or _fault_of_values(tensors):
        raise UserError(f"{path}: the model is damaged: {fault_found}; copy or train it again")
    snapshot = {name.removeprefix(_SNAPSHOT): value for name, value in tensors.items() if name.startswith(_SNAPSHOT)}
    weights = {name: value for name, value in tensors.items() if not name.startswith(_SNAPSHOT)}
    return ExportedModel(config, weights, snapshot or None)


def _header(metadata: dict[str, str] | None) -> dict[str, Any] | None:
    """Our entry of a file's metadata; None if there is none, or one that is no JSON object."""
    try:
        header = json.loads((metadata or {}).get(_HEADER, "null"))
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _fault_of_shapes(names: list[str], shape_of: Callable[[str], list[int]], config: EmbragConfig) -> str | None:
    """What tensors of these ``names`` and shapes lack as weights of the network that ``config`` describes, or None."""
    if config.model.layers > len(names):
        return f"it has too few tensors for {config.model.layers} transformer blocks"
    expected, found = _network_shapes(config), set(names)
    for name in expected:
        if name not in found:
            return f"it has no tensor {name}"
    if foreign := sorted(found - expected.keys()):
        return f"{foreign[0]} is no tensor of its network"
    for name, shape in expected.items():
        if shape_of(name) != shape:
            return f"{name} has the shape {shape_of(name)}, and its network {shape}"
    return None


def _network_shapes(config: EmbragConfig) -> dict[str, list[int]]:
    """Shapes of an export's tensors by name, without the memory of a network, or the time to make all its blocks."""
    with WithoutMemory():
        network = Imputer(replace(config.model, layers=1))
    shapes: dict[str, list[int]] = {}
    for name, value in network.state_dict().items():
        if name.startswith(_FIRST_BLOCK):
            inner = name.removeprefix(_FIRST_BLOCK)
            shapes |= {f"{_BLOCKS}{number}.{inner}": list(value.shape) for number in range(config.model.layers)}
        else:
            shapes[name] = list(value.shape)
    if config.retrieval.mode == "embedding" and config.retrieval.encoding != "live":
        shapes |= {_SNAPSHOT + name: list(value.shape) for name, value in network.embedding.state_dict().items()}
    return shapes


def _fault_of_values(tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that is not finite, for a message, or None."""
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            return f"{name} has values that are not finite"
    return None


def start_from(model: nn.Module, settings: EmbragConfig, export: ExportedModel, path: Path) -> None:
    """Load the weights of ``export`` into ``model``, the network of a run with ``settings``.

    The two networks must agree in all settings but ``dropout`` and ``good_turing``, which have no weights. Raises
    :class:`UserError`, naming ``path``, if they do not. A warning says where the run scales genetic distances otherwise
    than the model does.
    """
    if replace(export.config.model, **_WEIGHTLESS) != replace(settings.model, **_WEIGHTLESS):
        raise UserError(f"--init-from {path}: its network is {export.config.model}; set embrag.model to that")
    theirs, ours = export.config.data.map_scale, settings.data.map_scale
    if theirs != ours:
        logger.warning(
            "--init-from %s: it scales genetic distances by %g, this run by %g; on the panel that it adapted to, add "
            "--set embrag.data.map_scale=%r",
            path,
            theirs,
            ours,
            theirs,
        )
    model.load_state_dict(export.weights)
