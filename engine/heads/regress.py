"""A number per example."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, pooled
from trunkline.engine.text.cells import number_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Layout
    from trunkline.engine.text.tokenizer import Tokenizer


class Regress(Head):
    """A number per example, from the same token as a class."""

    squared = True
    metrics = ("pearson", "spearman")
    pools = True

    def columns(self, task: "Task") -> int:
        return 1

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        laid = layout.lay(row.texts, row.encoded)
        return Made([Piece(laid.tokens, [number_of(row.label, "label")], laid.types)], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: the number, (1,)."""
        return Labels.of([pooled(tokens, causal)], values=label)

    def predict(self, logits: "Tensor") -> float:
        """(1, 1) -> number"""
        return float(logits[0, 0])

    def reference(self, piece: Piece) -> float:
        return float(piece.label[0])

    def trivial(
        self, train: Sequence[float], inputs: Sequence[str], references: Sequence[float]
    ) -> dict[str, list[float]]:
        return {"mean of the training labels": [fmean(train)] * len(references)}

    def in_words(self, task: "Task", value: float, piece: Piece, tokenizer: "Tokenizer") -> str:
        return f"{value:.2f}"
