"""How time per token and memory grow with a batch, a sequence, the tasks, the width and the data.

    python benchmarks/systems/scaling.py [--device cuda] [--steps 3] [--curves NAME ...]

Training steps of the shape `tiny` on generated batches: forward, backward and optimizer; one thing is varied at a time.
The data set has generated lengths only, and what is measured there is what the host does: a run's first batch (the
mixer plans the whole run before it), and every further one, drawn and packed.

Flat should be: time per token over tokens a step, over tasks, and over the size of the data set. It grows with the
length of a sequence (attention looks at all tokens before) and with the width (so do the weights).
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from trunkline.benchmarks.plots import plot_scaling
from trunkline.benchmarks.record import record
from trunkline.benchmarks.systems.step import resident
from trunkline.benchmarks.systems.training_systems import VOCABULARY, autocast
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk, preset

TOKENS, LENGTH, TASKS, WIDTH = 2048, 64, 9, 256  # where they are not varied
BATCH, STEPS = 2048, 1900  # tokens and steps of the run whose batches are made from data of some size
CURVES: dict[str, dict[str, list[int]]] = {
    "tokens a step": {"cpu": [512, 1024, 2048, 4096, 8192], "cuda": [2048, 8192, 32768, 131072]},
    "tokens a sequence": {"cpu": [32, 128, 512, 2048, 8192], "cuda": [32, 128, 512, 2048, 8192, 16384]},
    "tasks": {"cpu": [1, 10, 100, 1000], "cuda": [1, 10, 100, 1000]},
    "width": {"cpu": [128, 256, 512, 1024], "cuda": [256, 512, 1024, 2048]},
    "examples, per batch": {"cpu": [10**n for n in range(3, 8)], "cuda": [10**n for n in range(3, 8)]},
    "examples, first batch": {"cpu": [10**n for n in range(3, 8)], "cuda": [10**n for n in range(3, 8)]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3, help="that are timed at each point")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    options = parser.parse_args()
    from trunkline.training.environment import environment

    kind = torch.device(options.device).type
    curves: dict[str, list[dict[str, Any]]] = {}
    for curve in options.curves:
        print(f"\n{curve:>22} {'µs a token':>12} {'MiB':>8}")
        curves[curve] = []
        for x in CURVES[curve][kind]:
            point = in_a_process(measure, curve, x, options.device, options.steps)
            curves[curve].append({"x": x, **point})
            print(f"{x:22,} {1e6 * point['seconds']:12,.3f} {point['memory'] / 2**20:8,.0f}", flush=True)
    content = {
        "command": f"python benchmarks/systems/scaling.py --steps {options.steps}",
        "unit": "seconds a token; bytes",
        "curves": curves,
    }
    plot_scaling(content, record("scaling", content, environment()).with_name("scaling.png"))


def in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Memory is a process's own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(curve: str, x: int, device: str, steps: int) -> dict[str, Any]:
    """Seconds a token, and bytes more than before."""
    match curve:
        case "tokens a step":
            return training(device, steps, tokens=x)
        case "tokens a sequence":
            return training(device, steps, tokens=max(x, TOKENS), length=x)
        case "tasks":
            return training(device, steps, tasks=x)
        case "width":
            return training(device, steps, width=x)
        case "examples, per batch":
            return batching(x, first=False)
        case _:
            return batching(x, first=True)


def training(
    device_name: str, steps: int, tokens: int = TOKENS, length: int = LENGTH, tasks: int = TASKS, width: int = WIDTH
) -> dict[str, Any]:
    """Sequences of one length, each with a class."""
    from trunkline.engine.settings import Optimizer
    from trunkline.engine.tasks.task import Task
    from trunkline.training.run.optimizer import make_optimizer

    device, rng = torch.device(device_name), np.random.default_rng(0)
    keep_freed_memory()
    examples = [
        Example(i % tasks, rng.integers(0, VOCABULARY, length), np.array([length - 1]), rng.integers(0, 2, 1))
        for i in range(tokens // length)
    ]
    batch = pack(examples, tasks, tokens).to(device)
    before = resident()
    of_tasks = [Task(f"task-{t}", "classify", ("text",), "label", ("no", "yes")) for t in range(tasks)]
    shape = preset("tiny", vocab_size=VOCABULARY, hidden_size=width, num_heads=width // 64, max_positions=16384)
    model = MultiTaskModel(Trunk(shape), of_tasks).to(device)
    optimizer = make_optimizer(model, Optimizer())
    times, memory = [], 0
    for _ in range(steps + 1):
        began = time.perf_counter()
        with autocast(device):
            loss = model(batch).loss.sum()
        memory = max(memory, resident() - before)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated()
        times.append(time.perf_counter() - began)
    return {"seconds": median(times[1:]) / tokens, "memory": memory}


def batching(examples: int, first: bool) -> dict[str, Any]:
    """Nine tasks with examples of 8 to 128 tokens, a hundred times as many in the largest as in the smallest."""
    from trunkline.engine.settings import Mixing
    from trunkline.training.data.mixing import Mixer

    rng = np.random.default_rng(0)
    sizes = np.geomspace(1, 100, TASKS)
    sizes = np.maximum(sizes * examples / sizes.sum(), 2).astype(int)
    lengths = [rng.integers(8, 129, size) for size in sizes]
    text = np.zeros(128, np.int32)
    before, began = resident(), time.perf_counter()
    mixer = Mixer(lengths, Mixing(), [], BATCH, STEPS, seed=0)

    def make(step: int) -> None:
        members = mixer.batch(step)
        pack([Example(t, text[: lengths[t][i]], np.array([0]), np.array([0])) for t, i in members], TASKS, BATCH)

    make(0)
    seconds = time.perf_counter() - began
    if not first:
        began = time.perf_counter()
        count = 128
        for step in range(1, count + 1):
            make(step)
        seconds = (time.perf_counter() - began) / count
    return {"seconds": seconds / BATCH, "memory": resident() - before}


if __name__ == "__main__":
    main()
