"""The kernels of the vocabulary loss against its definition in float64."""

import pytest
import torch
from torch import Tensor

from trunkline.kernels import arguments
from trunkline.kernels.vocabulary import chunks
from vocabulary import OPTIONS, N, V, assert_matches, definition, make, op, results

# -inf and overflow of exp are meant: they give the right limits
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNKS", {"cpu": (4, 0), "cuda": (4, 0)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_definition(options, dtype, device):
    assert_matches(make(9, dtype, device), **options)


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (1, 1), (2, 7), (2, 4096), (2, 5000)])
def test_sizes(rows, vocabulary, device):
    assert_matches(make(rows, device=device, vocabulary=vocabulary), **OPTIONS["everything"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large(dtype, device, monkeypatch):
    monkeypatch.undo()
    assert_matches(make(1100, dtype, device, vocabulary=50257))  # two chunks


def test_without_bias(device):
    assert_matches(make(5, device=device)._replace(bias=None))


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_logits_of_a_thousand(offset, device):
    inputs = make(5, device=device)
    assert_matches(inputs._replace(bias=inputs.bias + offset), label_smoothing=0.1)


def test_sums(device):
    """Of the same rows as in plain torch, whatever their order; the logits of a row that does not count may be NaN."""
    x, weight, bias, target, task, row_weight = make(9, device=device, vocabulary=7)
    row_weight[4] = 0
    sums = op(x, weight, bias, target, task, row_weight, N)
    logits = x @ weight.T + bias
    correct = (logits.argmax(-1) == target) & (row_weight > 0)
    for t in range(N):
        mine = task == t
        assert sums.correct[t] == correct[mine].sum()
        assert sums.count[t] == (row_weight[mine] > 0).sum()
    torch.testing.assert_close(sums.weight, torch.zeros(N, device=device).index_add(0, task, row_weight))
    assert sums.loss[2] == 0

    x[4] = torch.nan
    order = torch.randperm(9, device=device)
    shuffled = op(x[order], weight, bias, target[order], task[order], row_weight[order], N)
    torch.testing.assert_close(shuffled, sums)


def test_ignored_rows_have_no_gradient(device):
    x, weight, bias, target, _, row_weight = make(9, device=device)
    task = torch.zeros_like(target)
    target[2:5] = -100
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    sums = op(*leaves, target, task, row_weight, 1)
    dx, dweight, _ = torch.autograd.grad(sums.loss, leaves)
    assert sums.count.tolist() == [6.0]
    assert not dx[2:5].any()
    kept = target != -100
    fewer = op(x[kept], weight, bias, target[kept], task[kept], row_weight[kept], 1)
    torch.testing.assert_close(sums.loss, fewer.loss)
    torch.testing.assert_close(dweight, torch.autograd.grad(fewer.loss, weight)[0])


def test_tie_is_not_correct(device):
    x, weight, bias, *rest = make(3, device=device)
    assert not op(x, weight * 0, bias * 0, *rest).correct.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_sure_prediction(dtype, device):
    """p = 0.9993 for the true word: p - 1 must not be what is left of the rounding of p."""
    inputs = torch.eye(5), torch.zeros(5, 5).fill_diagonal_(8.625), torch.zeros(5)

    def dweight(function, dtype: torch.dtype) -> Tensor:
        x, weight, bias = (t.to(device, dtype).requires_grad_() for t in inputs)
        target, ones = torch.arange(5, device=device), torch.ones(5, device=device)
        return torch.autograd.grad(function(x, weight, bias, target, target * 0, ones, 1).sum(), weight)[0].double()

    got = dweight(lambda *inputs: op(*inputs).loss, dtype)
    exact = dweight(definition, torch.float64)
    torch.testing.assert_close(got, exact, rtol=4 * max(torch.finfo(dtype).eps, 1e-4), atol=0.0)


def test_same_bits_every_time(device):
    inputs, dloss = make(9, device=device), torch.randn(N, device=device)
    assert all(map(torch.equal, results(inputs, dloss), results(inputs, dloss)))


@pytest.mark.no_kernel
def test_target_outside_of_the_vocabulary_is_named(device, monkeypatch):
    monkeypatch.setattr(arguments, "_CHECK", True)
    inputs = make(5, device=device)
    inputs.target[2], inputs.task[2] = V, 3
    with pytest.raises(ValueError, match=rf"got {V} in row 2, of task 3$"):
        op(*inputs)


def test_known_weights_of_the_tasks_change_nothing_but_the_work(device):
    inputs, dloss = make(9, device=device), torch.randn(N, device=device)
    expected = results(inputs, dloss, **OPTIONS["everything"])
    torch.testing.assert_close(results(inputs, dloss, dloss=dloss, **OPTIONS["everything"]), expected)


@pytest.mark.gpu
def test_target_outside_of_the_vocabulary_is_no_number(device):
    inputs = make(5, device=device)
    inputs.target[2] = V
    assert op(*inputs._replace(task=torch.zeros_like(inputs.task)), 1).loss.isnan()
