"""The backward pass in two parts: Gram matrix and gradients are those of as many backward passes as there are tasks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline import Task
from trunkline.engine.foreign.adapter_files import adaptable
from trunkline.engine.network.adapters import Adapters
from trunkline.engine.network.balanced_backward import BalancedBackward, linear_layers
from trunkline.engine.network.model import MultiTaskModel, in_model_order
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.kernels.tasks import task_gram

pytestmark = pytest.mark.usefixtures("one_thread")

CAUSAL = TrunkConfig(vocab_size=29, hidden_size=16, num_layers=3, num_heads=4, max_positions=200)
TRUNKS = {
    "tied": CAUSAL,
    "rotary, gated, root mean square": replace(
        CAUSAL, positions="rotary", norm="rms", activation="swiglu", bias=False, qk_norm=True, num_kv_heads=2
    ),
    "own vocabulary": replace(CAUSAL, tie_vocabulary=False),
    "norms after": replace(CAUSAL, norm_position="post", embedding_norm=True),
    "local, gated, a last layer": replace(
        CAUSAL, positions="rotary", activation="geglu", window=5, global_every=2, last_layer=True, vocabulary_bias=True
    ),
}
TASKS = in_model_order(
    [
        Task("absent", "classify", ("a",), "b", ("x", "y")),
        Task("class", "classify", ("a",), "b", ("x", "y", "z")),
        Task("number", "regress", ("a",), "b"),
        Task("tag", "tag", ("a",), "b", ("x", "y")),
        Task("span", "span", ("a",), "b"),
        Task("story", "generate", ("a",), "b"),
        Task("prose", "language-model", ("a",)),
    ]
)
NAMES = [task.name for task in TASKS]


def batch(seed: int, names: list[str], budget: int = 420) -> PackedBatch:
    rng = np.random.default_rng(seed)
    examples = []
    for name in names:
        task = TASKS[NAMES.index(name)]
        tokens = rng.integers(0, 29, int(rng.integers(5, 40)) if name != "prose" else 140)
        L = len(tokens)
        match task.head:
            case "classify" | "regress":
                rows, targets = np.array([L - 1]), rng.integers(0, max(1, len(task.labels)), 1)
            case "tag":
                rows, targets = np.arange(1, L, 2), rng.integers(0, 2, L // 2)
            case "span":
                rows, targets = np.arange(L), np.zeros(L, int)
                targets[[1, 3]] = 1, 2
            case _:
                rows, targets = np.arange(1, L - 1), tokens[2:]
        examples.append(
            Example(NAMES.index(name), tokens, rows, targets, rng.random(len(rows)), 0.5 + rng.random(len(rows)))
        )
    return pack(examples, len(TASKS), budget)


BATCHES = {
    "one batch": [batch(0, ["class", "class", "number", "tag", "span", "story", "prose", "story"])],
    "two batches": [batch(1, ["tag", "prose", "span"]), batch(2, ["class", "number", "story", "tag"], 300)],
    "one task": [batch(3, ["number"])],
}


def make_model(config: TrunkConfig, projection: str = "gelu") -> MultiTaskModel:
    model = MultiTaskModel(Trunk(config), TASKS, projection).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def task_losses(model: MultiTaskModel, batches: list[PackedBatch]) -> Tensor:
    return torch.stack([model(batch).loss for batch in batches]).sum(0) * FACTOR


FACTOR = torch.linspace(0.2, 1.7, len(TASKS), dtype=torch.float64)
WEIGHTS = torch.tensor([9.0, 0.3, -0.7, 2.0, 1.1, 0.6, 1.9], dtype=torch.float64)


def in_two_parts(model: MultiTaskModel, layers: list[str], batches: list[PackedBatch]) -> tuple[Tensor, dict]:
    backward = BalancedBackward(model, layers)
    for packed in batches:
        backward.upper((backward.forward(packed).loss * FACTOR).sum())
    gram = backward.gram()
    backward.lower(WEIGHTS)
    return gram, gradients_of(model)


def gradients_of(model: MultiTaskModel) -> dict[str, Tensor | None]:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("formed", [True, False], ids=["gradients formed", "pairwise"])
@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("layers", [["last"], ["blocks.1.mlp_in", "blocks.2.qkv"], ["blocks.0.attention_out"]], ids=str)
def test_as_many_backward_passes_find(layers, batches, formed, monkeypatch):
    monkeypatch.setattr(task_gram, "PRODUCTS_PER_ELEMENT", 0 if formed else 1e9)
    model = make_model(CAUSAL)
    gram, gradients = in_two_parts(model, layers, batches)

    chosen = [layer.weight for layer in linear_layers(model.trunk, layers).values()]
    of_task = []
    for loss in task_losses(model, batches):
        parts = torch.autograd.grad(loss, chosen, retain_graph=True, materialize_grads=True)
        of_task.append(torch.cat([part.flatten() for part in parts]))
    of_task = torch.stack(of_task)
    torch.testing.assert_close(gram, of_task @ of_task.T, rtol=1e-6, atol=1e-9)

    (task_losses(model, batches) @ WEIGHTS).backward()
    assert_same(gradients, gradients_of(model))


def assert_same(gradients: dict, expected: dict) -> None:
    for name, gradient in expected.items():
        if gradient is None or not gradient.numel():
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            atol = 1e-6 * float(gradient.abs().max())  # the loss of spans is taken in float32
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("config", TRUNKS.values(), ids=TRUNKS)
@pytest.mark.parametrize("projection", ["", "tanh", "pooler"])
def test_every_shape_of_trunk(config, projection):
    model = make_model(config, projection)
    _, gradients = in_two_parts(model, ["last"], BATCHES["one batch"])
    (task_losses(model, BATCHES["one batch"]) @ WEIGHTS).backward()
    assert_same(gradients, gradients_of(model))


def test_a_second_step_adds_to_the_gradients():
    model = make_model(CAUSAL)
    _, once = in_two_parts(model, ["last"], BATCHES["one batch"])
    backward = BalancedBackward(model, ["last"])
    for _ in range(2):
        backward.upper((backward.forward(BATCHES["one batch"][0]).loss * FACTOR).sum())
        backward.gram()
        backward.lower(WEIGHTS)
    assert_same(gradients_of(model), {name: 2 * gradient for name, gradient in once.items()})


def test_nothing_is_left_on_the_model():
    model = make_model(CAUSAL)
    in_two_parts(model, ["last"], BATCHES["one batch"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_frozen_trunk():
    """Its layers still tell what the tasks would do to them."""
    model = make_model(CAUSAL)
    expected, _ = in_two_parts(model, ["last"], BATCHES["one batch"])
    model.trunk.requires_grad_(False)
    gram, gradients = in_two_parts(model, ["last"], BATCHES["one batch"])
    torch.testing.assert_close(gram, expected)
    (task_losses(model, BATCHES["one batch"]) @ WEIGHTS).backward()
    assert_same(gradients, gradients_of(model))


@pytest.mark.parametrize("of_task", [[0] * 7, [0, 1, 0, 1, 1, 2, 0]], ids=["shared", "groups"])
@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_adapters_that_tasks_share(batches, of_task):
    """Their Gram matrix is that of the gradients of A and B; the trunk gets none."""
    model = make_model(CAUSAL)
    model.adapters = Adapters(
        [f"adapter {a}" for a in range(max(of_task) + 1)], of_task, adaptable(model.trunk), 3, 6.0
    )
    model.adapters.double()
    for layer in model.adapters.layers.values():
        torch.nn.init.normal_(layer.up, std=0.3)
    model.trunk.requires_grad_(False)
    gram, gradients = in_two_parts(model, ["blocks.1"], batches)

    chosen = [p for name, layer in model.adapters.layers.items() if "blocks_1" in name for p in layer.parameters()]
    of_task = []
    for loss in task_losses(model, batches):
        parts = torch.autograd.grad(loss, chosen, retain_graph=True, materialize_grads=True)
        of_task.append(torch.cat([part.flatten() for part in parts]))
    of_task = torch.stack(of_task)
    torch.testing.assert_close(gram, of_task @ of_task.T, rtol=1e-6, atol=1e-9)
    (task_losses(model, batches) @ WEIGHTS).backward()
    assert_same(gradients, gradients_of(model))


@pytest.mark.parametrize("name", ["blocks.3", "blocks.1.mlp", "final_norm", "tokens", ""])
def test_a_name_without_linear_layers(name):
    with pytest.raises(ValueError, match=f"'{name}' names no linear layer of the trunk"):
        BalancedBackward(make_model(CAUSAL), [name])


def test_tokens_of_a_task():
    packed = BATCHES["one batch"][0]
    tasks = packed.task_of_token()
    assert tasks[: packed.real_tokens].diff().min() == 0
    assert (tasks[packed.real_tokens :] == len(TASKS)).all()
    assert torch.equal(tasks[packed.rows.token], packed.rows.task)
    assert packed.token_offsets[-1] == packed.real_tokens
