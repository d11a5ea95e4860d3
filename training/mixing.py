"""Which examples every step sees: a pure function of (seed, step), so that a run can start anywhere.

Steps are planned in windows of 32. A window takes from every task's shuffled examples a stretch of tokens in proportion
to the task's share, and spreads what it took evenly over its batches, longest first. Where a stretch begins follows
from the shares alone, nothing is carried from window to window, and every example of a task is seen once an epoch.

N tasks, T token budget of a batch
Source: annealed sampling is that of Stickland & Murray, BERT and PALs, arXiv:1902.02671, section 4.2.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

WINDOW = 32  # steps planned together: enough examples to fill batches to the brim, few enough to plan at once
FILLS = (
    0.998,
    0.995,
    0.99,
    0.98,
    0.96,
    0.93,
    0.9,
    0.85,
    0.8,
    0.7,
    0.6,
    0.5,
)  # of the budget; the first that fits is taken
PROBED = 16  # windows that a fill is tried on
GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly, however many there are


@dataclass(frozen=True)
class Mixing:
    """How often each task is seen."""

    method: Literal["proportional", "temperature", "annealed", "fixed"] = "temperature"
    """An example of a task with n of them is drawn in proportion to: n; n^(1/temperature); n^(1 - 0.8 progress), where
    progress goes from 0 to 1 over the run; or the task's share in `shares`."""
    temperature: float = 2.0
    """Of method 'temperature': 1 is proportional, larger is more even."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of method 'fixed': every task's share of the examples, by name; they need not add up to 1."""


def shares(mixing: Mixing, sizes: Sequence[int], fixed: Sequence[float], progress: float) -> np.ndarray:
    """(N,) probability that an example is of each task, from the numbers of training examples."""
    n = np.asarray(sizes, np.float64)
    match mixing.method:
        case "proportional":
            weights = n
        case "temperature":
            weights = n ** (1.0 / mixing.temperature)
        case "annealed":
            weights = n ** (1.0 - 0.8 * progress)
        case "fixed":
            weights = np.asarray(fixed, np.float64)
    return weights / weights.sum()


def spread(lengths: Sequence[int], bins: int, capacity: int) -> tuple[list[list[int]], list[int]]:
    """Indices of `lengths` over `bins` of one capacity, as even as can be, and those that found no room.

    Longest first, each into the emptiest bin: what does not fit there fits nowhere.
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    left_over = []
    heap = [(0, b) for b in range(bins)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        used, b = heap[0]
        if used + lengths[index] <= capacity:
            heapq.heapreplace(heap, (used + int(lengths[index]), b))
            filled[b].append(index)
        else:
            left_over.append(index)
    return filled, left_over


class _Stream:
    """The examples of one task, shuffled anew every epoch, one after the other as an endless stream of tokens.

    `mark`, in [0, 1), is where in an example the token lies that says which stretch has it. With the first token of
    every task's examples, the first window would have one example of each task too many.
    """

    def __init__(self, lengths: np.ndarray, seed: Sequence[int], mark: float):
        self.lengths, self.seed, self.mark = lengths, seed, mark
        self.tokens = int(lengths.sum())  # of an epoch
        self.epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # number, order, marked token of each example

    def between(self, first: int, last: int) -> list[int]:
        """Examples whose marked token lies in [first, last)."""
        taken: list[int] = []
        for number in range(first // self.tokens, (max(last, 1) - 1) // self.tokens + 1):
            if self.epoch is None or self.epoch[0] != number:
                order = np.random.default_rng([*self.seed, number]).permutation(len(self.lengths))
                lengths = self.lengths[order]
                self.epoch = number, order, np.cumsum(lengths) - lengths + (self.mark * lengths).astype(np.int64)
            _, order, marks = self.epoch
            a, b = np.searchsorted(marks, [first - number * self.tokens, last - number * self.tokens])
            taken += order[a:b].tolist()
        return taken


class Plan(NamedTuple):
    """The batches of one window, and how many of its examples found no room."""

    batches: list[list[tuple[int, int]]]
    left_out: int


class Mixer:
    """The training batches of a run, as lists of (task, example).

    How full a batch can be made depends on the lengths: the fullest plan that loses no example is taken. Should a later
    window still lose one for want of room, it is counted in `Plan.left_out` and seen again in the next epoch. Of
    examples longer than half a batch there may be fewer than batches: those left empty repeat examples of their window.

    Args:
        lengths: tokens of every training example, one array a task.
        mixing: how often each task is seen.
        fixed: share of every task, for method 'fixed'.
        budget: T
        steps: batches of the whole run; annealing ends with it.
        seed: every seed is another order.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        mixing: Mixing,
        fixed: Sequence[float],
        budget: int,
        steps: int,
        seed: int,
    ):
        self.lengths, self.budget = lengths, budget
        self.streams = [_Stream(task, [seed, t], t * GOLDEN % 1.0) for t, task in enumerate(lengths)]
        self.planned: tuple[int, Plan] | None = None  # the window in hand
        windows, sizes = -(-steps // WINDOW), [len(task) for task in lengths]
        progress = [window / max(1, windows - 1) for window in range(windows)]
        tokens = np.stack([shares(mixing, sizes, fixed, p) for p in progress]) * [task.mean() for task in lengths]
        tokens *= WINDOW * budget / tokens.sum(1, keepdims=True)  # (windows, N)
        for self.fill in FILLS:
            total = np.cumsum(self.fill * tokens, 0)
            self.starts = np.concatenate([np.zeros_like(total[:1]), total]).astype(np.int64)  # (windows + 1, N)
            if not any(self.plan(window).left_out for window in range(min(PROBED, windows))):
                break

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(task, example) of everything in batch `step`, from 0."""
        window = step // WINDOW
        if self.planned is None or self.planned[0] != window:
            self.planned = window, self.plan(window)
        return self.planned[1].batches[step % WINDOW]

    def plan(self, window: int) -> Plan:
        """The batches of a window of steps."""
        taken = [
            (t, example)
            for t, stream in enumerate(self.streams)
            for example in stream.between(*self.starts[window : window + 2, t].tolist())
        ]
        batches, left_out = spread([int(self.lengths[t][e]) for t, e in taken], WINDOW, self.budget)
        batches = [batch or batches[b % len(taken)] for b, batch in enumerate(batches)]
        return Plan([[taken[i] for i in batch] for batch in batches], len(left_out))
