"""The public functions of kernels/ on every layout, size and set of leaves, and on wrong arguments."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuzz.layouts import dtypes, spoiled, tensors, views
from fuzz.outcomes import assert_right, assert_right_or_refused
from parity import upstream_gradient
from trunkline.kernels.attention.attention import attention, attention_reference
from trunkline.kernels.attention.pack_plan import PackPlan
from trunkline.kernels.tasks.task_gram import task_gradients, task_gradients_reference, task_gram
from trunkline.kernels.tasks.task_loss import task_loss, task_loss_reference
from trunkline.kernels.tasks.task_projection import task_projection, task_projection_reference
from trunkline.kernels.vocabulary.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

pytestmark = pytest.mark.usefixtures("one_thread")


class Call(NamedTuple):
    op: Callable[..., Any]
    definition: Callable[..., Any]
    arguments: dict[str, Any]
    floor: float = 1e-5

    def assert_right(self, differentiable: Collection[str] = ()) -> None:
        assert_right(self.op, self.definition, self.arguments, differentiable, floor=self.floor)

    def assert_right_or_refused(self) -> None:
        assert_right_or_refused(self.op, self.definition, self.arguments, floor=self.floor)


def leaves(*names: str) -> st.SearchStrategy[set[str]]:
    """Those that require gradients."""
    return st.sets(st.sampled_from(names))


def bounds(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


sizes = st.integers(0, 9)
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 17, 64, 65, 128, 129, 140]), min_size=1, max_size=4)
WINDOWS = st.none() | st.tuples(st.sampled_from([-1, 0, 1, 9, 70]), st.sampled_from([-1, 0, 1, 9, 70]))


@st.composite
def attention_calls(draw: st.DrawFn) -> Call:
    dtype, lengths = draw(dtypes), draw(LENGTHS)
    cross = draw(st.booleans())
    lengths_k = [draw(st.sampled_from([0, 1, 5, 130])) for _ in lengths] if cross else lengths
    plan = PackPlan.of(bounds(lengths), bounds(lengths_k) if cross else None)
    G, D = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 16]))
    H = G * draw(st.integers(1, 3))
    settings: dict[str, Any] = {"causal": draw(st.booleans()), "window": draw(WINDOWS)}
    settings |= {"softcap": draw(st.sampled_from([None, 0.7])), "scale": draw(st.sampled_from([None, 0.3]))}
    if draw(st.integers(0, 3)) == 3:
        settings |= {"dropout": 0.4, "seed": draw(st.sampled_from([0, 2**40 + 7]))}
    arguments = {"q": draw(tensors((sum(lengths), H, D), dtype))}
    arguments |= {name: draw(tensors((sum(lengths_k), G, D), dtype)) for name in "kv"}
    if draw(st.booleans()) and sum(lengths):
        rows = torch.tensor(draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=9)), dtype=torch.int64)
        arguments["rows"] = draw(views(rows))

    def definition(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        out = attention_reference(q, k, v, plan, **settings)
        return out if rows is None else out[rows]

    # the backward pass has sum_j P_ij dP_ij from the output, which was rounded; with one key that is all there is
    floor = max(1e-5, 16 * torch.finfo(dtype).eps)
    return Call(lambda **given: attention(plan=plan, **given, **settings), definition, arguments, floor)


@st.composite
def projection_calls(draw: st.DrawFn) -> Call:
    dtype, counts, D, C = draw(dtypes), draw(st.lists(sizes, min_size=1, max_size=5)), draw(sizes), draw(sizes)
    N, R = len(counts), sum(counts)
    activation = draw(st.sampled_from(["none", "gelu", "relu", "tanh"]))
    shapes = {"x": (R, D), "weight": (N, D, C), "bias": (N, C)}
    arguments = {name: draw(tensors(shape, dtype)) for name, shape in shapes.items()}
    arguments["offsets"] = draw(views(bounds(counts, draw(st.sampled_from([torch.int32, torch.int64])))))
    return Call(
        lambda **given: task_projection(activation=activation, **given),
        lambda **given: task_projection_reference(activation=activation, **given),
        arguments,
    )


@st.composite
def loss_calls(draw: st.DrawFn) -> Call:
    dtype, D = draw(dtypes), draw(sizes)
    counts = draw(st.lists(st.sampled_from([0, 1, 2, 5, 300]), min_size=1, max_size=4))
    columns = [draw(st.sampled_from([1, 2, 3, 12])) for _ in counts]
    regression = torch.tensor([n == 1 and draw(st.booleans()) for n in columns])
    N, R, K = len(counts), sum(counts), sum(columns)
    task = torch.arange(N).repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    target = (torch.rand(R, generator=generator) * torch.tensor(columns)[task]).long()
    target[regression[task]] = draw(st.sampled_from([0, -100, 7]))
    shapes = {"x": (R, D), "weight": (K, D), "bias": (K,)}
    arguments = {name: draw(tensors(shape, dtype)) for name, shape in shapes.items()}
    arguments["offsets"] = draw(views(bounds(counts)))
    arguments["target"] = draw(views(target))
    arguments["value"] = draw(tensors((R,), torch.float32))
    row_weight = torch.rand(R, generator=generator) * (torch.rand(R, generator=generator) > 0.2)
    arguments["row_weight"] = draw(views(row_weight))
    arguments["class_offsets"] = draw(views(bounds(columns)))
    arguments["regression"] = draw(views(regression))
    if draw(st.booleans()):
        arguments["class_weight"] = draw(views(torch.rand(K, generator=generator)))
    smoothing, width = draw(st.sampled_from([0.0, 0.1])), max(columns) + draw(st.integers(0, 1))

    def definition(class_weight: Tensor | None = None, **given: Tensor) -> tuple[Tensor, ...]:
        if class_weight is not None:
            column = given["target"].where(~given["regression"][task], 0) + given["class_offsets"][task]
            given["row_weight"] = given["row_weight"] * class_weight[column]
        loss, weight, count, _ = task_loss_reference(**given, label_smoothing=smoothing)
        return loss.to(torch.promote_types(loss.dtype, torch.float32)), weight, count

    def op(**given: Tensor) -> tuple[Tensor, ...]:
        return tuple(task_loss(width=width, label_smoothing=smoothing, **given)[:3])

    return Call(op, definition, arguments)


@st.composite
def vocabulary_calls(draw: st.DrawFn) -> Call:
    dtype, R, D, V, N = draw(dtypes), draw(sizes), draw(sizes), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    in_float32 = dtype.itemsize == 2 and draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    target = torch.randint(V, (R,), generator=generator)
    if draw(st.booleans()):
        target[::3] = -100
    arguments = {
        "x": draw(tensors((R, D), dtype)),
        "weight": draw(tensors((V, D), torch.float32 if in_float32 else dtype)),
        "target": draw(views(target)),
        "task": draw(views(torch.randint(N, (R,), generator=generator))),
        "row_weight": draw(views(torch.rand(R, generator=generator))),
    }
    if draw(st.booleans()):
        arguments["bias"] = draw(tensors((V,), dtype))
    options = {"label_smoothing": draw(st.sampled_from([0.0, 0.1])), "z_loss": draw(st.sampled_from([0.0, 0.01]))}
    options["softcap"] = draw(st.sampled_from([0.0, 3.0]))
    dloss = upstream_gradient(torch.empty(N), seed=0) if draw(st.booleans()) else None

    def definition(weight: Tensor, target: Tensor, row_weight: Tensor, **given: Tensor) -> Tensor:
        kept = target != -100
        labels = {"target": target.where(kept, 0).long(), "row_weight": row_weight * kept}
        weight = weight.to(given["x"].dtype)
        given |= {"bias": given["bias"].to(weight.dtype)} if "bias" in given else {}
        loss = linear_cross_entropy_reference(weight=weight, num_tasks=N, **given, **labels, **options)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def op(**given: Tensor) -> Tensor:
        known = None if dloss is None else dloss.to(torch.promote_types(dtype, torch.float32))
        return linear_cross_entropy(num_tasks=N, dloss=known, **given, **options).loss

    return Call(op, definition, arguments)


@st.composite
def gram_calls(draw: st.DrawFn) -> Call:
    dtype, counts, D, C = draw(dtypes), draw(st.lists(sizes, max_size=5)), draw(sizes), draw(sizes)
    R = sum(counts) + draw(st.integers(0, 2))  # the last may be no task's
    arguments = {"x": draw(tensors((R, D), dtype)), "dy": draw(tensors((R, C), dtype))}
    arguments["offsets"] = draw(views(bounds(counts)))

    def definition(**given: Tensor) -> tuple[Tensor, Tensor]:
        gradients = task_gradients_reference(**given)
        return gradients, gradients.flatten(1) @ gradients.flatten(1).T

    return Call(lambda **given: (task_gradients(**given), task_gram(**given).gram), definition, arguments)


@given(attention_calls(), leaves("q", "k", "v"))
def test_attention(call, differentiable):
    call.assert_right(differentiable)


@given(projection_calls(), leaves("x", "weight", "bias"))
def test_task_projection(call, differentiable):
    call.assert_right(differentiable)


@given(loss_calls(), leaves("x", "weight", "bias"))
def test_task_loss(call, differentiable):
    call.assert_right(differentiable)


@given(vocabulary_calls(), leaves("x", "weight", "bias"))
def test_linear_cross_entropy(call, differentiable):
    call.assert_right(differentiable)


@given(gram_calls())
def test_task_gram(call):
    call.assert_right()


CALLS = {
    "attention": attention_calls(),
    "task_projection": projection_calls(),
    "task_loss": loss_calls(),
    "linear_cross_entropy": vocabulary_calls(),
    "task_gram": gram_calls(),
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@given(st.data())
def test_wrong_arguments(calls, data):
    call = data.draw(calls)
    call._replace(arguments=data.draw(spoiled(call.arguments))).assert_right_or_refused()
