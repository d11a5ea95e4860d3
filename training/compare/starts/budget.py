"""How many steps each system makes, so that all spend as much as the first one does: tokens, FLOPs or seconds."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from trunkline.engine.config import Config, with_vocabulary
from trunkline.engine.console import tell
from trunkline.engine.engine import Engine, make_model
from trunkline.engine.network.packing import PackedBatch
from trunkline.training.compare.starts.started import parts_of
from trunkline.training.compare.systems import Basis, Part
from trunkline.training.data.batches import Packer, make_mixer
from trunkline.training.data.corpus import Corpus, load_corpus
from trunkline.training.flops import training_flops
from trunkline.training.pages.units import duration, quantity
from trunkline.training.run.optimizer import freeze, make_optimizer

BudgetUnit = Literal["tokens", "FLOPs", "seconds"]
COUNTED, TIMED = 8, 4  # steps whose operations are counted, and that are timed; the first one of these is left out


def with_budget(bases: Mapping[str, Basis], unit: BudgetUnit, file: Path) -> dict[str, Basis]:
    """The systems, each with as many steps as its budget has room for; says how many.

    Args:
        bases: the first one's steps are the budget.
        file: takes what a step was found to take, so that a comparison goes on with the same numbers elsewhere.

    Raises:
        ValueError: the budget leaves a system less than two steps for each of its models.
    """
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    per_step = known.get(unit, {})
    for system, basis in bases.items():
        if system not in per_step:
            parts = parts_of(system, basis, Path(), 0)
            costs = [part.config.steps * MEASURES[unit](part, basis) for part in parts]
            per_step[system] = sum(costs) / sum(part.config.steps for part in parts)
    if unit == "seconds":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known | {unit: per_step}, indent=1) + "\n", encoding="utf-8")
    first = next(iter(bases))
    budget = bases[first].config.steps * per_step[first]
    return {system: _with_steps(system, basis, unit, budget, per_step[system]) for system, basis in bases.items()}


def _with_steps(system: str, basis: Basis, unit: BudgetUnit, budget: float, per_step: float) -> Basis:
    config = basis.config
    steps = round(budget / per_step)
    needed = 2 * len(parts_of(system, basis, Path(), 0))
    if steps < needed:
        raise ValueError(
            f"compare: budgets cannot be matched: of {_in_words(unit, budget)}, {system} gets {steps} steps of "
            f"{_in_words(unit, per_step)}, and needs {needed} at least; raise steps, or make its batch smaller"
        )
    tokens = quantity(steps * _places(config))
    tell(f"{system} makes {steps:,} steps, {tokens} tokens in batches: {_in_words(unit, steps * per_step)}")
    return replace(basis, config=replace(config, steps=steps))


def _in_words(unit: BudgetUnit, amount: float) -> str:
    return duration(amount) if unit == "seconds" else f"{quantity(amount)} {unit}"


def _places(config: Config) -> int:
    """Of tokens in the batches of a step."""
    return config.batch.tokens * config.batch.accumulate


def flops_per_step(part: Part, basis: Basis) -> float:
    config, corpus = _of_part(part, basis)
    with torch.device("meta"):
        model = make_model(with_vocabulary(config, corpus.tokenizer))
    batches = _batches(config, corpus, COUNTED)
    return sum(training_flops(model, batch) for batch in batches) / len(batches) * config.batch.accumulate


def seconds_per_step(part: Part, basis: Basis) -> float:
    """Of a few steps on this machine, the one in the middle."""
    config, corpus = _of_part(part, basis)
    engine = Engine.from_config(config)
    model = engine.build(corpus.tokenizer).train()
    freeze(model, config.optimizer.freeze)
    optimizer = make_optimizer(model, config.optimizer)
    times = []
    for batch in _batches(config, corpus, TIMED):
        began = time.perf_counter()
        with engine.autocast():
            sums = model(batch.to(engine.device))
        (sums.loss.sum() / sums.weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:]) * config.batch.accumulate


def _of_part(part: Part, basis: Basis) -> tuple[Config, Corpus]:
    """Its config as from the start itself, where it would go on from a run that there is not yet, and its data."""
    config = replace(part.config, init=basis.config.init)
    return config, basis.corpus if config.tasks == basis.config.tasks else load_corpus(config)


def _batches(config: Config, corpus: Corpus, count: int) -> list[PackedBatch]:
    config = replace(config, steps=max(config.steps, count))
    return [*Packer(corpus.train, config).batches(make_mixer(config, corpus), range(count))]


def _tokens_per_step(part: Part, basis: Basis) -> float:
    return float(_places(part.config))


MEASURES: dict[BudgetUnit, Callable[[Part, Basis], float]] = {
    "tokens": _tokens_per_step,
    "FLOPs": flops_per_step,
    "seconds": seconds_per_step,
}
