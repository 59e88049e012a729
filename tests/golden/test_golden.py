"""Short runs of the shipped configurations give the losses that are kept for their device."""

from __future__ import annotations

from pathlib import Path

import pytest

from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine.distributed import DistributedContext
from tests import golden
from tests.golden.__main__ import renewed


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> PanelInputs:
    return golden.panel_inputs(tmp_path_factory.mktemp("golden"))


def kept(name: str, device: str) -> list[float]:
    """The golden losses of a run; the test is skipped where the slot is empty."""
    losses = golden.read(name, device).losses
    if losses is None:
        pytest.skip(f"no golden losses of {name} on {device} yet: python -m tests.golden fills the slot")
    return losses


@pytest.mark.parametrize("name", golden.RUNS)
def test_the_losses_of_a_cpu_have_not_moved(
    panel: PanelInputs, distributed: DistributedContext, tmp_path: Path, name: str
) -> None:
    if distributed.device.type != "cpu":
        pytest.skip("this run is on a GPU: DS_ACCELERATOR=cpu compares the losses of the CPU")
    losses = golden.losses_of(name, panel, distributed, tmp_path)
    assert losses == pytest.approx(kept(name, "cpu"), rel=golden.TOLERANCE["cpu"]), "see tests/golden/__init__.py"


@pytest.mark.gpu
@pytest.mark.parametrize("name", golden.RUNS)
def test_the_losses_of_a_gpu_have_not_moved(
    panel: PanelInputs, distributed: DistributedContext, tmp_path: Path, name: str
) -> None:
    losses = golden.losses_of(name, panel, distributed, tmp_path)
    assert len(losses) == golden.STEPS
    assert losses == pytest.approx(kept(name, "cuda"), rel=golden.TOLERANCE["cuda"]), "see tests/golden/__init__.py"


def test_a_small_change_of_the_arithmetic_moves_them(
    panel: PanelInputs, distributed: DistributedContext, tmp_path: Path
) -> None:
    device = distributed.device.type
    losses = golden.losses_of("quickstart", panel, distributed, tmp_path, "optimizer.params.lr=0.00201")
    assert golden.largest_difference(losses, kept("quickstart", device)) > 10 * golden.TOLERANCE[device]


def test_the_command_fills_an_empty_slot_and_renews_what_has_moved(
    distributed: DistributedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = distributed.device.type
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    golden.write("v18_cpu", device, golden.Golden(None))
    folders = [tmp_path / name for name in ("fill", "compare")]
    for folder in folders:
        folder.mkdir()
    (line,) = renewed(["v18_cpu"], distributed, folders[0], writes=True)
    filled = golden.read("v18_cpu", device)
    assert filled.losses and filled.made_on and "moved" not in line
    golden.write("v18_cpu", device, golden.Golden([1.01 * loss for loss in filled.losses], {}))
    (line,) = renewed(["v18_cpu"], distributed, folders[1], writes=False)
    assert "moved by 0.0099 at most" in line and golden.read("v18_cpu", device).made_on == {}


@pytest.mark.parametrize("device", golden.TOLERANCE)
@pytest.mark.parametrize("name", golden.RUNS)
def test_every_run_has_its_file(name: str, device: str) -> None:
    kept = golden.read(name, device)
    assert (kept.losses is None) == (kept.made_on is None)
    if kept.losses is not None and kept.made_on is not None:
        assert len(set(kept.losses)) == golden.STEPS
        assert kept.made_on["panel"] == golden.fingerprint(), "another panel than the losses are of"
