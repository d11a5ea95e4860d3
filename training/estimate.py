"""`trunkline estimate`: memory, arithmetic and time of a run, before it is started.

Batches are made as the run will make them, and a step on them is gone through with tensors that have a shape and a
dtype but no content (PyTorch's FakeTensorMode). What is counted is which tensors are made and when they are let go, so
the estimate follows the model whatever is changed about it. Not in it: evaluation and generation, methods of balancing
that hold several batches, compiled graphs, and what the allocator rounds up.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trunkline.engine.config import Config, with_vocabulary
from trunkline.engine.engine import make_model
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import PackedBatch
from trunkline.kernels.attention.pack_plan import TILE_SIZES
from trunkline.kernels.products import mm
from trunkline.kernels.vocabulary.chunks import chunk_rows
from trunkline.training.data.batches import Packer, make_mixer
from trunkline.training.data.corpus import load_corpus
from trunkline.training.distributed.cost import LINKS, replicated, sharded
from trunkline.training.distributed.launch import too_few_batches
from trunkline.training.flops import training_flops
from trunkline.training.pages.units import duration, quantity
from trunkline.training.run.optimizer import freeze

LOOKED_AT, GONE_THROUGH = 32, 2  # batches of the run; and of these, those with the most labelled rows
CUBLAS = 32 << 20  # bytes that cuBLAS works in, on H100 and later
UTILISATION = {"cuda": 0.4, "cpu": 0.6}  # share of a device's rate that a step reaches: assumed, what is aimed for

# Dense bfloat16 products with float32 sums, TFLOP/s, and memory, GB; from NVIDIA's data sheets.
DEVICES = {
    "L4": (121, 24),
    "RTX 4090": (165, 24),
    "A100": (312, 80),
    "H100": (989, 80),
    "H200": (989, 141),
    "B200": (2250, 180),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the forward pass of a batch keeps for its backward pass
    peak: int  # the most that exists at a time


class Allocations(TorchDispatchMode):
    """A context that counts the bytes of all tensors made in it: those alive, and the most there were.

    Args:
        model: whose tensors are there already; views of them are no new ones.
        inside: bytes that an op needs while it runs, beside its inputs and outputs, by its name.
    """

    def __init__(self, model: nn.Module, inside: Mapping[str, int]):
        super().__init__()
        self.inside = inside
        self.now = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, outputs)
        self.peak = max(self.peak, self.now + self.inside.get(func.name(), 0))
        return outputs

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._let_go, storage.nbytes())

    def _let_go(self, size: int) -> None:
        self.now -= size


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[dict[int, int]]:
    """A context that collects what a forward pass saves for its backward pass, less the model's own tensors.

    Yields:
        Bytes by storage.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def step_memory(config: Config, batches: Sequence[PackedBatch], device: str) -> Memory:
    """The memory of a step on the largest of these batches.

    Args:
        config: with the size of the vocabulary in its trunk.
        batches: on the host.
        device: 'cpu': all in float32; 'cuda': products in bfloat16.
    """
    written = sorted(batches, key=lambda batch: len(batch.rows.token))[-GONE_THROUGH:]
    activations = made = 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_model(config).train()
        freeze(model, config.optimizer.freeze, torch.bfloat16 if device == "cuda" else None)
        assert isinstance(model, MultiTaskModel)
        model.trunk.checkpointing = config.checkpointing
        for batch in written:
            model.zero_grad()
            with Allocations(model, _inside_kernels(model, batch, device)) as allocations:
                for _ in range(min(config.batch.accumulate, 2)):  # from the second on, the gradients are there
                    with saved_tensors(model) as saved, _products(device):
                        loss = model(batch).loss.sum()
                    loss.backward()
            activations, made = max(activations, sum(saved.values())), max(made, allocations.peak)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in learnt)
    optimizer = sum(2 * parameter.nbytes + 4 for parameter in learnt)  # two means and the step
    peak = weights + optimizer + max(made, gradients) + (CUBLAS if device == "cuda" else 0)
    return Memory(weights, gradients, optimizer, activations, peak)


def _products(device: str) -> AbstractContextManager:
    """Tensors without content are on the CPU, whatever they stand for."""
    return torch.autocast("cpu", torch.bfloat16) if device == "cuda" else nullcontext()


def _inside_kernels(model: MultiTaskModel, batch: PackedBatch, device: str) -> dict[str, int]:
    """Bytes by op: logits of a chunk of rows; and on a CPU attention's tiles, which a GPU never has in memory."""
    rows = sum(batch.rows.counts[model.num_small + model.num_spans :])
    V, itemsize = model.trunk.config.vocab_size, 2 if device == "cuda" else 4
    inside = {"trunkline::linear_cross_entropy": chunk_rows(rows, V, itemsize, device) * V * itemsize}
    if device == "cpu":
        inside["trunkline::attention_backward"] = _attention_on_cpu(model, batch)
    return inside


def _attention_on_cpu(model: MultiTaskModel, batch: PackedBatch) -> int:
    """Bytes of the backward pass: in tiles of one width q, k, v, out, four gradients and one of these as tokens again;
    of two long sequences that follow one another three gradients each."""
    config, plan = model.trunk.config, batch.plan
    narrow, wide = plan.narrow_tiles, len(plan.tiles) - plan.narrow_tiles  # all of one width are worked on at once
    slots = max(narrow * TILE_SIZES[0], wide * TILE_SIZES[1])
    return 4 * config.num_heads * config.head_width * max(9 * slots, 6 * plan.max_seqlen)


def matrix_rate(seconds: float = 1.0) -> float:
    """FLOP/s of large float32 products on this machine's CPU, by the library that linear layers take."""
    a, b = torch.ones(2, 1024, 1024)
    mm(a, b)
    began, count = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds or not count:
        mm(a, b)
        count += 1
    return 2 * 1024**3 * count / took


def estimate(config: Config, tell: Callable[[str], None], machines: int = 1) -> dict[str, Memory]:
    """Reads the data of a run, tells what the run will take, and returns the memory by kind of device.

    Args:
        machines: that `config.devices` are shared out over.

    Raises:
        ValueError: the data cannot be used, as when the run is started; the model is no trunk; or devices that cannot
            be shared out so.
    """
    ranks = _ranks(config, machines)
    if config.architecture != "trunk":
        raise ValueError(f"estimate: what architecture '{config.architecture}' takes is not known beforehand")
    corpus = load_corpus(config, tell=tell)
    config = with_vocabulary(config, corpus.tokenizer)
    mixer, packer = make_mixer(config, corpus), Packer(corpus.train, config)
    numbers = range(min(LOOKED_AT, config.steps * config.batch.accumulate))
    batches = packer.batches(mixer, numbers)
    of_rank = replace(config, batch=replace(config.batch, accumulate=-(-config.batch.accumulate // ranks)))
    memory = {device: step_memory(of_rank, batches, device) for device in ("cpu", "cuda")}
    with FakeTensorMode():
        model = make_model(config)
        assert isinstance(model, MultiTaskModel)
    adapters = 0 if model.adapters is None else sum(p.numel() for p in model.adapters.parameters())
    total, trunk = (sum(p.numel() for p in part.parameters()) for part in (model, model.trunk))
    flops = config.batch.accumulate * fmean(training_flops(model, batch) for batch in batches)

    of_adapters = f", adapters {adapters:,}" if adapters else ""
    tell(f"parameters: {total:,}; trunk {trunk:,}{of_adapters}, heads {total - trunk - adapters:,}")
    if model.adapters is not None:
        count = len(model.adapters.names)
        each = quantity(4 * 4 * adapters / count, "B")  # weights, gradients and two means in float32
        tell(f"each of {count} adapters takes {each} in training, and a text a pass through the trunk in predicting")
    tell(
        f"arithmetic: {flops / 1e12:.3g} TFLOP a step, {flops * config.steps / 1e15:.3g} PFLOP in {config.steps} steps"
    )
    for device, title in (("cpu", "a CPU, float32"), ("cuda", "a GPU, products in bfloat16")):
        parts = ", ".join(f"{name} {quantity(value, 'B')}" for name, value in vars(memory[device]).items())
        tell(f"memory on {title}: {parts}")
    if config.balancing.method != "fixed":
        tell(f"balancing.method {config.balancing.method} takes more memory than that, and some more time")

    here = f"this CPU, {torch.get_num_threads()} threads"
    rates = {here: ("cpu", matrix_rate(), inf)}
    rates |= {name: ("cuda", peak * 1e12, gigabytes * 1e9) for name, (peak, gigabytes) in DEVICES.items()}
    tell(f"\n{'device':24} {'TFLOP/s':>8} {'of which':>8} {'ms a step':>10} {'the run':>12}")
    for name, (device, rate, room) in rates.items():
        seconds = flops / ranks / (UTILISATION[device] * rate)
        fits = memory[device].peak < room
        tell(
            f"{name:24} {rate / 1e12:8.4g} {UTILISATION[device]:8.0%} {1e3 * seconds:10.3g} "
            f"{duration(seconds * config.steps):>12}{'' if fits else '   does not fit'}"
        )
    tell("rates: of a GPU as its maker states, of this CPU as just measured; the share that is reached is assumed")
    if ranks > 1:
        tell(f"time: of {ranks} such devices; what they exchange comes to it where it is not hidden")
        _tell_of_ranks(of_rank, memory["cuda"], ranks, machines, tell)
    tell("time: of the arithmetic of training; small models take longer, and evaluation and reading data are not in it")
    return memory


def _ranks(config: Config, machines: int) -> int:
    ranks = config.devices
    if ranks == "all":
        raise ValueError("estimate: devices must be a number, for of how many 'all' would be nobody knows here")
    if machines < 1 or ranks % machines:
        raise ValueError(f"estimate: nodes must be a number that divides devices {ranks}, got {machines}")
    if ranks > config.batch.accumulate:
        raise ValueError(too_few_batches(config.batch.accumulate, ranks))
    if config.slices and ranks % config.slices:
        raise ValueError(f"estimate: slices {config.slices} must divide devices {ranks}")
    return ranks


def _tell_of_ranks(config: Config, memory: Memory, ranks: int, machines: int, tell: Callable[[str], None]) -> None:
    """`config`: of one rank, with as many batches as it has in a step."""
    with torch.device("meta"):
        model = make_model(config)
    freeze(model, config.optimizer.freeze, torch.bfloat16)
    assert isinstance(model, MultiTaskModel)
    costs = {
        "replicate": replicated(memory, ranks),
        "shard": sharded(model, memory, ranks, config.batch.accumulate),
    }
    if slices := config.slices:
        costs[f"by {slices}"] = sharded(model, memory, ranks, config.batch.accumulate, slices)
    tell(f"\n{ranks} GPUs on {machines} machines, products in bfloat16; exchange where nothing hides it")
    links = "".join(f" {link:>22}" for link in LINKS)
    tell(f"{'parallel':12} {'a GPU holds':>12} {'sends a step':>13}{links}")
    for name, cost in costs.items():
        took = "".join(f" {1e3 * cost.seconds(link, ranks // machines):19.3g} ms" for link in LINKS)
        tell(f"{name:12} {quantity(cost.memory, 'B'):>12} {quantity(cost.exchanged, 'B'):>13}{took}")
