"""A GPU that the driver lists and torch cannot use: training refuses, imputation warns, and the remedy is named."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch

from embrag_ds.engine import distributed
from embrag_ds.engine.distributed import start_distributed
from embrag_ds.errors import UserError
from embrag_ds.imputation import impute
from embrag_ds.runtime.driver import unused_gpus


class Nvml(ModuleType):
    """Stand-in for pynvml on a machine with a driver; ``fault`` names the query that fails."""

    class NVMLError(Exception):
        pass

    def __init__(self, driver: str = "535.183.01", cuda: int = 12020, gpus: int = 2, fault: str | None = None):
        super().__init__("pynvml")
        self.open = 0
        answers = {
            "nvmlSystemGetDriverVersion": driver,
            "nvmlSystemGetCudaDriverVersion_v2": cuda,
            "nvmlDeviceGetCount": gpus,
        }
        for name, answer in answers.items():
            setattr(self, name, lambda name=name, answer=answer: self._answer(name == fault, answer))
        self._blind = fault == "nvmlInit"

    def _answer(self, fails: bool, answer: object) -> object:
        assert self.open == 1
        if fails:
            raise self.NVMLError("planted")
        return answer

    def nvmlInit(self) -> None:
        if self._blind:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1


@pytest.fixture(autouse=True)
def _blind_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch for CUDA 13 that sees no GPU, and no choice of a device."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def machine(monkeypatch: pytest.MonkeyPatch, **found: object) -> Nvml:
    nvml = Nvml(**found)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_a_driver_for_cuda_12_and_a_torch_for_cuda_13(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = machine(monkeypatch)
    assert unused_gpus() == (
        "torch 2.13.0+cu130 sees no GPU, but driver 535.183.01 (CUDA 12.2) lists 2: this torch is built for CUDA 13.0; "
        "install the extra gpu-cu12 into a new environment (make clean install EXTRAS=gpu-cu12)"
    )
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("cuda", "remedy"), [(13000, "EXTRAS=gpu)"), (12080, "EXTRAS=gpu-cu12)"), (11080, "update the driver")]
)
def test_a_torch_for_cpus_only(monkeypatch: pytest.MonkeyPatch, cuda: int, remedy: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    machine(monkeypatch, cuda=cuda)
    said = unused_gpus()
    assert said is not None and "built for CPUs only" in said and remedy in said


def test_where_the_versions_agree_torch_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=13000)
    said = unused_gpus()
    assert said is not None and "torch.cuda.init() says why" in said and "VISIBLE" not in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    said = unused_gpus()
    assert said is not None and said.endswith("or CUDA_VISIBLE_DEVICES=7")


@pytest.mark.parametrize(
    "choice",
    [{"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}],
    ids=lambda choice: "=".join(*choice.items()),
)
def test_a_chosen_cpu_is_no_fault(monkeypatch: pytest.MonkeyPatch, choice: dict[str, str]) -> None:
    machine(monkeypatch)
    for name, value in choice.items():
        monkeypatch.setenv(name, value)
    assert unused_gpus() is None


@pytest.mark.parametrize(
    "found", [{"gpus": 0}, *({"fault": name} for name in ("nvmlInit", "nvmlDeviceGetCount"))], ids=str
)
def test_nothing_is_said_without_a_gpu_or_a_driver(monkeypatch: pytest.MonkeyPatch, found: dict[str, object]) -> None:
    nvml = machine(monkeypatch, **found)
    assert unused_gpus() is None and nvml.open == 0


def test_nothing_is_said_without_pynvml_or_with_a_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # the base install
    assert unused_gpus() is None
    machine(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_gpus() is None


def test_training_does_not_fall_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(distributed, "_on_cpu", lambda: True)
    with pytest.raises(UserError, match=r"CUDA 12\.2.*CUDA 13\.0.*or set DS_ACCELERATOR=cpu to train on the CPU$"):
        start_distributed()


def test_imputation_warns_and_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    machine(monkeypatch)
    assert impute._device("cpu") == "cpu" and not caplog.records
    assert impute._device(None) == "cpu"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "EXTRAS=gpu-cu12" in record.getMessage()
