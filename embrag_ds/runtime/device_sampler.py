"""What a run takes of its machine, sampled by a thread: GPU by NVML, torch's allocator, and the process itself."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, fields
from typing import Any, Protocol

import psutil
import pynvml
import torch

from embrag_ds.errors import UserError

INTERVAL_S = 0.1
MOST_READINGS = 10_000

_NO_DRIVER = (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded)
_UNAVAILABLE = (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound)
"""What a GPU, its driver or a container does not tell."""


@dataclass(frozen=True)
class Reading:
    """One look, ``seconds`` after the start. None where the machine does not tell.

    Of the process: ``host_bytes`` resident and ``cpu_percent`` since the reading before (100 is one core; None in the
    first reading and the last, too short after another). Of the GPU, by NVML: memory that this process uses
    (``process_bytes``; masked in most containers) and that all do (``device_bytes``), utilisation, power, clocks, and
    PCIe traffic to (``rx``) and from (``tx``) the GPU over 20 ms. Of torch's allocator: bytes in tensors, bytes
    reserved, and the most that were in tensors so far.
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


class _Gpu(Protocol):
    def read(self) -> dict[str, Any]:
        """The GPU's fields of a :class:`Reading`."""
        ...

    def close(self) -> None:
        """Let go of the driver."""
        ...


class _NoGpu:
    """In place of NVML where there is no driver, or nothing of the run on a GPU."""

    def read(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class _NvmlGpu:
    """One GPU through NVML, which is initialised already."""

    def __init__(self, device: torch.device):
        self._handle = _handle(device)
        self.name = f"{pynvml.nvmlDeviceGetName(self._handle)}, driver {pynvml.nvmlSystemGetDriverVersion()}"

    def read(self) -> dict[str, Any]:
        handle = self._handle
        memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
        busy = _told(pynvml.nvmlDeviceGetUtilizationRates, handle)
        power = _told(pynvml.nvmlDeviceGetPowerUsage, handle)
        return {
            "process_bytes": _of_this_process(_told(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)),
            "device_bytes": None if memory is None else memory.used,
            "gpu_percent": None if busy is None else busy.gpu,
            "power_w": None if power is None else power / 1000,
            "sm_mhz": _told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": _told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            "pcie_rx_kb_per_s": _told(pynvml.nvmlDeviceGetPcieThroughput, handle, pynvml.NVML_PCIE_UTIL_RX_BYTES),
            "pcie_tx_kb_per_s": _told(pynvml.nvmlDeviceGetPcieThroughput, handle, pynvml.NVML_PCIE_UTIL_TX_BYTES),
        }

    def close(self) -> None:
        pynvml.nvmlShutdown()


class DeviceSampler:
    """QueryBatch the machine on a thread of its own, from :meth:`start` (or ``with``) to :meth:`stop`; used once.

    ``source`` says in words what is sampled. :attr:`readings` never holds more than ``MOST_READINGS``: a long run keeps
    every second, fourth, ... of them; the peaks are those of all.
    """

    def __init__(self, device: torch.device, interval_s: float = INTERVAL_S):
        """``interval_s`` lie between two readings. Raises a UserError where NVML does not know ``device``."""
        if device.type == "cuda" and device.index is None:
            # Another thread has another current device.
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
        self._stopping = threading.Event()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="device-sampler", daemon=True)

    def start(self, began: float | None = None) -> None:
        """Begin sampling; seconds count from ``began`` (of :func:`time.perf_counter`; default: now)."""
        self._began = time.perf_counter() if began is None else began
        self._process.cpu_percent()  # the first call has nothing to compare with
        self._thread.start()

    def stop(self) -> None:
        """Take the last reading and end the thread; raises what went wrong on it."""
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
        """The highest value of every field that was ever told, by name."""
        return dict(self._peaks)

    def columns(self) -> dict[str, list[Any]]:
        """The readings field by field, without fields that were never told."""
        names = [field.name for field in fields(Reading) if field.name == "seconds" or field.name in self._peaks]
        return {name: [getattr(reading, name) for reading in self.readings] for name in names}

    def _run(self) -> None:
        try:
            self._keep(self._read_all(cpu_percent=None))
            while not self._stopping.wait(self._interval_s):
                self._keep(self._read_all(self._process.cpu_percent()))
            self._keep(self._read_all(cpu_percent=None))
        except BaseException as fault:  # whatever it is, stop() raises it
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
    """What reads the GPU of ``device``, and what is sampled, in words."""
    instead = "process memory and CPU are sampled instead"
    try:
        pynvml.nvmlInit()
    except _NO_DRIVER as fault:
        return _NoGpu(), f"no NVIDIA driver ({fault}): {instead}"
    if device.type != "cuda":
        pynvml.nvmlShutdown()
        return _NoGpu(), f"the run is on a CPU: {instead}"
    gpu = _NvmlGpu(device)
    return gpu, f"NVML: {gpu.name}"


def _handle(device: torch.device) -> Any:
    # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
    uuid = torch.cuda.get_device_properties(device).uuid
    for kind in ("GPU", "MIG"):
        with contextlib.suppress(pynvml.NVMLError_NotFound):
            return pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
    raise UserError(f"--profile: NVML does not know {device} (UUID {uuid})")


def _told(query: Any, *arguments: Any) -> Any:
    """What NVML answers; None for what this GPU does not tell."""
    try:
        return query(*arguments)
    except _UNAVAILABLE:
        return None


def _of_this_process(processes: Any) -> int | None:
    """Bytes that the processes with our id use; None where the driver lists none, or hides how much."""
    used = [each.usedGpuMemory for each in processes or [] if each.pid == os.getpid()]
    return sum(used) if used and None not in used else None


def _allocator(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats_as_nested_dict(device)  # memory_stats() also flattens and sorts hundreds of numbers
    if not stats:
        return {}
    return {
        "allocated_bytes": stats["allocated_bytes"]["all"]["current"],
        "reserved_bytes": stats["reserved_bytes"]["all"]["current"],
        "peak_allocated_bytes": stats["allocated_bytes"]["all"]["peak"],
    }
