"""A config as YAML, with the reason for every line beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from trunkline.engine.yaml_file import flow

WIDTH = 100  # characters of a line, from which its comment stands above it


def commented(
    head: Sequence[str],
    tasks: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
    rest: Mapping[str, tuple[Any, str]],
) -> str:
    """The file's text.

    Args:
        head: lines of comment at the top.
        tasks: the fields of each task, and comments by the name of a field.
        rest: the other settings, each with its comment.
    """
    lines = [f"# {_one_line(line)}" for line in head]
    lines.append("tasks:")
    for fields, why in tasks:
        for place, (name, value) in enumerate(fields.items()):
            lines += _line("  - " if place == 0 else "    ", name, value, why.get(name, ""))
    for name, (value, comment) in rest.items():
        lines += _line("", name, value, comment)
    return "\n".join(lines) + "\n"


def _line(indent: str, name: str, value: Any, comment: str) -> list[str]:
    line = f"{indent}{name}: {flow(value)}"
    if not comment:
        return [line]
    comment = _one_line(comment)
    if len(line) + len(comment) + 3 <= WIDTH:
        return [f"{line}  # {comment}"]
    space = " " * len(indent)
    return [f"{space}# {comment}", line]


def _one_line(comment: str) -> str:
    """Names of columns may hold line breaks, and what YAML does not take."""
    return " ".join("".join(c if c.isprintable() else " " for c in comment).split())
