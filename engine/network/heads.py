"""What the tasks predict: every head turns an example's labels into rows and logits into a prediction.

Heads that share a loss are computed together: the small ones in one table (`task_loss`), spans, and those that predict
tokens (`linear_cross_entropy`). Adding a head is one class here and one line in HEADS.

L tokens of an example, r labelled rows of it, C columns of the task
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from trunkline.kernels.task_loss import LossSums, sum_by_task

if TYPE_CHECKING:
    from trunkline.engine.tasks.task import Task

Group = Literal["table", "span", "vocabulary"]
GROUPS: tuple[Group, ...] = ("table", "span", "vocabulary")  # the order of tasks in a model

START, END = 1, 2  # bits of a span row's target


class Labels(NamedTuple):
    """The labelled rows of one example."""

    rows: np.ndarray  # (r,) int, offset of the token inside the example
    targets: np.ndarray  # (r,) int, class or next token
    values: np.ndarray  # (r,) float, label of a regression
    weights: np.ndarray  # (r,) float


def _labels(
    rows: ArrayLike,
    targets: ArrayLike | None = None,
    values: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Labels:
    rows = np.asarray(rows)
    zeros, ones = np.zeros(len(rows)), np.ones(len(rows))
    return Labels(
        rows,
        zeros if targets is None else np.asarray(targets),
        zeros if values is None else np.asarray(values),
        ones if weights is None else np.asarray(weights),
    )


class Head(ABC):
    """What a task predicts."""

    group: ClassVar[Group]

    @abstractmethod
    def columns(self, task: "Task") -> int:
        """C, the logits that are the task's own; 0 for the vocabulary, which tasks share."""

    @abstractmethod
    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """The labelled rows of an example with tokens (L,); what is in `label` is each head's own business."""

    def predict(self, logits: Tensor) -> Any:
        """The prediction for an example, from the logits (r, C) of its rows; heads that write text have none."""
        raise NotImplementedError


class Classify(Head):
    """A class per example, from the last token of a causal trunk and the first of a bidirectional one."""

    group: ClassVar[Group] = "table"

    def columns(self, task: "Task") -> int:
        return len(task.labels)

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """`label`: the class id, (1,)."""
        return _labels([pooled(tokens, causal)], targets=label)

    def predict(self, logits: Tensor) -> int:
        """(1, C) -> class id"""
        return int(logits[0].argmax())


class Regress(Head):
    """A number per example, from the same token as a class."""

    group: ClassVar[Group] = "table"

    def columns(self, task: "Task") -> int:
        return 1

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """`label`: the number, (1,)."""
        return _labels([pooled(tokens, causal)], values=label)

    def predict(self, logits: Tensor) -> float:
        """(1, 1) -> number"""
        return float(logits[0, 0])


class Tag(Head):
    """A class per word, from the word's last token."""

    group: ClassVar[Group] = "table"

    def columns(self, task: "Task") -> int:
        return len(task.labels)

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """`label`: (L,), the class at the last token of every word, -1 elsewhere."""
        rows = np.flatnonzero(label >= 0)
        return _labels(rows, targets=label[rows])

    def predict(self, logits: Tensor) -> list[int]:
        """(words, C) -> class ids"""
        return logits.argmax(-1).tolist()


class Span(Head):
    """The first and the last token of a stretch of the text; every token of the text is a row and may be either."""

    group: ClassVar[Group] = "span"

    def columns(self, task: "Task") -> int:
        return 2

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """`label`: (first token of the text, its end, first and last token of the answer)."""
        first, end, start, last = (int(x) for x in label)
        targets = np.zeros(end - first, np.int64)
        targets[start - first] |= START
        targets[last - first] |= END
        # the weights of an example add up to 1; tokens of weight 0 are there to be told from the answer
        return _labels(np.arange(first, end), targets=targets, weights=np.array([0.0, 0.5, 0.5, 1.0])[targets])

    def predict(self, logits: Tensor) -> tuple[int, int]:
        """(tokens of the text, 2) -> offsets of first and last token in the text; the best pair in order"""
        pairs = logits[:, 0, None] + logits[None, :, 1]
        best = int(pairs.masked_fill(torch.ones_like(pairs).tril(-1).bool(), float("-inf")).argmax())
        return best // len(logits), best % len(logits)


class Generate(Head):
    """A text that follows the prompt: every token of the target is predicted from the one before it."""

    group: ClassVar[Group] = "vocabulary"

    def columns(self, task: "Task") -> int:
        return 0

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """`label`: the length of the prompt, (1,)."""
        prompt = int(label[0])
        return _labels(np.arange(prompt - 1, len(tokens) - 1), targets=tokens[prompt:])


class Extract(Tag):
    """The sentences of a document that make a summary, each from its last token."""

    def columns(self, task: "Task") -> int:
        return 2

    def predict(self, logits: Tensor) -> list[int]:
        """(sentences, 2) -> places of the likeliest sentences, as many as their probabilities add up to, at least one.

        The sum is how many sentences the model expects; of equals the first ones are taken.
        """
        p = logits.softmax(-1)[:, 1]
        count = max(1, round(float(p.sum())))
        return sorted(p.argsort(descending=True, stable=True)[:count].tolist())


class LanguageModel(Generate):
    """Every next token."""

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """`label`: unused."""
        return _labels(np.arange(len(tokens) - 1), targets=tokens[1:])


class MaskedLanguageModel(Generate):
    """The tokens that were masked, from what stands around them."""

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        """`label`: (L,), the token that was masked, -1 elsewhere."""
        rows = np.flatnonzero(label >= 0)
        return _labels(rows, targets=label[rows])


HEADS: dict[str, Head] = {
    "classify": Classify(),
    "regress": Regress(),
    "tag": Tag(),
    "span": Span(),
    "generate": Generate(),
    "extract": Extract(),
    "language-model": LanguageModel(),
    "masked-language-model": MaskedLanguageModel(),
}


def pooled(tokens: np.ndarray, causal: bool) -> int:
    return len(tokens) - 1 if causal else 0


def span_loss(
    logits: Tensor, task: Tensor, target: Tensor, row_weight: Tensor, sequence: Tensor, num_tasks: int
) -> LossSums:
    """Cross-entropy of first and last token over the rows of each sequence.

    Args:
        logits: (R, 2) for first and last.
        task: (R,) int64, 0 <= task < num_tasks.
        target: (R,) int64, bits START and END.
        row_weight: (R,), 0 where the row is neither.
        sequence: (R,) int64, number of each row's sequence, ascending, from 0.
        num_tasks: N
    """
    logits = logits.float()
    groups = sequence[:, None].expand_as(logits)
    top = torch.full_like(logits, float("-inf")).scatter_reduce(0, groups, logits.detach(), "amax")  # (R, 2)
    total = torch.zeros_like(logits).scatter_add(0, groups, (logits - top[sequence]).exp())
    log_p = logits - top[sequence] - total[sequence].log()
    is_answer = torch.stack([target & START, (target & END) // END], -1).to(logits.dtype)  # (R, 2)
    loss = -(is_answer * log_p).sum(-1) / is_answer.sum(-1).clamp(min=1)
    best = torch.full_like(logits, float("-inf")).scatter_reduce(0, groups, log_p.detach(), "amax")[sequence]
    correct = ((log_p == best) | (is_answer == 0)).all(-1) & (row_weight > 0)
    counted = (row_weight > 0).to(loss.dtype)
    # a right start counts half, a right end the other half
    sums = (row_weight * loss, row_weight, counted, row_weight * correct)
    return LossSums(*(sum_by_task(values, task, num_tasks) for values in sums))
