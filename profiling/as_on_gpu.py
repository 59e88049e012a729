"""The path of a GPU on a machine without one: what a CUDA device would run, with kernels that only count.

Tensors stay on the CPU, so torch's own operations run there. Wherever ``embrag_ds`` takes another way on a CPU, the
GPU's way is taken instead: the CUDA kernels of copying and dosage, alleles as a table, and copies from pinned memory.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from embrag_ds.engine import distributed
from embrag_ds.ops import cuda, dosage, li_stephens, rotation_cuda
from embrag_ds.retrieval.device_panel import DevicePanel
from embrag_ds.runtime.streams import Staging

Launched = Callable[[str, list[Tensor]], None]
"""Function that is told of a kernel, or of a copy, and of the tensors that it reads and writes."""
_META = torch.device("meta")


@contextmanager
def as_on_gpu(launched: Launched, uncounted: Callable[[], Any]) -> Iterator[None]:
    """Take the GPU's way inside ``with``, and call ``launched`` where a kernel of ours or a copy would be launched.

    ``uncounted()`` is a context in which operations are not counted: those that only a CPU needs.
    """

    class Counting(cuda.Kernel):
        def __init__(self, source: str, name: str, options: tuple[str, ...] = ()):
            self._name = name

        def launch(self, blocks: int, threads: int, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
            launched(self._name, list(tensors))
            with uncounted():
                for tensor in tensors:
                    _settle(tensor)

    def put(staging: Staging, array: np.ndarray) -> Tensor:
        tensor = put_on_cpu(staging, array)
        launched("copy to the device", [tensor])
        return tensor

    def table(alleles: dosage.WindowAlleles, by_site: Tensor) -> None:
        alleles.by_haplotype = by_site.T.contiguous()
        alleles._by_site = None

    def rows(panel: DevicePanel, window: int, sites: np.ndarray, staging: Staging) -> Tensor:
        on_gpu = copy.copy(panel)
        on_gpu._device = _META
        on_gpu._resident = torch.empty(panel._packed.shape, dtype=torch.uint8, device=_META)
        on_gpu._columns = None if panel._columns is None else panel._columns.to(_META)
        rows_on_cpu(on_gpu, window, sites, staging)
        with uncounted():
            return rows_on_cpu(panel, window, sites, staging)

    def both(on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``on_cpu``, which chooses by the tensors' device, counted as it would run on another device."""

        def run(*given: Tensor | int) -> Tensor:
            on_cpu(*(torch.empty_like(each, device=_META) if isinstance(each, Tensor) else each for each in given))
            with uncounted():
                return on_cpu(*given)

        return run

    def expected(neighbours: Any, posterior: Tensor, flanking: Any) -> Tensor:
        return dosage.CudaDosage.apply(posterior, neighbours.all, flanking.left, flanking.right, flanking.share)

    put_on_cpu, rows_on_cpu = Staging.put, DevicePanel.alleles
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(distributed, "cpu_has_bf16", lambda: True)
        patch(cuda, "available", lambda: True)
        patch(Staging, "put", put)
        patch(DevicePanel, "alleles", rows)
        patch(dosage.WindowAlleles, "__init__", table)
        for old, new in (
            (cuda.kernel, Counting),
            (li_stephens.copying_backend, lambda device: "cuda kernel"),
            (li_stephens.mismatches, both(li_stephens.mismatches)),
            (li_stephens.count_by_place, both(li_stephens.count_by_place)),
            (dosage.expected_allele, expected),
            (rotation_cuda.serves, lambda qkv: True),
        ):
            for module, name in _places(old):
                patch(module, name, new)
        yield


def _settle(tensor: Tensor) -> None:
    """Replace the values of a float32 or bf16 tensor outside of (1e-6, 1), behind autograd's back.

    Kernels that only count leave their outputs as they were allocated. Any numbers do, but infinite ones would end in a
    step that is skipped.
    """
    if tensor.is_floating_point():
        values = tensor.data  # whose changes autograd does not see
        values.copy_(torch.where((values > 1e-6) & (values < 1), values, 0.01))


def _places(function: Any) -> list[tuple[Any, str]]:
    """Modules of ours that hold ``function``, with the name it has there."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("embrag_ds")]
    return [(module, name) for module in modules for name, value in vars(module).items() if value is function]
