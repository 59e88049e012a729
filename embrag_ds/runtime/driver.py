"""NVIDIA's driver beside torch: GPUs that the driver lists and torch cannot use."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

_NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU on purpose; SLURM sets the last one."""


@dataclass(frozen=True)
class _Driver:
    """What NVML says: the driver's ``version``, the newest ``cuda`` (major, minor) it runs, and its number of GPUs."""

    version: str
    cuda: tuple[int, int]
    gpus: int


def may_have_gpus() -> bool:
    """Whether torch might find a GPU: CUDA's driver can be loaded, or NVML lists one."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        driver = _driver()
        return driver is not None and driver.gpus > 0
    return True


def unused_gpus() -> str | None:
    """Say in one line why torch uses no GPU although the driver lists one, and how to mend it; None otherwise.

    It is also None where the CPU was chosen (``DS_ACCELERATOR=cpu``, or ``CUDA_VISIBLE_DEVICES`` that hides all GPUs),
    and where NVML cannot be asked, because driver or nvidia-ml-py is missing. The ``deepspeed`` launcher overwrites an
    empty ``CUDA_VISIBLE_DEVICES`` for its ranks, but passes ``DS_ACCELERATOR`` on.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible in _NO_DEVICES or torch.cuda.is_available():
        return None
    driver = _driver()
    if driver is None or not driver.gpus:
        return None
    found = f"torch {torch.__version__} sees no GPU, but driver {driver.version} (CUDA {_dotted(driver.cuda)}) lists "
    found += f"{driver.gpus}"
    built = torch.version.cuda
    if built is None:
        return f"{found}: this torch is built for CPUs only; {_remedy(driver)}"
    if int(built.split(".")[0]) > driver.cuda[0]:
        return f"{found}: this torch is built for CUDA {built}; {_remedy(driver)}"
    hidden = "" if visible is None else f", or CUDA_VISIBLE_DEVICES={visible}"
    return f"{found}: torch.cuda.init() says why (this torch is built for CUDA {built}){hidden}"


def _remedy(driver: _Driver) -> str:
    """Advice on the packages that go with ``driver``."""
    if driver.cuda[0] < 12:
        return "update the driver to 525 or newer"
    extra = "gpu" if driver.cuda[0] >= 13 else "gpu-cu12"
    return f"install the extra {extra} into a new environment (make clean install EXTRAS={extra})"


def _driver() -> _Driver | None:
    try:
        import pynvml
    except ImportError:  # the base install, which only imputes
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return _Driver(
            version=str(pynvml.nvmlSystemGetDriverVersion()),
            cuda=(cuda // 1000, cuda % 1000 // 10),
            gpus=pynvml.nvmlDeviceGetCount(),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
