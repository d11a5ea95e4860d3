"""A class per example."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, most_common, pooled
from trunkline.engine.text.class_names import class_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Tokenizer

UNLABELLED = ("-1", "-1.0", "-100")  # what data sets and loss functions write for "no class"


class Classify(Head):
    """A class per example, from the last token of a causal trunk and the first of a bidirectional one."""

    metrics = ("accuracy",)
    named = True
    pools = True

    def columns(self, task: "Task") -> int:
        return len(task.labels)

    def unlabelled(self, task: "Task", label: Any) -> bool:
        return super().unlabelled(task, label) or (str(label) in UNLABELLED and not task.class_names.meant(label))

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        laid = layout.lay(row.texts, row.encoded)
        return Made([Piece(laid.tokens, [class_of(task, row.label)], laid.types)], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: the class id, (1,)."""
        return Labels.of([pooled(tokens, causal)], targets=label)

    def predict(self, logits: "Tensor") -> int:
        """(1, C) -> class id"""
        return int(logits[0].argmax())

    def describe(self, task: "Task", value: int, laid: "Laid") -> str:
        return task.labels[value]

    def scores(self, task: "Task", value: int, logits: "Tensor", laid: "Laid") -> dict[str, Any]:
        p = logits[0].softmax(-1).tolist()
        return {"score": p[value], "scores": dict(zip(task.labels, p, strict=True))}

    def choices(self, logits: "Tensor", piece: Piece) -> "tuple[Tensor, Tensor]":
        return logits, logits.new_tensor(piece.label).long()

    def reference(self, piece: Piece) -> int:
        return int(piece.label[0])

    def trivial(self, train: Sequence[int], inputs: Sequence[str], references: Sequence[int]) -> dict[str, list[int]]:
        return {"majority class": [most_common(train)] * len(references)}

    def in_words(self, task: "Task", value: int, piece: Piece, tokenizer: "Tokenizer") -> str:
        return task.labels[value]
