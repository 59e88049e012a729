"""The stand-in for CUDA: planted breaches of every rule are found, and correct code passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda_rules import Machine, RuleBroken


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


def on_thread(run: Callable[[], Any]) -> BaseException | None:
    """What ``run`` raised on a thread of its own."""
    raised: list[BaseException] = []

    def kept() -> None:
        try:
            run()
        except BaseException as fault:
            raised.append(fault)

    thread = threading.Thread(target=kept)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def registered(size: int) -> torch.Tensor:
    """Bytes of plain memory, pinned by registration."""
    plain = torch.empty(size, dtype=torch.uint8)
    assert torch.cuda.cudart().cudaHostRegister(plain.data_ptr(), size, 0) == 0
    return plain


def test_values_gradients_and_modules_are_those_of_the_cpu(machine: Machine) -> None:
    torch.manual_seed(1)
    here = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    there = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    there.load_state_dict(here.state_dict())
    there.to(machine.device)
    tokens = torch.arange(5).repeat(3, 1)
    losses = []
    for network, device in ((here, "cpu"), (there, machine.device)):
        optimiser = torch.optim.AdamW(network.parameters(), lr=0.1)
        for _ in range(3):
            loss = network(tokens.to(device)).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    weight = there[1].weight
    assert weight.is_cuda and weight.device == machine.device and isinstance(weight, torch.nn.Parameter)


def test_operations_make_and_keep_tensors_on_the_device(machine: Machine) -> None:
    device = machine.device
    values = torch.arange(6.0, device=device).reshape(2, 3)
    assert values[:, 1:].T.contiguous().device == device
    assert torch.nn.functional.one_hot(values.long(), 7).sum().item() == 6
    assert values.new_zeros(3).device == torch.zeros_like(values).device == device
    assert values.to(torch.bfloat16).device == torch.cat([values, values]).device == device
    assert torch.tensor([1.0, 2.0], device=device).tolist() == [1, 2]
    assert values.cpu().device.type == "cpu" and type(values.cpu()) is torch.Tensor
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        values + torch.ones(3)


# Order of streams


def test_a_stream_reads_what_another_wrote_only_after_an_event(machine: Machine) -> None:
    side = torch.cuda.Stream(machine.device)
    values = torch.ones(3, device=machine.device)
    with machine.expect("sum on side stream 1"), torch.cuda.stream(side):
        values.sum()
    written = torch.cuda.current_stream(machine.device).record_event()
    side.wait_event(written)
    with torch.cuda.stream(side):
        values.sum()
    values.sum()  # both read
    with machine.expect("read by sum on side stream 1 (test_cuda_rules.py:"):
        values.mul_(2)
    torch.cuda.synchronize(machine.device)


def test_an_event_covers_the_work_before_it_only(machine: Machine) -> None:
    side = torch.cuda.Stream(machine.device)
    values = torch.ones(3, device=machine.device)
    event = torch.cuda.current_stream(machine.device).record_event()
    values.mul_(2)
    with machine.expect("written by mul_ on the default stream"), torch.cuda.stream(side):
        side.wait_event(event)
        values.clone()
    torch.cuda.synchronize(machine.device)


def test_order_passes_from_stream_to_stream(machine: Machine) -> None:
    one, two = torch.cuda.Stream(machine.device), torch.cuda.Stream(machine.device)
    values = torch.ones(3, device=machine.device)
    one.wait_stream(torch.cuda.current_stream(machine.device))
    two.wait_stream(one)
    with torch.cuda.stream(two):
        values.mul_(2)
    torch.cuda.current_stream(machine.device).wait_stream(two)
    values.sum()


def test_reads_on_two_streams_need_no_order(machine: Machine) -> None:
    side = torch.cuda.Stream(machine.device)
    values = torch.ones(3, device=machine.device)
    torch.cuda.synchronize(machine.device)
    with torch.cuda.stream(side):
        values.sum()
    values.sum()
    torch.cuda.synchronize(machine.device)


def test_parts_of_a_tensor_are_told_apart(machine: Machine) -> None:
    side = torch.cuda.Stream(machine.device)
    values = torch.zeros(8, device=machine.device)
    torch.cuda.synchronize(machine.device)
    with torch.cuda.stream(side):
        values[:4].fill_(1)
    values[4:].fill_(2)
    with machine.expect("fill_ on the default stream"):
        values[3:5].fill_(3)
    torch.cuda.synchronize(machine.device)


def test_memory_is_allocated_on_a_stream(machine: Machine) -> None:
    """Earlier work on that stream may still use it, in another tensor's name."""
    side = torch.cuda.Stream(machine.device)
    values = torch.empty(3, device=machine.device)
    with machine.expect("written by allocation on the default stream"), torch.cuda.stream(side):
        values.fill_(1)
    torch.cuda.synchronize(machine.device)


def test_a_wait_for_an_event_that_was_never_recorded(machine: Machine) -> None:
    with machine.expect("never recorded"):
        torch.cuda.current_stream(machine.device).wait_event(torch.cuda.Event())


# Freed memory


@pytest.mark.parametrize("told", [False, True])
def test_memory_that_another_stream_uses_is_freed_only_after_telling(machine: Machine, told: bool) -> None:
    side = torch.cuda.Stream(machine.device)
    values = torch.ones(3, device=machine.device)
    side.wait_stream(torch.cuda.current_stream(machine.device))
    with torch.cuda.stream(side):
        values.sum()
    if told:
        values.record_stream(side)
        del values
        assert machine.breaches == []
    else:
        with machine.expect("record_stream was not called"):
            del values


def test_memory_may_be_freed_when_its_stream_has_waited_for_the_other(machine: Machine) -> None:
    side = torch.cuda.Stream(machine.device)
    values = torch.ones(3, device=machine.device)
    side.wait_stream(torch.cuda.current_stream(machine.device))
    with torch.cuda.stream(side):
        values.sum()
    torch.cuda.current_stream(machine.device).wait_stream(side)
    part = values[1:]
    del values
    assert machine.order.held_bytes == 12
    del part
    assert machine.breaches == [] and machine.order.held_bytes == 0


# Pinned memory


@pytest.mark.parametrize("allocate", [registered, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True)])
def test_pinned_memory_is_rewritten_only_when_its_copy_has_finished(
    machine: Machine, allocate: Callable[[int], torch.Tensor]
) -> None:
    pinned = allocate(8)
    assert pinned.is_pinned() and pinned[2:].is_pinned() and not torch.empty(8).is_pinned()
    pinned.fill_(1)
    there = pinned[:4].to(machine.device, non_blocking=True)
    pinned[4:].fill_(2)  # another part
    pinned.sum()  # both read
    copied = torch.cuda.current_stream(machine.device).record_event()
    with machine.expect("fill_ by the host"):
        pinned[:4].fill_(3)
    copied.synchronize()
    pinned.fill_(4)
    assert there.tolist() == [1, 1, 1, 1]


def test_a_copy_to_pinned_memory_is_read_only_when_it_has_finished(machine: Machine) -> None:
    there = torch.arange(4, dtype=torch.uint8, device=machine.device)
    pinned = registered(4)
    pinned.copy_(there, non_blocking=True)
    with machine.expect("written by copy to the host"):
        pinned.clone()
    implicit = there.to("cpu", non_blocking=True)  # torch pins such a copy itself
    with machine.expect("written by copy to the host"):
        implicit.sum()
    torch.cuda.current_stream(machine.device).synchronize()
    assert pinned.tolist() == implicit.clone().tolist() == [0, 1, 2, 3]


def test_pinned_memory_is_unregistered_only_when_its_copy_has_finished(machine: Machine) -> None:
    pinned = registered(4)
    assert machine.registered_bytes == 4
    there = pinned.to(machine.device, non_blocking=True)
    with machine.expect("is unregistered while copy to the device"):
        torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr())
    there.cpu()
    assert torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr()) == 0 == machine.registered_bytes
    assert torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr()) != 0


def test_memory_is_registered_once(machine: Machine) -> None:
    pinned = registered(64)
    assert torch.cuda.cudart().cudaHostRegister(pinned.data_ptr() + 8, 8, 0) != 0


# Threads


@pytest.mark.parametrize(
    "call",
    [
        lambda device: torch.ones(1, device=device),
        lambda device: torch.cuda.Stream(device),
        lambda device: torch.cuda.current_stream(device),
        lambda device: torch.cuda.Event().record(),
        lambda device: torch.empty(1, pin_memory=True),
        lambda device: torch.cuda.cudart().cudaHostRegister(torch.empty(1).data_ptr(), 4, 0),
        lambda device: torch.cuda.synchronize(),
        lambda device: torch.ones(1).to(device, non_blocking=True),
        lambda device: torch.cuda.memory_stats_as_nested_dict(device),
    ],
)
def test_a_thread_that_has_not_chosen_its_device(machine: Machine, call: Callable[[torch.device], Any]) -> None:
    with machine.expect("opens a context on GPU 0"):
        raise on_thread(lambda: call(machine.device)) or AssertionError("no breach")

    def right() -> None:
        torch.cuda.set_device(machine.device)
        call(machine.device)

    assert on_thread(right) is None


def test_a_call_that_names_another_gpu(machine: Machine) -> None:
    for call in (torch.cuda.Stream, torch.cuda.synchronize, lambda device: torch.ones(1, device=device)):
        with machine.expect("GPU 0"):
            call(torch.device("cuda", 0))


def test_the_machine_may_leave_its_thread_on_gpu_0() -> None:
    with Machine(set_device=False) as machine:
        with machine.expect("opens a context on GPU 0"):
            torch.ones(1, device=machine.device)
        torch.cuda.set_device(machine.device)
        torch.ones(1, device=machine.device)


def test_streams_are_a_threads_own(machine: Machine) -> None:
    side, found = torch.cuda.Stream(machine.device), []

    def look() -> None:
        torch.cuda.set_device(machine.device)
        found.append(torch.cuda.current_stream(machine.device))

    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        assert on_thread(look) is None
        torch.ones(1, device=machine.device)
    assert machine.launched == {("MainThread", "side stream 1")}
    assert found == [torch.cuda.default_stream(machine.device)] == [torch.cuda.current_stream()]


def test_a_breach_that_a_thread_swallows_is_raised_at_the_end() -> None:
    with pytest.raises(RuleBroken, match="opens a context on GPU 0"), Machine() as machine:
        assert on_thread(lambda: torch.ones(1, device=machine.device)) is not None


# Waits of the host


@pytest.mark.parametrize(
    ("wait", "what"),
    [
        (lambda values: values.sum().item(), "item()"),
        (lambda values: bool(values[0] > 0), "item()"),
        (lambda values: values.tolist(), "a blocking copy to the host"),
        (lambda values: values.cpu(), "a blocking copy to the host"),
        (lambda values: values.numpy(force=True), "a blocking copy to the host"),
        (lambda values: values.to("cpu"), "a blocking copy to the host"),
        (lambda values: torch.ones(3).to(values.device), "a blocking copy to the device"),
        (lambda values: torch.tensor([1.0], device=values.device), "a blocking copy to the device"),
        (lambda values: values.nonzero(), "nonzero()"),
        (lambda values: values[values > 1], "indexing by a mask"),
        (lambda values: values[torch.tensor([0])], "indexing by a tensor on the CPU"),
        (lambda values: torch.equal(values, values), "equal()"),
        (lambda values: values.unique(), "unique()"),
        (lambda values: values.repeat_interleave(values.long()), "repeat_interleave() by a tensor"),
        (lambda values: torch.cuda.synchronize(), "torch.cuda.synchronize()"),
        (lambda values: torch.cuda.current_stream().synchronize(), "Stream.synchronize()"),
        (lambda values: torch.cuda.current_stream().record_event().synchronize(), "Event.synchronize()"),
    ],
)
def test_waits_are_counted_and_forbidden(machine: Machine, wait: Callable[[torch.Tensor], Any], what: str) -> None:
    values = torch.arange(3.0, device=machine.device)
    assert machine.waits == []
    wait(values)
    assert what in {each.what for each in machine.waits}
    assert {(each.thread, each.place.split(":")[0]) for each in machine.waits} == {("MainThread", "test_cuda_rules.py")}
    with machine.expect(f"the host waits for the device: {machine.waits[0].what}"), machine.no_waits():
        wait(values)


def test_what_does_not_wait(machine: Machine) -> None:
    with machine.no_waits():
        values = torch.arange(6, device=machine.device)
        values.repeat_interleave(2).masked_fill_(values.repeat(2) > 1, 0)
        torch.where(values > 2, values, 0)[values.flip(0)]
        registered(8).to(machine.device, non_blocking=True)
        torch.nn.functional.one_hot(values, 6)
        event = torch.cuda.current_stream().record_event()
        assert not event.query()
    pinned = registered(8)
    pinned.to(machine.device, non_blocking=True)
    machine.device_catches_up()
    with machine.expect("fill_ by the host"):
        pinned.fill_(1)  # finished, but the host does not know
    assert event.query() and torch.cuda.current_stream().query()
    pinned.fill_(1)


# numpy and DLPack


def test_numpy_and_dlpack_are_refused_as_in_torch(machine: Machine) -> None:
    values = torch.ones(3, device=machine.device)
    with pytest.raises(TypeError, match="can't convert cuda:1 device type tensor to numpy"):
        values.numpy()
    with pytest.raises(TypeError, match="can't convert cuda:1"):
        np.asarray(values)
    with pytest.raises(BufferError, match="Unsupported device"):
        np.from_dlpack(values)
    with pytest.raises(BufferError, match="require gradient"):
        values.requires_grad_().__dlpack__()
    assert values.detach().__dlpack__(stream=1) is not None


def test_everything_is_put_back() -> None:
    before = torch.ones, torch.Tensor.to, torch.cuda.Stream, torch.cuda.is_available(), threading.Thread.start
    with Machine():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    assert (torch.ones, torch.Tensor.to, torch.cuda.Stream, torch.cuda.is_available(), threading.Thread.start) == before


def test_a_conjugate_is_one() -> None:
    numbers = torch.complex(torch.arange(3.0), torch.ones(3))
    with Machine() as machine:
        found = (numbers.to(machine.device).conj() * 2).cpu()
    torch.testing.assert_close(found, numbers.conj().resolve_conj() * 2)
