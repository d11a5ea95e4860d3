"""How the vocabulary loss is called: compiled, for several heads, in mixed precision, and wrongly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trunkline.kernels import arguments
from trunkline.kernels.tasks.task_loss import LossSums
from trunkline.kernels.vocabulary import chunks
from trunkline.kernels.vocabulary import linear_cross_entropy as module
from trunkline.kernels.vocabulary.linear_cross_entropy import SHAPES, _forward, example, linear_cross_entropy
from vocabulary import OPTIONS, D, Inputs, N, V, definition, make, op, results

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("with_gradient", "of_weight"), [(True, True), (True, False), (False, True)], ids=["gradients", "frozen", "none"]
)
def test_op_contract(with_gradient, of_weight, with_bias, dtype, device):
    x, weight, bias, *rest = make(3, dtype, device)
    dloss = torch.rand(N, device=device) if with_gradient else None
    inputs = (x, weight, bias if with_bias else None, *rest, dloss, of_weight)
    torch.library.opcheck(_forward, (*inputs, N, 0.1, 0.01, 3.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("num_tasks", [1, N])
def test_compiles(num_tasks):
    x, weight, bias, target, task, row_weight = make(10)
    target[::3] = -100
    rest = (target, task.clamp(max=num_tasks - 1), row_weight, num_tasks)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*leaves: Tensor) -> LossSums:
        return op(*leaves, *rest, **OPTIONS["everything"])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    eager = function(*leaves)
    torch.testing.assert_close(compiled, eager)
    dloss = torch.randn(num_tasks)
    got, expected = (torch.autograd.grad(sums.loss, leaves, dloss) for sums in (compiled, eager))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("num_tasks", "known", "formed"), [(1, False, [True]), (N, True, [True]), (N, False, [False, True])]
)
def test_gradients_are_formed_once(num_tasks, known, formed, monkeypatch):
    """In the forward pass for one task or known dloss, in the backward pass otherwise, not at all where nobody asks."""
    calls = []

    def forward(*args):
        calls.append(args[6] is not None)
        return _forward(*args)

    monkeypatch.setattr(module, "_forward", forward)
    inputs = make(10)
    inputs, dloss = inputs._replace(task=inputs.task.clamp(max=num_tasks - 1)), torch.randn(num_tasks)
    options = {"num_tasks": num_tasks, "dloss": dloss if known else None}
    results(inputs, dloss, **options)
    assert calls == formed
    calls.clear()
    op(*inputs, **options)
    with torch.no_grad():
        op(*(t.requires_grad_() for t in inputs[:3]), *inputs[3:], **options)
    assert calls == [False, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_tasks", "known"), [(1, False), (N, True), (N, False)])
def test_frozen_vocabulary_costs_no_product(num_tasks, known, device, monkeypatch):
    """Its gradient would be a third of the arithmetic, and as large as the vocabulary."""
    products = []
    monkeypatch.setattr(chunks, "_add_product", lambda *_: products.append(1))
    inputs = make(10, device=device)
    inputs, dloss = inputs._replace(task=inputs.task.clamp(max=num_tasks - 1)), torch.randn(num_tasks, device=device)
    found = []
    for learns in (True, False):
        products.clear()
        x, weight, bias = (t.detach().requires_grad_() for t in inputs[:3])
        weight.requires_grad_(learns)
        sums = op(x, weight, bias, *inputs[3:], num_tasks=num_tasks, dloss=dloss if known else None)
        found.append(torch.autograd.grad(sums.loss, [x, bias], dloss))
        assert bool(products) == learns
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("num_tasks", [1, N])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_known_weights_of_the_tasks_change_nothing_but_the_work(options, num_tasks):
    """One of them is 0."""
    inputs, dloss = make(600, torch.float64), torch.randn(num_tasks, dtype=torch.float64)
    inputs = inputs._replace(task=inputs.task.clamp(max=num_tasks - 1))
    dloss[1:2] = 0
    expected = results(inputs, dloss, num_tasks=num_tasks, **options)
    known = results(inputs, dloss, num_tasks=num_tasks, dloss=dloss, **options)
    torch.testing.assert_close(known, expected)


def test_known_weights_of_several_heads():
    together, dloss = heads(), torch.randn(N)
    leaves = [t.requires_grad_() for t in (together["x"], *together["weight"])]
    expected = linear_cross_entropy(**together)
    known = linear_cross_entropy(**together, dloss=dloss)
    torch.testing.assert_close(known, expected)
    gradients = (torch.autograd.grad((sums.loss * dloss).sum(), leaves) for sums in (known, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_tasks", [1, N])
def test_another_gradient_than_the_one_that_was_said_is_named(num_tasks):
    inputs, dloss = make(5), torch.arange(1.0, num_tasks + 1)
    inputs = inputs._replace(x=inputs.x.requires_grad_(), task=inputs.task.clamp(max=num_tasks - 1))
    loss = op(*inputs, num_tasks, dloss=dloss).loss
    with pytest.raises(ValueError, match=r"must be the dloss that was given, \[1.0.*\], got \[1.5"):
        (loss * (dloss + 0.5)).sum().backward()


def test_wrong_number_of_known_weights_is_named():
    with pytest.raises(ValueError, match=rf"dloss must be \(N,\) = \({N},\), got \[{N + 1}\]"):
        op(*make(2), dloss=torch.ones(N + 1))


@pytest.mark.parametrize("num_tasks", [1, N])
def test_graph_can_be_kept(num_tasks):
    inputs = make(300)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    loss = op(*leaves, inputs.target, inputs.task.clamp(max=num_tasks - 1), inputs.row_weight, num_tasks).loss
    dloss = torch.randn(num_tasks)
    first, second = (torch.autograd.grad(loss, leaves, factor * dloss, retain_graph=True) for factor in (1, 2))
    torch.testing.assert_close([2 * gradient for gradient in first], list(second))


@pytest.mark.parametrize("device", DEVICES)
def test_order_of_rows_does_not_matter(device):
    inputs, dloss = make(600, torch.float64, device), torch.randn(N, device=device, dtype=torch.float64)
    order = inputs.task.argsort()
    sorted_inputs = inputs._replace(**{n: getattr(inputs, n)[order] for n in ("x", "target", "task", "row_weight")})
    *sums, dx, dweight, dbias = results(inputs, dloss)
    torch.testing.assert_close(results(sorted_inputs, dloss), (*sums, dx[order], dweight, dbias))


@pytest.mark.parametrize("num_tasks", [1, N])
def test_weight_in_float32_has_an_unrounded_gradient(num_tasks):
    """As in mixed precision: hidden states in bfloat16, the weight that is trained in float32."""
    inputs = make(600, torch.bfloat16)
    inputs = inputs._replace(weight=inputs.weight.float(), task=inputs.task.clamp(max=num_tasks - 1), bias=None)
    x, weight = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    loss = op(x, weight, *inputs[2:], num_tasks).loss
    dx, dweight = torch.autograd.grad(loss.sum(), (x, weight))
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    assert not torch.equal(dweight, dweight.bfloat16().float())
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    loss = definition(*exact, *inputs[2:], num_tasks)
    torch.testing.assert_close(dweight, torch.autograd.grad(loss.sum(), exact)[1].float(), rtol=0.0, atol=0.05)


def heads(**changes: Any) -> dict[str, Any]:
    """Three heads: of two tasks, of one whose rows are missing, and of one."""
    arguments = {
        "x": torch.randn(300, D),
        "weight": [torch.randn(v, D) / 2 for v in (101, 7, 40)],
        "target": torch.cat([torch.randint(101, (120,)), torch.randint(40, (180,))]),
        "task": torch.tensor([0, 1, 3]).repeat_interleave(torch.tensor([100, 20, 180])),
        "row_weight": torch.rand(300),
        "num_tasks": [2, 1, 1],
        "bias": [torch.randn(101), None, torch.randn(40)],
        "rows": [120, 0, 180],
    }
    return arguments | changes


def test_several_heads_are_like_one_call_each():
    together, dloss = heads(), torch.randn(N)
    leaves = [t.requires_grad_() for t in (together["x"], *together["weight"], together["bias"][0])]
    sums = linear_cross_entropy(**together)
    gradients = torch.autograd.grad(sums.loss, leaves, dloss)

    inputs = Inputs(**{name: together[name] for name in ("x", "target", "task", "row_weight")}, weight=None, bias=None)
    parts = []
    for head, (rows, first, num_tasks) in enumerate(
        [(slice(0, 120), 0, 2), (slice(0, 0), 2, 1), (slice(120, 300), 3, 1)]
    ):
        x, _, _, target, task, row_weight = (None if t is None else t[rows] for t in inputs)
        weight, bias = together["weight"][head], together["bias"][head]
        parts.append(op(x, weight, bias, target, task - first, row_weight, num_tasks))
    expected = LossSums(*(torch.cat(values) for values in zip(*parts, strict=True)))
    assert all(map(torch.equal, sums, expected))
    assert sums.count.tolist() == [100.0, 20.0, 0.0, 180.0]
    for got, wanted in zip(gradients, torch.autograd.grad(expected.loss, leaves, dloss), strict=True):
        assert torch.equal(got, wanted)
    assert not gradients[2].any()  # of the head without rows


@pytest.mark.parametrize(
    "changes", [{"rows": None}, {"rows": [120, 0, 181]}, {"num_tasks": 4}, {"num_tasks": [2, 2]}, {"bias": [None]}]
)
def test_heads_that_do_not_fit_are_named(changes):
    with pytest.raises(
        ValueError, match="weight, bias, num_tasks and rows must have one entry for each head, .* got 3,"
    ):
        linear_cross_entropy(**heads(**changes))


def test_example_fits_the_function():
    arguments = example("cpu", torch.float32, **SHAPES["1024 x 256 x 8192, all options"] | {"rows": 5, "vocabulary": 9})
    assert linear_cross_entropy(**arguments).count.tolist() == [5.0]


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


@pytest.mark.parametrize("word", [-1, V])
def test_target_outside_of_the_vocabulary_is_named(word):
    inputs = make(5)
    inputs.row_weight[1] = 0
    inputs.target[3], inputs.task[3] = word, 1
    with pytest.raises(ValueError, match=rf"targets must be in \[0, {V}\), got {word} in row 3, of task 1$"):
        op(*inputs)


@pytest.mark.gpu
def test_debug_flag_looks_at_every_target_on_a_gpu(monkeypatch):
    monkeypatch.setattr(arguments, "_CHECK", True)
    inputs = make(5, device="cuda")
    inputs.target[3], inputs.task[3] = V, 1
    with pytest.raises(ValueError, match=rf"targets must be in \[0, {V}\), got {V} in row 3, of task 1$"):
        op(*inputs)


@pytest.mark.parametrize("task", [-1, N])
def test_task_that_there_is_not_is_named(task):
    inputs = make(5)
    inputs.task[3] = task
    with pytest.raises(ValueError, match=rf"linear_cross_entropy: tasks must be in \[0, {N}\), got {task} in row 3$"):
        op(*inputs)


def test_vocabulary_without_words_is_named():
    inputs = make(2)._replace(weight=torch.zeros(0, D), bias=None)
    with pytest.raises(ValueError, match="the vocabulary must have words, got V = 0"):
        op(*inputs)


@pytest.mark.parametrize("weight", [torch.float64, torch.float16], ids=str)
def test_weight_of_another_dtype_is_named(weight):
    inputs = make(2, torch.bfloat16)
    message = f"weight and bias float32 with x in 16 bits, got torch.bfloat16, {weight}, torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        op(*inputs._replace(weight=inputs.weight.to(weight)))


def test_labels_may_be_narrow_integers():
    inputs = make(5)
    narrow = inputs._replace(target=inputs.target.int(), task=inputs.task.int())
    torch.testing.assert_close(op(*narrow), op(*inputs))


def test_targets_must_be_integers():
    inputs = make(5)
    with pytest.raises(ValueError, match=r"target must be of integers, got torch.float32"):
        op(*inputs._replace(target=inputs.target.float()))
