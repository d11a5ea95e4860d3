"""How a text becomes a sequence of tokens.

text classification   text [SEPARATOR text] END           (bidirectional trunks: END first)
tag, span, extract    the same; the label is at tokens of the text
generate              document SUMMARY target END
language-model        END text END, in pieces of the longest length
masked-language-model as a classification, some tokens hidden
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trunkline.engine.text.tokenizer import Ids, Tokenizer


class Laid(NamedTuple):
    """One row's text as a sequence, and where its last column lies in it."""

    tokens: np.ndarray
    first: int  # first token of the last text column
    end: int  # its end
    offsets: list[tuple[int, int]]  # characters of that column that each of its tokens covers, also of those cut off
    text: str  # that column
    causal: bool
    cut: bool  # whether some of the text found no room

    @property
    def kept(self) -> int:
        """Tokens of the last text column that found room."""
        return self.end - self.first


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
        return Laid(tokens, first, end, encoded[-1][1], texts[-1], self.causal, excess > 0)

    def prompt(self, document: str, max_target_tokens: int, encoded: Ids | None = None) -> Laid:
        """The document and the SUMMARY token, with room left for the longest target."""
        room = Layout(self.tokenizer, self.max_length - max_target_tokens - 1, causal=True)
        laid = room.lay([document], encoded and [encoded])
        laid.tokens[-1] = self.tokenizer.summary
        return laid
