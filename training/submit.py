"""`trunkline submit`: predictions on GLUE's test splits, in the files that its server scores.

A zip of eleven tables. The server knows a row by its index alone and a class by a name of its own, and scores whatever
it is given: rows that lack or stand in another order show only as a bad score, so that all of it is checked here. A
row's place is what its column idx (in GLUE's own TSV, index) says, not where it stands in the file.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.tasks.builtin import BUILTIN
from trunkline.engine.tasks.task import Task
from trunkline.training.data.sources import Rows, read_rows
from trunkline.training.data.tables import MissingColumnError

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

AT_ONCE = 256  # texts in one pass of the trunk
INDEX = "idx|index"
DATE = (1980, 1, 1, 0, 0, 0)  # of all files: the same predictions make the same zip


@dataclass(frozen=True)
class TestSplit:
    """One of the server's test sets."""

    file: str
    task: str
    """The embedded task whose head answers."""
    rows: int
    placeholder: str
    """The most frequent answer in training, or about the mean score: what stands where a run has no such task."""
    written: tuple[str, ...] = ()
    """What the server calls the classes, in the order of their ids; empty: a number from 0 to 5."""
    split: str = "test"
    subset: str = ""
    """Of the data set, where it is not the task's."""


_IDS = ("0", "1")
_BINARY = ("entailment", "not_entailment")
_ENTAILMENT = ("entailment", "neutral", "contradiction")
TEST_SPLITS = (
    TestSplit("CoLA.tsv", "cola", 1_063, "1", _IDS),
    TestSplit("SST-2.tsv", "sst2", 1_821, "1", _IDS),
    TestSplit("MRPC.tsv", "mrpc", 1_725, "1", _IDS),
    TestSplit("STS-B.tsv", "stsb", 1_379, "2.700"),
    TestSplit("QQP.tsv", "qqp", 390_965, "0", _IDS),
    TestSplit("MNLI-m.tsv", "mnli", 9_796, "contradiction", _ENTAILMENT, "test_matched"),
    TestSplit("MNLI-mm.tsv", "mnli", 9_847, "contradiction", _ENTAILMENT, "test_mismatched"),
    TestSplit("QNLI.tsv", "qnli", 5_463, "entailment", _BINARY),
    TestSplit("RTE.tsv", "rte", 3_000, "entailment", _BINARY),
    TestSplit("WNLI.tsv", "wnli", 146, "0", _IDS),
    TestSplit("AX.tsv", "mnli", 1_104, "entailment", _ENTAILMENT, subset="ax"),  # diagnostics, by the head of MNLI
)


def submit(
    engine: "Engine", out: Path, fill_missing: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Path:
    """Predicts GLUE's test splits and writes the zip for its server; nothing is written unless all of it is there.

    Args:
        engine: with the embedded GLUE tasks; the splits come from `engine.config.data`, a folder laid out like the hub
            (DATA/glue/sst2/test-*.parquet), or from the hub itself.
        out: the zip.
        fill_missing: answer the tests of tasks that the engine lacks with a constant, which the server scores too.
        tell: is told what is in each file.

    Raises:
        ValueError: a task is missing or is not GLUE's; a test split that is not there or not whole.
    """
    tasks = {task.name: task for task in engine.tasks}
    missing = list(dict.fromkeys(test.task for test in TEST_SPLITS if test.task not in tasks))
    if missing and not fill_missing:
        raise ValueError(
            f"submit: the run has no task {', '.join(missing)}, and the server wants every file: "
            f"--fill-missing writes a constant for these"
        )
    if len(missing) == len({test.task for test in TEST_SPLITS}):
        raise ValueError("submit: the run has none of GLUE's tasks")
    texts = {}
    for test in TEST_SPLITS:
        if test.task in tasks:
            _check_task(tasks[test.task])
            texts[test.file] = _texts(test, engine, tell)
    tables = {}
    for test in TEST_SPLITS:
        if test.task in tasks:
            tell(f"{test.file}: {test.rows:,} rows by task '{test.task}'")
            tables[test.file] = [_written(test, answer) for answer in _answers(engine, test.task, texts[test.file])]
        else:
            tell(f"{test.file}: {test.rows:,} rows FILLED with {test.placeholder}: the run has no task '{test.task}'")
            tables[test.file] = [test.placeholder] * test.rows
    _write(out, tables)
    return out


def _check_task(task: Task) -> None:
    """A task of that name may be the user's own; the order of its classes is its own business."""
    official = BUILTIN[task.name]
    found, expected = ((t.head, list(t.text), sorted(t.labels)) for t in (task, official))
    if found != expected:
        raise ValueError(f"submit: task '{task.name}' is not GLUE's: head, text and labels are {found}, not {expected}")


def _texts(test: TestSplit, engine: "Engine", tell: Callable[[str], None]) -> list[tuple[str, ...]]:
    """The text columns of a test split, in the order of the server's index."""
    official = BUILTIN[test.task]
    # the index in place of the label, which is -1 or not there at all
    task = replace(official, validation=test.split, subset=test.subset or official.subset, label=INDEX)
    data, base = engine.config.data, engine.config.base
    where = (Path(data) if data else None, Path(base))
    try:
        rows = read_rows(task, "validation", *where)
    except ValueError as error:
        if not isinstance(error.__cause__, MissingColumnError):
            raise
        # no index, or not the texts: then this tells
        rows = read_rows(replace(task, label=task.text[0]), "validation", *where)
        tell(f"{test.file}: no column idx or index, so the rows are taken to stand in the server's order")
    if len(rows) != test.rows:
        source = ", ".join(name for name, _ in rows.origins)
        raise ValueError(f"submit: {test.file} takes {test.rows:,} rows, found {len(rows):,} in {source}")
    texts = list(zip(*(rows.columns[column] for column in task.text), strict=True))
    return [texts[row] for row in _in_order(test, rows)] if INDEX in rows.columns else texts


def _in_order(test: TestSplit, rows: Rows) -> list[int]:
    """The row of every index from 0 on."""
    row_of: dict[int, int] = {}
    for row, given in enumerate(rows.columns[INDEX]):
        digits = str(given)
        index = int(digits) if digits.isascii() and digits.isdigit() else -1
        if not 0 <= index < len(rows):
            raise ValueError(
                f"submit: {test.file}: the index must be a whole number from 0 to {len(rows) - 1:,}, "
                f"got {given!r} ({rows.where(row)})"
            )
        if index in row_of:
            raise ValueError(
                f"submit: {test.file}: the index {index} is that of two rows ({rows.where(row_of[index])}; "
                f"{rows.where(row)})"
            )
        row_of[index] = row
    return [row_of[index] for index in range(len(rows))]


def _answers(engine: "Engine", task: str, texts: Sequence[tuple[str, ...]]) -> list[Any]:
    chunks = (texts[first : first + AT_ONCE] for first in range(0, len(texts), AT_ONCE))
    return [answer for chunk in chunks for answer in engine.predict(chunk, [task])[task]]


def _written(test: TestSplit, answer: Any) -> str:
    """A prediction as the server reads it."""
    if not test.written:
        return f"{min(max(answer, 0.0), 5.0):.3f}"
    return test.written[BUILTIN[test.task].labels.index(answer)]


def _write(out: Path, tables: dict[str, list[str]]) -> None:
    partial = out.with_name(f".{out.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, predictions in tables.items():
            lines = ["index\tprediction", *(f"{index}\t{answer}" for index, answer in enumerate(predictions)), ""]
            archive.writestr(zipfile.ZipInfo(file, DATE), "\n".join(lines), zipfile.ZIP_DEFLATED)
    partial.replace(out)
