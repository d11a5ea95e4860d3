"""What a resumed run takes from a checkpoint: the optimizer's state to the bit, and the settings it must share."""

import re

import pytest
import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint import (
    CheckpointError,
    check_same,
    load,
    load_optimizer_tensors,
    optimizer_tensors,
    save,
)

# The optimizer


class Trained:
    """A model with its optimizer, in groups whose order is not the model's; the last layer has no gradient at first."""

    def __init__(self, fused: bool, seed: int):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 3), nn.Linear(7, 7))
        biases = [p for name, p in self.model.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in self.model.named_parameters() if name.endswith("weight")]
        groups = [{"params": biases, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, fused=fused)

    def step(self, seed: int, layers: int) -> None:
        torch.manual_seed(seed)
        self.optimizer.zero_grad()
        for layer in self.model[:layers]:
            for parameter in layer.parameters():
                parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        return {**self.model.state_dict(), **optimizer_tensors(self.optimizer, self.model.named_parameters())}


@pytest.mark.parametrize("fused", [False, True])
def test_training_goes_on_bit_for_bit(tmp_path, fused):
    original, resumed = Trained(fused, seed=1), Trained(fused, seed=2)
    for step in range(3):
        original.step(step, layers=2)
    state = optimizer_tensors(original.optimizer, original.model.named_parameters())
    assert state["1.bias.step"].dtype == torch.float32
    save(tmp_path, "step-3", {"model": original.model.state_dict(), "optimizer": state}, {})
    tensors, _ = load(tmp_path / "step-3")
    resumed.model.load_state_dict(tensors["model"])
    load_optimizer_tensors(resumed.optimizer, resumed.model.named_parameters(), tensors["optimizer"])
    for step in range(3, 6):
        original.step(step, layers=2 + step % 2)
        resumed.step(step, layers=2 + step % 2)
    torch.testing.assert_close(resumed.tensors(), original.tensors(), rtol=0, atol=0)
    assert original.tensors()["1.weight.step"] == 6
    assert original.tensors()["2.weight.step"] == 2
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.0, 0.1]
    assert tensors["optimizer"]["1.weight.step"] == 3  # the optimizer has its own copy


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"0.bias.exp_avg": None}, "0.bias.exp_avg: absent in the checkpoint, [40] now"),
        ({"2.weight.step": None}, "2.weight.step: absent in the checkpoint, [] now"),
        ({"3.bias.step": torch.ones(())}, "3.bias.step: [] in the checkpoint, absent now"),
        ({"1.bias.exp_avg_sq": torch.ones(4)}, "1.bias.exp_avg_sq: [4] in the checkpoint, [3] now"),
    ],
)
def test_an_incomplete_optimizer_is_refused_and_not_fresh(damage, words):
    original, resumed = Trained(fused=True, seed=1), Trained(fused=True, seed=2)
    original.step(0, layers=3)
    state = {**optimizer_tensors(original.optimizer, original.model.named_parameters()), **damage}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"1 shapes differ: {re.escape(words)}$"):
        load_optimizer_tensors(resumed.optimizer, resumed.model.named_parameters(), state)
    with pytest.raises(CheckpointError, match="18 shapes differ: "):
        load_optimizer_tensors(resumed.optimizer, resumed.model.named_parameters(), {})
    assert not resumed.optimizer.state


# Other settings


def test_settings_of_another_run_are_all_named(tmp_path):
    settings = {"batch": {"tokens": 2048, "limit": None}, "tasks": ("sst2", "cola"), "seed": 1, "trunk": {"width": 8}}
    save(tmp_path, "step-1", {}, {"settings": settings})
    _, state = load(tmp_path / "step-1")
    check_same(state["settings"], settings)
    now = {"batch": {"tokens": 4096, "limit": None}, "tasks": ("sst2",), "trunk": {"width": 8, "depth": 2}}
    with pytest.raises(ValueError, match="other settings: ") as refused:
        check_same(state["settings"], now)
    assert str(refused.value).split(": ", 1)[1].split("; ") == [
        "batch.tokens: 2048 in the checkpoint, 4096 now",
        "tasks: ['sst2', 'cola'] in the checkpoint, ['sst2'] now",
        "seed: 1 in the checkpoint, absent now",
        "trunk.depth: absent in the checkpoint, 2 now",
    ]


@pytest.mark.parametrize(("saved", "current"), [(0, None), ("1", 1), ({}, {"b": 1}), ({}, 1), ([1, 2], [2, 1])])
def test_small_differences_count(saved, current):
    check_same({"a": saved}, {"a": saved})
    with pytest.raises(ValueError, match=r": a(\.b)?: .+ in the checkpoint, .+ now$"):
        check_same({"a": saved}, {"a": current})
