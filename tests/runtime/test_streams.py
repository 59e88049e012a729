"""Pinned staging and threads' devices, on the stand-in for CUDA."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from embrag_ds.errors import UserError
from embrag_ds.runtime import device_sampler, streams
from embrag_ds.runtime.device_sampler import DeviceSampler
from embrag_ds.runtime.streams import Staging, host_buffer, thread_start, use_device
from tests.cuda_rules import Machine

CPU = torch.device("cpu")
PAGE = 4096


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.mark.parametrize(("size", "held"), [(0, PAGE), (1, PAGE), (PAGE, PAGE), (5 * PAGE + 1, 6 * PAGE)])
def test_pinned_memory_takes_whole_pages_and_not_a_power_of_two(machine: Machine, size: int, held: int) -> None:
    buffer = host_buffer(size, machine.device)
    assert buffer.nbytes == held == machine.registered_bytes
    assert buffer.data_ptr() % PAGE == 0 and buffer.is_pinned() and buffer.dtype == torch.uint8


def test_memory_is_unpinned_when_its_last_view_is_gone_and_the_copies_out_of_it_have_finished(machine: Machine) -> None:
    buffer = host_buffer(PAGE, machine.device)
    view = buffer[8:16].view(torch.float32)
    del buffer
    gc.collect()
    assert machine.registered_bytes == PAGE
    there = view.fill_(3).to(machine.device, non_blocking=True)
    del view
    gc.collect()
    assert machine.registered_bytes == 0 and machine.breaches == []
    assert there.tolist() == [3, 3]


def test_a_forked_process_unpins_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = host_buffer(PAGE, machine.device)
    monkeypatch.setattr(streams.os, "getpid", lambda: -1)
    del buffer
    gc.collect()
    assert machine.registered_bytes == PAGE


def test_memory_that_cannot_be_pinned_is_an_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "register", lambda address, size: 2)  # cudaErrorMemoryAllocation
    with pytest.raises(UserError, match=r"3\.00 GiB of host memory could not be pinned for cuda:1 \(CUDA error 2\)"):
        host_buffer(3 << 30, machine.device)


def test_host_memory_of_a_cpu_run_is_plain() -> None:
    assert host_buffer(5, CPU).nbytes == 5
    staging = Staging(CPU, 2, 100)
    array = np.arange(3)
    staging.begin()
    assert staging.put(array).data_ptr() == array.ctypes.data and staging.host_bytes == 0


def test_a_slot_is_written_again_when_its_copies_have_finished(machine: Machine) -> None:
    staging = Staging(machine.device, 2, 1000)
    assert staging.host_bytes == machine.registered_bytes == 2 * PAGE
    batches = []
    for number in range(6):
        staging.begin()
        batches.append([staging.put(np.full(5, number)), staging.put(np.full((2, 3), number, dtype=np.float32))])
        staging.end()
    assert {each.what for each in machine.waits} == {"Event.synchronize()"}
    for number, (one, two) in enumerate(batches):
        assert one.tolist() == 5 * [number] and two.tolist() == 2 * [3 * [number]]


def test_the_host_does_not_wait_for_copies_that_have_finished(machine: Machine) -> None:
    staging = Staging(machine.device, 2, 1000)
    with machine.no_waits():
        for number in range(6):
            staging.begin()
            staging.put(np.full(5, number))
            staging.end()
            machine.device_catches_up()


def test_a_batch_that_does_not_fit_its_slot(machine: Machine) -> None:
    staging = Staging(machine.device, 1, PAGE)
    staging.begin()
    with pytest.raises(RuntimeError, match="staging slot of 4096 bytes is too small"):
        staging.put(np.zeros(PAGE + 1, dtype=np.uint8))


def test_a_thread_gets_the_device_of_the_one_that_starts_it(machine: Machine) -> None:
    start, found = thread_start(), []

    def run() -> None:
        found.append(torch.cuda.current_device())
        start()
        found.append(torch.cuda.current_device())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0, 1]


def test_a_run_on_a_cpu_never_touches_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for call in ("current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, call, lambda *given: pytest.fail("a call of CUDA"))
    thread_start()()
    use_device(CPU)


def test_a_device_is_chosen_for_this_thread() -> None:
    with Machine(set_device=False) as machine:
        use_device(torch.device("cuda"))
        assert torch.cuda.current_device() == 0
        use_device(machine.device)
        assert torch.cuda.current_device() == 1


def test_the_device_sampler_reads_torchs_allocator_on_its_own_device(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise device_sampler.pynvml.NVMLError_LibraryNotFound()

    monkeypatch.setattr(device_sampler.pynvml, "nvmlInit", no_driver)
    with DeviceSampler(machine.device, interval_s=0.01) as sampler:
        held = torch.ones(1000, device=machine.device)
        time.sleep(0.05)
    assert machine.breaches == [] and sampler.peaks()["allocated_bytes"] == held.nbytes
