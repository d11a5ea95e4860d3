"""What the tasks of an engine say of lines of text or of the rows of a file, one dict for each.

Answers are made while they are asked for: an iterator goes in, and one comes out.
"""

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.cells import text_of
from trunkline.engine.text.given import fits, misfit, text_rows
from trunkline.training.data.sources import rows_of_file
from trunkline.training.data.tables import Choose, MissingColumnError, choose_columns, format_of
from trunkline.training.distributed.ranks import ONE, Ranks

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

AT_ONCE = 256  # rows that share a pass through the trunk

Text = tuple[str, ...]  # the text columns of a row


def of_lines(
    engine: "Engine", lines: Sequence[str], names: Sequence[str], called: str = "text", scores: bool = False
) -> Iterator[dict[str, Any]]:
    """Answers to lines of text; a tab parts two texts of a pair.

    Args:
        names: of tasks; none: all that take as many texts as the lines have.
        called: what errors call a line, before its number.
        scores: whether answers come with their probabilities.

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
        takes = "; ".join(f"'{task.name}' reads {', '.join(task.text)}" for task in _answering(engine))
        raise ValueError(
            f"predict: no task takes all of these texts; a tab parts two texts of a pair; {takes or 'none answers'}"
        )
    for name in asked:
        for place, text in enumerate(texts, 1):
            if wrong := misfit(known[name], text):
                raise ValueError(f"predict: {wrong} as {called} {place}")
    rows = (dict.fromkeys(asked, text) for text in texts)
    for line, (_, said) in zip(lines, answers(engine, rows, scores), strict=True):
        yield {"text": line, **said}


def of_file(
    engine: "Engine",
    path: Path,
    names: Sequence[str],
    encoding: str = "",
    scores: bool = False,
    ranks: Ranks = ONE,
) -> Iterator[dict[str, Any]]:
    """The rows of a file, all columns of them, with the answers under the names of the tasks; a column that has such a
    name is called 'NAME (given)'. The file is read twice: once to check every row, and once for the answers; so its
    memory does not depend on the number of rows.

    Args:
        names: of tasks; none: all whose text columns the file has.
        encoding: of a text file; empty: that of the tasks' own.
        scores: whether answers come with their probabilities.
        ranks: as of `answers`.

    Raises:
        ValueError: a file that cannot be read, that lacks the columns of a task, or with a row without text; before any
            answer is made.
    """
    known = _known(engine, names)
    tasks = [known[name] for name in names] or _answering(engine)
    encodings = {encoding} if encoding else {task.encoding for task in tasks}
    encoding = encodings.pop() if len(encodings) == 1 else Task.encoding
    for _ in _rows(path, tasks, bool(names), encoding):
        pass
    waiting: deque[dict[str, Any]] = deque()

    def texts() -> Iterator[dict[str, Text]]:
        for cells, row in _rows(path, tasks, bool(names), encoding):
            waiting.append(cells)
            yield row

    for row, said in answers(engine, texts(), scores, ranks):
        yield {f"{name} (given)" if name in row else name: cell for name, cell in waiting.popleft().items()} | said


def as_json(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with what JSON has: dates and the like as they read, and null for what is no number."""
    return json.loads(json.dumps(answer, default=str, ensure_ascii=False), parse_constant=lambda _: None)


def write_answers(answers: Iterable[dict[str, Any]], out: Path) -> None:
    """Writes answers as .csv, with the columns of the first of them, or as .jsonl; where that fails, a file that was
    there stays.

    Raises:
        ValueError: for a .csv, an answer with other columns than the first.
        OSError: the disk is full, not writable, ...
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="" if out.suffix.lower() == ".csv" else "\n") as file:
            if out.suffix.lower() == ".csv":
                _write_csv(answers, file)
            else:
                file.writelines(f"{json.dumps(as_json(answer), ensure_ascii=False)}\n" for answer in answers)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def check_out(out: Path, read: Path | None) -> None:
    """
    Args:
        read: the file that is answered.

    Raises:
        ValueError: a file of another suffix, or the one that is read.
    """
    if read and out.absolute() == read.absolute():
        raise ValueError(f"predict: --out {out} is the file that is read: name another")
    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(f"predict: --out {out}: answers are written as .csv or .jsonl")


def _in_columns(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with its score, if there is one, in a column of its own."""
    columns: dict[str, Any] = {}
    for name, said in answer.items():
        if isinstance(said, dict) and "label" in said:
            columns |= {name: said["label"], f"{name} (score)": said.get("score", said.get("scores"))}
        else:
            columns[name] = said
    return columns


def _write_csv(answers: Iterable[dict[str, Any]], file: TextIO) -> None:
    table = csv.writer(file, lineterminator="\n")
    header: list[str] = []
    for number, answer in enumerate(map(_in_columns, answers), 1):
        if not header:
            header = list(answer)
            table.writerow(header)
        if list(answer) != header:
            raise ValueError(f"predict: row {number} has other keys than the first: --out FILE.jsonl takes them")
        plain = as_json(answer)
        table.writerow(
            json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell for cell in plain.values()
        )


def answers(
    engine: "Engine", rows: Iterable[dict[str, Text]], scores: bool = False, ranks: Ranks = ONE
) -> Iterator[tuple[dict[str, Text], dict[str, Any]]]:
    """Each row with what the tasks say of it; at most `AT_ONCE` rows a rank are taken before their answers are.

    Args:
        rows: by task, the texts that it reads; the tasks are the same in all of them.
        scores: whether answers come with their probabilities.
        ranks: that share the work; all take all of the answers.
    """

    def ask(chunk: list[dict[str, Text]]) -> dict[str, list[Any]]:
        return _ask(engine, {name: [row[name] for row in chunk] for name in chunk[0]}, scores)

    rows = iter(rows)
    while chunks := [chunk for _ in range(ranks.size) if (chunk := list(islice(rows, AT_ONCE)))]:
        for chunk, said in zip(chunks, ranks.spread(ask, chunks), strict=True):
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


def _rows(
    path: Path, tasks: Sequence[Task], needed: bool, encoding: str
) -> Iterator[tuple[dict[str, Any], dict[str, Text]]]:
    """The cells of each row of a file, and by task its texts; without tasks whose columns the file lacks, unless all
    are needed."""
    own: dict[str, list[str]] = {}  # by task, the file's names of its columns

    def choose(found: list[str]) -> list[str]:
        missing = []
        for task in tasks:
            try:
                own[task.name] = list(choose_columns(found, path.name, task.text).values())
            except MissingColumnError as error:
                missing.append(error)
        if missing and (needed or not own):
            raise ValueError(f"predict: {missing[0]}") from missing[0]
        return [column for column in found if column.strip() and found.count(column) == 1]

    for number, cells in enumerate(_cells(path, choose, encoding), 1):
        where = f"{path.name}, row {number}"
        if missing := [column for columns in own.values() for column in columns if column not in cells]:
            raise ValueError(f"predict: {where}: no key '{missing[0]}', found {list(cells)}")
        texts = {
            task.name: _text(task, [cells[column] for column in own[task.name]], where)
            for task in tasks
            if task.name in own
        }
        yield cells, texts


def _cells(path: Path, choose: Choose, encoding: str) -> Iterator[dict[str, Any]]:
    """The rows of a file; of JSON whole objects, which may have keys that others lack."""
    if format_of(path.name) in (".jsonl", ".json"):
        for number, (record,) in enumerate(rows_of_file(path, None, encoding)):
            if number == 0:
                choose(list(record))
            yield record
        return
    columns: list[str] = []

    def chosen(found: list[str]) -> list[str]:
        columns[:] = choose(found)
        return columns

    for values in rows_of_file(path, chosen, encoding):
        yield dict(zip(columns, values, strict=True))


def _text(task: Task, cells: Sequence[Any], where: str) -> Text:
    try:
        text = tuple(map(text_of, cells))
        if not fits(task, text):
            raise ValueError(f"column '{task.text[-1]}' is empty: leave out rows that have no text")
    except ValueError as error:
        raise ValueError(f"predict: task '{task.name}': {error} ({where})") from error
    return text


def _ask(engine: "Engine", texts: dict[str, list[Text]], scores: bool) -> dict[str, list[Any]]:
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
            answers |= engine.predict(of_task, same, scores)
    return answers
