"""Activation checkpointing: the same gradients, to the bit and with dropout, from less memory."""

import pytest
import torch
from test_balanced_backward import BATCHES, CAUSAL, WEIGHTS, in_two_parts, make_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trunkline.engine.config import Config
from trunkline.engine.network.compiled import CompiledModel, FixedShapes
from trunkline.engine.network.trunk import Checkpointing, Trunk, preset
from trunkline.engine.settings import Balancing
from trunkline.kernels.attention.pack_plan import PackPlan

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKPOINTED: list[Checkpointing] = ["block", "selective"]
LENGTHS = [60, 40, 20, 136]


def stream(lengths: list[int]) -> tuple[Tensor, Tensor, PackPlan]:
    """Tokens, positions and plan."""
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return torch.arange(sum(lengths)), torch.cat([torch.arange(n) for n in lengths]), PackPlan.of(bounds)


def gradients(trunk: Trunk) -> list[Tensor]:
    torch.manual_seed(7)
    out = trunk(*stream(LENGTHS), torch.tensor([3, 70, 250]))
    out.square().sum().backward()
    found = [parameter.grad for parameter in trunk.parameters()]
    trunk.zero_grad()
    return [out.detach(), *found]


@pytest.mark.parametrize("checkpointing", CHECKPOINTED)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_gradients(checkpointing, dropout):
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 64, "num_layers": 3, "norm": "rms", "activation": "swiglu"}
    trunk = Trunk(preset("tiny", dropout=dropout, **shape))
    expected = gradients(trunk)
    trunk.checkpointing = checkpointing
    torch.testing.assert_close(gradients(trunk), expected, rtol=0, atol=0)


class Alive(TorchDispatchMode):
    """Bytes that were allocated in here and are still held by somebody; views of parameters are none."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.known = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.known:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept_for_backward(checkpointing: Checkpointing) -> int:
    """Bytes between the forward and the backward pass of six layers."""
    torch.manual_seed(0)
    trunk = Trunk(preset("tiny", vocab_size=256, hidden_size=64, num_layers=6))
    trunk.checkpointing = checkpointing
    inputs = stream(LENGTHS)
    trunk(*inputs)  # what is remembered of a plan is not counted
    with Alive(trunk) as alive:
        out = trunk(*inputs)
    assert out.requires_grad
    return alive.bytes()


def test_memory():
    """A block in full keeps at least 13 times its input: that, what the norms give, queries, keys, values and the
    output of attention, 4 + 4 in the MLP. Selective keeps 11 of them, checkpointed blocks one."""
    none, block, selective = (kept_for_backward(way) for way in ("none", *CHECKPOINTED))
    assert block < none / 8
    assert block < selective < 0.7 * none


def test_gradients_of_tasks():
    """The balanced backward pass goes through the same graph twice."""
    model = make_model(CAUSAL)
    expected = in_two_parts(model, ["last"], BATCHES["two batches"])
    model.trunk.checkpointing = "block"
    torch.testing.assert_close(in_two_parts(model, ["last"], BATCHES["two batches"]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("balancing", [Balancing("pcgrad"), Balancing("fixed", watch=10)])
def test_selective_cannot_be_gone_through_twice(balancing):
    with pytest.raises(ValueError, match="checkpointing selective .* use block"):
        Config(tasks=("sentiment",), balancing=balancing, checkpointing="selective")
    assert Config(tasks=("sentiment",), balancing=balancing, checkpointing="block").checkpointing == "block"
    assert Config(tasks=("sentiment",), balancing=Balancing("famo"), checkpointing="selective")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it itself
def test_in_a_compiled_graph():
    torch._dynamo.reset()
    model = make_model(CAUSAL).float()
    batch = BATCHES["one batch"][0]
    shapes = FixedShapes.of([batch], model.groups)
    found = []
    for way in ("none", "selective"):
        model.trunk.checkpointing = way
        compiled = CompiledModel(model, shapes, backend="aot_eager")
        (compiled(shapes.pad(batch)).loss @ WEIGHTS.float()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0])
