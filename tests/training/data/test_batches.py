"""Batches that are packed ahead by worker processes are those that are packed when they are wanted, in their order."""

import pickle
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from encoded import CLASSIFY, GENERATE, made
from trunkline.engine.config import Config
from trunkline.engine.network.compiled import FixedShapes
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.settings import Batch, Mixing
from trunkline.kernels.attention.on_device import Flat, OnDevice
from trunkline.training.data.batches import Packer, planned_and_packed
from trunkline.training.data.mixing import Mixer

TEXTS = ["x" * (1 + i % 30) for i in range(200)]


@pytest.fixture
def packer() -> Packer:
    train = [
        made(CLASSIFY, text=TEXTS, label=[i % 3 for i in range(200)]),
        made(GENERATE, text=TEXTS, label=["y" * (1 + i % 9) for i in range(200)]),
    ]
    config = Config(tasks=(CLASSIFY, GENERATE), batch=Batch(200, max_length=64), class_weights={"toy": [1.0, 2.0, 3.0]})
    return Packer(train, config)


def mixer(packer: Packer) -> Mixer:
    return Mixer([split.lengths for split in packer.train], Mixing(), [0.0, 0.0], 200, steps=50, seed=3)


def assert_same(found: OnDevice, expected: OnDevice) -> None:
    for field in fields(expected):
        mine, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, OnDevice):
            assert_same(mine, other)
        elif isinstance(other, torch.Tensor):
            assert torch.equal(mine, other), field.name
        else:
            assert mine == other, field.name


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_with_their_members(packer, workers):
    numbers = range(30, 42)  # over the end of a window
    planner, cpu = mixer(packer), torch.device("cpu")
    made = list(planned_and_packed(packer, mixer(packer), numbers, cpu, workers))
    assert [members for members, _ in made] == [planner.batch(number) for number in numbers]
    for members, batch in made:
        assert isinstance(batch, PackedBatch)
        assert_same(batch, packer.pack(members, 200))
        assert len(batch.tokens) == 200


class Copies(TorchDispatchMode):
    """Counts what is copied to another device."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func.overloadpacket.__name__ == "_to_copy"
        return func(*args, **kwargs or {})


def test_a_batch_is_one_buffer_and_one_copy(packer):
    """A tensor by itself would take every process a file, and a GPU's step a launch."""
    batch = packer.pack(mixer(packer).batch(0), 200)
    flat = pickle.loads(pickle.dumps(Flat.of(batch)))
    assert [value for value in vars(flat).values() if isinstance(value, torch.Tensor)] == [flat.buffer]
    found = flat.content()
    assert_same(found, batch)
    (storage,) = {x.untyped_storage().data_ptr() for x in (found.tokens, found.plan.spans, found.rows.weight)}
    assert storage == flat.buffer.untyped_storage().data_ptr()
    assert all(x.storage_offset() * x.itemsize % 64 == 0 for x in (found.tokens, found.plan.blocks, found.rows.value))
    assert found.plan.blocks is found.plan.key_blocks  # what is one tensor stays one
    with Copies() as copies:
        moved = found.to("meta")
    assert copies.found == 1
    assert moved.rows.token.device.type == moved.plan.tiles.device.type == "meta"
    changed = replace(found, tokens=found.tokens + 1)  # is no longer what lies in the buffer
    assert torch.equal(changed.to("cpu").tokens, batch.tokens + 1)


def test_workers_pad_for_the_graph(packer):
    """In the loop it took the host a millisecond a step, and what came of it was not pinned."""
    batches = [packer.pack(mixer(packer).batch(number), 200) for number in range(8)]
    shapes = FixedShapes.of(batches, (1, 0, 1))
    made = planned_and_packed(packer, mixer(packer), range(8), torch.device("cpu"), 1, shapes)
    for (_, batch), plain in zip(made, batches, strict=True):
        assert shapes.has(batch)
        assert not shapes.has(plain)
        assert batch.flat is not None
        assert_same(batch, shapes.pad(plain))


def test_a_cpu_has_no_workers(packer, monkeypatch):
    monkeypatch.setattr("trunkline.training.data.batches.DataLoader", lambda *_, **__: pytest.fail("a worker"))
    batches = planned_and_packed(packer, mixer(packer), range(3), torch.device("cpu"))
    assert len(list(batches)) == 3


def test_what_goes_wrong_in_a_worker_is_told(packer):
    packer.config.class_weights["toy"].clear()  # then there is no weight for any class
    with pytest.raises((IndexError, ValueError)):
        list(planned_and_packed(packer, mixer(packer), range(3), torch.device("cpu"), workers=1))


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned(packer):
    (_, batch), *_ = planned_and_packed(packer, mixer(packer), range(3), torch.device("cuda"))
    assert batch.tokens.is_pinned()
    assert batch.plan.spans.is_pinned()
    assert batch.flat is not None
    assert batch.plan.blocks is batch.plan.key_blocks  # what is one tensor stays one
    assert batch.to("cuda").rows.token.is_cuda
