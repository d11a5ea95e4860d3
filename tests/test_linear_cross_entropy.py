"""The vocabulary loss against its definition in float64, and that the logits are never whole in memory."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parity import assert_as_accurate
from trunkline.kernels.linear_cross_entropy import (
    CHUNK,
    _backward,
    _backward_reference,
    _forward,
    _forward_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from trunkline.kernels.task_loss import LossSums

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
N, D, V = 4, 16, 101
ABSENT = 2
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "capped": {"softcap": 3.0},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0},
}


class Inputs(NamedTuple):
    """The tensors that `linear_cross_entropy` takes, in the order of its reference."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    task: Tensor
    row_weight: Tensor


def make(rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu", vocabulary: int = V) -> Inputs:
    tasks = torch.tensor([0, 1, 3])  # none of the absent one
    inputs = Inputs(
        x=torch.randn(rows, D).to(dtype),
        weight=(torch.randn(vocabulary, D) / 2).to(dtype),
        bias=torch.randn(vocabulary).to(dtype),
        target=torch.randint(vocabulary, (rows,)),
        task=tasks[torch.randint(len(tasks), (rows,))],
        row_weight=torch.rand(rows) + 0.5,
    )
    return Inputs(*(t.to(device) for t in inputs))


def op(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, task: Tensor, row_weight: Tensor, **options: float
) -> LossSums:
    return linear_cross_entropy(x, weight, target, task, row_weight, num_tasks=N, bias=bias, **options)


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, task: Tensor, row_weight: Tensor, **options: float
) -> Tensor:
    loss = linear_cross_entropy_reference(x, weight, target, task, row_weight, N, bias, **options)
    return loss.to(torch.promote_types(loss.dtype, torch.float32))  # in half precision it is rounded at last, ours not


def assert_matches(inputs: tuple[Tensor | None, ...], **options: float) -> None:
    assert_as_accurate(
        lambda *inputs: op(*inputs, **options).loss,
        lambda *inputs: definition(*inputs, **options),
        inputs,
        constant=(5,),
    )


def results(inputs: Inputs, dloss: Tensor, **options: float) -> tuple[Tensor, ...]:
    """The sums and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    sums = op(*leaves, *inputs[3:], **options)
    return *(total.detach() for total in sums), *torch.autograd.grad(sums.loss, leaves, dloss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 600])
def test_matches_definition(rows, device):
    assert_matches(make(rows, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype, device):
    assert_matches(make(300, dtype, device), **options)


@pytest.mark.parametrize("vocabulary", [1, 2, 128])
def test_size_of_the_vocabulary(vocabulary):
    assert_matches(make(40, vocabulary=vocabulary), label_smoothing=0.1)


def test_without_bias():
    assert_matches(make(300)._replace(bias=None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype):
    inputs = make(2000, dtype)
    exact = definition(*(t.double() if t.is_floating_point() else t for t in inputs))
    torch.testing.assert_close(op(*inputs).loss, exact.float(), rtol=1e-3, atol=0.0)


def test_weight_gradient_adds_up_in_float32(monkeypatch):
    monkeypatch.setattr("trunkline.kernels.linear_cross_entropy.CHUNK", 2)  # 300 summands
    assert_matches(make(600, torch.bfloat16))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    x, weight, bias, *rest = make(5, torch.float64, vocabulary=7)
    leaves = [t.requires_grad_() for t in (x[:, :3].clone(), weight[:, :3].clone(), bias)]
    torch.autograd.gradcheck(lambda *leaves: op(*leaves, *rest, **options).loss, leaves)


def test_sums():
    """Worked out by hand: the logits are the features, but for the bias."""
    inputs = Inputs(
        x=torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [3.0, 0.0], [0.0, 1.0]]),
        weight=torch.eye(2),
        bias=torch.tensor([0.0, 1.0]),
        target=torch.tensor([0, 0, 1, 0, -100]),
        task=torch.tensor([0, 0, 3, 3, 3]),
        row_weight=torch.tensor([2.0, 0.5, 1.0, 0.0, 1.0]),
    )
    sums = op(*inputs)
    margins = torch.tensor([1.0, -2.0, 1.0])  # of the true logit over the other
    first, second, third = F.softplus(-margins)
    torch.testing.assert_close(sums.loss, torch.stack([2 * first + second / 2, first * 0, first * 0, third]))
    assert sums.weight.tolist() == [2.5, 0.0, 0.0, 1.0]
    assert sums.count.tolist() == [2.0, 0.0, 0.0, 1.0]
    assert sums.correct.tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("ignore_index", [-100, -1, 0])
def test_ignored_rows_do_not_count(ignore_index):
    inputs, dloss, options = make(600), torch.randn(N), {"ignore_index": ignore_index, "z_loss": 0.01}
    inputs = inputs._replace(target=inputs.target.clamp(min=1))
    kept = torch.rand(600) < 0.7
    x, weight, bias, *rest = inputs
    fewer = results(Inputs(x[kept], weight, bias, *(t[kept] for t in rest)), dloss, **options)
    ignoring = inputs._replace(target=inputs.target.where(kept, ignore_index))
    *sums, dx, dweight, dbias = results(ignoring, dloss, **options)
    assert not dx[~kept].any()
    for got, expected in zip((*sums, dx[kept], dweight, dbias), fewer, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reason", ["ignored", "weight"])
def test_nothing_counts(reason):
    inputs = make(300)
    if reason == "ignored":
        inputs = inputs._replace(target=torch.full_like(inputs.target, -100))
    else:
        inputs = inputs._replace(row_weight=torch.zeros_like(inputs.row_weight))
    for total in results(inputs, torch.randn(N), **OPTIONS["everything"]):
        assert not total.any()


def test_task_without_rows_has_zeros():
    for total in results(make(300), torch.randn(N))[:4]:
        assert total[ABSENT] == 0
        assert total.count_nonzero() == N - 1


def test_only_loss_carries_gradients():
    x, *rest = make(10)
    assert [total.requires_grad for total in op(x.requires_grad_(), *rest)] == [True, False, False, False]


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_logits_of_a_thousand(offset):
    inputs = make(300)
    assert_matches(inputs._replace(bias=inputs.bias + offset), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_a_sure_prediction(dtype):
    """p = 0.9993 for the true word: p - 1 must not be what is left of the rounding of p."""
    logits = torch.zeros(5, 5).fill_diagonal_(8.625)  # exact in every dtype, and so is everything but the gradient

    def dweight(function, dtype: torch.dtype) -> Tensor:
        x, weight, bias = (t.to(dtype).requires_grad_() for t in (torch.eye(5), logits, torch.zeros(5)))
        loss = function(x, weight, bias, torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.ones(5))
        return torch.autograd.grad(loss[0], weight)[0]

    exact = dweight(definition, torch.float64)
    assert exact.diagonal().max() < -1e-4
    got = dweight(lambda *inputs: op(*inputs).loss, dtype).double()
    torch.testing.assert_close(got, exact, rtol=4 * max(torch.finfo(dtype).eps, 1e-4), atol=0.0)


def test_certain_prediction_is_finite():
    inputs = make(300)
    inputs = inputs._replace(target=torch.full_like(inputs.target, 7))
    inputs.bias[7] = 1e4
    loss, _, count, correct, *gradients = results(inputs, torch.ones(N), label_smoothing=0.1)
    assert torch.equal(count, correct)
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_logits_are_never_whole_in_memory():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    x, weight, bias, *rest = make(4 * CHUNK, vocabulary=1000)
    with Largest() as largest:
        *_, lse = _forward_reference(x, weight, bias, *rest, N, 0.1, 0.01, 3.0)
        _backward_reference(torch.ones(N), x, weight, bias, *rest, lse, 0.1, 0.01, 3.0)
    assert largest.elements == CHUNK * 1000


@pytest.mark.parametrize("device", DEVICES)
def test_memory_around_the_inputs_is_never_read(device):
    inputs = make(300, device=device)
    dloss = torch.randn(N, device=device)
    clean = results(inputs, dloss)
    *inputs, dloss = (
        torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))])[len(t) : 2 * len(t)]
        if t.is_floating_point()
        else t
        for t in (*inputs, dloss)
    )
    for got, expected in zip(results(Inputs(*inputs), dloss), clean, strict=True):
        torch.testing.assert_close(got, expected)


def test_views():
    inputs = make(300)
    inputs = inputs._replace(x=torch.randn(300, 2 * D)[:, D:], weight=inputs.weight.T.contiguous().T)
    assert not inputs.x.is_contiguous()
    assert_matches(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_op_contract(with_bias, dtype):
    x, weight, bias, *rest = make(3, dtype)
    bias = bias if with_bias else None
    torch.library.opcheck(_forward, (x, weight, bias, *rest, N, 0.1, 0.01, 3.0))
    *_, lse = _forward(x, weight, bias, *rest, N, 0.1, 0.01, 3.0)
    torch.library.opcheck(_backward, (torch.randn(N), x, weight, bias, *rest, lse, 0.1, 0.01, 3.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles():
    x, weight, bias, target, *rest = make(10)
    target[::3] = -100
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*leaves: Tensor) -> LossSums:
        return op(*leaves, target, *rest, **OPTIONS["everything"])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    eager = function(*leaves)
    torch.testing.assert_close(compiled, eager)
    dloss = torch.randn(N)
    got, expected = (torch.autograd.grad(sums.loss, leaves, dloss) for sums in (compiled, eager))
    torch.testing.assert_close(got, expected)


def test_same_bits_every_time():
    inputs, dloss = make(600), torch.randn(N)
    assert all(map(torch.equal, results(inputs, dloss), results(inputs, dloss)))


@pytest.mark.parametrize(
    ("weight", "bias", "got"), [((9, 4), None, r"\[9, 4\]"), ((9, D), 8, rf"\[9, {D}\] and \[8\]")]
)
def test_wrong_vocabulary_is_named(weight, bias, got):
    inputs = make(2)._replace(weight=torch.zeros(weight), bias=None if bias is None else torch.zeros(bias))
    message = rf"linear_cross_entropy: weight must be \(V, {D}\) and bias \(V,\), got {got}$"
    with pytest.raises(ValueError, match=message):
        op(*inputs)


@pytest.mark.parametrize("name", ["target", "task", "row_weight"])
def test_wrong_number_of_rows_is_named(name):
    inputs = make(2)
    inputs = inputs._replace(**{name: getattr(inputs, name).repeat(2)})
    with pytest.raises(ValueError, match=rf"cross_entropy: {name} must be \(R,\) = \(2,\) to match x, got \[4\]"):
        op(*inputs)
