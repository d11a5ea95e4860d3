"""Which parameter learns at which rate, and which not at all."""

import pytest
import torch

from trunkline import Engine, Task, Trunk, TrunkConfig
from trunkline.engine.foreign.adapter_files import adaptable
from trunkline.engine.foreign.pretrained import Origin
from trunkline.engine.network.adapters import Adapters
from trunkline.engine.network.bilstm import BiLSTM
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.settings import Batch, Optimizer
from trunkline.training.run.optimizer import ERASES, freeze, in_words, make_optimizer, rates, untouched

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = TrunkConfig(vocab_size=50, hidden_size=16, num_layers=3, num_heads=2, max_positions=64)
TASKS = [Task("class", "classify", ("text",), "label", ("a", "b")), Task("number", "regress", ("text",), "label")]


def make(foreign: bool = False) -> MultiTaskModel:
    trunk = Trunk(SHAPE)
    if foreign:
        trunk.origin = Origin.__new__(Origin)  # as what a checkpoint of others leaves
    return MultiTaskModel(trunk, TASKS)


def rate_of(model: torch.nn.Module, settings: Optimizer) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["rate"] for group in make_optimizer(model, settings).param_groups for p in group["params"]}


def test_from_scratch_everything_learns_at_one_rate():
    assert set(rate_of(make(), Optimizer()).values()) == {1e-3}
    assert set(rate_of(make(), Optimizer(learning_rate=3e-4)).values()) == {3e-4}


def test_on_a_checkpoint_of_others_heads_learn_faster():
    found = rate_of(make(foreign=True), Optimizer())
    assert {rate for name, rate in found.items() if name.startswith("trunk.")} == {1e-4}
    assert {rate for name, rate in found.items() if not name.startswith("trunk.")} == {1e-3}
    assert rates(make(foreign=True), Optimizer(learning_rate=5e-3)) == (5e-3, 5e-3)  # never below the trunk's
    assert rates(make(foreign=True), Optimizer(head_learning_rate=2e-5)) == (1e-4, 2e-5)


def test_lower_layers_learn_less():
    found = rate_of(make(), Optimizer(learning_rate=1.0, head_learning_rate=2.0, layer_decay=0.5))
    assert found["weight"] == found["bias"] == 2.0
    assert found["trunk.final_norm.weight"] == found["trunk.blocks.2.qkv.weight"] == 1.0
    assert (found["trunk.blocks.1.qkv.bias"], found["trunk.blocks.0.mlp_in.weight"]) == (0.5, 0.25)
    assert found["trunk.tokens.weight"] == found["trunk.positions.weight"] == 0.125


@pytest.mark.parametrize(
    ("parts", "frozen"),
    [
        (["embeddings"], ["tokens", "positions"]),
        (["blocks.0-1"], ["blocks.0", "blocks.1"]),
        (["blocks.1", "final_norm"], ["blocks.1", "final_norm"]),
        (["trunk"], ["tokens", "positions", "blocks.0", "blocks.1", "blocks.2", "final_norm"]),
    ],
)
def test_frozen_parts_have_no_place_in_the_optimizer(parts, frozen):
    model = make()
    freeze(model, parts)
    expected = {n for n, _ in model.trunk.named_parameters() if any(f"{n}.".startswith(f"{part}.") for part in frozen)}
    assert {n for n, p in model.trunk.named_parameters() if not p.requires_grad} == expected
    assert set(rate_of(model, Optimizer())).isdisjoint(f"trunk.{name}" for name in expected)
    assert "frozen: " in in_words(model, make_optimizer(model, Optimizer()), Optimizer())[-1]


def test_frozen_matrices_can_be_kept_in_bfloat16():
    model = make()
    freeze(model, ["blocks.0"], torch.bfloat16)
    kept = {n: p.dtype for n, p in model.trunk.named_parameters()}
    assert kept["blocks.0.qkv.weight"] == torch.bfloat16
    assert kept["blocks.0.qkv.bias"] == kept["blocks.1.qkv.weight"] == torch.float32


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("block.0", "the trunk has no 'block.0'; there are trunk, embeddings, blocks.0-2, tokens"),
        ("blocks.3", "the trunk has no 'blocks.3'"),
        ("blocks.1-3", "the blocks are 0 to 2"),
    ],
)
def test_a_part_that_there_is_not_is_named(part, message):
    with pytest.raises(ValueError, match=message):
        freeze(make(), [part])


def test_a_bilstm_has_nothing_to_freeze():
    with pytest.raises(ValueError, match="bilstm has none"):
        freeze(BiLSTM(SHAPE, TASKS), ["embeddings"])


def test_a_rate_that_erases_a_checkpoint_is_warned_of():
    def told(foreign: bool, freezes: bool = False, **settings) -> str:
        model = make(foreign)
        freeze(model, ["trunk"] if freezes else [])
        return "\n".join(in_words(model, make_optimizer(model, Optimizer(**settings)), Optimizer(**settings)))

    assert "soon erases" in told(foreign=True, learning_rate=ERASES)
    assert "soon erases" not in told(foreign=True)
    assert "soon erases" not in told(foreign=False, learning_rate=ERASES)
    assert "soon erases" not in told(foreign=True, freezes=True, learning_rate=ERASES)


def test_what_is_frozen_keeps_its_bits_and_the_rest_learns(tmp_path):
    engine = Engine(
        trunk=SHAPE,
        tasks=["sentiment", "similarity"],
        vocab_size=300,
        steps=1,
        batch=Batch(tokens=256, max_length=64),
        device="cpu",
        run=str(tmp_path / "one"),
    )
    engine.fit()
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters() if p.numel()}

    def changed(run: str, *parts: str) -> set[str]:
        engine.fit(run=str(tmp_path / run), steps=2, optimizer=Optimizer(freeze=parts))
        return {name for name, p in engine.model.named_parameters() if p.numel() and not torch.equal(p, before[name])}

    frozen = {name for name in before if name.startswith(("trunk.tokens", "trunk.positions", "trunk.blocks.0."))}
    assert changed("two", "embeddings", "blocks.0") == before.keys() - frozen
    assert changed("three") == before.keys()  # what was frozen in one run learns in the next


def test_the_adapter_of_an_absent_task_stays():
    """To the bit, and what AdamW keeps of it: its gradient is 0, but there are moments, and weight decay."""
    trunk = Trunk(SHAPE)
    model = MultiTaskModel(trunk, TASKS, adapters=Adapters(("class", "number"), (0, 1), adaptable(trunk), 2, 4.0))
    freeze(model, ())
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.1))
    layers = list(model.adapters.parameters())

    def step(examples: list[int]) -> list[torch.Tensor]:
        for parameter in layers:
            parameter.grad = torch.randn_like(parameter)
            for adapter in model.adapters.absent(examples):
                parameter.grad[adapter] = 0
        with untouched(optimizer, model, examples):
            optimizer.step()
        moments = [optimizer.state[p][key] for p in layers for key in ("exp_avg", "exp_avg_sq")]
        return [tensor.detach().clone() for tensor in (*layers, *moments)]

    before, after = step([3, 1]), step([2, 0])
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[1], other[1])
        assert not torch.equal(one[0], other[0])


def test_adapters_learn_faster_than_what_they_are_on():
    trunk = Trunk(SHAPE)
    model = MultiTaskModel(trunk, TASKS, adapters=Adapters(("all",), (0, 0), adaptable(trunk), 2, 4.0))
    freeze(model, ())
    trunk.origin = Origin.__new__(Origin)
    rate = rate_of(model, Optimizer(learning_rate=2e-5, head_learning_rate=0.5))
    assert {rate for name, rate in rate.items() if name.startswith("adapters.")} == {2e-5}
    rate = rate_of(model, Optimizer())
    assert not [name for name in rate if name.startswith("trunk.")]
    assert set(rate.values()) == {1e-3}
