"""What the tests of the small heads' losses share: six tasks and the rows of a batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = [3, 1, 2, 7, 1, 5]  # columns of every task
REGRESSION = [False, True, False, False, False, False]  # the other task with one column has one class
ABSENT = 3
ROWS = {"mixed": sorted([0, 1, 2, 4, 5] * 40), "one row": [2], "one task": [1] * 9, "no row": []}  # each row's task


class Inputs(NamedTuple):
    """The arguments of `task_loss`, in order."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    offsets: Tensor
    target: Tensor
    value: Tensor
    row_weight: Tensor
    class_offsets: Tensor
    regression: Tensor


def make(tasks: list[int], dtype: torch.dtype = torch.float32, device: str = "cpu", width: int = 24) -> Inputs:
    task = torch.tensor(tasks, dtype=torch.int64)
    counts = torch.bincount(task, minlength=len(CLASSES))
    R, K, regression = len(task), sum(CLASSES), torch.tensor(REGRESSION)
    target = (torch.rand(R) * torch.tensor(CLASSES)[task]).long()
    inputs = Inputs(
        x=torch.randn(R, width).to(dtype),
        weight=torch.randn(K, width).to(dtype),
        bias=torch.randn(K).to(dtype),
        offsets=F.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        target=target,
        value=torch.where(regression[task], torch.randn(R), 0.0),
        row_weight=torch.rand(R) + 0.5,
        class_offsets=torch.tensor([0, *CLASSES]).cumsum(0).to(torch.int32),
        regression=regression,
    )
    return Inputs(*(t.to(device) for t in inputs))
