"""What a row's cells say: texts, numbers and classes, each checked."""

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.engine.tasks.task import Task


def text_of(value: Any) -> str:
    """A text column's value; a list of sentences is joined.

    Raises:
        ValueError: it is not text, or has half a character, as JSON can.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(text_of(part) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"text must be a string, got {value!r}")
    value.encode()  # an error for half a character
    return value


def references_of(label: Any) -> list[str]:
    """The texts that a generated one is matched with: the label, or those of its list that are not blank.

    Raises:
        ValueError: one of them is no text.
    """
    references = label if isinstance(label, list) else [label]
    for place, reference in enumerate(references, 1):
        if not isinstance(reference, str):
            raise ValueError(f"reference {place} of {len(references)} must be a string, got {reference!r}")
    return [text for text in map(text_of, references) if text.strip()]


def number_of(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def class_of(task: "Task", label: Any) -> int:
    """A class given by name, or by id as a number or its digits."""
    if isinstance(label, str):
        if label in task.labels:
            return task.labels.index(label)
        number = int(label) if re.fullmatch(r"-?\d+", label) else None
    else:
        number = int(label) if isinstance(label, int | float) and label % 1 == 0 else None
    if number is None or not 0 <= number < len(task.labels):
        known = ", ".join(task.labels)
        raise ValueError(f"label must be a class id in [0, {len(task.labels)}) or one of {known}, got {label!r}")
    return number
