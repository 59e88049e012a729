"""Bit-packed alleles of the panel, resident on the device or streamed to it.

The alleles never change, so they are copied to the device once if they fit its budget. Otherwise the rows of a batch
are read from the memory-mapped panel and copied through pinned staging. The collator runs ahead of the training step,
so that copy overlaps with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from embrag_ds.data.windows import WindowedPanel
from embrag_ds.ops.bits import unpack, unpack_host
from embrag_ds.runtime.streams import Staging

GIB = 1 << 30
_COPY_ROWS = 1 << 16


class DevicePanel:
    """Source of the reference alleles of a window's sites, on ``device``.

    The panel is packed site by site, uint8 [S, ceil(panel haplotypes / 8)]; haplotypes outside the reference set are
    dropped after unpacking.
    """

    def __init__(self, data: WindowedPanel, device: torch.device, budget_gb: float):
        """Copy the packed panel to a CUDA device if it takes at most ``budget_gb`` GiB."""
        panel = data.reference.panel
        self._packed = panel.packed
        self._windows = data.windows
        self._device = device
        self._haplotypes = 2 * len(panel.samples)
        whole = len(data.reference) == self._haplotypes
        self._columns = None if whole else torch.from_numpy(data.reference.haplotypes).to(device)
        self._resident: Tensor | None = None
        if device.type == "cuda" and self._packed.nbytes <= budget_gb * GIB:
            self._resident = torch.empty(self._packed.shape, dtype=torch.uint8, device=device)
            for start in range(0, len(self._packed), _COPY_ROWS):
                rows = torch.from_numpy(np.array(self._packed[start : start + _COPY_ROWS]))
                self._resident[start : start + _COPY_ROWS].copy_(rows)  # the host waits, so every stream may read it

    @property
    def packed_bytes(self) -> int:
        """Size of the packed panel in bytes."""
        return int(self._packed.nbytes)

    @property
    def device_bytes(self) -> int:
        """Device memory held, in bytes; 0 if the panel is not resident."""
        return 0 if self._resident is None else self._resident.numel()

    def staged_bytes(self, rows: int) -> int:
        """Staging memory that a call of :meth:`alleles` with ``rows`` sites takes, in bytes."""
        if self._device.type == "cpu":
            return 0
        return rows * (8 if self._resident is not None else self._packed.shape[1])

    def alleles(self, window: int, sites: np.ndarray, staging: Staging) -> Tensor:
        """Alleles uint8 [n, H] of the reference haplotypes at ``sites`` int64 [n], indices into a window's sites."""
        places = self._windows[window].start + sites
        if self._device.type == "cpu":
            unpacked = torch.from_numpy(unpack_host(self._packed[places], 0, self._haplotypes))
        elif self._resident is not None:
            unpacked = unpack(self._resident[staging.put(places)], self._haplotypes)
        else:
            unpacked = unpack(staging.put(self._packed[places]), self._haplotypes)
        return unpacked if self._columns is None else unpacked.index_select(1, self._columns)
