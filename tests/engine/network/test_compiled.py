"""One graph for all batches: padding changes nothing, nothing is compiled twice, and no step waits for the device."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_balanced_backward import CAUSAL, TASKS, batch, make_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trunkline import Engine
from trunkline.engine.network.compiled import CompiledModel, FixedShapes
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.settings import Balancing, Optimizer
from trunkline.kernels.tasks.task_loss import LossSums
from trunkline.kernels.vocabulary import linear_cross_entropy
from trunkline.training.balancing.balancer import Balancer
from trunkline.training.config_file import load_config
from trunkline.training.data.batches import weight_sums
from trunkline.training.run.faults import Guard
from trunkline.training.run.optimizer import make_optimizer
from trunkline.training.run.progress import Interval, Progress

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo does it
]

MIXES = {
    "all": ["class", "number", "tag", "span", "story", "prose", "class", "story"],
    "small heads": ["class", "number", "tag", "tag", "absent"],
    "texts": ["prose", "story", "story", "prose"],
    "spans": ["span", "span", "span"],
    "one span": ["span"],
    "one short example": ["number"],
}
BATCHES = {name: batch(seed, tasks, 600) for seed, (name, tasks) in enumerate(MIXES.items())}


def shapes_for(model: MultiTaskModel) -> FixedShapes:
    return FixedShapes.of(BATCHES.values(), model.groups)


def gradients_of(model: MultiTaskModel, sums: LossSums) -> dict[str, Tensor]:
    (sums.loss @ torch.linspace(0.5, 2, len(TASKS), dtype=sums.loss.dtype)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def sizes(packed: PackedBatch) -> list[tuple[int, ...]]:
    plan, rows = packed.plan, packed.rows
    tensors = [packed.tokens, packed.positions, *plan.layout, rows.token, rows.task, rows.target, rows.value]
    return [*(tuple(x.shape) for x in (*tensors, rows.weight, rows.offsets)), (plan.narrow_tiles,)]


@pytest.mark.parametrize("packed", BATCHES.values(), ids=BATCHES)
def test_padding_changes_no_loss_and_no_gradient(packed):
    model = make_model(CAUSAL)
    padded = shapes_for(model).pad(packed)
    assert padded is not packed
    for ends in ((), shapes_for(model).ends):
        sums, expected = (model.losses(model.hidden(b), b, ends=e) for b, e in ((padded, ends), (packed, ())))
        torch.testing.assert_close(sums, expected)
        gradients = gradients_of(model, sums)
        torch.testing.assert_close(gradients, gradients_of(model, expected), rtol=1e-6, atol=1e-9)


def test_padded_batches_have_one_shape():
    shapes = shapes_for(make_model(CAUSAL))
    padded = [shapes.pad(packed) for packed in BATCHES.values()]
    assert len({tuple(sizes(packed)) for packed in padded}) == 1
    assert len({tuple(sizes(packed)) for packed in BATCHES.values()}) == len(BATCHES)
    assert all(shapes.has(packed) for packed in padded)
    assert not any(shapes.has(packed) for packed in BATCHES.values())
    for packed in padded:
        bounds, ends = packed.rows.offsets.tolist(), packed.plan.cu_seqlens
        assert [packed.rows.task.tolist().count(t) for t in range(len(TASKS))] == list(packed.rows.counts)
        assert bounds[-1] == len(packed.rows.task) == sum(packed.rows.counts)
        assert (packed.rows.task.diff() >= 0).all()
        assert ends[-1] == ends[-2] == 600  # at least one sequence is empty


def test_there_is_room_for_more_of_everything_and_not_for_much_more():
    """Of few, too: a batch with one wide tile more than the largest is common where there are four."""
    shapes, plan = FixedShapes.of([BATCHES["all"]], make_model(CAUSAL).groups), BATCHES["all"].plan
    sizes = plan.narrow_tiles, len(plan.tiles) - plan.narrow_tiles, len(plan.blocks)
    assert max(sizes) > 3
    for size, most in zip(sizes, (shapes.narrow_tiles, shapes.wide_tiles, shapes.blocks), strict=True):
        assert size + (size > 0) <= most <= size + size / 16 + 1


TOO_MUCH = {
    "rows": batch(7, ["prose"] * 4, 600),
    "sequences": batch(8, ["class"] * 20, 600),
    "another budget": batch(9, ["class"], 300),
}


@pytest.mark.parametrize("packed", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_batch_that_does_not_fit_goes_without_the_graph(packed):
    model = make_model(CAUSAL)
    compiled = CompiledModel(model, shapes_for(model), backend="eager")
    assert compiled.shapes.pad(packed) is packed
    torch.testing.assert_close(compiled(packed), model(packed), rtol=0, atol=0)
    assert compiled.uncompiled == 1


def test_rows_of_spans_are_padded_in_the_tail_only():
    """Elsewhere they would take part in the softmax over somebody's text."""
    model = make_model(CAUSAL)
    full = batch(0, MIXES["all"], sum(int(n) for n in BATCHES["all"].plan.cu_seqlens.diff()[:-1]))
    shapes = replace(shapes_for(model), tokens=len(full.tokens))
    assert full.real_tokens == shapes.tokens
    assert shapes.pad(full) is full
    spans = int(full.rows.counts[4])
    assert shapes.has(replace(shapes, rows=(shapes.rows[0], spans, shapes.rows[2])).pad(full)) is False


METHODS = [Balancing(), Balancing("uncertainty", watch=2), Balancing("pcgrad")]


@pytest.mark.parametrize("balancing", METHODS, ids=["fixed", "from losses, watched", "from gradients"])
def test_no_graph_break_and_nothing_compiled_twice(balancing):
    """Over several mixes, with the model scored in between; the same losses and weights as without the graph."""
    runs = []
    for compile in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        counters.clear()
        model = make_model(CAUSAL)
        compiled = CompiledModel(model, shapes_for(model), backend="aot_eager")
        runs.append(train(model, balancing, compiled if compile else None, [*BATCHES.values()]))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-7)
    graphs = 0 if balancing.method == "pcgrad" else 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def train(
    model: MultiTaskModel,
    balancing: Balancing,
    compiled: CompiledModel | None,
    batches: list[PackedBatch],
    watch: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Steps as in the loop: the losses of each, and the weights in the end."""
    balancer = Balancer(balancing, model, 0, compiled)
    optimizer, losses = make_optimizer(model, Optimizer(learning_rate=1e-3)), []
    names = [task.name for task in model.tasks]
    interval, guard = Interval(names, model.device), Guard(optimizer, names, 1, Progress())
    for step, packed in enumerate(batches):
        packed = compiled.shapes.pad(packed) if compiled else packed
        model.train()
        weight = weight_sums([packed], len(TASKS)).to(model.device)
        factor = torch.where(weight > 0, 1 / weight, 0.0)
        packed = packed.to(model.device)
        with watch():
            sums = balancer.forward(packed, factor, step)
            balancer.backward(sums.loss * factor, step)
            interval.add([packed], sums.loss, sums.weight)
            balancer.finish(weight, step)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            guard.judge(step, sums.loss, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not (compiled and compiled.cuda_graphs))
        losses.append(sums.loss.detach().clone())
        model.eval()
        with torch.inference_mode():
            model.losses(model.hidden(packed), packed)
    assert guard.look() == []
    return losses, dict(model.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_code_gives_the_same_losses_and_gradients():
    torch._dynamo.reset()
    model = make_model(replace(CAUSAL, num_layers=1)).float()
    compiled = CompiledModel(model, shapes_for(model))
    compiled.warm_up(BATCHES["all"])
    assert all(parameter.grad is None for parameter in model.parameters())
    for packed in BATCHES.values():
        sums, expected = compiled(compiled.shapes.pad(packed)), model(packed)
        torch.testing.assert_close(sums.loss, expected.loss)
        gradients = gradients_of(model, sums)
        for name, gradient in gradients_of(model, expected).items():
            rounding = 3e-6 * float(gradient.abs().max())
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=rounding, msg=lambda m, n=name: n + m)
    assert compiled.seconds > 0
    assert compiled.uncompiled == 0


def test_a_run_compiles(finished, tmp_path, monkeypatch, capsys):
    """With accumulation, evaluation and a projection; what it learns is what a run learns that does not."""
    monkeypatch.setattr("trunkline.training.run.compiling.CompiledModel", partial(CompiledModel, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    config = load_config(finished.config)
    config = replace(config, steps=6, trunk=replace(config.trunk, dropout=0.0))
    runs = []
    for compile in (False, True):
        engine = Engine.from_config(replace(config, run=str(tmp_path / str(compile)), compile=compile))
        runs.append((engine.fit(), engine.model.state_dict()))
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-3, atol=2e-3)
    for task in config.all_tasks:
        losses = [summary["tasks"][task.name]["last_loss"] for summary, _ in runs]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    seconds = [summary["compile_seconds"] for summary, _ in runs]
    assert seconds[0] == 0 < seconds[1] < runs[1][0]["wall_time_seconds"]
    assert f"compiled the model in {seconds[1]:.0f} s" in capsys.readouterr().out
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_step_makes_each_vocabulary_product_once(monkeypatch):
    """Two tasks predict tokens. Where their gradients are known before the backward pass, as with fixed weights, the
    logits are made once; the op is called a second time where they are not."""
    called, rows = [], linear_cross_entropy.in_chunks
    monkeypatch.setattr(linear_cross_entropy, "in_chunks", lambda *args: called.append(1) or rows(*args))
    model = make_model(CAUSAL)
    assert model.num_vocabulary == 2
    compiled = CompiledModel(model, shapes_for(model), backend="eager")
    for balancing, calls in ((Balancing(), 1), (Balancing("uncertainty"), 2)):
        torch._dynamo.reset()
        called.clear()
        train(model, balancing, compiled, [BATCHES["texts"]])
        assert len(called) == calls + 1  # one more of the scoring after the step


class Looks(TorchDispatchMode):
    """Notes the operations that bring a value, or a size that depends on values, to the host. Those inside an op of
    ours are its own business: each has an implementation for the CPU."""

    WAIT = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "bincount"}
    BY_INDEX = {"index", "index_put", "index_put_"}

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        by_mask = name in self.BY_INDEX and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in self.WAIT or by_mask or unsized:
            self.found.append(str(func))
        return func(*args, **kwargs)


@pytest.mark.parametrize("fixed", [False, True], ids=["as they are", "fixed shapes"])
@pytest.mark.parametrize("balancing", METHODS[:2], ids=["fixed", "from losses, watched"])
def test_no_step_asks_for_a_value(monkeypatch, balancing, fixed):
    """What is compiled is gone through operation by operation."""
    monkeypatch.setattr(linear_cross_entropy, "can_look", lambda x: False)  # as on a GPU
    model, looks = make_model(CAUSAL).float(), Looks()
    compiled = CompiledModel(model, shapes_for(model)) if fixed else None
    with torch.compiler.set_stance("force_eager"):
        train(model, balancing, compiled, [*BATCHES.values()], lambda: looks)
    assert looks.found == []
    assert compiled is None or compiled.uncompiled == 0


LOOKS = {
    "a number": lambda x: float(x.sum()),
    "rows of a mask": lambda x: x[x > 0],
    "a size": lambda x: x.repeat_interleave(x.long()),
    "a condition": lambda x: bool((x > 0).all()),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_asking_for_a_value_is_seen(look):
    with Looks() as looks:
        look(torch.ones(3))
    assert looks.found


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu():
    """In bfloat16, without and with compiled kernels in a CUDA graph; the losses are the same."""
    losses, autocast = [], partial(torch.autocast, "cuda", torch.bfloat16)
    for compile in (False, True):
        torch.manual_seed(0)
        model = make_model(replace(CAUSAL, hidden_size=64)).float().cuda()
        compiled = CompiledModel(model, shapes_for(model)) if compile else None
        batches = [*BATCHES.values()]
        if compiled:
            assert compiled.cuda_graphs
            with autocast():
                compiled.warm_up(batches[0].to("cuda"))
        train(model, Balancing(), compiled, batches, autocast)  # compiles kernels
        losses.append(train(model, Balancing(), compiled, batches, no_waiting)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0.05)
