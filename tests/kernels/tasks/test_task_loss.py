"""The losses of the small heads against their definition in float64, and what they count."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity import assert_as_accurate
from small_heads import ABSENT, CLASSES, REGRESSION, ROWS, Inputs, make
from trunkline.kernels.tasks.task_loss import (
    SHAPES,
    LossSums,
    _backward,
    _forward,
    example,
    task_logits,
    task_loss,
    task_loss_reference,
)
from trunkline.kernels.tasks.task_loss_torch import LARGE

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def assert_matches(inputs: Inputs, smoothing: float = 0.0, slack: float = 2.0, width: int = max(CLASSES)) -> None:
    def definition(*inputs: Tensor) -> tuple[Tensor, ...]:  # in half precision its loss is rounded at last, ours is not
        loss, *others = task_loss_reference(*inputs, label_smoothing=smoothing)
        return loss.to(torch.promote_types(loss.dtype, torch.float32)), *others

    def op(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(task_loss(*inputs, width=width, label_smoothing=smoothing))

    assert_as_accurate(op, definition, inputs, constant=(5, 6), slack=slack)


def results(inputs: Inputs, dloss: Tensor) -> tuple[Tensor, ...]:
    """The sums and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    sums = task_loss(*leaves, *inputs[3:], width=max(CLASSES), label_smoothing=0.1)
    return *(total.detach() for total in sums), *torch.autograd.grad(sums.loss, leaves, dloss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tasks", ROWS.values(), ids=ROWS)
def test_matches_definition(tasks, smoothing, device):
    assert_matches(make(tasks, device=device), smoothing)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    assert_matches(make(ROWS["mixed"], dtype, device), smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tasks_with_many_classes(dtype):
    """On a CPU the first and the last task have products of their own, the two between them do not."""
    inputs = example("cpu", dtype, rows=200, tasks=4, width=24, classes=100)
    rows, columns = inputs["offsets"].diff(), inputs["class_offsets"].diff()
    assert (rows * columns >= LARGE).tolist() == [True, False, False, True]
    inputs = Inputs(*(inputs[name] for name in Inputs._fields))
    assert_matches(inputs, smoothing=0.1, width=100)


def test_a_single_task_with_many_logits():
    """Where no task is small, nothing is summed up for the small ones."""
    inputs = example("cpu", torch.float32, rows=200, tasks=1, width=24, classes=100)
    assert_matches(Inputs(*(inputs[name] for name in Inputs._fields)), smoothing=0.1, width=100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype):
    inputs = make(ROWS["mixed"], dtype)
    exact = task_loss_reference(*(t.double() if t.is_floating_point() else t for t in inputs)).loss
    loss = task_loss(*inputs, width=max(CLASSES)).loss
    torch.testing.assert_close(loss, exact.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(smoothing):
    x, weight, bias, *rest = make([0, 0, 1, 2, 4, 5], torch.float64, width=3)

    def loss(*leaves: Tensor) -> Tensor:
        return task_loss(*leaves, *rest, width=max(CLASSES), label_smoothing=smoothing).loss

    torch.autograd.gradcheck(loss, [t.requires_grad_() for t in (x, weight, bias)])


def test_sums():
    """Worked out by hand: two tasks of two classes, whose logits are the features, and a number."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [5.0, 0.0], [3.0, 0.0]])
    sums = task_loss(
        x,
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        torch.zeros(5),
        offsets=torch.tensor([0, 2, 4, 5], dtype=torch.int32),
        target=torch.tensor([0, 1, 1, 0, 0]),
        value=torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
        row_weight=torch.tensor([2.0, 1.0, 0.5, 0.0, 0.25]),
        class_offsets=torch.tensor([0, 2, 4, 5], dtype=torch.int32),
        regression=torch.tensor([False, False, True]),
        width=2,
    )
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    torch.testing.assert_close(sums.loss, torch.tensor([2 * math.log(2) + right, 0.5 * wrong, 0.25 * 4.0]))
    assert sums.weight.tolist() == [3.0, 0.5, 0.25]
    assert sums.count.tolist() == [2.0, 1.0, 1.0]  # the fourth row has weight 0
    assert sums.correct.tolist() == [2.0, 0.0, 0.0]  # of two equal logits the first is the answer


def test_task_without_rows_has_zeros():
    sums = results(make(ROWS["mixed"]), torch.randn(len(CLASSES)))
    first, last = sum(CLASSES[:ABSENT]), sum(CLASSES[: ABSENT + 1])
    assert [total[ABSENT].item() for total in sums[:4]] == [0.0] * 4
    for gradient in sums[5:]:  # of weight and bias
        assert not gradient[first:last].any()


def test_one_class_has_neither_loss_nor_gradient():
    inputs = make([4] * 5)
    loss, weight, count, correct, *gradients = results(inputs, torch.ones(len(CLASSES)))
    assert loss[4].abs() < 1e-5
    assert (count[4], correct[4]) == (5, 5)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_rows_of_weight_zero_do_not_count():
    inputs = make(ROWS["mixed"])
    for total in results(inputs._replace(row_weight=torch.zeros_like(inputs.row_weight)), torch.ones(len(CLASSES))):
        assert not total.any()
    kept = torch.arange(len(inputs.x)) % 3 > 0
    dloss = torch.randn(len(CLASSES))
    offsets = F.pad(kept.cumsum(0), (1, 0))[inputs.offsets].to(torch.int32)
    fewer = Inputs(*(t[kept] if len(t) == len(kept) else t for t in inputs))._replace(offsets=offsets)
    fewer = results(fewer, dloss)
    *masked, dx, dweight, dbias = results(inputs._replace(row_weight=inputs.row_weight * kept), dloss)
    assert not dx[~kept].any()
    for got, expected in zip((*masked, dx[kept], dweight, dbias), fewer, strict=True):
        torch.testing.assert_close(got, expected)


def test_task_none_of_whose_rows_counts_is_as_good_as_absent():
    inputs, dloss, ignored = make(ROWS["mixed"]), torch.randn(len(CLASSES)), 2
    own_rows = torch.tensor(ROWS["mixed"]) == ignored
    own_columns = torch.arange(len(CLASSES)).repeat_interleave(torch.tensor(CLASSES)) == ignored
    owns = [*[torch.arange(len(CLASSES)) == ignored] * 4, own_rows, own_columns, own_columns]
    without = results(inputs._replace(row_weight=inputs.row_weight.masked_fill(own_rows, 0.0)), dloss)
    for got, expected, own in zip(without, results(inputs, dloss), owns, strict=True):
        assert not got[own].any()
        torch.testing.assert_close(got[~own], expected[~own])


def test_only_loss_carries_gradients():
    x, *rest = make(ROWS["mixed"])
    sums = task_loss(x.requires_grad_(), *rest, width=max(CLASSES))
    assert [total.requires_grad for total in sums] == [True, False, False, False]


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_logits_of_a_thousand(offset):
    inputs = make(sorted([0, 2, 5] * 20))
    assert_matches(inputs._replace(bias=inputs.bias + offset), smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_a_sure_prediction(dtype):
    """p = 0.9993 for the true class: p - 1 must not be what is left of the rounding of p."""
    logits = torch.zeros(5, 5).fill_diagonal_(8.625)  # exact in every dtype, and so is everything but the gradient
    offsets, regression = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([False])
    rows = (offsets, torch.arange(5), torch.zeros(5), torch.ones(5))

    def gradients(function, dtype: torch.dtype, **options: int) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (torch.eye(5), logits, torch.zeros(5))]
        loss = function(*leaves, *rows, offsets, regression, **options)
        return torch.autograd.grad(loss[0], leaves)

    exact = gradients(task_loss_reference, torch.float64)
    got = gradients(lambda *inputs, **options: task_loss(*inputs, **options).loss, dtype, width=5)
    assert exact[1].diagonal().max() < -1e-4
    torch.testing.assert_close(got[1].double(), exact[1], rtol=4 * max(torch.finfo(dtype).eps, 1e-4), atol=0.0)


def test_certain_prediction_is_finite():
    inputs = make([0] * 4)
    inputs = inputs._replace(target=torch.ones_like(inputs.target))
    inputs.bias[1] = 1e4
    loss, _, _, correct, *gradients = results(inputs, torch.ones(len(CLASSES)))
    assert correct[0] == 4
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_around_the_inputs_is_never_read(device):
    inputs = make(ROWS["mixed"], device=device)
    dloss = torch.randn(len(CLASSES), device=device)
    clean = results(inputs, dloss)
    amid_nan = (
        torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))])[len(t) : 2 * len(t)]
        if t.is_floating_point()
        else t
        for t in (*inputs, dloss)
    )
    *inputs, dloss = amid_nan
    for got, expected in zip(results(Inputs(*inputs), dloss), clean, strict=True):
        torch.testing.assert_close(got, expected)


def test_views():
    inputs = make(ROWS["mixed"])
    R, D = inputs.x.shape
    inputs = inputs._replace(x=torch.randn(R, 2 * D)[:, D:], weight=inputs.weight.T.contiguous().T)
    assert not inputs.x.is_contiguous()
    assert_matches(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_contract(dtype):
    inputs = make([0, 1, 1, 5], dtype)
    *_, gradient = _forward(*inputs, max(CLASSES), 0.1)
    torch.library.opcheck(_forward, (*inputs, max(CLASSES), 0.1))
    dloss = torch.randn(len(CLASSES))
    torch.library.opcheck(_backward, (dloss, gradient, *inputs[:4], inputs.class_offsets))
    torch.library.opcheck(task_logits, (*inputs[:4], inputs.class_offsets, max(CLASSES)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles():
    x, weight, bias, *rest = make([0, 1, 1, 5])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*leaves: Tensor) -> LossSums:
        return task_loss(*leaves, *rest, width=max(CLASSES), label_smoothing=0.1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    eager = function(*leaves)
    torch.testing.assert_close(compiled, eager)
    dloss = torch.randn(len(CLASSES))
    got, expected = (torch.autograd.grad(sums.loss, leaves, dloss) for sums in (compiled, eager))
    torch.testing.assert_close(got, expected)


def test_same_bits_every_time():
    inputs = make(ROWS["mixed"])
    dloss = torch.randn(len(CLASSES))
    assert all(map(torch.equal, results(inputs, dloss), results(inputs, dloss)))


def test_offsets_changed_in_place_are_seen():
    inputs, dloss = make([0] * 4 + [2] * 4), torch.randn(len(CLASSES))
    results(inputs, dloss)  # remembers what the offsets say
    inputs.offsets[1:3] = 2  # two rows move from the first task to the third
    inputs.target.clamp_(max=1)
    got = results(inputs, dloss)
    assert all(map(torch.equal, got, results(inputs._replace(offsets=inputs.offsets.clone()), dloss)))
    assert got[2].tolist() == [2, 0, 6, 0, 0, 0]


def test_order_of_rows_in_a_task_does_not_matter():
    inputs, dloss = make(ROWS["mixed"]), torch.randn(len(CLASSES))
    bounds = inputs.offsets.tolist()
    shuffled = [a + torch.randperm(b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    order = torch.cat(shuffled)
    moved = results(Inputs(*(t[order] if len(t) == len(order) else t for t in inputs)), dloss)
    *sums, dx, dweight, dbias = results(inputs, dloss)
    for got, expected in zip(moved, (*sums, dx[order], dweight, dbias), strict=True):
        torch.testing.assert_close(got, expected)


def test_class_weights_are_row_weights():
    inputs, class_weight = make(ROWS["mixed"]), torch.rand(sum(CLASSES))
    task = torch.tensor(ROWS["mixed"])
    weights = class_weight[inputs.class_offsets[task] + inputs.target]
    expected = task_loss(*inputs._replace(row_weight=inputs.row_weight * weights), width=max(CLASSES))
    got = task_loss(*inputs, width=max(CLASSES), class_weight=class_weight)
    torch.testing.assert_close(got, expected)
    first = inputs.offsets[2], inputs.offsets[3]  # against torch's own meaning of class weights
    rows, table = slice(*first), slice(*inputs.class_offsets[2:4])
    logits = F.linear(inputs.x[rows], inputs.weight[table], inputs.bias[table])
    ones = inputs._replace(row_weight=torch.ones_like(inputs.row_weight))
    loss, weight, *_ = task_loss(*ones, width=max(CLASSES), class_weight=class_weight)
    torch.testing.assert_close(loss[2] / weight[2], F.cross_entropy(logits, inputs.target[rows], class_weight[table]))


@pytest.mark.parametrize("target", [0, 1, 50, -100])
def test_class_weight_of_a_number_is_that_of_its_column(target):
    inputs, class_weight = make([0, 1, 1, 2]), torch.rand(sum(CLASSES)) + 0.5
    expected = task_loss(*inputs, width=max(CLASSES))
    inputs.target[1:3] = target
    got = task_loss(*inputs, width=max(CLASSES), class_weight=class_weight)
    torch.testing.assert_close(got.loss[1], expected.loss[1] * class_weight[CLASSES[0]])
    torch.testing.assert_close(got.weight[1], expected.weight[1] * class_weight[CLASSES[0]])


def test_micro_batches_add_up_to_the_batch():
    """Sums, and so losses normalised by them: rows dealt out so that a task may miss a whole micro-batch."""
    inputs = make(ROWS["mixed"], torch.float64)
    dloss = 1 / results(inputs, torch.ones(len(CLASSES)).double())[1].clamp(min=1)  # loss_t = sum w l / sum w
    whole = results(inputs, dloss)
    part = torch.arange(len(inputs.x)) // 50
    parts = []
    for index in range(4):
        kept = part == index
        offsets = F.pad(kept.cumsum(0), (1, 0))[inputs.offsets].to(torch.int32)
        micro = Inputs(*(t[kept] if len(t) == len(kept) else t for t in inputs))._replace(offsets=offsets)
        parts.append(results(micro, dloss))
    for place in (0, 1, 2, 3, 5, 6):  # all but dx
        torch.testing.assert_close(sum(p[place] for p in parts), whole[place], rtol=1e-6, atol=1e-9)


def test_many_more_tasks_than_rows():
    inputs, N = make([0, 0, 2, 5]), 500
    present = results(inputs, torch.ones(len(CLASSES)))
    counts = torch.zeros(N, dtype=torch.int64).index_put_((torch.tensor([0, 2, 5]),), torch.tensor([2, 1, 1]))
    more = N - len(CLASSES)
    wide = inputs._replace(
        weight=torch.cat([inputs.weight, torch.randn(2 * more, 24)]),
        bias=torch.cat([inputs.bias, torch.randn(2 * more)]),
        offsets=F.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        class_offsets=torch.tensor([0, *CLASSES, *[2] * more]).cumsum(0).to(torch.int32),
        regression=torch.tensor([*REGRESSION, *[False] * more]),
    )
    for got, expected in zip(results(wide, torch.ones(N)), present, strict=True):
        torch.testing.assert_close(got[: len(expected)], expected)
        assert not got[len(expected) :].any()


def test_logits():
    inputs = make(ROWS["mixed"])
    logits = task_logits(*inputs[:4], inputs.class_offsets, max(CLASSES))
    for row in (0, 70, 199):
        t = ROWS["mixed"][row]
        table = slice(*inputs.class_offsets[t : t + 2])
        own = F.linear(inputs.x[row], inputs.weight[table], inputs.bias[table])
        torch.testing.assert_close(logits[row, : CLASSES[t]], own)
        assert (logits[row, CLASSES[t] :] == -math.inf).all()


def test_target_of_a_number_has_no_meaning():
    inputs = make([0, 1, 1, 2])
    expected = task_loss(*inputs, width=max(CLASSES))
    inputs.target[1:3] = -100
    torch.testing.assert_close(task_loss(*inputs, width=max(CLASSES)), expected)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_example(sizes):
    arguments = example("cpu", torch.bfloat16, **(sizes | {"rows": 64, "width": 8}))
    assert arguments["x"].shape == (64, 8)
    sums = task_loss(**arguments)
    assert sums.count.sum() == 64
    assert sums.loss.isfinite().all()
