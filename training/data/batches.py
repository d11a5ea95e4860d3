"""The batches of a run, packed on the host and, for a GPU, ahead of the step that they are for."""

import signal
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trunkline.engine.config import Config
from trunkline.engine.network.compiled import FixedShapes
from trunkline.engine.network.packing import PackedBatch, pack
from trunkline.kernels.attention.on_device import Flat
from trunkline.training.data.corpus import Corpus
from trunkline.training.data.encoded import Encoded
from trunkline.training.data.mixing import Mixer

Members = Sequence[tuple[int, int]]  # (task, example) of everything in a batch
WORKERS, AHEAD = 2, 4  # processes that pack for a GPU, and how many batches each has ready


class Packer:
    """Makes batches of the examples of the training splits, as a config says."""

    def __init__(self, train: Sequence[Encoded], config: Config):
        self.train, self.config = train, config

    def pack(self, members: Members, budget: int | None = None) -> PackedBatch:
        """A batch of these examples; `budget` as in `trunkline.engine.network.packing.pack`."""
        prompt, of_class = self.config.prompt_weight, self.config.class_weights
        splits = self.train
        examples = [splits[t].example(i, t, prompt, of_class.get(splits[t].task.name)) for t, i in members]
        return pack(examples, len(splits), budget)

    def batches(self, mixer: Mixer, numbers: Iterable[int]) -> list[PackedBatch]:
        """Batches of the run, by number, as training will make them."""
        return [self.pack(mixer.batch(number), self.config.batch.tokens) for number in numbers]

    def tokens(self, members: Members) -> int:
        """Tokens of these examples."""
        return sum(int(self.train[task].lengths[i]) for task, i in members)


class _Packed(Dataset):
    """What a worker does: members in, batch out. It has no state, so the order is the planner's alone."""

    def __init__(self, packer: Packer, shapes: FixedShapes | None):
        self.packer, self.shapes = packer, shapes

    def batch(self, members: Members) -> PackedBatch:
        batch = self.packer.pack(members, self.packer.config.batch.tokens)
        return self.shapes.pad(batch) if self.shapes else batch

    def __getitem__(self, members: Members) -> Flat[PackedBatch]:
        return Flat.of(self.batch(members))


def planned_and_packed(
    packer: Packer,
    mixer: Mixer,
    numbers: Iterable[int],
    device: torch.device,
    workers: int | None = None,
    shapes: FixedShapes | None = None,
) -> Iterator[tuple[Members, PackedBatch]]:
    """Batches by number, each with what is in it.

    On a GPU the host launches kernels while worker processes pack and pad: one buffer of pinned memory a batch. A CPU
    computes on all of its cores: there a batch is packed when it is wanted, which takes about a hundredth of the step.

    Args:
        shapes: that a compiled graph wants; None: batches are as they come.
        workers: processes; None: as many as the device is worth; 0: this one.
    """
    workers = (WORKERS if device.type == "cuda" else 0) if workers is None else workers
    dataset = _Packed(packer, shapes)
    waiting: deque[Members] = deque()

    def plan() -> Iterator[Members]:
        for number in numbers:
            waiting.append(mixer.batch(number))
            yield waiting[-1]

    packed: Iterator[PackedBatch]
    if workers:
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=plan(),
            num_workers=workers,
            prefetch_factor=AHEAD,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
        )
        with warnings.catch_warnings():  # of threads in a process that forks; a worker needs none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            packed = (flat.content() for flat in iter(loader))
    else:
        packed = map(dataset.batch, plan())
    for batch in packed:
        yield waiting.popleft(), batch


def make_mixer(config: Config, corpus: Corpus) -> Mixer:
    """Which examples every batch of a run sees."""
    return Mixer(
        [split.lengths for split in corpus.train],
        config.mixing,
        [config.mixing.shares.get(task.name, 0.0) for task in corpus.tasks],
        config.batch.tokens,
        config.steps * config.batch.accumulate,
        config.seed,
        config.evaluation.every * config.batch.accumulate if config.mixing.reacts else None,
    )


def weight_sums(batches: Sequence[PackedBatch], num_tasks: int) -> Tensor:
    """(N,) sum of the row weights of every task."""
    total = torch.zeros(num_tasks)
    for batch in batches:
        total.index_add_(0, batch.rows.task, batch.rows.weight)
    return total


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C, and what torchrun stops a rank with, go to all processes; when the workers end is for the run to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
