"""Real tokens per second of a whole training step: Trunkline beside three ways of doing it with Hugging Face.

    python benchmarks/step.py DATA [--seconds 10] [--rounds 3]

DATA is laid out like the hub: eight GLUE tasks and DialogSum, at most 2,000 examples of each, mixed alike. All systems
train the same GPT-2 shape with the same optimizer on batches of about 2,048 tokens. Each runs in a process of its own,
which waits while the others are timed; they take turns, round after round. A token is real if it is no padding.

The table also has 9 against 300 classification heads on the same tokens.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from trunkline.benchmarks.record import record
from trunkline.engine.memory import keep_freed_memory
from trunkline.engine.model import MultiTaskModel
from trunkline.engine.packing import Example, PackedBatch, pack
from trunkline.engine.trunk import Trunk, preset

if TYPE_CHECKING:
    from trunkline.training.config import Config
    from trunkline.training.corpus import Corpus

BUDGET, MAX_LENGTH, VOCABULARY, EXAMPLES = 2048, 512, 8192, 2000
TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "qqp", "qnli", "mnli", "dialogsum")
WARM_UP = 5  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    systems = ["trunkline", "padded", "grouped", "packed", "9 heads", "300 heads"]
    rates: dict[str, list[float]] = {system: [] for system in systems}
    waste: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    workers = {}
    for system in systems:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(system, options.data, theirs), daemon=True)
        process.start()
        print(f"{system}: ready, {ours.recv()}", flush=True)  # one after the other: getting ready takes both cores too
        workers[system] = ours
    for _ in range(options.rounds):
        for system, connection in workers.items():
            connection.send(options.seconds)
            real, padding, seconds = connection.recv()
            rates[system].append(real / seconds)
            waste[system] = padding / (real + padding)
    for process in multiprocessing.active_children():
        process.terminate()
    report(rates, waste, options)


def work(system: str, data: Path, connection) -> None:
    """Trains one system for as many seconds as it is told to, again and again."""
    torch.manual_seed(0)
    step, parameters = SYSTEMS[system](data) if system in SYSTEMS else hugging_face(data, system)
    for _ in range(WARM_UP):
        step()
    connection.send(f"{parameters:,} parameters")
    while True:
        seconds = connection.recv()
        began, real, padding = time.perf_counter(), 0, 0
        while time.perf_counter() - began < seconds:
            batch_real, batch_padding = step()
            real, padding = real + batch_real, padding + batch_padding
        connection.send((real, padding, time.perf_counter() - began))


Step = Callable[[], tuple[int, int]]  # one optimizer step: how many real tokens it saw, and how much padding


def trunkline(data: Path) -> tuple[Step, int]:
    """The eight GLUE tasks and DialogSum on the packed trunk."""
    from trunkline.training.loop import next_batch
    from trunkline.training.mixing import Mixer

    config = configured(data)
    corpus = read(config)
    mixer = Mixer([split.lengths for split in corpus.train], config.mixing, [], BUDGET, steps=100_000, seed=0)
    model = MultiTaskModel(trunk(corpus.tokenizer.vocab_size), corpus.tasks)
    numbers = iter(range(100_000))
    return _step(model, lambda: next_batch(corpus.train, mixer, next(numbers), config))


def heads(count: int) -> Callable[[Path], tuple[Step, int]]:
    """`count` tasks of two classes, all on the same examples."""

    def system(data: Path) -> tuple[Step, int]:
        from trunkline.training.tasks import Task

        tasks = [Task(f"task-{t}", "classify", ("text",), "label", ("no", "yes")) for t in range(count)]
        model = MultiTaskModel(trunk(VOCABULARY), tasks)
        rng = np.random.default_rng(0)

        def batch() -> PackedBatch:
            lengths = rng.integers(8, 96, 200)
            lengths = lengths[lengths.cumsum() <= BUDGET]
            examples = [
                Example(i % count, rng.integers(0, VOCABULARY, n), np.array([n - 1]), rng.integers(0, 2, 1))
                for i, n in enumerate(lengths, int(rng.integers(count)))
            ]
            return pack(examples, count, BUDGET)

        return _step(model, batch)

    return system


def _step(model: MultiTaskModel, batches: Callable[[], PackedBatch]) -> tuple[Step, int]:
    keep_freed_memory()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)

    def step() -> tuple[int, int]:
        batch = batches()
        sums = model(batch)
        (sums.loss / sums.weight.clamp(min=1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return batch.real_tokens, len(batch.tokens) - batch.real_tokens

    return step, sum(p.numel() for p in model.parameters())


SYSTEMS = {"trunkline": trunkline, "9 heads": heads(9), "300 heads": heads(300)}


def hugging_face(data: Path, way: str) -> tuple[Step, int]:
    from trunkline.benchmarks.hugging_face import HuggingFaceModel
    from trunkline.benchmarks.hugging_face import batches as made
    from trunkline.training.mixing import shares

    config = configured(data)
    corpus = read(config)
    model = HuggingFaceModel(shape(corpus.tokenizer.vocab_size), corpus.train)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    sizes = [len(split) for split in corpus.train]
    stream: Iterator = made(way, corpus.train, shares(config.mixing, sizes, [], 0.0).tolist(), BUDGET, seed=0)

    def step() -> tuple[int, int]:
        batch = next(stream)
        model(batch, torch.device("cpu")).backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths = [int(corpus.train[t].lengths[i]) for t, i in batch[0]]
        padding = 0 if batch[1] else max(lengths) * len(lengths) - sum(lengths)
        return sum(lengths), padding

    return step, sum(p.numel() for p in model.parameters())


def shape(vocab_size: int):
    """The GPT-2 shape, with GPT-2's own positions and activation."""
    return preset("tiny", vocab_size=vocab_size, positions="learned", activation="gelu_tanh")


def trunk(vocab_size: int) -> Trunk:
    return Trunk(shape(vocab_size))


def configured(data: Path) -> "Config":
    from trunkline.training.config import Batch, Config

    batch = Batch(BUDGET, max_length=MAX_LENGTH)
    return Config(tasks=TASKS, data=str(data), trunk=shape(VOCABULARY), vocab_size=VOCABULARY, batch=batch)


def read(config: "Config") -> "Corpus":
    """The corpus, with the first examples of every task only."""
    from trunkline.training.corpus import load_corpus

    corpus = load_corpus(config)
    return replace(corpus, train=tuple(first(split, EXAMPLES) for split in corpus.train))


def first(split, count: int):
    """The first examples of a split."""
    return replace(split, bounds=split.bounds[: count + 1], label_bounds=split.label_bounds[: count + 1])


def report(rates: dict[str, list[float]], waste: dict[str, float], options: argparse.Namespace) -> None:
    """Prints the table and writes it as JSON."""
    from trunkline.training.environment import environment

    middle = {system: median(values) for system, values in rates.items()}
    best = max(middle[way] for way in ("padded", "grouped", "packed"))
    print(f"\n{'system':12} {'real tokens/s':>14} {'of the best peer':>17} {'padding':>8}   turns")
    for system, rate in middle.items():
        turns = " ".join(f"{value:,.0f}" for value in rates[system])
        ratio = f"{rate / best:.2f}x" if "heads" not in system else ""
        print(f"{system:12} {rate:14,.0f} {ratio:>17} {waste[system]:8.1%}   {turns}")
    print(f"300 heads take {middle['9 heads'] / middle['300 heads']:.3f}x the time of 9 heads")

    content = {
        "command": f"python benchmarks/step.py DATA --seconds {options.seconds:g} --rounds {options.rounds}",
        "unit": "real tokens/s, median of the turns",
        "tokens_per_second": middle,
        "turns": rates,
        "padding": waste,
        "best_peer": best,
        "time_300_heads_over_9": middle["9 heads"] / middle["300 heads"],
    }
    record("step", content, environment())


if __name__ == "__main__":
    main()
