"""The first and the last token of a stretch of the text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, most_common
from trunkline.engine.text.cells import number_of, text_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Tokenizer

START, END = 1, 2  # bits of a row's target
ANSWER = ("text", "answer_start")  # of an answer in SQuAD


class Span(Head):
    """The first and the last token of a stretch of the text; every token of the text is a row and may be either."""

    group = "span"
    metrics = ("span_exact", "span_f1")
    reads_last = True

    def columns(self, task: "Task") -> int:
        return 2

    def unlabelled(self, task: "Task", label: Any) -> bool:
        return super().unlabelled(task, label) or (isinstance(label, dict) and label.get("text", "") in (None, []))

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """The label's cell is the answer's text, inside the last text column."""
        text, (answer, given) = row.texts[-1], answer_of(row.label, row.start)
        begin = text.find(answer) if given is None else int(number_of(given, "start"))
        end = begin + len(answer)
        if begin < 0 or text[begin:end] != answer:
            place = "" if given is None else f" at character {given}"
            raise ValueError(f"label {answer!r} does not stand{place} in column '{task.text[-1]}'")
        laid = layout.lay(row.texts, row.encoded)
        inside = [i for i, (first, last) in enumerate(laid.offsets) if first < end and last > begin]
        if not inside or inside[-1] >= laid.kept:  # the tokenizer makes nothing of the answer, or it was cut off
            return Made([], laid.cut)
        answered = [laid.first, laid.end, laid.first + inside[0], laid.first + inside[-1]]
        return Made([Piece(laid.tokens, answered, laid.types)], laid.cut)

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
        if not laid.kept:
            raise ValueError(f"there is no span in {laid.text[:60]!r}, which the tokenizer makes no token of")
        return range(laid.first, laid.end)

    def predict(self, logits: "Tensor") -> tuple[int, int]:
        """(tokens of the text, 2) -> offsets of first and last token in the text; the best pair in order"""
        pairs = logits[:, 0, None] + logits[None, :, 1]
        best = int(pairs.masked_fill(pairs.new_ones(pairs.shape).tril(-1).bool(), float("-inf")).argmax())
        return best // len(logits), best % len(logits)

    def describe(self, task: "Task", value: tuple[int, int], laid: "Laid") -> str:
        return laid.text[laid.offsets[value[0]][0] : laid.offsets[value[1]][1]].strip()

    def scores(self, task: "Task", value: tuple[int, int], logits: "Tensor", laid: "Laid") -> dict[str, Any]:
        """'score': the product of the probabilities of both ends."""
        first, last = logits.softmax(0)[list(value), [0, 1]].tolist()
        return {"score": first * last}

    def choices(self, logits: "Tensor", piece: Piece) -> "tuple[Tensor, Tensor]":
        """(tokens of the text, 2) -> (2, tokens of the text): where it starts, and where it ends"""
        return logits.T, logits.new_tensor(self.reference(piece)).long()

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


def answer_of(label: Any, start: Any) -> tuple[str, Any]:
    """The answer's text, and where it starts, if that is given.

    The cell is the text; or, as SQuAD has them, the first of several answers, a list of {text, answer_start} or an
    object with a list of each.

    Raises:
        ValueError: it is neither.
    """
    first = label[0] if isinstance(label, list) and label and isinstance(label[0], dict) else label
    if not isinstance(first, dict):
        return text_of(first), start
    if "text" not in first:
        raise ValueError(f"label must be a text, or have a text as SQuAD's answers do, got {label!r}")
    text, place = (value[0] if isinstance(value, list) and value else value for value in map(first.get, ANSWER))
    return text_of(text), start if place is None else place
