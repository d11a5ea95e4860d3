"""What the tasks of an engine say of lines of text or of the rows of a file, one dict for each.

Answers are made while they are asked for: an iterator goes in, and one comes out.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.given import fits, text_rows
from trunkline.training.data.sources import rows_of_file
from trunkline.training.data.tables import MissingColumnError, choose_columns

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
    for line, (_, said) in zip(lines, answers(engine, (dict.fromkeys(asked, text) for text in texts)), strict=True):
        yield {"text": line, **said}


def of_file(engine: "Engine", path: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Answers to the rows of a file, beside the columns that were read. It is read twice: once to check every row, and
    once for the answers; so its memory does not depend on the number of rows.

    Args:
        names: of tasks; none: all whose text columns the file has.

    Raises:
        ValueError: a file that cannot be read, that lacks the columns of a task, or with a row without text; before any
            answer is made.
    """
    known = _known(engine, names)
    tasks = [known[name] for name in names] or _answering(engine)
    for _ in _rows(path, tasks, needed=bool(names)):
        pass
    for row, said in answers(engine, _rows(path, tasks, needed=bool(names))):
        read = {column: text for name in row for column, text in zip(known[name].text, row[name], strict=True)}
        yield {**read, **said}


def answers(engine: "Engine", rows: Iterable[dict[str, Text]]) -> Iterator[tuple[dict[str, Text], dict[str, Any]]]:
    """Each row with what the tasks say of it; at most `AT_ONCE` rows are taken before their answers are.

    Args:
        rows: by task, the texts that it reads; the tasks are the same in all of them.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, AT_ONCE)):
        said = _ask(engine, {name: [row[name] for row in chunk] for name in chunk[0]})
        for place, row in enumerate(chunk):
            yield row, {name: said[name][place] for name in row}


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


def _rows(path: Path, tasks: Sequence[Task], needed: bool) -> Iterator[dict[str, Text]]:
    """By task, the texts of each row of a file; without tasks whose columns the file lacks, unless all are needed."""
    own: dict[str, list[str]] = {}  # by task, the file's names of its columns
    columns: list[str] = []

    def choose(found: list[str]) -> list[str]:
        missing = []
        for task in tasks:
            try:
                own[task.name] = list(choose_columns(found, path.name, task.text).values())
            except MissingColumnError as error:
                missing.append(error)
        if missing and (needed or not own):
            raise ValueError(f"predict: {missing[0]}") from missing[0]
        columns[:] = dict.fromkeys(column for of_task in own.values() for column in of_task)
        return columns

    encodings = {task.encoding for task in tasks}
    encoding = encodings.pop() if len(encodings) == 1 else Task.encoding
    for number, values in enumerate(rows_of_file(path, choose, encoding), 1):
        cells = dict(zip(columns, values, strict=True))
        yield {
            task.name: _text(task, [cells[column] for column in own[task.name]], f"{path.name}, row {number}")
            for task in tasks
            if task.name in own
        }


def _text(task: Task, cells: Sequence[Any], where: str) -> Text:
    try:
        text = tuple(map(text_of, cells))
        if not fits(task, text):
            raise ValueError(f"column '{task.text[-1]}' is empty")
    except ValueError as error:
        raise ValueError(f"predict: task '{task.name}': {error} ({where})") from error
    return text


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
