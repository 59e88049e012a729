"""Launching CUDA kernels, with a stand-in for CuPy 14."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.ops import cuda
from embrag_ds.ops.cuda import Kernel, available, require_kernels
from embrag_ds.ops.dosage_cuda import SOURCE as DOSAGE

SOURCE = r"""
extern "C" __global__ void add(
    const float* given,  // [n], the terms
    float* total,        // [n]
    const int n)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) total[i] += given[i];
}
extern "C" __global__ void parted(float* total, const int n)
{
    if (threadIdx.x) __syncthreads();
}
"""


def arguments() -> list[Tensor]:
    return [torch.arange(5.0), torch.ones(5)]


@pytest.mark.usefixtures("kernels_on_host")
@pytest.mark.filterwarnings("error")
def test_a_kernel_runs_on_torchs_stream_and_writes_where_the_tensors_are() -> None:
    """Addresses serve tensors that require gradients, too; those of saved outputs do."""
    given, total = arguments()
    kernel = Kernel(SOURCE, "add")
    kernel.launch(2, 4, [given.requires_grad_(), total], [5])
    assert total.tolist() == [1, 2, 3, 4, 5]
    kernel.launch(0, 4, [given, total], [5])
    assert total.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda given, total: [given.double(), total],
            "add: given is torch.float64 on cpu and contiguous; .* takes torch.float32",
        ),
        (lambda given, total: [given, torch.ones(10)[::2]], "add: total is .* not contiguous"),
        (lambda given, total: [given, total.to("meta")], "add: total is torch.float32 on meta"),
    ],
)
@pytest.mark.usefixtures("kernels_on_host")
def test_what_a_kernel_cannot_read_is_named(spoil: Callable[..., list[Tensor]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Kernel(SOURCE, "add").launch(1, 8, spoil(*arguments()), [5])


@pytest.mark.usefixtures("kernels_on_host")
def test_a_tensor_too_many_and_a_number_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Kernel(SOURCE, "add").launch(1, 8, [*arguments(), torch.ones(5)], [5])
    with pytest.raises(OverflowError):
        Kernel(SOURCE, "add").launch(1, 8, arguments(), [2**31])


@pytest.mark.usefixtures("kernels_on_host")
def test_tensors_of_the_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_KIND", "cuda")
    with pytest.raises(ValueError, match=r"add: given is torch.float32 on cpu"):
        Kernel(SOURCE, "add").launch(1, 8, arguments(), [5])


def test_parameters_are_read_from_the_source() -> None:
    found = cuda._parameters(DOSAGE, "copied_dosage_adjoint")
    tensors = [("alleles", torch.uint8), ("gradient", torch.float32), ("left", torch.int64), ("right", torch.int64)]
    tensors += [("share", torch.float32), ("posterior_gradient", torch.float32)]
    assert found == [*tensors, *((size, None) for size in ("tiles", "M", "K", "L"))]


@pytest.mark.usefixtures("kernels_on_host")
def test_the_stand_in_notices_threads_that_wait_for_ever() -> None:
    with pytest.raises(AssertionError, match="wait for ever"):
        Kernel(SOURCE, "parted").launch(1, 8, [torch.ones(5)], [5])


@pytest.mark.parametrize("fault", ["", "raise RuntimeError('CUDA driver version is insufficient')"])
def test_a_cupy_that_cannot_be_imported_is_not_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path, request: pytest.FixtureRequest, fault: str
) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    if fault:
        (tmp_path / "cupy.py").write_text(fault, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setitem(sys.modules, "cupy", None)
    cuda.import_fault.cache_clear()
    request.addfinalizer(cuda.import_fault.cache_clear)
    assert not available()
    require_kernels(torch.device("cpu"))
    with pytest.raises(UserError, match=r"need CuPy, .*(insufficient|import of cupy halted).* 'gpu'"):
        require_kernels(torch.device("cuda", 1))


@pytest.mark.usefixtures("kernels_on_host")
def test_a_cupy_that_can_be_imported_is_enough() -> None:
    assert available()
    require_kernels(torch.device("cuda", 0))
