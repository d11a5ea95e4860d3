"""A class per word."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, most_common

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Tokenizer


class Tag(Head):
    """A class per word of the last text column, from the word's last token."""

    metrics = ("tag_accuracy", "tag_f1")
    named = True
    reads_last = True

    def columns(self, task: "Task") -> int:
        return len(task.labels)

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """The label's cell is one tag for each word of the last text column: a list, or separated by white space."""
        label = row.label
        tags = label.split() if isinstance(label, str) else label if isinstance(label, list) else [label]
        words = row.texts[-1].split()
        if len(tags) != len(words):
            raise ValueError(f"label must have one tag for each of the {len(words)} words, got {len(tags)}: {label!r}")
        classes = [task.class_names.id_of(tag) for tag in tags]
        laid = layout.lay(row.texts, row.encoded)
        of_token = [-1] * len(laid.tokens)
        for token, tag in zip(word_rows(laid), classes, strict=True):
            if token >= 0:
                of_token[token] = tag
        return Made([Piece(laid.tokens, of_token)] if max(of_token) >= 0 else [], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: (L,), the class at the last token of every word, -1 elsewhere."""
        return Labels.marked(label)

    def rows(self, laid: "Laid") -> Sequence[int]:
        return [token for token in word_rows(laid) if token >= 0]

    def predict(self, logits: "Tensor") -> list[int]:
        """(words, C) -> class ids"""
        return logits.argmax(-1).tolist()

    def describe(self, task: "Task", value: Sequence[int], laid: "Laid") -> list[str]:
        return [task.labels[tag] for tag in value]

    def reference(self, piece: Piece) -> list[int]:
        return [int(tag) for tag in piece.label if tag >= 0]

    def trivial(
        self, train: Sequence[Sequence[int]], inputs: Sequence[str], references: Sequence[Sequence[int]]
    ) -> dict[str, list[list[int]]]:
        tag = most_common(chain.from_iterable(train))
        return {"majority class": [[tag] * len(tags) for tags in references]}

    def in_words(self, task: "Task", value: Sequence[int], piece: Piece, tokenizer: "Tokenizer") -> str:
        return " ".join(task.labels[tag] for tag in value)


def word_rows(laid: "Laid") -> list[int]:
    """The last token of every word of the last text column; words are what white space separates.

    -1 where no token ends with the word: it was cut off, or its end is a character that the tokenizer leaves out.
    """
    last = {end: laid.first + i for i, (_, end) in enumerate(laid.offsets)}  # of several that end there, the last
    return [last.get(word.end(), -1) for word in re.finditer(r"\S+", laid.text)]
