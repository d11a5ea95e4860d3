"""Several systems side by side: same data and budget, several seeds, one table.

    RUN/comparison.yaml          what is compared; a comparison is only continued with the same settings
    RUN/tokenizer.json           of all runs that start from random weights; the others have that of their start
    RUN/starts/                  checkpoints that were cut
    RUN/<system>/seed-<n>/<part> run folders, each finished, resumed or begun on its own
    RUN/parts/                   of every finished part what the tables need; with kept=DIR it is that folder
    RUN/comparison.{json,csv,md,html}   written anew after every system and seed

What the systems are is said in `trunkline.training.compare.systems`, of those from pretrained starts in `started`.
"""

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from trunkline.engine import checkpoint
from trunkline.engine.config import with_tokenizer
from trunkline.engine.console import harmless, tell
from trunkline.engine.engine import Engine
from trunkline.engine.text.tokenizer import FILE
from trunkline.training.compare.comparison import Comparison
from trunkline.training.compare.record import WARM_UP, Record, Records, settings_of
from trunkline.training.compare.results import Finished, collect
from trunkline.training.compare.starts.budget import with_budget
from trunkline.training.compare.starts.held_out import book_pieces, completed, loss_before, on_test
from trunkline.training.compare.starts.start import find_starts, remember_starts
from trunkline.training.compare.starts.started import config_of, parts_of
from trunkline.training.compare.starts.zero_shot import ask_untrained
from trunkline.training.compare.systems import FIRST, SYSTEMS, Basis, Part, ordinary
from trunkline.training.config_file import save_config
from trunkline.training.data.corpus import load_corpus

FAILURE = "failure.json"
EXTRA = ("seeds", "systems", "split")  # which may be others when a comparison goes on
PLACES = ("run", "base", "data", "device", "starts", "kept")  # where things lie may change too


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison, and what they have in common."""

    bases: dict[str, Basis]  # by system
    parts: dict[tuple[str, int], list[Part]]  # by system and seed, in the order in which they are made
    about: dict[str, str]  # by system, what it is and where it starts
    identities: dict[str, str]  # by system, of its start
    records: Records
    split: str  # that is scored
    books: list[str]  # held-out text, by which is measured what a trunk forgets

    @property
    def asked(self) -> set[str]:
        """The systems that are asked for; the first one has a basis even so, for the others to be matched to."""
        return {system for system, _ in self.parts}


def compare(comparison: Comparison) -> dict[str, Any]:
    """Trains what is not there yet, and writes the comparison's files. A system that fails does not stop the others.

    Returns:
        What comparison.json holds.

    Raises:
        ValueError: data or settings that cannot be used, a folder with another comparison, or a start that has changed
            since it was begun; before any training.
    """
    run = Path(comparison.run)
    _check_folder(comparison, run)
    plan = _started(comparison) if comparison.start else _from_scratch(comparison)
    if plan.split == "test":
        for basis in plan.bases.values():
            _tested(basis)
    finished = {of: _found(plan, *of) for of in plan.parts}
    save_config(comparison, run / "comparison.yaml")
    if comparison.start:
        remember_starts(plan.identities, plan.records.folder)
    untrained = _untrained(comparison, plan)
    before = _losses_before(plan)
    results: dict[str, Any] = {}
    for number, (system, seed) in enumerate(plan.parts, start=1):
        print(f"\n{system}, seed {seed} ({number} of {len(plan.parts)})", flush=True)
        if not finished[system, seed].complete:
            finished[system, seed] = train_system(plan, system, seed)
            results = _written(comparison, plan, finished, untrained, before)
        else:
            tell("it is finished")
    return results or _written(comparison, plan, finished, untrained, before)


def _written(
    comparison: Comparison,
    plan: Plan,
    finished: Mapping[tuple[str, int], Finished],
    untrained: Mapping[str, Mapping[str, Record]],
    before: Mapping[str, float],
) -> dict[str, Any]:
    from trunkline.training.compare.comparison_page import write_comparison

    tasks = next(iter(plan.bases.values())).corpus.tasks
    results = collect(comparison, tasks, finished, plan.about, untrained, before)
    write_comparison(results, finished, Path(comparison.run))
    return results


def _from_scratch(comparison: Comparison) -> Plan:
    """All systems start from random weights, with one tokenizer."""
    basis = _basis(comparison, Path(comparison.run))
    bases = dict.fromkeys(comparison.systems, basis)
    parts = _planned(comparison, lambda system, *of: SYSTEMS[system](basis, *of))
    about = {system: (SYSTEMS[system].__doc__ or "").strip() for system in comparison.systems}
    return Plan(bases, parts, about, dict.fromkeys(comparison.systems, ""), _records(comparison), comparison.split, [])


def _started(comparison: Comparison) -> Plan:
    """Every system has a start of its own."""
    records = _records(comparison)
    systems = [system for system in dict.fromkeys((FIRST, *comparison.systems)) if system in comparison.start]
    found = find_starts(comparison.start, systems, comparison.starts, Path(comparison.run), records.folder)
    bases = {}
    for system in systems:
        start = comparison.start[system]
        config = config_of(system, ordinary(comparison), start, found[system])
        bases[system] = Basis(config, load_corpus(config, tell=tell), comparison.match, start.warm_up)
    bases = with_budget(bases, comparison.budget, records.folder / "budget.json")
    parts = _planned(comparison, lambda system, *of: parts_of(system, bases[system], *of))
    about = {system: f"starts from {of.in_words()}" for system, of in found.items()}
    identities = {system: of.identity for system, of in found.items()}
    books = book_pieces(ordinary(comparison))
    return Plan(bases, parts, about, identities, records, comparison.split, books)


def _planned(
    comparison: Comparison, parts_of: Callable[[str, Path, int], list[Part]]
) -> dict[tuple[str, int], list[Part]]:
    return {
        (system, seed): parts_of(system, Path(comparison.run) / system / f"seed-{seed}", seed)
        for seed in comparison.seeds
        for system in comparison.systems
    }


def _records(comparison: Comparison) -> Records:
    return Records(Path(comparison.kept or Path(comparison.run) / "parts"))


def _check_folder(comparison: Comparison, run: Path) -> None:
    """Makes the folder, or says why it is not to be used."""
    file = run / "comparison.yaml"
    if file.is_file():
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        defaults = {f.name: f.default for f in fields(Comparison) if f.default is not MISSING}
        current = json.loads(json.dumps(asdict(comparison)))
        saved = {key: saved.get(key, defaults.get(key, {})) for key in {**current, **saved}}  # it may be an older one
        for key in (*EXTRA, *PLACES):
            saved.pop(key, None)
            current.pop(key)
        try:
            checkpoint.check_same(saved, current)
        except ValueError as error:
            raise ValueError(f"comparison {run} was begun with other settings, name another run=: {error}") from error
    elif run.exists() and (
        not run.is_dir() or any(path.name not in (FILE, "starts", "parts") for path in run.iterdir())
    ):
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


def _found(plan: Plan, system: str, seed: int) -> Finished:
    """What is there of a system with one seed already.

    Raises:
        ValueError: a record of other settings.
    """
    parts = plan.parts[system, seed]
    known = {part.name: _record(plan, system, seed, part) for part in parts}
    folder = Path(parts[0].config.run).parent
    failure = folder / FAILURE
    return Finished(
        {name: record for name, record in known.items() if record},
        all(known.values()) and not any(map(_begun_anew, parts)),
        json.loads(failure.read_text(encoding="utf-8")) if failure.is_file() else [],
    )


def _record(plan: Plan, system: str, seed: int, part: Part) -> Record | None:
    settings = settings_of(part, plan.bases[system], plan.identities[system], plan.split)
    return plan.records.of(system, seed, part, settings)


def _begun_anew(part: Part) -> bool:
    """Whether there is a run that is not finished, whatever was kept of one before it."""
    run = Path(part.config.run)
    return run.is_dir() and not (run / "summary.json").is_file()


def train_system(plan: Plan, system: str, seed: int) -> Finished:
    """Runs what is not finished of one system with one seed. A failure is recorded, and tried again the next time."""
    parts = plan.parts[system, seed]
    file, failures = Path(parts[0].config.run).parent / FAILURE, []
    file.unlink(missing_ok=True)
    for part in parts:
        try:
            _train(plan, system, seed, part)
        except Exception as error:  # whatever it is, the others have runs of their own, and the table says it
            text = f"{type(error).__name__}: {error}"
            failures.append({"part": part.name, "error": text, "traceback": traceback.format_exc()})
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(failures, indent=1), encoding="utf-8")
            print(harmless(f"failed: {text}"), file=sys.stderr)
            if part.name == WARM_UP:  # which the next part starts from
                break
    return _found(plan, system, seed)


def _train(plan: Plan, system: str, seed: int, part: Part) -> None:
    """Finishes a part and puts its record. One that others start from is needed here, and not just its record."""
    own = Path(part.config.run)
    done = (own / "summary.json").is_file()
    if _record(plan, system, seed, part) and (done or (part.name != WARM_UP and not own.is_dir())):
        tell(f"{own} is finished")
        return
    if not done:
        begun = (own / "checkpoints").is_dir()
        resume = begun and checkpoint.newest(own / "checkpoints", warn=tell) is not None
        Engine.from_config(part.config).fit(resume=resume, overwrite=begun and not resume)
    settings = settings_of(part, plan.bases[system], plan.identities[system], plan.split)
    plan.records.put(system, seed, part, completed(part, settings, plan.split, plan.books))


def _tested(basis: Basis) -> Basis:
    """With the test splits in place of the validation splits.

    Raises:
        ValueError: there are none, or they cannot be used.
    """
    config = on_test(basis.config)
    return replace(basis, config=config, corpus=load_corpus(config, basis.corpus.tokenizer, tell=tell))


def _losses_before(plan: Plan) -> dict[str, float]:
    """By system with a causal checkpoint, its loss on held-out books before it learns, where there are books."""
    return {
        system: loss_before(basis, plan.books, plan.identities[system], plan.records.folder / "language_loss.json")
        for system, basis in plan.bases.items()
        if system in plan.asked and plan.books and basis.config.trunk.causal and basis.config.init
    }


def _untrained(comparison: Comparison, plan: Plan) -> dict[str, dict[str, Record]]:
    """What the checkpoint of the first system says without training, where that system is asked for."""
    if not comparison.prompts or FIRST not in comparison.systems:
        return {}
    basis = _tested(plan.bases[FIRST]) if plan.split == "test" else plan.bases[FIRST]
    return {
        "zero-shot": ask_untrained(basis, comparison.prompts, plan.identities[FIRST], plan.split, plan.records.folder)
    }
