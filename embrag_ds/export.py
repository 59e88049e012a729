"""Exported models: one safetensors file, which is all that imputation needs.

The file holds the network's weights, the section ``"embrag"`` of the configuration, and a snapshot of the embedding
layer. The section is without its paths, which mean nothing on another machine or for another panel. The snapshot
encodes reference panels (encodings ``fixed`` and ``refresh``). It is absent where panels are encoded by the current
weights (``live``) or not at all.

A file is read and written without torch, which only a network needs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from embrag_ds.config import EmbragConfig, parse_embrag, without_paths
from embrag_ds.dependence import INDEPENDENT, Dependence
from embrag_ds.errors import UserError
from embrag_ds.files import written
from embrag_ds.model.numbers import embedding_shapes, network_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from embrag_ds.model.imputer import Imputer

logger = logging.getLogger(__name__)

EXPORT_FORMAT = 3
"""Version of the file's layout; other versions are refused."""
MODEL_FILE = "model.safetensors"
"""Name of the exported model in a run folder."""
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / MODEL_FILE
"""The model shipped with the package; docs/results.md describes its training."""
_HEADER = "embrag_ds"
_SNAPSHOT = "snapshot."
_WEIGHTLESS: dict[str, Any] = {"dropout": 0.0, "good_turing": False}


@dataclass(frozen=True)
class ExportedModel:
    """Contents of an exported model: its ``config``, and float32 ``arrays`` by the names that they have in the file.

    ``dependence`` is that of a sample's two haplotypes, of a model that was adapted.
    """

    config: EmbragConfig
    arrays: dict[str, np.ndarray]
    dependence: Dependence = INDEPENDENT

    @classmethod
    def of(cls, config: EmbragConfig, weights: Mapping[str, Any], snapshot: Mapping[str, Any] | None) -> ExportedModel:
        """The model with these :attr:`weights` and :attr:`snapshot`, arrays or tensors of any precision on the CPU."""
        arrays = {name: _float32(value) for name, value in weights.items()}
        arrays |= {_SNAPSHOT + name: _float32(value) for name, value in (snapshot or {}).items()}
        return cls(config, arrays)

    @property
    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The arrays of the network and those of the layer that encodes panels, by name.

        The second are none where panels are encoded live or not at all.
        """
        network = {name: value for name, value in self.arrays.items() if not name.startswith(_SNAPSHOT)}
        named = {name.removeprefix(_SNAPSHOT): value for name, value in self.arrays.items() if name not in network}
        return network, named

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's tensors by name, fp32 on the CPU, in the memory of the arrays."""
        return _tensors(self.parts[0])

    @property
    def snapshot(self) -> dict[str, Tensor] | None:
        """Those of the layer that encodes panels; None where there is none."""
        named = self.parts[1]
        return _tensors(named) if named else None

    def network(self) -> Imputer:
        """A new network with these weights, for inference, on the CPU."""
        from embrag_ds.model.imputer import Imputer

        network = Imputer(self.config.model)
        network.load_state_dict(self.weights)
        return network.eval()


def write_export(path: Path, model: ExportedModel) -> None:
    """Write an exported model; the file appears only when complete."""
    # One entry: safetensors writes several in random order, and equal models should be equal files.
    header = {"format": EXPORT_FORMAT, "embrag": asdict(without_paths(model.config)[0])}
    if model.dependence != INDEPENDENT:
        header["dependence"] = asdict(model.dependence)
    arrays = {name: np.ascontiguousarray(value) for name, value in model.arrays.items()}
    with written(path) as temporary:
        try:
            save_file(arrays, temporary, {_HEADER: json.dumps(header)})
        except SafetensorError as fault:
            raise UserError(f"{path}: cannot write the model ({fault}); free some space in {path.parent}") from fault


def _float32(value: Any) -> np.ndarray:
    """An array of the value; a run's snapshot is in bf16 or fp16 where its network is."""
    return np.asarray(value if isinstance(value, np.ndarray) else value.float(), dtype=np.float32)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def read_export(path: Path) -> ExportedModel:
    """Read a file written by :func:`write_export`; paths of the training in a file of an older version are ignored.

    Raises :class:`UserError` if the file cannot be read, is not an export of this format, or lacks finite weights for
    the network that it describes.
    """
    try:
        if not path.is_file():  # a pipe cannot be mapped into memory, and reading it would wait
            path.stat()
            raise OSError("it is no file")
        with safe_open(path, framework="numpy") as stored:
            header = _header(stored.metadata())
            if header is None or header.get("format") != EXPORT_FORMAT or "embrag" not in header:
                raise UserError(f"{path}: not a model written by launch/train.py (or by another version of it)")
            config, dropped = without_paths(parse_embrag(header["embrag"], str(path)))
            dependence = _dependence(header.get("dependence", {}), path)
            names = list(stored.keys())
            # Before any tensor is read: a file may name large ones that are all holes.
            fault_found = _fault_of_tensors(names, stored.get_slice, config)
            arrays = {} if fault_found else {name: stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as fault:
        raise UserError(f"{path}: cannot read the model: {fault}; name a model.safetensors of a run folder") from fault
    except MemoryError as fault:
        size = path.stat().st_size / 1e9
        raise UserError(f"{path}: no memory for its {size:.1f} GB; copy it again, or use a larger machine") from fault
    if dropped:
        logger.info("%s: paths of its training are ignored (%s)", path, ", ".join(dropped))
    if fault_found := fault_found or _fault_of_values(arrays):
        raise UserError(f"{path}: the model is damaged: {fault_found}; copy or train it again")
    return ExportedModel(config, arrays, dependence)


def _header(metadata: dict[str, str] | None) -> dict[str, Any] | None:
    """Our entry of a file's metadata; None if there is none, or one that is no JSON object."""
    try:
        header = json.loads((metadata or {}).get(_HEADER, "null"))
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _dependence(given: Any, path: Path) -> Dependence:
    try:
        return Dependence(**given)
    except (TypeError, ValueError) as fault:
        raise UserError(f"{path}: the model is damaged: its dependence is {given}; copy or adapt it again") from fault


def _fault_of_tensors(names: list[str], slice_of: Callable[[str], Any], config: EmbragConfig) -> str | None:
    """What tensors of these ``names`` lack as weights of the network that ``config`` describes, or None.

    ``slice_of`` gives a tensor's shape and type.
    """
    if config.model.layers > len(names):
        return f"it has too few tensors for {config.model.layers} transformer blocks"
    expected, found = network_shapes(config.model), set(names)
    if config.retrieval.mode == "embedding" and config.retrieval.encoding != "live":
        expected |= {_SNAPSHOT + name: shape for name, shape in embedding_shapes(config.model.dims).items()}
    for name in expected:
        if name not in found:
            return f"it has no tensor {name}"
    if foreign := sorted(found - expected.keys()):
        return f"{foreign[0]} is no tensor of its network"
    for name, shape in expected.items():
        stored = slice_of(name)
        if stored.get_shape() != list(shape):
            return f"{name} has the shape {stored.get_shape()}, and its network {list(shape)}"
        if stored.get_dtype() != "F32":
            return f"{name} has numbers of the type {stored.get_dtype()}, and not F32"
    return None


def _fault_of_values(arrays: dict[str, np.ndarray]) -> str | None:
    """The first array that is not finite, for a message, or None."""
    for name, value in arrays.items():
        if not np.isfinite(value).all():
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
