"""What a user asks about, checked before any of it is worked on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task


def listed(given: Any, what: str) -> list[Any]:
    """The members of what must be a list, or another iterable.

    Raises:
        ValueError: it is one string, whose members are characters; a table or a mapping, whose members are names of
            columns; or nothing that has members.
    """
    if isinstance(given, str):
        raise ValueError(f"{what} must be a list, got one string: write [{given!r:.60}]")
    if isinstance(given, bytes | Mapping) or hasattr(given, "columns") or not isinstance(given, Iterable):
        table = "; of a table take columns, as frame['text'] or zip(frame['question'], frame['context'])"
        hint = table if hasattr(given, "columns") else ""
        raise ValueError(f"{what} must be a list, got {type(given).__name__} {given!r:.60}{hint}")
    return list(given)


def text_rows(texts: Any, caller: str) -> list[tuple[str, ...]]:
    """Each text, or tuple of texts, as a tuple.

    Raises:
        ValueError: `texts` is no list, or one of them is no text; names the place.
    """
    rows = []
    for place, given in enumerate(listed(texts, f"{caller}: texts")):
        several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
        row = tuple(given) if several else (given,)
        for text in row:
            if not isinstance(text, str):
                hint = "; of a row take its text, as row['text']" if isinstance(text, Mapping) else ""
                what = f"{type(text).__name__} {text!r:.60}{hint}"
                raise ValueError(f"{caller}: expected a text at place {place}, got {what}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"half a character at place {place}, {text[error.start]!r} in {text!r:.60}"
                raise ValueError(f"{caller}: {half}") from error
        rows.append(row)
    return rows


def fits(task: Task, texts: Sequence[str]) -> bool:
    """Whether a row has the texts that the task takes, and its head something to look at."""
    needed = texts[-1:] if HEADS[task.head].reads_last else texts
    return len(texts) == len(task.text) and any(text.strip() for text in needed)


def misfit(task: Task, texts: Sequence[str]) -> str:
    """What a task takes that these texts are not, in words; empty: they fit."""
    if fits(task, texts):
        return ""
    wanted = f"{len(task.text)} text(s) {list(task.text)}" if len(texts) != len(task.text) else "no blank text"
    return f"task '{task.name}' takes {wanted}, got {texts!r:.120}"
