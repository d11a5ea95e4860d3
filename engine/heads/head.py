"""What a head is: everything that is asked of a kind of prediction, said by one class.

Heads that share a loss are computed together: the small ones in one table (`task_loss`), spans, and those that predict
tokens (`linear_cross_entropy`). Adding a head is one class in a file of its own and one line in registry.py.

L tokens of an example, r labelled rows of it, C columns of the task
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:  # listing the tasks waits neither for numpy nor for torch
    import numpy as np
    from numpy.typing import ArrayLike
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Ids, Tokenizer

Group = Literal["table", "span", "vocabulary"]
GROUPS: tuple[Group, ...] = ("table", "span", "vocabulary")  # the order of tasks in a model


class Row(NamedTuple):
    """What a table says of one example."""

    texts: Sequence[str]  # of the text columns
    encoded: "Sequence[Ids]"  # their tokens
    label: Any = None  # the cell of the label column; None for heads without one
    start: Any = None  # the cell of the column `Task.start`


class Piece(NamedTuple):
    """One encoded example; a row is one, or, of a long text, several."""

    tokens: "np.ndarray"  # (L,)
    label: "Sequence[float] | np.ndarray"  # numbers whose meaning is the head's own business
    types: "np.ndarray | None"  # (L,) uint8, which text a token is of: those that it was laid out with; None: all 0
    reference: str | list[str] | None = None  # the texts to be matched, of heads whose label is a text


class Made(NamedTuple):
    """What became of a row."""

    pieces: list[Piece]  # none: the row is too long to be used
    cut: bool  # whether some of the text found no room


class Labels(NamedTuple):
    """The labelled rows of one example."""

    rows: "np.ndarray"  # (r,) int, offset of the token inside the example
    targets: "np.ndarray"  # (r,) int, class or next token
    values: "np.ndarray"  # (r,) float, label of a regression
    weights: "np.ndarray"  # (r,) float

    @classmethod
    def of(
        cls,
        rows: "ArrayLike",
        targets: "ArrayLike | None" = None,
        values: "ArrayLike | None" = None,
        weights: "ArrayLike | None" = None,
    ) -> "Labels":
        """What is not given is 0, and the weights 1."""
        import numpy as np

        rows = np.asarray(rows)
        zeros, ones = np.zeros(len(rows)), np.ones(len(rows))
        return cls(
            rows,
            zeros if targets is None else np.asarray(targets),
            zeros if values is None else np.asarray(values),
            ones if weights is None else np.asarray(weights),
        )

    @classmethod
    def marked(cls, label: "np.ndarray") -> "Labels":
        """Of a label (L,) that has the target where a token is a row, and -1 elsewhere."""
        rows = (label >= 0).nonzero()[0]
        return cls.of(rows, targets=label[rows])


class Head(ABC):
    """What a task predicts: from a row of a table to a loss, and from logits to an answer in words."""

    group: ClassVar[Group] = "table"
    """With which other heads its loss is computed."""
    squared: ClassVar[bool] = False
    """Of the table: the loss is the squared error of one column, instead of the cross-entropy over the task's own."""
    metrics: ClassVar[tuple[str, ...]]
    """Those of a task that names none; all that are computed together with them fit the head."""
    labelled: ClassVar[bool] = True
    """Whether it needs a label column; a language model learns from the text alone."""
    named: ClassVar[bool] = False
    """Whether it needs class names, `Task.labels`."""
    one_text: ClassVar[bool] = False
    """Whether it takes one text column only."""
    reads_last: ClassVar[bool] = False
    """Whether its rows are in the last text column, which then cannot be empty."""
    offsets: ClassVar[bool] = True
    """Whether it needs the characters of the tokens, which take ten times the memory of the tokens."""
    learns_words: ClassVar[bool] = False
    """Whether the label is a text, whose words the tokenizer learns and metrics match."""
    follows: ClassVar[bool] = False
    """Whether it predicts next tokens, which needs a causal trunk."""
    writes: ClassVar[bool] = False
    """Whether its answer is a new text, written token by token."""
    hides: ClassVar[bool] = False
    """Whether tokens are hidden, which needs a mask token."""
    pools: ClassVar[bool] = False
    """Whether it has one row, which stands for the whole text."""
    several: ClassVar[bool] = False
    """Of the table: every column is a label of its own, which holds or not; a row's target has a bit for each."""

    # From a row of a table to a loss

    def check(self, task: "Task") -> None:
        """Whether the task's fields go with the head.

        Raises:
            ValueError: a field is missing, or one that is given has no meaning here.
        """
        if self.one_text and len(task.text) != 1:
            raise ValueError(f"head '{task.head}' takes one text column, got {list(task.text)}")
        if self.labelled and not task.label:
            raise ValueError(f"head '{task.head}' needs a label column")
        if self.named and not task.labels:
            raise ValueError(f"head '{task.head}' needs labels: the class names in id order")
        if task.labels and not self.named:
            from trunkline.engine.heads.registry import HEADS  # which imports this file

            naming = " and ".join(name for name, head in HEADS.items() if head.named)
            raise ValueError(f"labels belong to {naming}, not to '{task.head}'")

    def room(self, task: "Task") -> int:
        """Tokens of an example that are not the text's."""
        return len(task.text)  # a separator between each two, and END

    def unlabelled(self, task: "Task", label: Any) -> bool:
        """Whether a cell says that there is no label."""
        missing = label is None or label == [] or (isinstance(label, float) and math.isnan(label))
        return missing or (isinstance(label, str) and not label.strip())

    @abstractmethod
    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """A row as tokens and label.

        A text that is laid out has token types, `laid.types`, which go with its tokens: where a piece has a part of the
        tokens, it has the same part of the types.

        Raises:
            ValueError: the label's cell cannot be used; says what was expected and what came.
        """

    @abstractmethod
    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """The labelled rows of an example with tokens (L,), from the label that `encode` gave it."""

    def label_with_prompt(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool, weight: float) -> Labels:
        """As `label`; where there is a prompt, its next tokens are learnt too, each counting `weight` of a target's."""
        return self.label(tokens, label, causal)

    @abstractmethod
    def columns(self, task: "Task") -> int:
        """C, the logits that are the task's own; 0 for the vocabulary, which tasks share."""

    # From logits to an answer

    def rows(self, laid: "Laid") -> Sequence[int]:
        """Offsets of the tokens whose hidden states the head looks at; those that were labelled in training."""
        return [pooled(laid.tokens, laid.causal)]

    def predict(self, logits: "Tensor") -> Any:
        """The prediction for an example, from the logits (r, C) of its rows; heads that predict tokens have none."""
        raise NotImplementedError

    def describe(self, task: "Task", value: Any, laid: "Laid") -> Any:
        """A prediction in words: class names for ids, the text of a span."""
        return value

    def scores(self, task: "Task", value: Any, logits: "Tensor", laid: "Laid") -> dict[str, Any]:
        """How sure a prediction is, by name: 'score', its probability, and 'scores', those of all that it might have
        been; nothing of a head without probabilities.

        Args:
            value: what `predict` made of the logits.
            logits: (r, C) of the example's rows, divided by the task's temperature.
        """
        return {}

    def choices(self, logits: "Tensor", piece: Piece) -> "tuple[Tensor, Tensor] | None":
        """What a prediction chooses between: logits (n, A) of the alternatives of n choices, and which of them was
        right, (n,) int64; None of a head without probabilities. Temperatures are fitted on it, and calibration judged.

        Args:
            logits: (r, C) of the example's rows.
        """
        return None

    # Scores and pages

    @abstractmethod
    def reference(self, piece: Piece) -> Any:
        """The label as metrics want it."""

    def prompt(self, piece: Piece) -> "np.ndarray":
        """What stands before a text that is to be written; of other heads, everything."""
        return piece.tokens

    def answer(self, value: Any, piece: Piece, tokenizer: "Tokenizer") -> Any:
        """A prediction as metrics want it."""
        return value

    def trivial(self, train: Sequence[Any], inputs: Sequence[str], references: Sequence[Any]) -> dict[str, list[Any]]:
        """What can be predicted without a model, by what was taken, in words; a prediction for every reference.

        Args:
            train: references of the training examples.
            inputs, references: of the examples to be predicted; only heads whose label is a text read the inputs.
        """
        return {}

    def in_words(self, task: "Task", value: Any, piece: Piece, tokenizer: "Tokenizer") -> str:
        """A reference or prediction as a reader wants it."""
        return str(value)


def pooled(tokens: "np.ndarray", causal: bool) -> int:
    """The token that stands for the whole text: END."""
    return len(tokens) - 1 if causal else 0


def most_common(values: Iterable[Any]) -> Any:
    """The value that occurs most; of equals, the one that comes first."""
    return Counter(values).most_common(1)[0][0]
