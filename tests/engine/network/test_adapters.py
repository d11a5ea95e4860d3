"""Adapters of several tasks in one batch do what PEFT does for each task alone."""

from functools import partial

import numpy as np
import pytest
import torch

from checkpoints import V, make
from trunkline.engine.adapting import merged
from trunkline.engine.foreign.adapter_files import adaptable, put_adapter, read_adapter
from trunkline.engine.network.adapters import Adapters
from trunkline.engine.network.compiled import CompiledModel, FixedShapes
from trunkline.engine.network.generate import Search
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.tasks.task import Task

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = [Task(name, "classify", ("text",), "label", ("no", "yes")) for name in ("first", "absent", "second")]
LENGTHS = {0: (7, 1, 20), 2: (13, 5)}  # of each task's examples
RANK, ALPHA = 3, 6.0


def texts() -> list[Example]:
    numbers = np.random.default_rng(0)
    return [
        Example(task, numbers.integers(V, size=length), np.array([length - 1]))
        for task, lengths in LENGTHS.items()
        for length in lengths
    ]


def adapted(trunk: Trunk, of_task=(0, 1, 2), names=("first", "absent", "second"), **settings) -> MultiTaskModel:
    """A model in float64 whose adapters add something."""
    adapters = Adapters(names, of_task, adaptable(trunk), RANK, ALPHA, **settings)
    model = MultiTaskModel(trunk, TASKS, adapters=adapters).double().eval()
    for layer in adapters.layers.values():
        torch.nn.init.normal_(layer.up, std=0.1)
    return model


def exact_norms(model: torch.nn.Module) -> None:
    """transformers' RMSNorm computes in float32, whatever comes in."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight, eps = module.weight, module.variance_epsilon
            module.forward = partial(
                torch.nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps
            )


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bert"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_a_mixed_batch_is_every_task_alone_in_peft(family, tmp_path):
    theirs = make(family).double()
    theirs.save_pretrained(tmp_path / "trunk")
    exact_norms(theirs)
    trunk = Trunk.from_pretrained(tmp_path / "trunk", dropout=0.0, dtype=torch.float64)
    model = adapted(trunk)
    targets = [part.name for _, parts in adaptable(trunk).values() for part in parts]
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "init_lora_weights": False}
    config = partial(peft.LoraConfig, **settings, fan_in_fan_out=family == "gpt2")
    wrapped = peft.get_peft_model(theirs, config(), "first", autocast_adapter_dtype=False)
    wrapped.add_adapter("second", config(), autocast_adapter_dtype=False)
    wrapped.save_pretrained(tmp_path)
    for name, place in (("first", 0), ("second", 2)):
        given = read_adapter(tmp_path / name, adaptable(trunk), "")
        put_adapter(model.adapters, place, given)

    examples = texts()
    batch = pack(examples, len(TASKS), budget=64)
    x = model.hidden(batch)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    x.backward(upstream)
    for row, place in enumerate(batch.order):
        example = examples[place]
        wrapped.set_adapter(TASKS[example.task].name)
        states = wrapped.base_model.model.base_model(torch.from_numpy(example.tokens)[None]).last_hidden_state[0, -1]
        torch.testing.assert_close(x[row], states, rtol=1e-10, atol=1e-10)
        states.backward(upstream[row])
    gradients = {name: parameter.grad for name, parameter in wrapped.named_parameters()}
    compared = 0
    for layer in model.adapters.layers.values():
        for p, part in enumerate(layer.parts):
            columns = layer.of_part(p)[1].shape[2]
            begin = sum(part.end - part.first for part in layer.parts[:p])
            down, up = layer.down.grad[:, :, p * RANK : (p + 1) * RANK], layer.up.grad[:, :, begin : begin + columns]
            for name, place in (("first", 0), ("second", 2)):
                for kind, ours in (("A", down), ("B", up)):
                    (key,) = [key for key in gradients if key.endswith(f"{part.name}.lora_{kind}.{name}.weight")]
                    torch.testing.assert_close(ours[place].T, gradients[key], rtol=1e-10, atol=1e-10)
                    compared += bool(gradients[key].abs().max() > 1e-6)
            assert not down[1].any()
            assert not up[1].any()
    assert compared > 2 * len(model.adapters.layers)


def llama(tmp_path) -> Trunk:
    make("llama").save_pretrained(tmp_path)
    return Trunk.from_pretrained(tmp_path, dtype=torch.float64)


def test_new_adapters_add_nothing(tmp_path):
    trunk = llama(tmp_path)
    adapters = Adapters(("first", "absent", "second"), (0, 1, 2), adaptable(trunk), RANK, ALPHA)
    model, batch = MultiTaskModel(trunk, TASKS, adapters=adapters).double().eval(), pack(texts(), len(TASKS))
    assert torch.equal(model.hidden(batch), MultiTaskModel(trunk, TASKS).double().eval().hidden(batch))


@pytest.mark.parametrize(("of_task", "names"), [((0, 0, 0), ("shared",)), ((1, 0, 1), ("b", "a")), ((0, 1, 0), "ab")])
def test_tasks_of_one_adapter_share_it(of_task, names, tmp_path):
    """As adapters of their own with the same weights, whose gradients add up."""
    trunk = llama(tmp_path)
    batch = pack(texts(), len(TASKS))
    model, own = adapted(trunk, of_task, names), adapted(trunk)
    for ours, theirs in zip(model.adapters.layers.values(), own.adapters.layers.values(), strict=True):
        theirs.down.data, theirs.up.data = ours.down.data[list(of_task)], ours.up.data[list(of_task)]
    x, expected = model.hidden(batch), own.hidden(batch)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(x)
    for states in (x, expected):
        states.backward(upstream)
    for ours, theirs in zip(model.adapters.layers.values(), own.adapters.layers.values(), strict=True):
        sums = torch.zeros_like(ours.down).index_add_(0, torch.tensor(of_task), theirs.down.grad)
        torch.testing.assert_close(ours.down.grad, sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("task", [0, 2])
def test_a_single_task_is_its_part_of_a_batch(task, tmp_path):
    """What generation asks for."""
    model = adapted(llama(tmp_path))
    mixed = pack(texts(), len(TASKS))
    alone: PackedBatch = pack([example for example in texts() if example.task == task], len(TASKS))
    own = model.adapters.of_one(task, len(alone.tokens), len(alone.rows.token))
    x = model.trunk(alone.tokens, alone.positions, alone.plan, alone.rows.token, adapt=own)
    torch.testing.assert_close(x, model.hidden(mixed)[mixed.rows.task == task], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_the_merged_trunk(beams, tmp_path):
    tasks = [Task(name, "generate", ("text",), "label") for name in ("first", "second")]
    trunk = llama(tmp_path)
    adapters = Adapters(("second", "first"), (1, 0), adaptable(trunk), RANK, ALPHA)
    model = MultiTaskModel(trunk, tasks, adapters=adapters).double().eval()
    for layer in adapters.layers.values():
        torch.nn.init.normal_(layer.up, std=0.3)
    torch.nn.init.normal_(model.vocabulary)
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(V, size=length) for length in (3, 17, 1, 8)]
    search = Search(max_new_tokens=9, beams=beams)
    written = [model.generate(prompts, task, 0, search) for task in (0, 1)]
    for task in (0, 1):
        plain = MultiTaskModel(merged(model, task), tasks).double().eval()
        plain.vocabulary.data = model.vocabulary.data
        assert written[task] == plain.generate(prompts, task, 0, search)
    assert all(len(text) > 4 for text in written[0])
    assert written[0] != written[1]


def test_many_adapters_of_few_rows(tmp_path):
    trunk = llama(tmp_path)
    tasks = [Task(f"t{t:02}", "classify", ("text",), "label", ("no", "yes")) for t in range(40)]
    adapters = Adapters([t.name for t in tasks], range(40), adaptable(trunk), RANK, ALPHA)
    model = MultiTaskModel(trunk, tasks, adapters=adapters).double()
    for layer in adapters.layers.values():
        torch.nn.init.normal_(layer.up, std=0.1)
    example = Example(0, np.arange(4), np.array([3]))
    batch = pack([Example(t, example.tokens, example.rows) for t in range(40)], 40)
    x = model.hidden(batch)
    for t in (0, 17, 39):
        alone = model.hidden(pack([Example(t, example.tokens, example.rows)], 40))
        torch.testing.assert_close(x[t : t + 1], alone, rtol=1e-12, atol=1e-12)
    assert (x[0] - x[1]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does it
def test_one_graph_for_every_mix(tmp_path):
    """Compiled, and padded to fixed shapes: the same losses and gradients."""
    model = adapted(llama(tmp_path))
    batches = [pack(texts(), len(TASKS), 64), pack(texts()[:2], len(TASKS), 64)]
    compiled = CompiledModel(model, FixedShapes.of(batches, model.groups), backend="aot_eager")
    for batch in batches:
        found = []
        for losses in (compiled(compiled.shapes.pad(batch)).loss, model(batch).loss):
            losses.sum().backward()
            found.append([losses.detach(), *(p.grad.clone() for p in model.adapters.parameters())])
            model.zero_grad()
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert not compiled.uncompiled
