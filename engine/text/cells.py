"""What a row's cells say: texts and numbers, each checked."""

import math
import re
from collections.abc import Sequence
from typing import Any

WORD = re.compile(r"\S+")
LARGEST = (2 - 2**-23) * 2.0**127  # float32


class Words(str):
    """A text that came as a list of words or sentences, and the characters that each of them has in it."""

    bounds: list[tuple[int, int]]

    @classmethod
    def of(cls, parts: Sequence[str]) -> "Words":
        text, end = cls(" ".join(parts)), -1
        text.bounds = [(end := end + 1, end := end + len(part)) for part in parts]
        return text


def word_bounds(text: str) -> list[tuple[int, int]]:
    """First character and end of every word: of a list each part, which may be empty or have spaces in it; else what
    white space separates."""
    return text.bounds if isinstance(text, Words) else [word.span() for word in WORD.finditer(text)]


def text_of(value: Any) -> str:
    """A text column's value; the parts of a list are joined.

    Raises:
        ValueError: it is not text, or has half a character, as JSON can.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return Words.of([text_of(part) for part in value])
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
    """A number that float32, which training computes in, holds.

    Raises:
        ValueError: it is none.
    """
    try:
        number = math.nan if isinstance(value, str) and "_" in value else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if abs(number) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:.1e} in size, the largest float32, got {value!r}")
    return number
