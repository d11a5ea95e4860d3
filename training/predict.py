"""What the tasks of an engine say of lines of text or of the rows of a file, one dict for each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.given import fits, text_rows
from trunkline.training.data.sources import Rows, read_columns
from trunkline.training.data.tables import MissingColumnError

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

AT_ONCE = 256  # rows that share a pass through the trunk

Text = tuple[str, ...]  # the text columns of a row


def of_lines(
    engine: "Engine", lines: Sequence[str], names: Sequence[str], called: str = "text"
) -> Iterator[dict[str, Any]]:
    """Answers to lines of text; a tab parts two texts of a pair.

    Args:
        names: of tasks; none: all that take as many texts as the lines have.
        called: what errors call a line, before its number.

    Raises:
        ValueError: no task takes all of the lines, an unknown task, or a line that does not fit a task; before any
            answer is made.
    """
    known = _known(engine, names)
    texts = text_rows([tuple(line.split("\t")) for line in lines], "predict")
    for place, text in enumerate(texts, 1):
        if not any(part.strip() for part in text):
            raise ValueError(f"predict: {called} {place} of {len(lines)} is blank")
        if not names and len(text) != len(texts[0]):
            raise ValueError(
                f"predict: no task takes all of these texts: {called} {place} has {len(text)} parts, {called} 1 has "
                f"{len(texts[0])}; a tab parts two texts of a pair"
            )
    fitting = [task.name for task in _answering(engine) if all(len(text) == len(task.text) for text in texts)]
    if not (asked := names or fitting):
        raise ValueError("predict: no task takes all of these texts; a tab parts two texts of a pair")
    for name in asked:
        for place, text in enumerate(texts, 1):
            if not fits(known[name], text):
                wanted = f"{len(known[name].text)} text(s) {list(known[name].text)}"
                raise ValueError(f"predict: task '{name}' takes {wanted}, got {text!r:.120} as {called} {place}")
    for first in range(0, len(lines), AT_ONCE):
        answers = _ask(engine, dict.fromkeys(asked, texts[first : first + AT_ONCE]))
        for place, line in enumerate(lines[first : first + AT_ONCE]):
            yield {"text": line, **{name: answers[name][place] for name in asked}}


def of_file(engine: "Engine", path: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Answers to the rows of a .csv, .tsv, .jsonl or .parquet file, beside the columns that were read.

    Args:
        names: of tasks; none: all whose text columns the file has.

    Raises:
        ValueError: a file that cannot be read, that lacks the columns of a task, or with a row without text.
    """
    known = _known(engine, names)
    rows: dict[str, Rows] = {}
    missing: list[MissingColumnError] = []
    for task in [known[name] for name in names] or _answering(engine):
        try:
            rows[task.name] = read_columns(path, task.text, task.encoding)
        except MissingColumnError as error:
            missing.append(error)
    if missing and (names or not rows):
        raise ValueError(f"predict: {missing[0]}") from missing[0]
    texts = {name: _texts(known[name], columns) for name, columns in rows.items()}
    for first in range(0, len(next(iter(rows.values()))), AT_ONCE):
        chunk = {name: of_task[first : first + AT_ONCE] for name, of_task in texts.items()}
        answers = _ask(engine, chunk)
        for place in range(len(next(iter(chunk.values())))):
            read = {
                column: text
                for name, of_task in chunk.items()
                for column, text in zip(known[name].text, of_task[place], strict=True)
            }
            yield {**read, **{name: answers[name][place] for name in chunk}}


def _known(engine: "Engine", names: Sequence[str]) -> dict[str, Task]:
    """The engine's tasks by name, which have all of these names."""
    known = {task.name: task for task in engine.tasks}
    if strangers := [name for name in names if name not in known]:
        raise ValueError(f"predict: no task '{strangers[0]}'; there are {', '.join(known)}")
    if language := [name for name in names if known[name] not in _answering(engine)]:
        raise ValueError(f"predict: task '{language[0]}' is a language model, which answers nothing")
    return known


def _answering(engine: "Engine") -> list[Task]:
    return [task for task in engine.tasks if HEADS[task.head].labelled]


def _texts(task: Task, rows: Rows) -> list[Text]:
    texts = []
    for row, values in enumerate(zip(*(rows.columns[column] for column in task.text), strict=True)):
        try:
            text = tuple(map(text_of, values))
            if not fits(task, text):
                raise ValueError(f"column '{task.text[-1]}' is empty")
        except ValueError as error:
            raise ValueError(f"predict: task '{task.name}': {error} ({rows.where(row)})") from error
        texts.append(text)
    return texts


def _ask(engine: "Engine", texts: dict[str, list[Text]]) -> dict[str, list[Any]]:
    """By task, an answer to each of its texts; tasks that read the same texts share a pass through the trunk."""
    heads = {task.name: task.head for task in engine.tasks}
    answers: dict[str, list[Any]] = {}
    for name, of_task in texts.items():
        if name in answers:
            continue
        if heads.get(name) == "generate":
            answers[name] = engine.generate([text for (text,) in of_task], name)
        else:
            same = [other for other, others in texts.items() if others == of_task and heads.get(other) != "generate"]
            answers |= engine.predict(of_task, same)
    return answers
