"""The sentences of a document, which summaries are made of and scored by."""

import re
from bisect import bisect_left
from collections.abc import Sequence


def units(document: str) -> list[str]:
    """The lines of a document that has several (a line of a dialogue is a turn), else its sentences."""
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    return lines if len(lines) > 1 else sentences(document)


# A stop ends a sentence before white space, save after a title or a single letter ("J. Smith", "e.g. this").
_SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["”’')]))(?<!\bMr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Za-z]\.)\s+"""
    r"|(?<=[。！？])|\n"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text; a line break ends one too."""
    return [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]


def sentences_of(text: str, offsets: Sequence[tuple[int, int]], kept: int) -> list[tuple[str, int]]:
    """The sentences of a document (its lines, if it has several), each with its last token.

    Args:
        offsets: characters that each token covers.
        kept: of these tokens, how many were not cut off.
    """
    starts, place = [start for start, _ in offsets], 0
    found: list[tuple[str, int]] = []
    for sentence in units(text):
        first = text.index(sentence, place)
        place = first + len(sentence)
        token = bisect_left(starts, place) - 1
        if token >= kept:  # its end was cut off
            break
        has_token = token >= 0 and offsets[token][1] > first
        if has_token and not (found and token == found[-1][1]):
            found.append((sentence, token))
    if not found and kept:  # not one whole sentence is left
        found.append((text[: offsets[kept - 1][1]], kept - 1))
    return found
