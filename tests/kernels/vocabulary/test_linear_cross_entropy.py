"""The vocabulary loss against its definition in float64, and that the logits are never whole in memory."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trunkline.benchmarks.microbenchmarks.losses import peak_memory
from trunkline.kernels.vocabulary import chunks
from trunkline.kernels.vocabulary.linear_cross_entropy import _forward_reference
from vocabulary import ABSENT, OPTIONS, D, Inputs, N, assert_matches, definition, make, op, results

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHUNK = 256


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNKS", {"cpu": (CHUNK, 0), "cuda": (CHUNK, 0)})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 600])
def test_matches_definition(rows, device):
    assert_matches(make(rows, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype, device):
    assert_matches(make(300, dtype, device), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 40), (2, 40), (7, 40), (128, 40), (50257, 3)])
def test_size_of_the_vocabulary(vocabulary, rows, device):
    assert_matches(make(rows, vocabulary=vocabulary, device=device), label_smoothing=0.1)


def test_without_bias():
    assert_matches(make(300)._replace(bias=None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype):
    inputs = make(2000, dtype)
    exact = definition(*(t.double() if t.is_floating_point() else t for t in inputs))
    torch.testing.assert_close(op(*inputs).loss, exact.float(), rtol=1e-3, atol=0.0)


def test_weight_gradient_adds_up_in_float32(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNKS", {"cpu": (2, 0), "cuda": (2, 0)})  # 300 summands
    assert_matches(make(600, torch.bfloat16))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    x, weight, bias, *rest = make(5, torch.float64, vocabulary=7)
    leaves = [t.requires_grad_() for t in (x[:, :3].clone(), weight[:, :3].clone(), bias)]
    torch.autograd.gradcheck(lambda *leaves: op(*leaves, *rest, **options).loss, leaves)
    target, task, row_weight = rest
    one_task = (target, torch.zeros_like(task), row_weight, 1)
    torch.autograd.gradcheck(lambda *leaves: op(*leaves, *one_task, **options).loss, leaves)


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


def without(rows: Tensor, reason: str, inputs: Inputs) -> Inputs:
    if reason == "ignored":
        return inputs._replace(target=inputs.target.masked_fill(rows, -100))
    return inputs._replace(row_weight=inputs.row_weight.masked_fill(rows, 0.0))


@pytest.mark.parametrize("reason", ["ignored", "weight"])
def test_nothing_counts(reason):
    inputs = without(torch.ones(300, dtype=torch.bool), reason, make(300))
    for total in results(inputs, torch.randn(N), **OPTIONS["everything"]):
        assert not total.any()


@pytest.mark.parametrize("reason", ["ignored", "weight"])
def test_task_none_of_whose_rows_counts_is_as_good_as_absent(reason):
    inputs, dloss, options = make(300), torch.randn(N), OPTIONS["everything"]
    own = inputs.task == 1
    *sums, dx, dweight, dbias = results(without(own, reason, inputs), dloss, **options)
    assert not any(total[1] for total in sums)
    assert not dx[own].any()
    others = Inputs(*(t if name in ("weight", "bias") else t[~own] for name, t in inputs._asdict().items()))
    torch.testing.assert_close((*sums, dx[~own], dweight, dbias), results(others, dloss, **options))


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
        _forward_reference(x, weight, bias, *rest, torch.ones(N), True, N, 0.1, 0.01, 3.0)
    assert largest.elements == CHUNK * 1024  # rows are padded to a multiple of 64


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_quarter_of_the_memory_of_all_logits():
    """1024 rows, D 256, V 8192: forward and backward, beside `F.cross_entropy(F.linear())`."""
    ours, eager = peak_memory("trunkline"), peak_memory("eager")
    assert eager > 3 * 1024 * 8192 * 4  # logits, their log-softmax and its gradient
    assert ours <= eager / 4


def test_chunks_are_equal_and_fit_their_bytes(monkeypatch):
    """On a GPU every chunk moves the whole gradient of the weight once more, and a small last one keeps few busy."""
    monkeypatch.undo()
    for R, V, device, expected in (
        (8192, 50257, "cuda", [4096, 4096]),
        (16384, 128256, "cuda", [2048] * 8),
        (2528, 50304, "cuda", [2528]),
        (900, 1 << 20, "cuda", [900]),
        (1024, 8192, "cpu", [256] * 4),
        (300, 8192, "cpu", [192, 108]),
        (0, 8192, "cpu", []),
    ):
        itemsize = 2 if device == "cuda" else 4
        size = chunks.chunk_rows(R, V, itemsize, device)
        assert [min(size, R - start) for start in range(0, R, size)] == expected
        at_least, most_bytes = chunks.CHUNKS[device]
        assert size <= at_least or size * V * itemsize <= most_bytes


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


@pytest.mark.parametrize("num_tasks", [1, N])
def test_micro_batches_add_up(num_tasks):
    inputs, dloss = make(600), torch.randn(num_tasks)
    inputs = inputs._replace(task=inputs.task.clamp(max=num_tasks - 1))
    *sums, dx, dweight, dbias = results(inputs, dloss, num_tasks=num_tasks)
    parts = []
    for rows in (slice(0, 100), slice(100, 101), slice(101, 600)):
        part = Inputs(*(t if name in ("weight", "bias") else t[rows] for name, t in inputs._asdict().items()))
        parts.append(results(part, dloss, num_tasks=num_tasks))
    *sums_of_parts, parts_dx, parts_dweight, parts_dbias = zip(*parts, strict=True)
    totals = [*map(sum, (*sums_of_parts, parts_dweight, parts_dbias)), torch.cat(parts_dx)]
    for got, expected in zip(totals, (*sums, dweight, dbias, dx), strict=True):
        assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_tie_is_not_correct():
    inputs = make(5)
    zeros = inputs._replace(weight=torch.zeros_like(inputs.weight), bias=torch.zeros_like(inputs.bias))
    assert not op(*zeros).correct.any()


def test_same_bits_every_time():
    inputs, dloss = make(600), torch.randn(N)
    assert all(map(torch.equal, results(inputs, dloss), results(inputs, dloss)))
