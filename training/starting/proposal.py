"""What can be learnt from a table: tasks that are proposed, with the reason for every guess."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trunkline.engine.heads.multi_label import MOST, labels_in_cell
from trunkline.engine.heads.registry import HEADS, head_of
from trunkline.training.starting.choice import (
    are_ids,
    candidates,
    holds_several,
    is_classes,
    is_written,
    labels_in,
    text_answered_by,
    texts_in,
    words_tagged_by,
)
from trunkline.training.starting.columns import MOSTLY, Column, is_missing, number_in
from trunkline.training.starting.names import hints_at_label, in_order

FEWEST = 20  # rows with text and label that there is something to learn from
RARE = 5  # rows of a class that are too few to be learnt and scored
NOTHING = frozenset("na n/a nan none null nil - -- ?".split())  # what people write for no value
UNEVEN = 0.7  # share of the largest class from which on accuracy alone says little
ELSE = "--label names another column, --head language-model learns the texts alone"
SCORED = 5000  # rows of a large table that are held out


@dataclass(frozen=True)
class Asked:
    """What the user says, so that it is not guessed; empty: a guess."""

    labels: tuple[str, ...] = ()
    """Label columns, a task each."""
    text: tuple[str, ...] = ()
    head: str = ""
    classes: tuple[str, ...] = ()
    """Class names in the order of their ids."""
    metrics: tuple[str, ...] = ()
    unlabelled: str = ""


@dataclass
class Proposal:
    """One task, as the fields of its `Task`, and why it is so: a comment by the name of a field."""

    fields: dict[str, Any]
    why: dict[str, str]
    notes: list[str] = field(default_factory=list)
    """What else there is to know about the data."""
    others: list[str] = field(default_factory=list)
    """Columns that might be the label just as well."""
    rows: int = 0
    """That have a text and a label."""
    words: float = 0.0
    """Of a row on average, those that are to be written included."""


def propose(columns: Sequence[Column], where: str, asked: Asked) -> list[Proposal]:
    """The tasks of a table.

    Args:
        where: the file's name, for messages.

    Raises:
        ValueError: nothing can be learnt from it; says what was seen, and what it would need.
    """
    named = {column.name: column for column in columns}
    if not columns or not len(columns[0].values):
        raise ValueError(f"{where} has no rows" + (f": columns {', '.join(named)}, and nothing below" if named else ""))
    for name in (*asked.labels, *asked.text):
        if name not in named:
            raise ValueError(f"{where} has no column '{name}'; it has {', '.join(named)}")
    if both := [name for name in asked.labels if name in asked.text]:
        raise ValueError(f"{where}: '{both[0]}' cannot be both the label and a text that is read")
    if asked.labels:
        return _tasks(columns, where, [named[name] for name in asked.labels], asked)
    if asked.head and not head_of(asked.head).labelled:
        return _tasks(columns, where, [], asked)
    # a label by its name that cannot be one by its values is told, and not passed over
    labels = labels_in(columns) or [column for column in columns if hints_at_label(column.name)][:1]
    proposals = _tasks(columns, where, labels, asked)
    if not any(hints_at_label(label.name) for label in labels):
        proposals[0].others = [column.name for column in candidates(columns) if column not in labels]
    return proposals


def _tasks(columns: Sequence[Column], where: str, labels: Sequence[Column], asked: Asked) -> list[Proposal]:
    targets: list[Column | None] = [*labels]
    proposals = [_task(columns, where, label, asked) for label in targets or [None]]
    read = {column for p in proposals for column in (*p.fields["text"], p.fields.get("label"))}
    proposals[0].why["text"] = _left_out([column for column in columns if column.name not in read])
    return proposals


def _task(columns: Sequence[Column], where: str, label: Column | None, asked: Asked) -> Proposal:
    """The task of predicting one column, or, without one, the next token."""
    head, because = _head(columns, where, label, asked)
    text = _text_columns(columns, where, label, head, asked)
    why = {"head": because, "text": ""}
    fields: dict[str, Any] = {"name": "", "head": head, "text": [column.name for column in text]}
    proposal = Proposal(fields, why)
    if label is not None:
        fields["label"] = label.name
    has_label = _labelled(label, head)
    usable = _usable(text, has_label)
    proposal.rows = len(usable)
    if len(usable) < FEWEST:
        labelled = f" and a label in '{label.name}'" if label else ""
        raise ValueError(
            f"{where}: {len(usable)} of {len(columns[0].values):,} rows have a text{labelled}; it takes {FEWEST} at "
            "least, and some hundreds to learn anything"
        )
    if HEADS[head].named and label is not None:
        _name_classes(proposal, where, label, asked)
    if head == "regress" and label is not None:
        _check_numbers(where, label)
    if asked.metrics:
        fields["metrics"] = [*asked.metrics]
    fields["train"] = ""  # in this place; the file is the caller's business
    fields["validation"] = 0.1 if len(usable) <= 10 * SCORED else max(0.001, round(SCORED / len(usable), 3))
    why["validation"] = "of the rows are held out for scoring, every text on one side only"
    if all(column.missing for column in text):
        without = sum(all(map(is_missing, row)) for row in zip(*(column.values for column in text), strict=True))
        proposal.notes += [f"{without:,} rows have no text: they are left out"] if without else []
    unlabelled = has_label.count(False)
    if asked.unlabelled or unlabelled:
        fields["unlabelled"] = asked.unlabelled or "drop"
        why["unlabelled"] = f"{unlabelled:,} of {len(columns[0].values):,} rows have no label"
    written = [label] if label is not None and HEADS[head].writes else []
    proposal.words = sum(column.words for column in (*text, *written))
    _note_repetitions(proposal, text, label, usable)
    return proposal


def _head(columns: Sequence[Column], where: str, label: Column | None, asked: Asked) -> tuple[str, str]:
    """The head, and why it is that one."""
    if label is None:
        return asked.head or "language-model", "" if asked.head else "no column looks like a label: the text is learnt"
    _check_label(where, label)
    if asked.head:
        return asked.head, ""
    name = f"'{label.name}'"
    if words_tagged_by(label, columns):
        return "tag", f"{name} has a tag for every word"
    if found := text_answered_by(label, columns):
        return "span", f"what {name} says stands in '{found.name}'"
    if holds_several(label):
        return "multi-label", f"{name} has any number of labels in a row"
    if is_classes(label):
        grades = label.numbers >= MOSTLY and label.distinct > 2 and not are_ids(label)
        near = "; --head regress takes them for amounts, of which 4 is nearer to 5 than 1" if grades else ""
        return "classify", f"{name} has {label.distinct} different values{near}"
    if label.numbers >= MOSTLY:
        return "regress", f"{name} has numbers, {label.distinct:,} different ones"
    if is_written(label, columns) or (label.has_texts and label.words >= 2.5):
        return "generate", f"{name} has texts, of {label.words:.0f} words on average"
    if label.has_texts and label.distinct <= label.present / 2:
        return "classify", f"{name} has {label.distinct:,} different values"
    raise ValueError(
        f"{where}: '{label.name}' has {label.distinct:,} different values in {label.present:,} rows, such as "
        f"{_example(label)}: a class needs several rows to be learnt, and a number is written as 1234.5 ({ELSE}, "
        "--head generate takes it for a text to be written)"
    )


def _check_label(where: str, label: Column) -> None:
    if not label.distinct:
        raise ValueError(f"{where}: '{label.name}' is empty in all {len(label.values):,} rows: {ELSE}")
    if label.distinct == 1:
        raise ValueError(
            f"{where}: '{label.name}' is {_example(label)} in all {label.present:,} rows that have a label: with one "
            f"class there is nothing to learn; it takes rows of another one ({ELSE})"
        )


def _example(column: Column) -> str:
    text = str(column.cells[0] if column.cells else "")
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _text_columns(columns: Sequence[Column], where: str, label: Column | None, head: str, asked: Asked) -> list[Column]:
    named = {column.name: column for column in columns}
    if asked.text:
        return [named[name] for name in asked.text]
    texts = texts_in(columns, label)
    if not texts:
        kinds = ", ".join(f"{column.name} ({_kind(column)})" for column in columns)
        raise ValueError(f"{where} has no column of texts to read: {kinds}; --text names one")
    if label is not None and (read := words_tagged_by(label, columns) or text_answered_by(label, columns)):
        # the last column is the one that the head looks into; the other texts of a tagged sentence tell nothing
        before = [] if head == "tag" else [c for c in texts if c is not read and "question" in c.name.lower()]
        return [*before, read] if head in ("tag", "span") else texts
    if HEADS[head].one_text:
        return [max(texts, key=lambda column: column.words)]
    order = in_order([column.name for column in texts])
    return [named[name] for name in order]


def _left_out(columns: Sequence[Column]) -> str:
    others = [f"{column.name} ({_kind(column)})" for column in columns]
    more = f" and {len(others) - 6} more" if len(others) > 6 else ""
    return f"not read: {', '.join(others[:6])}{more}" if others else ""


def _kind(column: Column) -> str:
    """What a column holds, in a word or two."""
    if not column.cells:
        return "empty"
    if column.seen == 1 and column.distinct == 1:
        return "the same everywhere"
    if column.dates:
        return "dates"
    if column.addresses:
        return "addresses"
    if column.keys:
        return "another in every row"
    if column.numbers >= MOSTLY:
        return "numbers"
    if column.lists or column.objects:
        return "lists"
    return "texts" if column.words >= 2.5 else "other values"


def _labelled(label: Column | None, head: str) -> list[bool]:
    """Of every row, whether it has a label; that several may hold, an empty list or text says that none does."""
    if label is None or (not label.missing and not HEADS[head].several):
        return []
    if HEADS[head].several:
        return [value is not None and value == value for value in label.values]  # but for None and NaN
    return [not is_missing(value) for value in label.values]


def _usable(text: Sequence[Column], has_label: Sequence[bool]) -> list[int]:
    """Rows that have some text, and a label where there is one to have."""
    rows = range(len(text[0].values))
    if all(not column.missing for column in text):
        has_text: Sequence[int] = rows
    else:
        has_text = [row for row in rows if any(not is_missing(column.values[row]) for column in text)]
    return [row for row in has_text if has_label[row]] if has_label else list(has_text)


# Classes and numbers


def _name_classes(proposal: Proposal, where: str, label: Column, asked: Asked) -> None:
    """The names of the classes, and what is said of how often they occur."""
    head = proposal.fields["head"]
    counts = class_names(label, head)
    if head == "multi-label" and len(counts) > MOST:
        raise ValueError(
            f"{where}: '{label.name}' has {len(counts):,} different labels, and head 'multi-label' takes {MOST}: write "
            "the rare ones as one, or leave them out"
        )
    if (
        head != "multi-label"
        and "-1" in counts
        and len(counts) > 3
        and all(name.lstrip("-").isdigit() for name in counts)
    ):
        unlabelled = counts.pop("-1")  # what data sets write for "no class"; of -1, 0, 1 it is one
        proposal.fields["unlabelled"] = "drop"
        proposal.why["unlabelled"] = f"{unlabelled:,} rows have the label -1"
    if asked.classes and (left_out := [name for name in counts if name not in asked.classes]):
        raise ValueError(
            f"{where}: --labels lacks '{left_out[0]}'; '{label.name}' has {_listed(sorted(counts, key=_order))}"
        )
    proposal.fields["labels"] = [*asked.classes] or [*label.class_names] or sorted(counts, key=_order)
    total = len(label.values) if head == "multi-label" else sum(counts.values())  # of rows
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in ordered[:6])
    proposal.why["labels"] = shares + (f" and {len(ordered) - 6} more" if len(ordered) > 6 else "")
    if head not in ("classify", "multi-label"):
        return
    if rare := [name for name, count in ordered if count < RARE]:
        proposal.notes.append(
            f"classes with fewer than {RARE} rows, too few to learn from: {len(rare)}, such as '{rare[0]}'"
        )
    alike: dict[str, list[str]] = {}
    for name in proposal.fields["labels"]:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    if same := [names for names in alike.values() if len(names) > 1]:
        shown = ", ".join(map(repr, same[0]))
        proposal.notes.append(f"classes that differ in capitals or spaces alone, and are learnt apart: {shown}")
    if nothing := [name for plain, names in alike.items() if plain in NOTHING for name in names]:
        shown = ", ".join(map(repr, nothing))
        proposal.notes.append(
            f"taken for classes like the others: {shown}; if they stand for no label, empty the cells"
        )
    if head == "classify" and ordered[0][1] / total >= UNEVEN and not asked.metrics:
        proposal.fields["metrics"] = ["macro_f1", "accuracy"]
        proposal.why["metrics"] = f"to say '{ordered[0][0]}' always has an accuracy of {ordered[0][1] / total:.2f}"


def class_names(label: Column, head: str) -> Counter[str]:
    """The classes in a column, and how often each occurs."""
    if head == "tag":
        tags = (tag for cell in label.values for tag in (cell if isinstance(cell, list) else str(cell or "").split()))
        return Counter(class_name(tag, label.class_names) for tag in tags)
    if head == "multi-label":
        named = (name for cell in label.values if not is_missing(cell) for name in labels_in_cell(cell))
        return Counter(class_name(name, label.class_names) for name in named)
    counts: Counter[str] = Counter()
    for value, count in label.counts.items():
        counts[class_name(value, label.class_names)] += count
    return counts


def class_name(value: Any, names: Sequence[str] = ()) -> str:
    """The name of a class: of an id by `names`, of another number as it is read, of yes and no as JSON writes them."""
    if type(value) is int and 0 <= value < len(names):
        return names[value]
    if isinstance(value, bool):
        return str(value).lower()
    whole = re.fullmatch(r"(-?[1-9]\d*|0)\.0*", str(value))  # spreadsheets and pandas write 1 as 1.0, too
    return whole[1] if whole else str(value)


def _listed(names: Iterable[str]) -> str:
    names = [*names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _order(name: str) -> tuple[float, str]:
    """Numbers by their size, then names."""
    number = number_in(name)
    return (number if number is not None else float("inf"), name)


def _check_numbers(where: str, label: Column) -> None:
    """
    Raises:
        ValueError: some cells hold something else; names the first.
    """
    wrong = [row for row, value in enumerate(label.values, 1) if not is_missing(value) and number_in(value) is None]
    if wrong:
        raise ValueError(
            f"{where}: '{label.name}' has numbers but for {len(wrong):,} of {label.present:,} rows, such as "
            f"{str(label.values[wrong[0] - 1])!r:.60} in row {wrong[0]}: a number is written as "
            "1234.5, and where a cell is empty its row is not used"
        )


def _note_repetitions(proposal: Proposal, text: Sequence[Column], label: Column | None, usable: Sequence[int]) -> None:
    """Texts that occur more than once, and whether they contradict one another."""
    if any(column.distinct == len(column.values) for column in text):
        return
    values = [column.comparable for column in text]
    keys = [*zip(*values, strict=True)] if len(values) > 1 else values[0]
    if len(set(keys)) == len(keys):
        return
    first: dict[Any, Any] = {}
    repeated = contradicting = 0
    for row in usable:
        key, own = keys[row], label.values[row] if label is not None else None
        if key in first:
            repeated += 1
            contradicting += first[key] != own
        else:
            first[key] = own
    if repeated:
        proposal.notes.append(
            f"{repeated:,} rows repeat a text of another row, so there are {len(first):,} different ones; a text is on "
            "one side of the split only"
        )
    if contradicting and label is not None and proposal.fields["head"] in ("classify", "regress"):
        proposal.notes.append(
            f"of these, {contradicting:,} have another '{label.name}' than the first: which is right?"
        )
