"""Training steps with low-rank adapters: beside full fine-tuning, beside Hugging Face and PEFT, and of many adapters.

    python benchmarks/systems/adapters.py [--rounds 3] [--tokens 2048] [--quick]

The shape of SmolLM2-135M with random weights, float32; eight tasks of two classes, on texts of 8 to 96 random tokens;
adapters of rank 16 on every linear layer of the blocks. A step is forward, backward and AdamW:

    full                  the whole trunk learns
    adapters              one of each task
    shared adapter        one of all
    PEFT                  one of all, Hugging Face's model; the same texts in padded batches, grouped by length
    PEFT, 8 runs          a step of each of eight runs, one after the other, with an eighth of the tokens each
    1 adapter, 100 adapters   as `shared adapter` and `adapters`, of 100 tasks, on the same rows

Hugging Face's batches may mix tasks, which costs it nothing here: all heads are one linear layer. The eight runs are
steps of one model, since what a step costs does not depend on the weights. Before anything is timed, its hidden states
are held against ours. All take turns in one process, round after round; ratios are of the times of one round.
`--quick` tries all of it on a small model, and records nothing.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.benchmarks.microbenchmarks.measure import in_turns
from trunkline.benchmarks.record import record
from trunkline.engine.adapting import make_adapters
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.engine.settings import Adapters, Optimizer
from trunkline.engine.tasks.task import Task
from trunkline.training.environment import environment
from trunkline.training.run.optimizer import freeze, make_optimizer

SMOLLM2 = TrunkConfig(
    vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, intermediate_size=1536,
    max_positions=8192, positions="rotary", rope_theta=100000.0, norm="rms", activation="swiglu", bias=False,
)  # fmt: skip
SMALL = replace(SMOLLM2, vocab_size=512, hidden_size=192, num_layers=2, num_heads=3, num_kv_heads=1)
TASKS, MANY, RANK = 8, 100, 16
WARM_UP = 1  # rounds

Step = Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--quick", action="store_true", help="a small model; nothing is recorded")
    options = parser.parse_args()
    keep_freed_memory()
    shape, rounds = SMALL if options.quick else SMOLLM2, WARM_UP + options.rounds
    few, many = ([texts(tasks, options.tokens, shape, number) for number in range(rounds)] for tasks in (TASKS, MANY))
    trunk = Trunk(shape)  # stays as it is: all that have adapters share it
    ours = {
        "full": Ours(Trunk(shape), few, TASKS, None),
        "adapters": Ours(trunk, few, TASKS, Adapters(RANK)),
        "shared adapter": Ours(trunk, few, TASKS, Adapters(RANK, of="shared")),
        "1 adapter": Ours(trunk, many, MANY, Adapters(RANK, of="shared")),
        "100 adapters": Ours(trunk, many, MANY, Adapters(RANK)),
    }
    grouped = by_length([example for batch in few for example in batch], rounds)
    of_task = [by_length([e for batch in few for e in batch if e.task == t], rounds) for t in range(TASKS)]
    peft = Peft(trunk)
    hold_against(ours["shared adapter"], peft, few[0])
    steps: dict[str, Step] = {name: system.step for name, system in ours.items()}
    steps["PEFT"] = lambda number: peft.step(grouped[number])
    steps["PEFT, 8 runs"] = lambda number: [peft.step(batches[number]) for batches in of_task]
    seconds = in_turns(steps, options.rounds, warm_up=WARM_UP)

    runs = [batch for batches in of_task for batch in batches[WARM_UP:]]
    theirs = {"PEFT": sum(map(real_tokens, grouped[WARM_UP:])), "PEFT, 8 runs": sum(map(real_tokens, runs))}
    tokens = dict.fromkeys(ours, options.rounds * options.tokens) | theirs
    rates = {name: tokens[name] / sum(times) for name, times in seconds.items()}
    of_one_task = (ours["adapters"].held() - ours["shared adapter"].held()) / (TASKS - 1)
    content = {
        "command": f"python benchmarks/systems/adapters.py --rounds {options.rounds} --tokens {options.tokens}",
        "unit": "seconds a step",
        "threads": torch.get_num_threads(),
        "tokens": options.tokens,
        "padding": {"PEFT": padding(grouped[WARM_UP:]), "PEFT, 8 runs": padding(runs)},
        "seconds": seconds,
        "tokens_per_second": rates,
        "ratios": {
            "time, adapters / full": over(seconds, "adapters", "full"),
            "time, adapters / shared adapter": over(seconds, "adapters", "shared adapter"),
            "time, 100 adapters / 1 adapter": over(seconds, "100 adapters", "1 adapter"),
            "real tokens/s, shared adapter / PEFT": rates["shared adapter"] / rates["PEFT"],
            "real tokens/s, adapters / PEFT, 8 runs": rates["adapters"] / rates["PEFT, 8 runs"],
            "memory, one more task / trunk": of_one_task / bytes_of(trunk.parameters()),
            "memory, one more task / full": of_one_task / ours["full"].held(),
        },
    }  # fmt: skip
    for name, times in seconds.items():
        print(f"{name:18} {1000 * median(times):10,.1f} ms a step {rates[name]:10,.0f} real tokens/s")
    for name, ratio in content["ratios"].items():
        print(f"{name:42} {ratio:.3f}")
    if not options.quick:
        record("adapters", content, environment())


def over(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The machine's speed changes from round to round; the times of one round belong together."""
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def texts(tasks: int, tokens: int, shape: TrunkConfig, number: int) -> list[Example]:
    """Texts with a class, in turn of the tasks, of just so many tokens together: of 8 to 96, or where there are many
    tasks so short that about every one has a text."""
    random = np.random.default_rng(number)
    longest = min(96, 2 * (tokens // tasks) - 8)
    lengths = random.integers(8, longest, tokens // 8)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), tokens)]
    lengths[-1] += tokens - lengths.sum()
    return [
        Example(i % tasks, random.integers(0, shape.vocab_size, n), np.array([n - 1]), random.integers(0, 2, 1))
        for i, n in enumerate(lengths)
    ]


def by_length(examples: Sequence[Example], batches: int) -> list[list[Example]]:
    """Batches of about as many tokens, each of texts of similar length; in an order that has nothing to do with it."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    ends = np.cumsum([len(example.tokens) for example in ordered])
    place = np.minimum((ends - 1) * batches // ends[-1], batches - 1)
    members = [[ordered[i] for i in np.flatnonzero(place == batch)] for batch in range(batches)]
    return [members[i] for i in np.random.default_rng(0).permutation(batches)]


def real_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.tokens) for example in examples)


def padding(batches: Sequence[Sequence[Example]]) -> float:
    """Share of the tokens that are gone through."""
    through = sum(len(batch) * max(len(example.tokens) for example in batch) for batch in batches)
    return 1 - sum(map(real_tokens, batches)) / through


def bytes_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class Ours:
    """A model of ours in training; without adapters all of it learns."""

    def __init__(self, trunk: Trunk, batches: Sequence[Sequence[Example]], tasks: int, adapters: Adapters | None):
        torch.manual_seed(0)
        of_tasks = [Task(f"task-{t}", "classify", ("text",), "label", ("no", "yes")) for t in range(tasks)]
        made = make_adapters(adapters, trunk, [task.name for task in of_tasks]) if adapters else None
        self.model = MultiTaskModel(trunk, of_tasks, adapters=made)
        freeze(self.model, [])
        self.optimizer = make_optimizer(self.model, Optimizer())
        self.batches = [pack(examples, tasks) for examples in batches]

    def step(self, number: int) -> None:
        sums = self.model(self.batches[number])
        (sums.loss / sums.weight.clamp(min=1)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of what learns, its gradients, and what AdamW keeps of it."""
        states = [x for state in self.optimizer.state.values() for x in state.values()]
        return 2 * bytes_of(p for p in self.model.parameters() if p.requires_grad) + bytes_of(states)


class Peft(nn.Module):
    """What people do: Hugging Face's model of the same weights, an adapter of PEFT's, and a head for every task."""

    def __init__(self, trunk: Trunk):
        import peft

        super().__init__()
        config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
        self.trunk = peft.get_peft_model(trunk.to_hugging_face().base_model, config)
        self.heads = nn.Linear(trunk.config.hidden_size, 2 * TASKS)
        self.optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3, fused=True)

    def hidden(self, examples: Sequence[Example]) -> Tensor:
        """(B, D) at the last token of every text."""
        tokens = [torch.from_numpy(example.tokens) for example in examples]
        lengths = torch.tensor([len(text) for text in tokens])
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        states = self.trunk(ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return states[torch.arange(len(ids)), lengths - 1]

    def step(self, examples: Sequence[Example]) -> None:
        tasks = torch.tensor([example.task for example in examples])
        labels = torch.tensor([int(example.targets[0]) for example in examples if example.targets is not None])
        logits = self.heads(self.hidden(examples)).unflatten(1, (TASKS, 2))[torch.arange(len(tasks)), tasks]
        F.cross_entropy(logits, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def hold_against(ours: Ours, peft: Peft, examples: Sequence[Example]) -> None:
    """Adapters that have not learnt add nothing: both are the trunk."""
    batch = ours.batches[0]
    expected = peft.hidden([examples[i] for i in batch.order])
    torch.testing.assert_close(ours.model.hidden(batch), expected, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
