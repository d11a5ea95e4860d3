"""One encoded split of a task: what every example is, as flat arrays.

n examples
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trunkline.engine.heads.head import Piece
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.packing import Example
from trunkline.engine.tasks.task import Task


@dataclass(frozen=True)
class Counts:
    """Rows that are not, or not wholly, among the examples."""

    empty: int = 0
    too_long: int = 0
    unlabelled: int = 0
    truncated: int = 0

    def in_words(self) -> list[str]:
        """What there is any of: '3 empty'."""
        return [f"{number:,} {what.replace('_', ' ')}" for what, number in vars(self).items() if number]

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that are not among the examples, by the reason."""
        return {"empty": self.empty, "too_long": self.too_long, "unlabelled": self.unlabelled}


@dataclass(frozen=True)
class Encoded:
    """One split of one task, as flat arrays."""

    task: Task
    causal: bool
    tokens: np.ndarray  # all examples' tokens, int32
    bounds: np.ndarray  # (n + 1,) first token of each example
    labels: np.ndarray  # all examples' labels, float64; what they say is the head's business
    label_bounds: np.ndarray  # (n + 1,)
    references: Sequence[str | list[str]]  # (n,) generate, extract: the texts to be matched; empty otherwise
    counts: Counts
    types: np.ndarray | None = None  # all examples' token types, uint8; None for a trunk without them
    again: Any = field(init=False, default=None, repr=False, compare=False)  # as __reduce__; lost when it is changed

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Data that is mapped from a file goes to another process by name."""
        return self.again or super().__reduce_ex__(protocol)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each example"""
        return np.diff(self.bounds)

    def tokens_of(self, i: int) -> np.ndarray:
        return self.tokens[self.bounds[i] : self.bounds[i + 1]]

    def types_of(self, i: int) -> np.ndarray | None:
        return None if self.types is None else self.types[self.bounds[i] : self.bounds[i + 1]]

    def label_of(self, i: int) -> np.ndarray:
        return self.labels[self.label_bounds[i] : self.label_bounds[i + 1]]

    def piece(self, i: int) -> Piece:
        """Example `i`, as its head encoded it."""
        return Piece(
            self.tokens_of(i), self.label_of(i), self.types_of(i), self.references[i] if self.references else None
        )

    def prompt_of(self, i: int) -> np.ndarray:
        """What stands before the text to be generated; of other heads, everything."""
        return HEADS[self.task.head].prompt(self.piece(i))

    def example(
        self, i: int, task: int, prompt_weight: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> Example:
        """Example `i`, with its labelled rows, as one of task number `task` of a model.

        Args:
            prompt_weight: above 0, the next tokens of a prompt are learnt too, each counting that much of a target's.
            class_weights: factor of each class's rows; None: 1.
        """
        tokens, label, head = self.tokens_of(i), self.label_of(i), HEADS[self.task.head]
        if prompt_weight:
            labels = head.label_with_prompt(tokens, label, self.causal, prompt_weight)
        else:
            labels = head.label(tokens, label, self.causal)
        if class_weights is not None:
            labels = labels._replace(weights=labels.weights * np.take(class_weights, labels.targets.astype(int)))
        return Example(task, tokens, *labels, types=self.types_of(i))

    def reference(self, i: int) -> Any:
        """The label as metrics want it: a class, a number, a text, tags, a span, or the number of predicted tokens."""
        return HEADS[self.task.head].reference(self.piece(i))
