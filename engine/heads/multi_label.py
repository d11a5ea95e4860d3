"""Any number of classes per example, none among them."""

from ast import literal_eval
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, most_common, pooled
from trunkline.engine.text.cells import number_of
from trunkline.engine.text.class_names import class_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Tokenizer

BETWEEN = "|"  # labels of one cell
MOST = 63  # labels: a row's target has a bit for each, and a sign
METRICS = ("micro_f1", "macro_f1", "accuracy")


class MultiLabel(Head):
    """Any number of classes per example, each with a probability of its own, from the same token as one class."""

    metrics = METRICS[:2]
    named = True
    pools = True
    several = True

    def columns(self, task: "Task") -> int:
        return len(task.labels)

    def check(self, task: "Task") -> None:
        if not task.labels:
            raise ValueError("head 'multi-label' needs labels: the class names in id order")
        if len(task.text) == 0 or len(task.labels) > MOST:
            raise ValueError(f"head 'multi-label' takes at most {MOST} labels, got {len(task.labels)}")
        if task.label and (broken := [name for name in task.labels if BETWEEN in name]):
            raise ValueError(f"labels: '{broken[0]}' has a '{BETWEEN}', which stands between the labels of one cell")
        if wrong := [name for name in task.metrics if name not in METRICS]:
            raise ValueError(f"metrics of a 'multi-label' head are {', '.join(METRICS)}; got '{wrong[0]}'")

    def unlabelled(self, task: "Task", label: Any) -> bool:
        """An empty list, and an empty text, say that none of the labels holds; a cell without a value says nothing."""
        if not task.label:
            return all(super(MultiLabel, self).unlabelled(task, cell) for cell in label)
        return label is None or (isinstance(label, float) and label != label)

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """The label's cell names classes, see `labels_in_cell`; of a task without a label column there is a cell of 0
        or 1 for every class."""
        holds = [0] * len(task.labels)
        for place in _named(task, row.label) if task.label else _flagged(task, row.label):
            holds[place] = 1
        laid = layout.lay(row.texts, row.encoded)
        return Made([Piece(laid.tokens, holds, types=laid.types)], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: (C,), 1 for every class that holds and 0 for the others."""
        return Labels.of([pooled(tokens, causal)], targets=[sum(1 << place for place in _places(label))])

    def predict(self, logits: "Tensor") -> tuple[int, ...]:
        """(1, C), less what each has to exceed -> the classes above it, ascending"""
        return tuple((logits[0] > 0).nonzero().flatten().tolist())

    def describe(self, task: "Task", value: Sequence[int], laid: "Laid") -> list[str]:
        return [task.labels[place] for place in value]

    def scores(self, task: "Task", value: Sequence[int], logits: "Tensor", laid: "Laid") -> dict[str, Any]:
        """'scores': of every class the probability that it holds."""
        return {"scores": dict(zip(task.labels, logits[0].sigmoid().tolist(), strict=True))}

    def choices(self, logits: "Tensor", piece: Piece) -> "tuple[Tensor, Tensor]":
        """(1, C) -> (C, 2): whether a class holds is a choice between logits of 0 and its own"""
        return logits.new_zeros(logits.shape[1], 2).index_copy_(1, logits.new_tensor([1]).long(), logits.T), (
            logits.new_tensor(piece.label).long()
        )

    def reference(self, piece: Piece) -> tuple[int, ...]:
        return tuple(_places(piece.label))

    def trivial(
        self, train: Sequence[tuple[int, ...]], inputs: Sequence[str], references: Sequence[tuple[int, ...]]
    ) -> dict[str, list[tuple[int, ...]]]:
        """The most common class alone, since the most common set is often the empty one, which scores 0."""
        of_all = list(chain.from_iterable(train))
        return {"most common label": [(most_common(of_all),) if of_all else ()] * len(references)}

    def in_words(self, task: "Task", value: Sequence[int], piece: Piece, tokenizer: "Tokenizer") -> str:
        return " | ".join(task.labels[place] for place in value) or "(none)"


def labels_in_cell(cell: Any) -> list[Any]:
    """Of a list its parts, also as JSON or Python write one; of a text what stands between '|'."""
    if isinstance(cell, list):
        return cell
    if not isinstance(cell, str):
        return [cell]
    text = cell.strip()
    if text[:1] == "[" and text[-1:] == "]":
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # then it is no list, but a name
            if isinstance(parts := literal_eval(text), list):
                return parts
    return [part.strip() for part in text.split(BETWEEN)] if text else []


def _places(label: "Sequence[float] | np.ndarray") -> list[int]:
    return [place for place, holds in enumerate(label) if holds]


def _named(task: "Task", cell: Any) -> list[int]:
    """The classes that a cell names."""
    classes = [class_of(task, label) for label in labels_in_cell(cell)]
    if len(set(classes)) < len(classes):  # as a list of 0 and 1 for every class would
        repeated = most_common(classes)
        raise ValueError(
            f"label names '{task.labels[repeated]}' twice in {cell!r}; it must be a list of classes, or a text with "
            f"'{BETWEEN}' between them. For a column of 0 and 1 for every class leave `label` out"
        )
    return classes


def _flagged(task: "Task", cells: Sequence[Any]) -> list[int]:
    """The classes whose cells say 1."""
    flags = []
    for name, cell in zip(task.labels, cells, strict=True):
        try:
            flag = number_of(cell, name)
        except ValueError:
            flag = -1.0
        if flag not in (0, 1):
            raise ValueError(f"column '{name}' must be 0 or 1, got {cell!r}")
        flags.append(flag)
    return _places(flags)
