"""A whole training step of nine tasks: fixed weights, weights from the tasks' gradients, and one backward pass a task.

    python benchmarks/systems/balancing.py [--rounds 15]

All three train the tiny trunk (width 256, 4 layers, vocabulary 8,192) on the same batches of 2,048 tokens: eight tasks
of short texts and one that writes. The last two give the tasks PCGrad's weights, from the last block's linear layers:
one as in training, the other with nine backward passes through the whole model. They take turns, round after round.
"""

import argparse
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from trunkline.benchmarks.microbenchmarks.measure import in_turns
from trunkline.benchmarks.record import record
from trunkline.engine.network.balanced_backward import linear_layers
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk, preset
from trunkline.engine.settings import Balancing
from trunkline.engine.tasks.task import Task
from trunkline.training.balancing.balancer import Balancer
from trunkline.training.balancing.methods import Seen, State, pcgrad
from trunkline.training.environment import environment

TASKS, BUDGET, VOCABULARY = 9, 2048, 8192
WARM_UP = 3  # rounds

Backward = Callable[[MultiTaskModel, PackedBatch, Tensor, int], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    batches = [batch_of(number).to(device) for number in range(WARM_UP + options.rounds)]
    systems = {
        "fixed weights": _steps(balanced("fixed"), batches, device),
        "weights from gradients": _steps(balanced("pcgrad"), batches, device),
        "a backward pass per task": _steps(one_pass_per_task(), batches, device),
    }
    seconds = in_turns(systems, options.rounds, warm_up=WARM_UP)
    # the machine's speed changes from round to round; the times of one round belong together
    fixed = seconds["fixed weights"]
    ratio = {name: median(t / f for t, f in zip(times, fixed, strict=True)) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:26} {1000 * median(times):8.1f} ms  {ratio[name]:.3f}x")
    content = {
        "command": f"python benchmarks/systems/balancing.py --rounds {options.rounds}",
        "unit": "seconds a step",
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "time_over_fixed": ratio,
    }
    record("balancing", content, environment())


def balanced(method: str) -> Callable[[MultiTaskModel], Backward]:
    """As training does it."""

    def make(model: MultiTaskModel) -> Backward:
        balancer = Balancer(Balancing(method), model, seed=0)

        def backward(model: MultiTaskModel, batch: PackedBatch, count: Tensor, number: int) -> None:
            factor = 1 / count.clamp(min=1)
            sums = balancer.forward(batch, factor, number)
            balancer.backward(sums.loss * factor, number)
            balancer.finish(count, number)

        return backward

    return make


def one_pass_per_task() -> Callable[[MultiTaskModel], Backward]:
    """As it is done without knowing that a token has one task."""

    def make(model: MultiTaskModel) -> Backward:
        chosen = [layer.weight for layer in linear_layers(model.trunk, ["last"]).values()]
        parameters = list(model.parameters())
        places = [next(i for i, p in enumerate(parameters) if p is weight) for weight in chosen]

        def backward(model: MultiTaskModel, batch: PackedBatch, count: Tensor, number: int) -> None:
            losses = model(batch).loss / count.clamp(min=1)
            of_task = [
                torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses
            ]
            own = torch.stack([torch.cat([gradients[i].flatten() for i in places]) for gradients in of_task])
            gram = (own @ own.T).double().cpu().numpy()
            seen = Seen(np.arange(TASKS), np.ones(TASKS), np.ones(TASKS), gram, number, np.random.default_rng(number))
            weights = losses.new_tensor(pcgrad(seen, State(TASKS)))
            for parameter, *gradients in zip(parameters, *of_task, strict=True):
                parameter.grad = torch.einsum("t...,t->...", torch.stack(gradients), weights)

        return backward

    return make


def _steps(
    make: Callable[[MultiTaskModel], Backward], batches: list[PackedBatch], device: torch.device
) -> Callable[[int], None]:
    torch.manual_seed(0)
    tasks = [Task(f"task-{t}", "classify", ("text",), "label", ("no", "yes")) for t in range(TASKS - 1)]
    tasks.append(Task("summary", "generate", ("text",), "label"))
    model = MultiTaskModel(Trunk(preset("tiny", vocab_size=VOCABULARY)), tasks).to(device)
    optimizer, backward = torch.optim.AdamW(model.parameters(), 3e-4, fused=True), make(model)

    def step(number: int) -> None:
        batch = batches[number]
        count = torch.zeros(TASKS, device=device).index_add_(0, batch.rows.task, batch.rows.weight)
        backward(model, batch, count, number)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def batch_of(number: int) -> PackedBatch:
    """Texts of 8 to 96 tokens with a class, in turn of the eight tasks, and three of 240 with a summary of 40."""
    random = np.random.default_rng(number)
    examples = [
        Example(TASKS - 1, tokens := random.integers(0, VOCABULARY, 240), np.arange(199, 239), tokens[200:])
        for _ in range(3)
    ]
    lengths = random.integers(8, 96, 60)
    for i, length in enumerate(lengths[lengths.cumsum() <= BUDGET - 3 * 240]):
        tokens = random.integers(0, VOCABULARY, length)
        examples.append(Example(i % (TASKS - 1), tokens, np.array([length - 1]), random.integers(0, 2, 1)))
    return pack(examples, TASKS, BUDGET)


if __name__ == "__main__":
    main()
