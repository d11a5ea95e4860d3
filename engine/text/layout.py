"""How a text becomes a sequence of tokens.

text classification   as the tokenizer's template says; without one
                      text [SEPARATOR text] END           (bidirectional trunks: END first)
tag, span, extract    the same; the label is at tokens of the text
generate              document SUMMARY target END
language-model        END text END, in pieces of the longest length
masked-language-model as a classification, some tokens hidden

What is written begins with the template's prefix. A vocabulary that has no SEPARATOR or SUMMARY and is not to grow, as
that of a checkpoint, has a line break and "Summary:" in their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trunkline.engine.text.template import Frame
from trunkline.engine.text.tokenizer import Ids, Tokenizer


class Laid(NamedTuple):
    """One row's text as a sequence, and where its last column lies in it."""

    tokens: np.ndarray  # (L,) int64
    types: np.ndarray  # (L,) uint8, token types
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
        """The sequence of a row's text columns; where they are too long, the longest loses its tail.

        Raises:
            ValueError: what stands around the texts leaves no room for them.
        """
        return self._fill(self.tokenizer.frame(len(texts), self.causal), texts, encoded, self.max_length)

    def prompt(self, document: str, max_target_tokens: int, encoded: Ids | None = None) -> Laid:
        """The document and the SUMMARY token, with room left for the longest target and its end."""
        room = self.max_length - max_target_tokens - 1
        return self._fill(self.tokenizer.prompt_frame(), [document], encoded and [encoded], room)

    def _fill(self, frame: Frame, texts: Sequence[str], encoded: Sequence[Ids] | None, room: int) -> Laid:
        encoded = encoded or self.tokenizer.encode(texts)
        if room <= frame.size:
            raise ValueError(
                f"{self.max_length} tokens leave no room for {len(texts)} text(s): {frame.size} stand around them"
                + (f", and {self.max_length - room} are kept for what follows" if room < self.max_length else "")
            )
        whole = [len(ids) for ids, _ in encoded]
        lengths, excess = whole.copy(), sum(whole) + frame.size - room
        for _ in range(excess):
            longest = max(lengths)
            equal = [c for c, length in enumerate(lengths) if length == longest]
            # as transformers: of two that are equally long now, the one that was longer keeps the odd token
            lengths[min(equal, key=whole.__getitem__) if self.tokenizer.template else equal[0]] -= 1
        kept = [ids[:length] for (ids, _), length in zip(encoded, lengths, strict=True)]
        tokens, types, starts = frame.fill(kept)
        end = starts[-1] + lengths[-1]
        return Laid(tokens, types, starts[-1], end, encoded[-1][1], texts[-1], self.causal, excess > 0)
