"""How a text becomes a sequence of tokens, which of them a task's head looks at, and what its prediction is in words.

text classification   text [SEPARATOR text] END           (bidirectional trunks: END first)
tag, span, extract    the same; the label is at tokens of the text
generate              document SUMMARY target END
language-model        END text END, in pieces of the longest length
masked-language-model as a classification, some tokens hidden
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trunkline.engine.network.heads import pooled
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.sentences import sentences_of
from trunkline.engine.text.tokenizer import Ids, Tokenizer


class Laid(NamedTuple):
    """One row's text as a sequence, and where its last column lies in it."""

    tokens: np.ndarray
    first: int  # first token of the last text column
    end: int  # its end
    offsets: list[tuple[int, int]]  # characters of that column that each of those tokens covers
    text: str  # that column
    causal: bool
    cut: bool  # whether some of the text found no room


@dataclass(frozen=True)
class Layout:
    """How texts are put together into one sequence."""

    tokenizer: Tokenizer
    max_length: int
    causal: bool

    def lay(self, texts: Sequence[str], encoded: Sequence[Ids] | None = None) -> Laid:
        """The sequence of a row's text columns; where they are too long, the longest loses its tail."""
        encoded = encoded or self.tokenizer.encode(texts)
        lengths = [len(ids) for ids, _ in encoded]
        excess = sum(lengths) + len(texts) - self.max_length  # a separator between each two, and END
        for _ in range(excess):
            lengths[lengths.index(max(lengths))] -= 1
        sequence: list[int] = [] if self.causal else [self.tokenizer.end]
        for c, ((ids, _), length) in enumerate(zip(encoded, lengths, strict=True)):
            if c:
                sequence.append(self.tokenizer.separator)
            first = len(sequence)
            sequence.extend(ids[:length].tolist())
        end = len(sequence)
        tokens = np.array(sequence + [self.tokenizer.end] * self.causal)
        return Laid(tokens, first, end, encoded[-1][1][: lengths[-1]], texts[-1], self.causal, excess > 0)

    def prompt(self, document: str, max_target_tokens: int, encoded: Ids | None = None) -> Laid:
        """The document and the SUMMARY token, with room left for the longest target."""
        room = Layout(self.tokenizer, self.max_length - max_target_tokens - 1, causal=True)
        laid = room.lay([document], encoded and [encoded])
        laid.tokens[-1] = self.tokenizer.summary
        return laid


def word_rows(laid: Laid) -> np.ndarray:
    """(words,) the last token of every word of the last text column; words are what white space separates.

    -1 where no token ends with the word: it was cut off, or its end is a character that the tokenizer leaves out.
    """
    last = {end: laid.first + i for i, (_, end) in enumerate(laid.offsets)}  # of several that end there, the last
    return np.array([last.get(word.end(), -1) for word in re.finditer(r"\S+", laid.text)], np.int64)


def prediction_rows(task: Task, laid: Laid) -> np.ndarray:
    """Offsets of the tokens whose hidden states a task's head looks at."""
    match task.head:
        case "tag":
            rows = word_rows(laid)
            return rows[rows >= 0]
        case "span":
            return np.arange(laid.first, laid.end)
        case "extract":
            return laid.first + np.array([token for _, token in sentences_of(laid.text, laid.offsets)])
        case _:
            return np.array([pooled(laid.tokens, laid.causal)])


def describe(task: Task, value: Any, laid: Laid) -> Any:
    """A head's prediction in words: class names for ids, the text of a span."""
    match task.head:
        case "classify":
            return task.labels[value]
        case "tag":
            return [task.labels[tag] for tag in value]
        case "extract":
            sentences = sentences_of(laid.text, laid.offsets)
            return "\n".join(sentences[place][0] for place in value)
        case "span":
            return laid.text[laid.offsets[value[0]][0] : laid.offsets[value[1]][1]].strip()
        case _:
            return value
