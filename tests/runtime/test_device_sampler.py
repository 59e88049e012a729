"""Device sampler: values from a fake NVML, machines without a driver, and exceptions on its thread."""

from __future__ import annotations

import itertools
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from embrag_ds.errors import UserError
from embrag_ds.runtime import device_sampler
from embrag_ds.runtime.device_sampler import DeviceSampler

CPU = torch.device("cpu")
SECOND = torch.device("cuda", 1)


class FakeNvml:
    """Fake NVML of three GPUs, the third of which is torch's device 1; functions raise those in ``faults``."""

    def __init__(self) -> None:
        self.open = 0
        self.faults: dict[str, Exception] = {}
        self.processes = [(os.getpid(), 5 << 30), (os.getpid() + 1, 7 << 30)]
        self.uuids = {"GPU-aaaa": 0, "GPU-bbbb": 1, "GPU-cccc": 2}

    def nvmlInit(self) -> None:
        self._may_fail("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self._may_fail("nvmlShutdown")
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        self._may_fail("handle")
        if uuid not in self.uuids:
            raise pynvml.NVMLError_NotFound()
        return self.uuids[uuid]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"NVIDIA Fake {handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "600.1"

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: int) -> list[SimpleNamespace]:
        self._may_fail("processes")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=(10 + handle) << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        self._may_fail("utilisation")
        return SimpleNamespace(gpu=80 + handle)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 300_500 + handle

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1900, pynvml.NVML_CLOCK_MEM: 2600}[kind]

    def nvmlDeviceGetPcieThroughput(self, handle: int, counter: int) -> int:
        return {pynvml.NVML_PCIE_UTIL_RX_BYTES: 1234, pynvml.NVML_PCIE_UTIL_TX_BYTES: 56}[counter]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVML"):  # constants and exceptions are the real ones
            return getattr(pynvml, name)
        raise AttributeError(name)

    def _may_fail(self, name: str) -> None:
        if name in self.faults:
            raise self.faults[name]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Fake machine with GPUs: NVML and torch's functions are replaced."""
    fake = FakeNvml()
    monkeypatch.setattr(device_sampler, "pynvml", fake)
    uuids = {0: "aaaa", 1: "cccc"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index], name="Fake")
    )
    stats = {"allocated_bytes": {"all": {"current": 3, "peak": 9}}, "reserved_bytes": {"all": {"current": 4}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    return fake


def sampled(device: torch.device) -> DeviceSampler:
    with DeviceSampler(device, interval_s=0.01) as sampler:
        time.sleep(0.1)
    return sampler


def test_it_reads_the_gpu_that_torch_uses(fake: FakeNvml) -> None:
    sampler = sampled(SECOND)
    assert sampler.source == "NVML: NVIDIA Fake 2, driver 600.1"
    assert fake.open == 0  # the driver is released
    assert len(sampler.readings) > 2
    one = sampler.readings[-1]
    assert (one.process_bytes, one.device_bytes) == (5 << 30, 12 << 30)
    assert (one.gpu_percent, one.power_w, one.sm_mhz, one.memory_mhz) == (82, 300.502, 1900, 2600)
    assert (one.pcie_rx_kb_per_s, one.pcie_tx_kb_per_s) == (1234, 56)
    assert (one.allocated_bytes, one.reserved_bytes, one.peak_allocated_bytes) == (3, 4, 9)
    assert set(sampler.columns()) == {"seconds", *sampler.peaks()} == set(device_sampler.Reading.__dataclass_fields__)


def test_a_mig_slice_has_a_uuid_of_its_own(fake: FakeNvml) -> None:
    fake.uuids = {"MIG-cccc": 1}
    assert "NVIDIA Fake 1" in sampled(SECOND).source


def test_a_gpu_that_nvml_does_not_know(fake: FakeNvml) -> None:
    fake.uuids = {"GPU-aaaa": 0}
    with pytest.raises(UserError, match=r"NVML does not know cuda:1 \(UUID cccc\)"):
        DeviceSampler(SECOND)
    assert fake.open == 0


def test_a_gpu_that_cannot_be_looked_up(fake: FakeNvml) -> None:
    fake.faults["handle"] = pynvml.NVMLError_GpuIsLost()
    with pytest.raises(pynvml.NVMLError_GpuIsLost):
        DeviceSampler(SECOND)
    assert fake.open == 0


@pytest.mark.parametrize(
    "fault", [pynvml.NVMLError_NotSupported(), pynvml.NVMLError_NoPermission(), pynvml.NVMLError_FunctionNotFound()]
)
def test_a_field_that_is_not_supported_is_none(fake: FakeNvml, fault: Exception) -> None:
    fake.faults = {"utilisation": fault, "processes": fault}
    sampler = sampled(SECOND)
    assert all(each.gpu_percent is None and each.process_bytes is None for each in sampler.readings)
    assert sampler.readings[0].device_bytes == 12 << 30
    assert "gpu_percent" not in sampler.columns() and "gpu_percent" not in sampler.peaks()


@pytest.mark.parametrize("processes", [[], [(1, 1 << 30)], [(os.getpid(), None)]])
def test_a_process_that_the_driver_hides_is_none(fake: FakeNvml, processes: list[Any]) -> None:
    fake.processes = processes
    (first, *_) = sampled(SECOND).readings
    assert first.process_bytes is None and first.device_bytes == 12 << 30


def test_an_error_of_nvml_leaves_a_field_out_and_is_said_once(fake: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    sampler = DeviceSampler(SECOND, interval_s=0.01)
    sampler.start()
    time.sleep(0.03)
    fake.faults["utilisation"] = pynvml.NVMLError_GpuIsLost()
    time.sleep(0.05)
    sampler.stop()
    first, last = sampler.readings[0], sampler.readings[-1]
    assert (first.gpu_percent, last.gpu_percent) == (82, None) and last.device_bytes == 12 << 30
    assert caplog.messages == [
        "profile: nvmlDeviceGetUtilizationRates fails (GPU is lost); its readings are left out where it does"
    ]
    assert sampler.peaks()["gpu_percent"] == 82 and fake.open == 0


def test_an_error_when_nvml_shuts_down_is_said(fake: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    with DeviceSampler(SECOND, interval_s=0.01) as sampler:
        fake.faults["nvmlShutdown"] = pynvml.NVMLError_Unknown()
    assert sampler.peaks()["gpu_percent"] == 82
    assert caplog.messages == ["profile: NVML does not shut down (Unknown Error)"]


def test_what_fails_on_the_thread_is_raised_at_stop(fake: FakeNvml) -> None:
    sampler = DeviceSampler(SECOND, interval_s=0.01)
    sampler.start()
    time.sleep(0.03)
    fake.faults["utilisation"] = OSError("no statistics")
    time.sleep(0.03)
    with pytest.raises(OSError, match="no statistics"):
        sampler.stop()
    assert sampler.readings and fake.open == 0
    assert "device-sampler" not in [each.name for each in threading.enumerate()]


@pytest.mark.parametrize("fault", [pynvml.NVMLError_LibraryNotFound(), pynvml.NVMLError_DriverNotLoaded()])
def test_no_driver(fake: FakeNvml, fault: Exception) -> None:
    fake.faults["nvmlInit"] = fault
    assert sampled(CPU).source == f"no NVIDIA driver ({fault}): process memory and CPU are sampled instead"


def test_another_fault_of_nvml_is_not_taken_for_a_missing_driver(fake: FakeNvml) -> None:
    fake.faults["nvmlInit"] = pynvml.NVMLError_Unknown()
    with pytest.raises(pynvml.NVMLError_Unknown):
        DeviceSampler(CPU)


def test_a_run_on_the_cpu_of_a_machine_with_gpus(fake: FakeNvml) -> None:
    sampler = sampled(CPU)
    assert sampler.source.startswith("the run is on a CPU") and fake.open == 0
    assert sampler.readings[0].device_bytes is None


def test_process_memory_and_cpu_are_those_of_the_process() -> None:
    """Measured on the real machine, with or without a GPU."""
    block = 200 << 20
    with DeviceSampler(CPU, interval_s=0.01) as sampler:
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            pass
        before = psutil.Process().memory_info().rss
        held = bytearray(os.urandom(1 << 20) * (block >> 20))
        time.sleep(0.05)
    assert len(held) == block
    seconds = sampler.columns()["seconds"]
    assert seconds == sorted(seconds) and 0 <= seconds[0] < 0.2 and seconds[-1] > 0.3
    assert sampler.peaks()["host_bytes"] > before + 0.9 * block
    assert sampler.peaks()["cpu_percent"] > 20
    assert list(sampler.columns()) == ["seconds", "host_bytes", "cpu_percent"]


def test_a_long_run_keeps_few_samples_and_all_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampler, "MOST_READINGS", 10)
    sampler = DeviceSampler(CPU)
    for number in range(100):
        sampler._keep(device_sampler.Reading(float(number), 1 + (number == 77), None))
    assert len(sampler.readings) <= 10
    seconds = sampler.columns()["seconds"]
    assert seconds[0] == 0 and seconds[-1] > 80 and len({b - a for a, b in itertools.pairwise(seconds)}) == 1
    assert sampler.peaks()["host_bytes"] == 2
    sampler.stop()


@pytest.mark.gpu
def test_the_gpu_of_this_machine() -> None:
    device = torch.device("cuda", 0)
    with DeviceSampler(device, interval_s=0.02) as sampler:
        held = torch.ones(1 << 28, device=device)
        time.sleep(0.3)
    assert sampler.source.startswith("NVML: ")
    peaks = sampler.peaks()
    assert peaks["allocated_bytes"] >= held.nbytes and peaks["device_bytes"] >= held.nbytes
    assert peaks.get("process_bytes", peaks["device_bytes"]) >= held.nbytes
    assert peaks["sm_mhz"] > 0 and peaks["power_w"] > 0
