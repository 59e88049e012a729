"""Fixtures of all tests: one rank of DeepSpeed in this process, a small simulated data set, and skipped tests."""

from __future__ import annotations

import os

# The variable has DeepSpeed use the CPU. Then torch, FAISS and CuPy must not see a GPU either. CUDA looks only once.
if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import functools
import gc
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from embrag_ds.config import RunConfig, load_config
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.data.simulate import DefaultData, SimulationSettings, simulate_default
from embrag_ds.data.windows import DataConfig
from embrag_ds.engine.distributed import DistributedContext, start_distributed
from tests.ranks import LAUNCHER

# Commands that tests start load their modules' bytecode, as those of users do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data" / "kgp_chr20"

# The time of an example depends on how busy the machine is, not on the code.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")


def pytest_sessionstart() -> None:
    """Collect no garbage until all tests are known: what is made stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave tests and modules out of garbage collections: DeepSpeed begins several with every engine."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what no encoding has in the captured output, or a test's process could not send its report."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with a reason, the tests that this machine cannot run."""
    reasons = {}
    if not REAL_DATA.is_dir():
        reasons["real"] = f"no 1000 Genomes data at {REAL_DATA}"
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device, or DS_ACCELERATOR=cpu"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The 1000 Genomes files (tests that use them carry the mark ``real``)."""
    return REAL_DATA


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Function that sets the back end of torch.compile; the fast ones trace and differentiate but make no code."""
    real = torch.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda name: monkeypatch.setattr(torch, "compile", functools.partial(real, backend=name))
    torch._dynamo.reset()


KeptBytes = Callable[[Callable[[], torch.Tensor]], int]


@pytest.fixture(scope="session")
def kept_bytes() -> KeptBytes:
    """Function that counts the bytes which a forward pass keeps for the backward pass."""

    def count(forward: Callable[[], torch.Tensor]) -> int:
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = forward()  # keeps the counted tensors alive
        assert made.requires_grad
        return sum(storages.values())

    return count


@pytest.fixture(scope="session")
def distributed() -> Iterator[DistributedContext]:
    """Process group of one rank in this process, as ``deepspeed`` would start it."""
    before = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    distributed = start_distributed()
    yield distributed
    distributed.close()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> DefaultData:
    """A simulated panel of 60 samples, 9 target samples and their truth: a few hundred sites."""
    settings = SimulationSettings(
        length_bp=150_000, panel_samples=60, target_samples=9, typed_spacing_bp=2_000, seed=11
    )
    return simulate_default(tmp_path_factory.mktemp("simulated") / "data", settings)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tests' packed panels."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def inputs(simulated: DefaultData, cache_dir: Path) -> PanelInputs:
    """The simulated panel, opened."""
    files = PanelFiles(simulated.panel, simulated.genetic_map, simulated.samples)
    return open_inputs(files, DataConfig(cache_dir=str(cache_dir)), progress=False)


TINY: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 6,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 1_000_000_000,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 40, "warmup_num_steps": 3, "warmup_type": "linear"},
    },
    "zero_optimization": {"stage": 1},
    "embrag": {
        "seed": 5,
        "data": {"window_sites": 64, "overlap_sites": 16, "flank_sites": 32, "validation_samples": 6},
        "masking": {"curriculum_steps": 10, "array_spacing_bp": [1000, 3000]},
        "retrieval": {"encoding": "fixed", "k": 16, "backend": "torch"},
        "model": {"dims": 16, "layers": 1, "heads": 2, "dropout": 0.1},
        "train": {"max_steps": 6, "log_every": 1, "eval_every": 1000, "checkpoint_every": 1000, "workers": 0},
        "validation": {"windows": 2, "samples": 6},
    },
}

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tmp_path: Path, cache_dir: Path) -> MakeConfig:
    """Function that builds the tiny run's configuration with ``dotted.key=value`` overrides."""

    def make(*overrides: str) -> RunConfig:
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(TINY), encoding="utf-8")
        return load_config(path, [f"embrag.data.cache_dir={cache_dir}", *overrides])

    return make
