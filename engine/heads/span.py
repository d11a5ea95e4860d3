"""The first and the last token of a stretch of the text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, most_common
from trunkline.engine.text.cells import number_of, text_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Tokenizer

START, END = 1, 2  # bits of a row's target


class Span(Head):
    """The first and the last token of a stretch of the text; every token of the text is a row and may be either."""

    group = "span"
    metrics = ("span_exact", "span_f1")
    reads_last = True

    def columns(self, task: "Task") -> int:
        return 2

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """The label's cell is the answer's text, inside the last text column."""
        text, answer = row.texts[-1], text_of(row.label)
        begin = text.find(answer) if row.start is None else int(number_of(row.start, "start"))
        end = begin + len(answer)
        if begin < 0 or text[begin:end] != answer:
            place = "" if row.start is None else f" at character {row.start}"
            raise ValueError(f"label {answer!r} does not stand{place} in column '{task.text[-1]}'")
        laid = layout.lay(row.texts, row.encoded)
        inside = [i for i, (first, last) in enumerate(laid.offsets) if first < end and last > begin]
        if not inside or inside[-1] >= laid.kept:  # the tokenizer makes nothing of the answer, or it was cut off
            return Made([], laid.cut)
        answered = [laid.first, laid.end, laid.first + inside[0], laid.first + inside[-1]]
        return Made([Piece(laid.tokens, answered)], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: (first token of the text, its end, first and last token of the answer)."""
        import numpy as np

        first, end, start, last = (int(x) for x in label)
        targets = np.zeros(end - first, np.int64)
        targets[start - first] |= START
        targets[last - first] |= END
        # the weights of an example add up to 1; tokens of weight 0 are there to be told from the answer
        return Labels.of(np.arange(first, end), targets=targets, weights=np.array([0.0, 0.5, 0.5, 1.0])[targets])

    def rows(self, laid: "Laid") -> Sequence[int]:
        return range(laid.first, laid.end)

    def predict(self, logits: "Tensor") -> tuple[int, int]:
        """(tokens of the text, 2) -> offsets of first and last token in the text; the best pair in order"""
        pairs = logits[:, 0, None] + logits[None, :, 1]
        best = int(pairs.masked_fill(pairs.new_ones(pairs.shape).tril(-1).bool(), float("-inf")).argmax())
        return best // len(logits), best % len(logits)

    def describe(self, task: "Task", value: tuple[int, int], laid: "Laid") -> str:
        return laid.text[laid.offsets[value[0]][0] : laid.offsets[value[1]][1]].strip()

    def reference(self, piece: Piece) -> tuple[int, int]:
        first, _, start, last = (int(x) for x in piece.label)
        return start - first, last - first

    def trivial(
        self, train: Sequence[tuple[int, int]], inputs: Sequence[str], references: Sequence[tuple[int, int]]
    ) -> dict[str, list[tuple[int, int]]]:
        return {"most frequent training span": [most_common(map(tuple, train))] * len(references)}

    def in_words(self, task: "Task", value: tuple[int, int], piece: Piece, tokenizer: "Tokenizer") -> str:
        first = int(piece.label[0])  # of the text in the example
        return tokenizer.decode(piece.tokens[first + value[0] : first + value[1] + 1])
