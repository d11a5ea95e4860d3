"""What stands around the texts of a sequence: asked from the tokenizer itself, whatever kind of post-processor it has.

[CLS] text [SEP] text [SEP] of BERT, <s> text </s></s> text </s> of RoBERTa, <s> text of Llama: all are marks before,
between and after the texts, each of a token type.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Marks:
    """Special tokens that stand side by side."""

    ids: tuple[int, ...] = ()
    types: tuple[int, ...] = ()

    @classmethod
    def of(cls, *ids: int) -> "Marks":
        """Marks of type 0."""
        return cls(ids, (0,) * len(ids))


@dataclass(frozen=True)
class Frame:
    """Everything around n texts."""

    marks: tuple[Marks, ...]  # (n + 1,) before the first text, between each two, after the last
    types: tuple[int, ...]  # (n,) token type of each text

    @property
    def size(self) -> int:
        """Tokens that are no text."""
        return sum(len(marks.ids) for marks in self.marks)

    def fill(self, texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The sequence with these texts, token ids of each.

        Returns:
            tokens (L,) int64, types (L,) uint8, and where each text begins.
        """
        tokens: list[np.ndarray] = [np.array(self.marks[0].ids, np.int64)]
        types: list[np.ndarray] = [np.array(self.marks[0].types, np.uint8)]
        starts: list[int] = []
        for ids, kind, after in zip(texts, self.types, self.marks[1:], strict=True):
            starts.append(sum(map(len, tokens)))
            tokens += ids, np.array(after.ids, np.int64)
            types += np.full(len(ids), kind, np.uint8), np.array(after.types, np.uint8)
        return np.concatenate(tokens).astype(np.int64), np.concatenate(types), starts


@dataclass(frozen=True)
class Template:
    """How a tokenizer frames one text and two; of more, the second is repeated with what stands before it."""

    one: Frame
    two: Frame

    @classmethod
    def of(cls, inner: "tokenizers.Tokenizer") -> "Template | None":
        """The template of a tokenizer; None if it adds nothing to a text."""
        if inner.post_processor is None:
            return None
        text = next((text for text in ("a", *inner.get_vocab()) if _is_text(inner, text)), None)
        if text is None:
            return None
        template = cls(_frame(inner.encode(text)), _frame(inner.encode(text, text)))
        return template if template.two.size else None

    def frame(self, texts: int) -> Frame:
        """Around so many texts."""
        if texts == 1:
            return self.one
        (before, between, after), (first, second) = self.two.marks, self.two.types
        return Frame((before, *[between] * (texts - 1), after), (first, *[second] * (texts - 1)))

    @property
    def prefix(self) -> Marks:
        """Before a text that others are to follow."""
        return self.one.marks[0]

    @property
    def ids(self) -> set[int]:
        """All marks."""
        return {token for frame in (self.one, self.two) for marks in frame.marks for token in marks.ids}


def _is_text(inner: "tokenizers.Tokenizer", text: str) -> bool:
    try:
        return bool(inner.encode(text, add_special_tokens=False).ids)
    except Exception:  # a vocabulary of words alone, without one for the unknown: the library's bare exception
        return False


def _frame(encoding: "tokenizers.Encoding") -> Frame:
    """What is around the texts of an encoding."""
    tokens = list(zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True))
    count = encoding.n_sequences
    marks: list[Marks] = []
    place = 0
    kinds = []
    for text in range(count):
        own = [i for i, (_, _, sequence) in enumerate(tokens) if sequence == text]
        marks.append(_marks(tokens[place : own[0]]))
        kinds.append(tokens[own[0]][1])
        place = own[-1] + 1
    return Frame((*marks, _marks(tokens[place:])), tuple(kinds))


def _marks(tokens: list[tuple[int, int, int | None]]) -> Marks:
    return Marks(tuple(token for token, _, _ in tokens), tuple(kind for _, kind, _ in tokens))
