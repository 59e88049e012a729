"""Reference alleles from the packed panel, on the CPU and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embrag_ds.retrieval.device_panel import DevicePanel
from embrag_ds.runtime.streams import SideStream, Staging, hand_over
from tests.cuda_rules import Machine

CPU = torch.device("cpu")


@pytest.mark.parametrize("reference", [range(6), [0, 2, 5]])
def test_rows_of_the_packed_panel_are_its_alleles(build, reference) -> None:
    alleles = build.random_alleles(3, 50, 6)
    world = build(alleles, reference=reference, window_sites=20, overlap=4, flank=3)
    panel = DevicePanel(world.data, CPU, 1.0)
    staging = Staging(CPU, 1, 0)
    for window in world.data.windows:
        sites = np.array([0, 3, len(window) - 1])
        expected = alleles[window.start + sites][:, world.data.reference.haplotypes]
        assert np.array_equal(panel.alleles(window.index, sites, staging).numpy(), expected)


def check_rows(build, device: torch.device, budget: float) -> None:
    world = build(build.random_alleles(3, 50, 6), reference=[0, 2, 5], window_sites=20, overlap=4, flank=3)
    panel, host = DevicePanel(world.data, device, budget), DevicePanel(world.data, CPU, 1.0)
    staging, sites = Staging(device, 2, 1 << 16), np.array([0, 3, 7])
    assert (panel.device_bytes > 0) == (budget > 0)
    for window in world.data.windows:
        with SideStream(device) as side:
            staging.begin()
            there = panel.alleles(window.index, sites, staging)
            staging.end()
        hand_over([there], side.event())
        assert torch.equal(there.cpu(), host.alleles(window.index, sites, Staging(CPU, 1, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_rows_on_the_gpu_are_those_on_the_cpu(build, budget: float) -> None:
    """Both with a resident panel and with one streamed through pinned staging."""
    check_rows(build, torch.device("cuda", 0), budget)


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_rows_on_a_side_stream_are_those_on_the_cpu(build, budget: float) -> None:
    with Machine() as machine:
        check_rows(build, machine.device, budget)
    assert machine.breaches == []
