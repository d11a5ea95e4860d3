"""`trunkline init`: from the tables that somebody has to a config that trains, with the reason for every guess."""

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.trunk_config import PRESETS
from trunkline.engine.tasks.task import Task
from trunkline.training.data.tables import check_encoding, format_of
from trunkline.training.scoring.metrics import metric_names
from trunkline.training.starting.commented_yaml import commented
from trunkline.training.starting.length import TOKENS, batch_tokens, steps_for, tokens_of
from trunkline.training.starting.names import hints_at_label
from trunkline.training.starting.proposal import Asked, Proposal, class_names, propose
from trunkline.training.starting.tables_given import Table, grouped, read_table, repeated_texts

SCHEMA = ".trunkline.schema.json"  # beside the YAML, which names it, for editors to complete and check
LARGE = 20_000  # rows from which on a vocabulary is a large one
VOCABULARY, LARGE_VOCABULARY = 4096, 8192
EVALUATIONS = 4  # of a run
LONG = 350  # words from which on a text is longer than the longest example, Batch.max_length

Ask = Callable[[str, str], str]  # a question and what is taken where nothing is answered -> the answer


@dataclass(frozen=True)
class Answers:
    """What the user says, so that it is not guessed; empty or None: a guess."""

    asked: Asked = field(default_factory=Asked)
    name: str = ""
    validation: str = ""
    encoding: str = ""
    init: str = ""
    trunk: str = ""
    steps: int | None = None
    minutes: float | None = None


def init(
    files: Sequence[Path],
    answers: Answers,
    *,
    out: Path | None,
    overwrite: bool,
    command: str,
    tell: Callable[[str], None],
    ask: Ask | None = None,
) -> Path:
    """Looks at tables, writes a commented config, and tells what was guessed and which commands follow.

    Args:
        files: a task each; files whose names differ in train, validation and test are the splits of one.
        out: the YAML to write; None: named after the first file, in the working directory.
        command: the line that the user typed, for the file's first comment.
        ask: None: nobody is there to be asked.

    Raises:
        ValueError: a file that is no table, or that nothing can be learnt from; says what was seen.
    """
    _check(answers)
    groups = grouped(files)
    target = out or Path(f"{_slug(answers.name or next(iter(groups)))}.yaml")
    if target.exists() and not overwrite:
        raise ValueError(f"init: {target} is there already: --overwrite replaces it, --out FILE.yaml names another")
    proposals: list[Proposal] = []
    for group, splits in groups.items():
        table = read_table(splits["train"], answers.encoding)
        tell(f"{table.path}: {table.rows:,} rows, columns {', '.join(column.name for column in table.columns)}")
        found = _proposed(table, answers.asked, ask)
        for proposal in found:
            own = proposal.fields.get("label", "text") if len(found) > 1 else group
            proposal.fields["name"] = _slug(answers.name or own, taken={p.fields["name"] for p in proposals})
            _place(proposal, table, splits, target.parent, answers)
            proposals.append(proposal)
    if ask and not (answers.init or answers.trunk):
        answers = replace(answers, init=ask("start from a checkpoint: folder or hub id; nothing: from scratch", ""))
    for proposal in proposals:
        metric_names(Task(**proposal.fields))  # whether it can be
    head = [f"yaml-language-server: $schema={SCHEMA}", f"Written by `{command}`. Every line may be changed."]
    tasks = [(proposal.fields, proposal.why) for proposal in proposals]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(commented(head, tasks, _settings(proposals, answers, target.parent)), encoding="utf-8")
    (target.parent / SCHEMA).write_bytes((Path(__file__).parents[1] / "configs" / "schema.json").read_bytes())
    for proposal in proposals:
        _tell(proposal, tell)
    _tell_what_follows(target, proposals, tell)
    return target


def _check(answers: Answers) -> None:
    """
    Raises:
        ValueError: an answer that cannot be.
    """
    if answers.trunk and answers.trunk not in PRESETS:
        raise ValueError(f"init: --trunk '{answers.trunk}' is no preset; there are {', '.join(PRESETS)}")
    if answers.trunk and answers.init:
        raise ValueError("init: --trunk starts from scratch and --init from a checkpoint: give one of them")
    for name in ("steps", "minutes"):
        if (number := getattr(answers, name)) is not None and not 0 < number < inf:
            raise ValueError(f"init: --{name} must be above 0, got {number}")
    check_encoding("init", answers.encoding)


def _proposed(table: Table, asked: Asked, ask: Ask | None) -> list[Proposal]:
    found = propose(table.columns, table.path.name, asked)
    if ask is None or asked.labels or (asked.head and not HEADS[asked.head].labelled):
        return found
    guessed = " ".join(proposal.fields["label"] for proposal in found if "label" in proposal.fields)
    answer = ask(f"label column of {table.path.name}", guessed)
    if answer == guessed:
        return found
    return propose(table.columns, table.path.name, replace(asked, labels=(answer,)))


def _slug(name: str, taken: set[str] | frozenset[str] = frozenset()) -> str:
    """The name as that of a task, unlike those that are taken."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", letters).strip("-_") or "task"
    numbered = (f"{slug}{number}" for number in ("", *(f"-{count}" for count in range(2, 10_000))))
    return next(one for one in numbered if one not in taken)


def _place(proposal: Proposal, table: Table, splits: Mapping[str, Path], folder: Path, answers: Answers) -> None:
    """Where the rows are, and which of them are held out."""
    fields, why = proposal.fields, proposal.why
    fields["train"] = _relative(table.path, folder)
    if table.encoding != "utf-8" and format_of(table.path.name) != ".parquet":
        fields["encoding"] = table.encoding
        if not answers.encoding:
            why["encoding"] = "its bytes are not UTF-8; if letters look wrong, name another"
    given = answers.validation or splits.get("validation", "")
    if isinstance(given, str) and re.fullmatch(r"0?\.\d+", given):
        fields["validation"] = float(given)
    elif given:
        path = Path(given)
        fields["validation"] = _relative(path, folder)
        why["validation"] = ""
        _compare_splits(proposal, table, read_table(path, table.encoding))
    if "test" in splits:
        proposal.notes.append(
            f"{splits['test']} is left alone; `trunkline predict` answers it once the run is finished"
        )


def _compare_splits(proposal: Proposal, train: Table, validation: Table) -> None:
    """Classes that only the validation rows have, and texts that both have."""
    fields = proposal.fields
    there = {column.name: column for column in validation.columns}
    wanted = [*fields["text"], *filter(None, [fields.get("label")])]
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(f"{validation.path} has no column '{missing[0]}', which {train.path} has: {', '.join(there)}")
    if "labels" in fields:
        own = class_names(there[fields["label"]], fields["head"])
        if new := [name for name in own if name not in fields["labels"]]:
            fields["labels"] += new
            proposal.notes.append(f"class '{new[0]}' is in {validation.path.name} only, so it cannot be learnt")
    if fields.get("label") and there[fields["label"]].missing:
        fields.setdefault("unlabelled", "drop")
    texts = [
        {name: {c.name: c for c in table.columns}[name].values for name in fields["text"]}
        for table in (train, validation)
    ]
    if both := repeated_texts(*texts):
        proposal.notes.append(
            f"{both:,} of {validation.rows:,} rows of {validation.path.name} have a text that is trained on, too: "
            "scores on them are too good; without that file, --validation 0.1 holds out rows with texts of their own"
        )


def _relative(path: Path, folder: Path) -> str:
    """A file as the YAML in that folder names it."""
    try:
        return Path(os.path.relpath(path.expanduser(), folder)).as_posix()
    except ValueError:  # on another drive
        return path.absolute().as_posix()


def _settings(proposals: Sequence[Proposal], answers: Answers, folder: Path) -> dict[str, tuple[Any, str]]:
    """The settings beside the tasks, and why."""
    rows = sum(proposal.rows for proposal in proposals)
    words = sum(proposal.rows * proposal.words for proposal in proposals) / rows
    heads = {proposal.fields["head"] for proposal in proposals}
    settings: dict[str, tuple[Any, str]] = {}
    preset = None if answers.init else answers.trunk or "tiny"
    if answers.init:
        local = Path(answers.init).expanduser().exists()
        settings["init"] = (
            _relative(Path(answers.init), folder) if local else answers.init,
            "trunk and tokenizer are its own",
        )
    else:
        trunk: dict[str, Any] = {"preset": preset, "dropout": 0.1}
        if any(len(proposal.fields["text"]) > 1 for proposal in proposals) or heads & {"span", "generate"}:
            trunk["exact_match"] = True  # says which words two texts share
        settings["trunk"] = (
            trunk,
            "from scratch; or `init: FOLDER`, a checkpoint to start from, which knows the language",
        )
        settings["vocab_size"] = (
            LARGE_VOCABULARY if rows > LARGE else VOCABULARY,
            "of a tokenizer that is trained on the texts",
        )
        if heads <= {"classify", "multi-label", "regress"}:
            settings["lowercase"] = (True, "capitals and small letters are the same to it")
    batch = batch_tokens(words) if answers.init else TOKENS
    if batch < TOKENS:
        settings["batch"] = ({"tokens": batch}, f"of a step: about {batch / tokens_of(words):.0f} examples")
    steps, why = steps_for(rows, words, answers.minutes, preset, batch)
    if answers.steps:
        steps, why = answers.steps, ""
    settings["steps"] = (steps, why)
    settings["evaluation"] = ({"every": -(-steps // EVALUATIONS)}, "steps between scores, each with a checkpoint")
    return settings


def _tell(proposal: Proposal, tell: Callable[[str], None]) -> None:
    """A task in words: what was guessed, and what else there is to know."""
    fields = proposal.fields
    label = f" '{fields['label']}'" if "label" in fields else ""
    reason = f" ({proposal.why['head']})" if proposal.why["head"] else ""
    tell(f"task {fields['name']}: {fields['head']}{label} from {' and '.join(fields['text'])}{reason}")
    if "labels" in fields:
        tell(f"  classes: {proposal.why['labels']}")
    if proposal.why["text"]:
        tell(f"  {proposal.why['text']}")
    if proposal.why.get("unlabelled"):
        tell(f"  {proposal.why['unlabelled']}: they are left out")
    if proposal.words > LONG:
        tell(f"  texts have {proposal.words:.0f} words on average: what is beyond batch.max_length tokens is cut off")
    for note in proposal.notes:
        tell(f"  {note}")
    if proposal.others and not hints_at_label(fields.get("label", "")):
        tell(f"  if another column is meant: --label {', or --label '.join(proposal.others[:6])}")


def _tell_what_follows(target: Path, proposals: Sequence[Proposal], tell: Callable[[str], None]) -> None:
    tell(f"wrote {target}; what follows:")
    tell(f"  trunkline train {target}")
    answering = [proposal for proposal in proposals if HEADS[proposal.fields["head"]].labelled]
    run = f"runs/{target.stem}"
    suffix = format_of(proposals[0].fields["train"]) or ".csv"
    tell(f"  trunkline predict {run} --file NEW{suffix}" if answering else f"  trunkline eval {run}")
