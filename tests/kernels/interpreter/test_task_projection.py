"""The kernels of the per-task linear layers against their definition in float64."""

import pytest
import torch
from torch import Tensor

from parity import assert_as_accurate
from trunkline.kernels.tasks import task_projection_triton
from trunkline.kernels.tasks.task_projection import task_projection, task_projection_reference


def make(
    counts: list[int], dtype: torch.dtype, device: str, width: int = 40, out: int = 72
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and offsets."""
    N, R = len(counts), sum(counts)
    tensors = (torch.randn(R, width), torch.randn(N, width, out) / width**0.5, torch.randn(N, out))
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    return *(x.to(device, dtype) for x in tensors), offsets


@pytest.mark.parametrize("activation", ["none", "gelu", "relu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matches_definition(dtype, activation, device):
    inputs = make([5, 0, 129, 1, 0, 64], dtype, device)
    assert_as_accurate(task_projection, task_projection_reference, (*inputs, activation))


@pytest.mark.parametrize("counts", [[1], [0, 1, 0], [0, 0], [64, 64]], ids=str)
def test_few_rows(counts, device):
    assert_as_accurate(task_projection, task_projection_reference, (*make(counts, torch.float32, device), "gelu"))


def test_long_tasks_are_shared_out(device, monkeypatch):
    """Rows beyond a task's first chunk are added up from partial sums."""
    monkeypatch.setattr(task_projection_triton, "MIN_CHUNK", 32)
    monkeypatch.setattr(task_projection_triton, "PROGRAMS", 1 << 20)
    inputs = make([31, 0, 100, 1, 64], torch.float32, device, out=16)
    assert_as_accurate(task_projection, task_projection_reference, (*inputs, "none"))


@pytest.mark.parametrize("tasks", [1, 1025])  # more than one look at the offsets
def test_many_tasks(tasks, device):
    counts = [0] * (tasks - 1) + [3]
    inputs = make(counts, torch.float32, device, width=4, out=3)
    y = task_projection(*inputs)
    torch.testing.assert_close(y, inputs[0] @ inputs[1][-1] + inputs[2][-1])


def test_memory_around_the_rows_is_never_read(device):
    x, weight, bias, offsets = make([5, 0, 70], torch.float32, device)
    dy = torch.randn(75, 72, device=device)

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, dy = (t.detach() for t in tensors)
        leaves = [t.requires_grad_() for t in leaves]
        y = task_projection(*leaves, offsets, "gelu")
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    clean = results(x, weight, bias, dy)
    amid_nan = (
        torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))])[len(t) : 2 * len(t)]
        for t in (x, weight, bias, dy)
    )
    assert all(map(torch.equal, results(*amid_nan), clean))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "gelu", "relu", "tanh"])
def test_large_tiles(activation):
    inputs = make([5, 0, 9000, 1, 4200], torch.bfloat16, "cuda", width=200, out=392)
    assert_as_accurate(task_projection, task_projection_reference, (*inputs, activation))
