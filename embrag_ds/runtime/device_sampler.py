"""Sampling of GPU (NVML), torch allocator and process load during a run, on a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass, fields
from typing import Any, Protocol

import psutil
import pynvml
import torch

from embrag_ds.errors import UserError
from embrag_ds.runtime.streams import thread_start

logger = logging.getLogger(__name__)

INTERVAL_S = 0.1
"""Default seconds between two readings."""
MOST_READINGS = 10_000
"""Readings kept at most."""

_NO_DRIVER = (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded)
_UNAVAILABLE = (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound)
"""NVML errors for a value that the GPU, its driver or a container does not provide; they are no news."""


@dataclass(frozen=True)
class Reading:
    """One sample of the machine, ``seconds`` after the start; a field is None where its value is not available.

    Process: ``host_bytes`` is resident memory. ``cpu_percent`` is the load since the reading before (100 is one core).
    It is None in the first and the last reading, which have no full interval before them.

    GPU, by NVML: ``process_bytes`` is the memory of this process, which most containers hide; ``device_bytes`` that of
    all processes. Utilisation, power and clocks follow, and PCIe traffic to (``rx``) and from (``tx``) the GPU,
    averaged over 20 ms.

    Torch's allocator: bytes in tensors, bytes reserved, and the peak of bytes in tensors so far.
    """

    seconds: float
    host_bytes: int
    cpu_percent: float | None
    process_bytes: int | None = None
    device_bytes: int | None = None
    gpu_percent: int | None = None
    power_w: float | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    pcie_rx_kb_per_s: int | None = None
    pcie_tx_kb_per_s: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None


MEMORY = {
    "host_bytes": "process",
    "process_bytes": "GPU, this process",
    "device_bytes": "GPU, all",
    "allocated_bytes": "in tensors",
    "reserved_bytes": "reserved by torch",
}
"""Fields of a reading that are memory in use, and what they are called in plots and traces."""


class _Gpu(Protocol):
    """Source of the GPU fields of a reading."""

    def read(self) -> dict[str, Any]:
        """Current values of the GPU fields of a :class:`Reading`, by name."""
        ...

    def close(self) -> None:
        """Release the driver."""
        ...


class _NoGpu:
    """Null source without GPU fields, for a run on a CPU or a machine without a driver."""

    def read(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class _NvmlGpu:
    """GPU fields of one CUDA device, read by NVML, which must be initialised; :meth:`close` shuts it down.

    A value that cannot be read is None. Errors of NVML are logged, once for each query, because they must not end the
    run that is measured.
    """

    def __init__(self, device: torch.device):
        self._faulty: set[str] = set()
        self._handle = _handle(device)
        self.name = f"{pynvml.nvmlDeviceGetName(self._handle)}, driver {pynvml.nvmlSystemGetDriverVersion()}"

    def read(self) -> dict[str, Any]:
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses_v3")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        busy = self._ask("nvmlDeviceGetUtilizationRates")
        power = self._ask("nvmlDeviceGetPowerUsage")
        return {
            "process_bytes": _of_this_process(processes),
            "device_bytes": None if memory is None else memory.used,
            "gpu_percent": None if busy is None else busy.gpu,
            "power_w": None if power is None else power / 1000,
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
            "pcie_rx_kb_per_s": self._ask("nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_RX_BYTES),
            "pcie_tx_kb_per_s": self._ask("nvmlDeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_TX_BYTES),
        }

    def _ask(self, query: str, *arguments: int) -> Any:
        """Result of an NVML query on the GPU, or None if it fails."""
        try:
            return getattr(pynvml, query)(self._handle, *arguments)
        except pynvml.NVMLError as fault:
            if not isinstance(fault, _UNAVAILABLE) and query not in self._faulty:
                self._faulty.add(query)
                logger.warning("profile: %s fails (%s); its readings are left out where it does", query, fault)
            return None

    def close(self) -> None:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as fault:
            logger.warning("profile: NVML does not shut down (%s)", fault)


class DeviceSampler:
    """Sampler of the machine on a thread of its own, from :meth:`start` (or ``with``) to :meth:`stop`; used once.

    ``source`` describes what is sampled. :attr:`readings` holds at most :data:`MOST_READINGS`: in
    a long run only every second, fourth, ... reading is kept. The peaks are taken over all readings.
    """

    def __init__(self, device: torch.device, interval_s: float = INTERVAL_S):
        """``interval_s`` is the time between two readings, in seconds.

        Raises :class:`~embrag_ds.errors.UserError` if NVML does not know ``device``, and ``pynvml.NVMLError`` if NVML
        fails to start, or to find the device, for another reason than a missing driver.
        """
        if device.type == "cuda" and device.index is None:
            # The current device is a property of the calling thread, and the sampling thread has its own.
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._interval_s = interval_s
        self._process = psutil.Process()
        self._gpu, self.source = _open_gpu(device)
        self.readings: list[Reading] = []
        self._peaks: dict[str, float] = {}
        self._taken = 0
        self._kept_every = 1
        self._began = 0.0
        self._start_thread = thread_start()
        self._stopping = threading.Event()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="device-sampler", daemon=True)

    def start(self, began: float | None = None) -> None:
        """Start the sampling thread. Seconds count from ``began``, a :func:`time.perf_counter` time; default: now."""
        self._began = time.perf_counter() if began is None else began
        self._process.cpu_percent()  # the first call only sets the start of the next interval
        self._thread.start()

    def stop(self) -> None:
        """Take the last reading and end the thread.

        Raises the exception that ended it early, if there was one; an error of NVML is none.
        """
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._gpu.close()
        if self._fault is not None:
            raise self._fault

    def __enter__(self) -> DeviceSampler:
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def peaks(self) -> dict[str, float]:
        """Highest value of every field over all readings, by name, without fields that were never available."""
        return dict(self._peaks)

    def columns(self) -> dict[str, list[Any]]:
        """Values of the kept readings, by field name, without fields that were never available."""
        names = [field.name for field in fields(Reading) if field.name == "seconds" or field.name in self._peaks]
        return {name: [getattr(reading, name) for reading in self.readings] for name in names}

    def _run(self) -> None:
        try:
            self._start_thread()
            self._keep(self._read_all(cpu_percent=None))
            while not self._stopping.wait(self._interval_s):
                self._keep(self._read_all(self._process.cpu_percent()))
            self._keep(self._read_all(cpu_percent=None))
        except BaseException as fault:  # also SystemExit: stop() raises it on the caller's thread
            self._fault = fault

    def _read_all(self, cpu_percent: float | None) -> Reading:
        return Reading(
            seconds=time.perf_counter() - self._began,
            host_bytes=self._process.memory_info().rss,
            cpu_percent=cpu_percent,
            **self._gpu.read(),
            **_allocator(self._device),
        )

    def _keep(self, reading: Reading) -> None:
        for name, value in vars(reading).items():
            if value is not None and name != "seconds":
                self._peaks[name] = max(value, self._peaks.get(name, value))
        if self._taken % self._kept_every == 0:
            self.readings.append(reading)
        self._taken += 1
        if len(self.readings) > MOST_READINGS:
            self.readings = self.readings[::2]
            self._kept_every *= 2


def _open_gpu(device: torch.device) -> tuple[_Gpu, str]:
    """Source of the GPU fields for ``device``, and a description of what is sampled."""
    instead = "process memory and CPU are sampled instead"
    try:
        pynvml.nvmlInit()
    except _NO_DRIVER as fault:
        return _NoGpu(), f"no NVIDIA driver ({fault}): {instead}"
    if device.type != "cuda":
        pynvml.nvmlShutdown()
        return _NoGpu(), f"the run is on a CPU: {instead}"
    try:
        gpu = _NvmlGpu(device)
    except BaseException:
        pynvml.nvmlShutdown()
        raise
    return gpu, f"NVML: {gpu.name}"


def _handle(device: torch.device) -> Any:
    """NVML handle of ``device``; raises :class:`UserError` if NVML does not list its UUID."""
    # CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's, so only the UUID identifies the GPU.
    uuid = torch.cuda.get_device_properties(device).uuid
    for kind in ("GPU", "MIG"):
        with contextlib.suppress(pynvml.NVMLError_NotFound):
            return pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
    raise UserError(f"--profile: NVML does not know {device} (UUID {uuid})")


def _of_this_process(processes: Any) -> int | None:
    """GPU memory of this process in bytes; None where the driver does not list it or hides its memory."""
    used = [each.usedGpuMemory for each in processes or [] if each.pid == os.getpid()]
    return sum(used) if used and None not in used else None


def _allocator(device: torch.device) -> dict[str, int]:
    """Allocator fields of a :class:`Reading`, by name; empty on a CPU."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats_as_nested_dict(device)  # memory_stats() would flatten and sort hundreds of values
    if not stats:
        return {}
    return {
        "allocated_bytes": stats["allocated_bytes"]["all"]["current"],
        "reserved_bytes": stats["reserved_bytes"]["all"]["current"],
        "peak_allocated_bytes": stats["allocated_bytes"]["all"]["peak"],
    }
