"""Several systems side by side: same data, tokenizer and budget, several seeds, one table.

    RUN/comparison.yaml          what is compared; a comparison is only continued with the same settings
    RUN/tokenizer.json           of all runs
    RUN/<system>/seed-<n>/<part> run folders, each finished, resumed or begun on its own
    RUN/comparison.{json,csv,md,html}   written anew after every system and seed

What the systems are, and how the budget is shared out, is said in `trunkline.training.compare.systems`.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from trunkline.engine import checkpoint
from trunkline.engine.config import Config, with_tokenizer
from trunkline.engine.console import harmless, tell
from trunkline.engine.engine import Engine
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.trunk import TrunkConfig
from trunkline.engine.text.tokenizer import FILE
from trunkline.training.compare.results import FAILURE, collect
from trunkline.training.compare.start import Found, Start, find
from trunkline.training.compare.started import CHECKPOINTS, config_of, parts_of
from trunkline.training.compare.systems import SYSTEMS, Basis, Match, Part, ordinary
from trunkline.training.config_file import load_config, save_config
from trunkline.training.data.corpus import load_corpus

STARTS = "starts.json"
EXTRA = ("seeds", "systems")  # of which a comparison may be given more, or fewer, when it goes on
PLACES = ("run", "base", "data", "device", "starts")  # where things lie may change too


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
    starts: str = ""
    """Folder with the checkpoints and files that `start` names."""
    start: dict[str, Start] = field(default_factory=dict)
    """What each system starts from, by its name; none: all start from random weights, and `trunk` is their shape."""

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
        if self.steps < 2 * len(self.tasks):
            raise ValueError(
                f"compare: steps must be at least {2 * len(self.tasks)}, for each task has a model of its own in "
                f"'single-task'; got {self.steps}"
            )

    def _check_starts(self) -> None:
        object.__setattr__(self, "starts", os.path.expanduser(self.starts))
        if self.trunk != TrunkConfig():
            raise ValueError("compare: with `start` every system has the trunk of its own start: leave trunk out")
        for system in (*self.start, *self.systems):
            if system not in SYSTEMS:
                raise ValueError(f"compare: start names '{system}'; the systems are {', '.join(SYSTEMS)}")
            if system not in self.start and system in CHECKPOINTS:
                raise ValueError(f"compare: start says of every system where it starts, and not of '{system}'")


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """As `load_config`."""
    comparison = load_config(path, overrides, Comparison)
    assert isinstance(comparison, Comparison)
    return comparison


def compare(comparison: Comparison) -> dict[str, Any]:
    """Trains what is not there yet, and writes the comparison's files. A system that fails does not stop the others.

    Returns:
        What comparison.json holds.

    Raises:
        ValueError: data or settings that cannot be used, or a folder with another comparison; before any training.
    """
    from trunkline.training.compare.comparison_page import write_comparison

    run = Path(comparison.run)
    _check_folder(comparison, run)
    if comparison.start:
        found = find_starts(comparison, run)
        bases = started_bases(comparison, found)
        plan = planned(comparison, lambda system, *of: parts_of(system, bases[system], *of))
        save_starts(found, run)
    else:
        bases = dict.fromkeys(comparison.systems, _basis(comparison, run))
        plan = planned(comparison, lambda system, *of: SYSTEMS[system](bases[system], *of))
    save_config(comparison, run / "comparison.yaml")
    results: dict[str, Any] = {}
    for number, ((system, seed), parts) in enumerate(plan.items(), start=1):
        print(f"\n{system}, seed {seed} ({number} of {len(plan)})", flush=True)
        if train_system(parts, run / system / f"seed-{seed}") or number == len(plan):
            results = collect(comparison, next(iter(bases.values())).corpus.tasks, plan)
            write_comparison(results, run)
    return results


def planned(
    comparison: Comparison, parts_of: Callable[[str, Path, int], list[Part]]
) -> dict[tuple[str, int], list[Part]]:
    """The runs of every system with every seed, in the order in which they are made."""
    return {
        (system, seed): parts_of(system, Path(comparison.run) / system / f"seed-{seed}", seed)
        for seed in comparison.seeds
        for system in comparison.systems
    }


def find_starts(comparison: Comparison, run: Path) -> dict[str, Found]:
    """What every system starts from; says so.

    Raises:
        ValueError: a start that there is not, or that was another one when the comparison was begun.
    """
    file, found = run / STARTS, {}
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for system in comparison.systems:
        found[system] = find(system, comparison.start.get(system, Start()), comparison.starts, run / "starts")
        before, now = known.get(system, {}).get("digest", found[system].digest), found[system].digest
        if before != now:
            raise ValueError(
                f"compare: the start of {system} has changed since the comparison in {run} was begun: SHA-256 {before} "
                f"then, {now} now; put it back, or name another run="
            )
        tell(f"{system} starts from {found[system].in_words()}")
    return found


def save_starts(found: dict[str, Found], run: Path) -> None:
    """Beside those of systems that are not asked for this time."""
    file = run / STARTS
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(known | {name: asdict(of) for name, of in found.items()}, indent=1), encoding="utf-8")


def started_bases(comparison: Comparison, found: dict[str, Found]) -> dict[str, Basis]:
    """The settings and data of every system, each with its own tokenizer."""
    bases = {}
    for system in comparison.systems:
        start = comparison.start.get(system, Start())
        config = config_of(system, ordinary(comparison), start, found[system])
        bases[system] = Basis(config, load_corpus(config, tell=tell), comparison.match, start.warm_up)
    return bases


def _check_folder(comparison: Comparison, run: Path) -> None:
    """Makes the folder, or says why it is not to be used."""
    file = run / "comparison.yaml"
    if file.is_file():
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        current = json.loads(json.dumps(asdict(comparison)))
        for key in (*EXTRA, *PLACES):
            saved.pop(key, None)
            current.pop(key)
        try:
            checkpoint.check_same(saved, current)
        except ValueError as error:
            raise ValueError(f"comparison {run} was begun with other settings, name another run=: {error}") from error
    elif run.exists() and (not run.is_dir() or any(path.name not in (FILE, "starts") for path in run.iterdir())):
        raise ValueError(f"comparison folder {run} holds something else: name another run=")
    run.mkdir(parents=True, exist_ok=True)


def _basis(comparison: Comparison, run: Path) -> Basis:
    """Reads and checks all data, and makes the tokenizer that all systems use."""
    if not (run / "comparison.yaml").exists():
        tokenizer = load_corpus(comparison, tell=tell).tokenizer
        if "bert" in comparison.systems:
            tokenizer.mask()
        tokenizer.save(run)
    config = with_tokenizer(ordinary(comparison), run)
    return Basis(config, load_corpus(config, tell=tell), comparison.match, comparison.warm_up)


def train_system(parts: Sequence[Part], folder: Path) -> bool:
    """Runs what is not finished of one system with one seed, and says whether there was anything.

    A failure is recorded, and tried again the next time.
    """
    failure, anything = folder / FAILURE, False
    failure.unlink(missing_ok=True)
    for part in parts:
        own = Path(part.config.run)
        if (own / "summary.json").is_file():
            tell(f"{own} is finished")
            continue
        anything = True
        try:
            begun = (own / "checkpoints").is_dir()
            resume = begun and checkpoint.newest(own / "checkpoints", warn=tell) is not None
            Engine.from_config(part.config).fit(resume=resume, overwrite=begun and not resume)
        except Exception as error:  # whatever it is, the other systems have their own run, and the table says it
            folder.mkdir(parents=True, exist_ok=True)
            text = f"{type(error).__name__}: {error}"
            content = {"part": part.name, "error": text, "traceback": traceback.format_exc()}
            failure.write_text(json.dumps(content, indent=1), encoding="utf-8")
            print(harmless(f"failed: {text}"), file=sys.stderr)
            break
    return anything
