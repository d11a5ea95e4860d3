"""What a call may come to: a result, or a ValueError with a text; anything else fails the test."""

from collections.abc import Callable
from typing import Any


def result_or_refusal(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """The result and '', or None and the words of the ValueError."""
    words = ""
    try:
        return call(*arguments), words
    except ValueError as error:
        words = str(error)
    assert words, "an error without a text"
    return None, words
