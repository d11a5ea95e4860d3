"""A class per word."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, most_common
from trunkline.engine.text.cells import word_bounds
from trunkline.engine.text.class_names import class_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Tokenizer

UNREAD = "<unread>"  # in place of the tag of a word that the model does not read


class Tag(Head):
    """A class per word of the last text column, from the word's last token.

    A word is what white space separates, or, of a text that comes as a list, one of its parts.
    """

    metrics = ("tag_accuracy", "tag_f1")
    named = True
    reads_last = True

    def columns(self, task: "Task") -> int:
        return len(task.labels)

    def check(self, task: "Task") -> None:
        super().check(task)
        if UNREAD in task.labels:
            raise ValueError(f"labels: '{UNREAD}' stands for the tag of a word that is not read; take another name")

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """The label's cell is one tag for each word of the last text column: a list, or separated by white space."""
        label = row.label
        tags = label.split() if isinstance(label, str) else label if isinstance(label, list) else [label]
        words = word_bounds(row.texts[-1])
        if len(tags) != len(words):
            raise ValueError(f"label must have one tag for each of the {len(words)} words, got {len(tags)}: {label!r}")
        classes = [class_of(task, tag) for tag in tags]
        laid = layout.lay(row.texts, row.encoded)
        of_token = [-1] * len(laid.tokens)
        for token, tag in zip(word_rows(laid), classes, strict=True):
            if token >= 0:
                of_token[token] = tag
        return Made([Piece(laid.tokens, of_token, laid.types)] if max(of_token) >= 0 else [], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: (L,), the class at the last token of every word, -1 elsewhere."""
        return Labels.marked(label)

    def rows(self, laid: "Laid") -> Sequence[int]:
        return [token for token in word_rows(laid) if token >= 0]

    def predict(self, logits: "Tensor") -> list[int]:
        """(words, C) -> class ids"""
        return logits.argmax(-1).tolist()

    def describe(self, task: "Task", value: Sequence[int], laid: "Laid") -> list[str]:
        """A tag for every word, or UNREAD."""
        tags = iter(value)
        return [task.labels[next(tags)] if token >= 0 else UNREAD for token in word_rows(laid)]

    def scores(self, task: "Task", value: Sequence[int], logits: "Tensor", laid: "Laid") -> dict[str, Any]:
        """'score': of every word the probability of its tag; None of a word that is not read."""
        best = iter(logits.softmax(-1).amax(-1).tolist())
        return {"score": [next(best) if token >= 0 else None for token in word_rows(laid)]}

    def choices(self, logits: "Tensor", piece: Piece) -> "tuple[Tensor, Tensor]":
        return logits, logits.new_tensor(self.reference(piece)).long()

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
    """The last token of every word of the last text column; -1 where the model does not read the word: its end was cut
    off, or the tokenizer makes no token of it."""
    starts, words = [start for start, _ in laid.offsets], word_bounds(laid.text)
    rows = []
    for place, (first, end) in enumerate(words):
        token = bisect_left(starts, end) - 1
        following = words[place + 1][0] if place + 1 < len(words) else len(laid.text)
        while token >= 0 and laid.offsets[token][1] > max(following, end):  # of a token of two words, the later has it
            token -= 1
        read = 0 <= token < laid.kept and laid.offsets[token][1] > first
        rows.append(laid.first + token if read else -1)
    return rows
