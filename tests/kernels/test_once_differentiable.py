"""Gradients of gradients of our ops are an error that names the op and what to use, never other numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.attention.attention import attention
from trunkline.kernels.attention.pack_plan import PackPlan
from trunkline.kernels.tasks.task_loss import task_loss
from trunkline.kernels.tasks.task_projection import task_projection
from trunkline.kernels.vocabulary.linear_cross_entropy import linear_cross_entropy

OFFSETS, TARGET, ONES = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 1, 2, 0]), torch.ones(4)
PLAN = PackPlan.of(OFFSETS)
CLASSES, NUMBER = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([False])
ROWS = {"target": TARGET, "row_weight": ONES}
TASKS = {"offsets": OFFSETS, "value": 0 * ONES, "class_offsets": CLASSES, "regression": NUMBER, "width": 3}


def heads(x: Tensor) -> Tensor:
    """(4, D) -> (4, 1, D)"""
    return x[:, None]


# each of x (4, 5) and weight (3, 5), beside the same in plain PyTorch
FUNCTIONS = {
    "attention": (
        lambda x, weight: attention(heads(x), heads(x * 2), heads(x), PLAN, causal=False),
        lambda x, weight: (x @ (x * 2).T * 5**-0.5).softmax(-1)[:, None] @ x,
    ),
    "task_projection": (
        lambda x, weight: task_projection(x, weight.T[None], torch.zeros(1, 3), OFFSETS, "gelu"),
        lambda x, weight: F.gelu(x @ weight.T),
    ),
    "task_loss": (
        lambda x, weight: task_loss(x, weight, torch.zeros(3), **ROWS, **TASKS).loss,
        lambda x, weight: F.cross_entropy(x @ weight.T, TARGET, reduction="sum")[None],
    ),
    "linear_cross_entropy": (
        lambda x, weight: linear_cross_entropy(x, weight, task=TARGET * 0, num_tasks=1, **ROWS).loss,
        lambda x, weight: F.cross_entropy(x @ weight.T, TARGET, reduction="sum")[None],
    ),
}


@pytest.fixture
def leaves() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)


def gradient_of_penalty(loss: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum() + x.square().sum(), x)[0]


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_gradient_is_an_error_that_names_the_op(name, loss, leaves):
    """Also where what arrives in the first backward pass is constant, and where the penalty has other terms."""
    with pytest.raises(RuntimeError, match=f"{name}: its gradients cannot be differentiated again.* use {name}_refer"):
        gradient_of_penalty(loss(FUNCTIONS[name][0](*leaves)), leaves[0])


@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_first_gradients_are_those_of_plain_torch(ours, theirs, leaves):
    x, _ = leaves
    got, expected = (torch.autograd.grad(function(*leaves).square().sum(), x) for function in (ours, theirs))
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("ours", [ours for ours, _ in FUNCTIONS.values()], ids=FUNCTIONS)
def test_a_compiled_graph_refuses_as_well(ours, leaves):
    compiled = torch.compile(ours, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient_of_penalty(compiled(*leaves).square().sum(), leaves[0])
