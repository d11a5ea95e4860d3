"""The settings of a comparison."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from trunkline.engine.config import Config
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.trunk import TrunkConfig
from trunkline.training.compare.starts.budget import BudgetUnit
from trunkline.training.compare.starts.start import Start
from trunkline.training.compare.starts.zero_shot import asks, names_of
from trunkline.training.compare.systems import FIRST, SYSTEMS, Match
from trunkline.training.config_file import load_config


@dataclass(frozen=True)
class Comparison(Config):
    """The settings of a comparison: those of the multi-task run, and what is compared.

    Raises:
        ValueError: an unknown system, a seed that is given twice, or a task that a system cannot learn.
    """

    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Which are compared; all of them are the default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every system is trained once with each; they decide on weights, order, dropout and generated data."""
    match: Match = "parameters"
    """What bert and bilstm-attention have in common with multitask: parameters, or operations of training a token."""
    warm_up: float = 0.25
    """Part of bert's steps for guessing masked words, before it sees a label; a `start` has its own."""
    split: Literal["validation", "test"] = "validation"
    """What is scored in the end. test: the split of that name in `data`, which had no part in choosing the settings."""
    kept: str = ""
    """Folder that takes a JSON file of every finished part, which counts wherever it was made; empty: RUN/parts."""
    starts: str = ""
    """Folder with the checkpoints and files that `start` names."""
    start: dict[str, Start] = field(default_factory=dict)
    """What each system starts from, by its name; none: all start from random weights, and `trunk` is their shape."""
    budget: BudgetUnit = "tokens"
    """With `start`, what every system spends as much of as multitask does in `steps` steps: tokens, FLOPs of training,
    or seconds of it on this machine, which a few steps are timed for. Without, all make the same steps."""
    prompts: dict[str, str] = field(default_factory=dict)
    """With `start`, what the checkpoint of multitask is asked without training, by task, the columns of the task in
    braces: '{sentence} This review is'. Of classes the one is taken whose name it finds the likeliest to follow."""

    def __post_init__(self):
        super().__post_init__()
        for system in self.systems:
            if system not in SYSTEMS:
                near = get_close_matches(system, SYSTEMS, n=1, cutoff=0.0)[0]
                raise ValueError(f"compare: unknown system '{system}'; did you mean '{near}'?")
        for name, values in (("systems", self.systems), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"compare: {name} must be different ones, at least one; got {list(values)}")
        if min(self.seeds) < 0:
            raise ValueError(f"compare: seeds must be at least 0, got {list(self.seeds)}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"compare: warm_up must be at least 0 and below 1, got {self.warm_up}")
        if self.architecture != "trunk" or not self.trunk.causal or self.seed:
            raise ValueError("compare: architecture, trunk.causal and seed are set for every system; leave them out")
        if self.devices != 1:
            raise ValueError(
                f"compare: its runs follow one another on one device, and devices is {self.devices}: leave it out"
            )
        if language := [task.name for task in self.all_tasks if not HEADS[task.head].labelled]:
            raise ValueError(f"compare: '{language[0]}' is a language model, which not every system can be")
        if self.start:
            self._check_starts()
        elif self.budget != "tokens" or self.prompts:
            raise ValueError("compare: budget and prompts are of comparisons with `start`; leave them out")
        if self.steps < 2 * len(self.tasks):
            raise ValueError(
                f"compare: steps must be at least {2 * len(self.tasks)}, for each task has a model of its own in "
                f"'single-task'; got {self.steps}"
            )

    def _check_starts(self) -> None:
        for name in ("starts", "kept"):
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        if self.trunk != TrunkConfig():
            raise ValueError("compare: with `start` every system has the trunk of its own start: leave trunk out")
        for name in ("init", "tokenizer", "vectors", "adapters", "projection", "prompt_weight"):
            if getattr(self, name):
                raise ValueError(f"compare: with `start`, {name} is said of every system by itself: leave it out")
        for system in (*self.start, *self.systems):
            if system not in SYSTEMS:
                raise ValueError(f"compare: start names '{system}'; the systems are {', '.join(SYSTEMS)}")
            if system not in self.start:
                raise ValueError(f"compare: start says of every system where it starts, and not of '{system}'")
        if (self.budget != "tokens" or self.prompts) and FIRST not in self.start:
            raise ValueError(f"compare: budget {self.budget} and prompts go by {FIRST}, and start does not have it")
        columns = {task.name: names_of(task) for task in self.all_tasks}
        for name, prompt in self.prompts.items():
            if name not in columns:
                raise ValueError(f"compare: prompts names '{name}', which is none of {', '.join(columns)}")
            if not asks(prompt, columns[name]):
                wanted = ", ".join(f"{{{column}}}" for column in columns[name])
                raise ValueError(
                    f"compare: prompts.{name} must have columns of the task in braces, {wanted}: {prompt!r}"
                )


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """As `load_config`."""
    comparison = load_config(path, overrides, Comparison)
    assert isinstance(comparison, Comparison)
    return comparison
