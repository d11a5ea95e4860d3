"""What is estimated of many ranks against FSDP2's own slices and collectives, on a process group that is not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from trunkline.engine.config import Config, with_vocabulary
from trunkline.engine.engine import make_model
from trunkline.training import cli
from trunkline.training.config_file import load_config
from trunkline.training.data.batches import Packer, make_mixer
from trunkline.training.data.corpus import load_corpus
from trunkline.training.distributed.cost import Cost, replicated, sharded, slice_of
from trunkline.training.distributed.sharding import local, own_slices, shard
from trunkline.training.estimate import Memory, step_memory

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = ["trunk.hidden_size=64", "trunk.num_layers=3", "trunk.dropout=0", "vocab_size=512"]


class Exchanged(TorchDispatchMode):
    """A context that counts the bytes that collectives put together or take apart."""

    bytes = summed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather_base" in func.name():
            self.bytes += args[0].nbytes
        elif "reduce_scatter_base" in func.name():
            self.bytes += args[1].nbytes
        elif "allreduce" in func.name():
            self.summed += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def rank_of(ranks: int, slices: int = 0) -> Iterator[SimpleNamespace]:
    """The first of so many, whose groups send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        slices = slices or ranks
        across = [dist.new_group(range(0, ranks, slices)), dist.new_group(range(slices))]
        yield SimpleNamespace(
            device=dist.group.WORLD, size=ranks, slices=slices, across=across, copy_of_first=lambda model: None
        )
    finally:
        dist.destroy_process_group()


def prepared(tiny_config: Path, *values: str) -> tuple[Config, list]:
    config = load_config(tiny_config, [*WIDE, *values])
    corpus = load_corpus(config)
    packer = Packer(corpus.train, config)
    return with_vocabulary(config, corpus.tokenizer), packer.batches(make_mixer(config, corpus), range(2))


@pytest.mark.parametrize("values", ["", "adapters.rank=8"])
@pytest.mark.parametrize("ranks", [8, 64])
def test_slices_are_those_that_fsdp_makes(tiny_config, ranks, values):
    config, _ = prepared(tiny_config, *values.split())
    with torch.device("meta"):
        model = make_model(config)
    expected = slice_of(model, ranks)
    with rank_of(ranks) as first:
        shard(model, first, torch.device("cpu"))
        assert sum(local(parameter).nbytes for parameter in model.parameters()) == expected


@pytest.mark.parametrize("slices", [4, 2])
def test_bytes_are_those_of_the_collectives(tiny_config, slices):
    """Of a step of two batches on one of four ranks."""
    config, batches = prepared(tiny_config)
    model = make_model(config)
    cost = sharded(model, step_memory(config, batches, "cpu"), ranks=4, batches=2, slices=slices)
    with rank_of(4, slices) as first:
        shard(model, first, torch.device("cpu"))
        with Exchanged() as exchanged:
            for batch in batches:
                model(batch).loss.sum().backward()
    inside, replicas = exchanged.bytes * (slices - 1) / slices, 4 // slices
    assert cost.exchanged == pytest.approx(inside + exchanged.summed * 2 * (replicas - 1) / replicas, rel=0.01)
    assert bool(exchanged.summed) == (replicas > 1)
    assert cost.inside == (pytest.approx(inside, rel=0.01) if replicas > 1 else 0)  # slices are padded


def test_costs_by_hand():
    memory = Memory(weights=400, gradients=400, optimizer=800, activations=50, peak=1650)
    assert replicated(memory, 1) == Cost(1650, 0)
    assert replicated(memory, 4) == Cost(1650 + 400, 2 * 3 * 400 // 4)
    cost = Cost(0, 125_000_000)
    assert cost.seconds("400 Gbit/s a GPU", 8) == pytest.approx(2.5e-3)
    assert cost.seconds("100 Gbit/s a machine", 8) == pytest.approx(80e-3)
    mostly_inside = Cost(0, 125_000_000, inside=112_500_000, slices=8)
    assert mostly_inside.seconds("100 Gbit/s a machine", 8) == pytest.approx(8e-3 + 0.25e-3)
    assert mostly_inside.seconds("100 Gbit/s a machine", 4) == pytest.approx(40e-3)


def test_the_command_says_what_many_ranks_hold(tiny_config, capsys):
    values = ["devices=64", "nodes=8", "batch.accumulate=64", "parallel=shard", "slices=8"]
    assert cli.main(["estimate", str(tiny_config), *values]) == 0
    output = capsys.readouterr().out
    assert "64 GPUs on 8 machines" in output
    assert [line.split()[0] for line in output.splitlines() if line.startswith(("replicate", "shard", "by 8 "))] == [
        "replicate",
        "shard",
        "by",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["devices=64", "nodes=8"], "64 ranks need one each: set batch.accumulate to 64"),
        (["devices=8", "nodes=3", "batch.accumulate=8"], "nodes must be a number that divides devices 8, got 3"),
        (["devices=8", "batch.accumulate=8", "parallel=shard", "slices=3"], "slices 3 must divide devices 8"),
        (["devices=8", "nodes=many"], "nodes is a number of machines, got 'many'"),
        (["devices=all"], "devices must be a number"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(values, message, tiny_config, capsys):
    assert cli.main(["estimate", str(tiny_config), *values]) == cli.USER_ERROR
    assert message in capsys.readouterr().err


def test_a_slice_of_a_checkpoint_is_written_once():
    """By the first of its replicas: two ranks that write one file could leave parts of both."""

    def number(rank: int) -> int | None:
        ranks = SimpleNamespace(shards=True, rank=rank, slices=2, first=rank == 0, gather=list)
        return own_slices({"model": {"weight": torch.ones(2)}}, ranks)[1].number

    assert [number(rank) for rank in range(4)] == [0, 1, None, None]
