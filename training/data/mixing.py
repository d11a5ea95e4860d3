"""Which examples every step sees: a pure function of (seed, step), so that a run can start anywhere.

Batches are planned in windows of 32. A window takes from every task's shuffled examples a stretch of tokens in
proportion to the task's share, and spreads what it took evenly over its batches, longest first. Where a stretch begins
follows from the shares alone, nothing is carried from window to window, and every example of a task is seen once an
epoch. Where the shares react to training (adaptive.py), windows end at evaluations too, and the order is a function of
(seed, step, the shares chosen so far).

N tasks, T token budget of a batch
Source: annealed sampling is that of Stickland & Murray, BERT and PALs, arXiv:1902.02671, section 4.2.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trunkline.engine.settings import ADAPTIVE, Mixing

WINDOW = 32  # batches planned together: enough examples to fill batches to the brim, few enough to plan at once
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
CHUNK = 1 << 20  # examples that are shuffled at once
GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly, however many there are


def shares(mixing: Mixing, sizes: Sequence[int], fixed: Sequence[float], progress: float) -> np.ndarray:
    """(N,) probability that an example is of each task, from the numbers of training examples."""
    n = np.asarray(sizes, np.float64)
    if mixing.method == "fixed" or (mixing.method in ADAPTIVE and mixing.shares):
        weights = np.asarray(fixed, np.float64)
    elif mixing.method == "proportional":
        weights = n
    elif mixing.method == "annealed":
        weights = n ** (1.0 - 0.8 * progress)
    else:
        weights = n ** (1.0 / mixing.temperature)
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

    Of a task with more than CHUNK examples every n-th one, from some first one on, is a chunk; an epoch goes from chunk
    to chunk, and only the one in hand is shuffled and held. So a run on ten million examples starts as soon as one on a
    million.

    `mark`, in [0, 1), is where in an example the token lies that says which stretch has it. With the first token of
    every task's examples, the first window would have one example of each task too many.
    """

    def __init__(self, lengths: np.ndarray, seed: Sequence[int], mark: float):
        self.lengths, self.seed, self.mark = lengths, seed, mark
        chunks = -(-len(lengths) // CHUNK)
        self.chunk_tokens = [int(lengths[chunk::chunks].sum()) for chunk in range(chunks)]
        self.tokens = sum(self.chunk_tokens)  # of an epoch
        self.shuffled: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None  # as `_shuffle` returns it

    def between(self, first: int, last: int) -> list[int]:
        """Examples whose marked token lies in [first, last)."""
        taken: list[int] = []
        for epoch in range(first // self.tokens, (max(last, 1) - 1) // self.tokens + 1):
            start = epoch * self.tokens
            for chunk, tokens in enumerate(self.chunk_tokens):
                if first < start + tokens and start < last:
                    if self.shuffled is None or self.shuffled[0] != (epoch, chunk):
                        self.shuffled = self._shuffle(epoch, chunk)
                    _, order, marks = self.shuffled
                    a, b = np.searchsorted(marks, [first - start, last - start])
                    taken += order[a:b].tolist()
                start += tokens
        return taken

    def _shuffle(self, epoch: int, chunk: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        """Epoch and chunk; the order of its examples; the marked token of each, counted from the chunk's first."""
        chunks = len(self.chunk_tokens)
        random = np.random.default_rng([*self.seed, epoch, chunk] if chunk else [*self.seed, epoch])
        order = chunk + chunks * random.permutation(len(self.lengths[chunk::chunks]))
        lengths = self.lengths[order]
        return (epoch, chunk), order, np.cumsum(lengths) - lengths + (self.mark * lengths).astype(np.int64)


class Plan(NamedTuple):
    """The batches of one window, and how many of its examples found no room."""

    batches: list[list[tuple[int, int]]]
    left_out: int


def windows_of(batches: int, every: int | None = None) -> np.ndarray:
    """(windows + 1,) first batch of each window and the end of the last; a window ends at every multiple of `every`."""
    if every is None:
        return np.arange(0, batches + WINDOW, WINDOW)
    parts = [range(first, min(first + every, batches), WINDOW) for first in range(0, batches, every)]
    return np.array([*(first for part in parts for first in part), batches])


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
        every: batches between two places where the shares may change; None: they never do.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        mixing: Mixing,
        fixed: Sequence[float],
        budget: int,
        steps: int,
        seed: int,
        every: int | None = None,
    ):
        self.lengths, self.budget = lengths, budget
        self.streams = [_Stream(task, [seed, t], t * GOLDEN % 1.0) for t, task in enumerate(lengths)]
        self.firsts = windows_of(steps, every)  # (windows + 1,)
        windows, sizes = len(self.firsts) - 1, [len(task) for task in lengths]
        progress = [window / max(1, windows - 1) for window in range(windows)]
        self.shares = np.stack([shares(mixing, sizes, fixed, p) for p in progress])  # (windows, N) before any change
        self.starts = np.zeros((windows + 1, len(lengths)), np.int64)  # first token of every task's stretch
        self.change(0, np.ones(len(lengths)))

    def change(self, batch: int, factors: np.ndarray) -> np.ndarray:
        """From `batch` on, where a window begins, the shares are multiplied by `factors`, (N,), not all of them 0.

        Returns:
            (N,) the shares of the examples from there on.
        """
        first, windows = int(np.searchsorted(self.firsts, batch)), len(self.firsts) - 1
        changed = self.shares[first:] * factors
        tokens = changed * [task.mean() for task in self.lengths]
        tokens *= np.diff(self.firsts[first:])[:, None] * self.budget / tokens.sum(1, keepdims=True)  # (windows, N)
        for self.fill in FILLS:
            total = np.cumsum(self.fill * tokens, 0)
            self.starts[first + 1 :] = self.starts[first] + total.astype(np.int64)
            if not any(self.plan(window).left_out for window in range(first, min(first + PROBED, windows))):
                break
        self.planned: tuple[int, Plan] | None = None  # the window in hand
        return changed[0] / changed[0].sum()

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(task, example) of everything in batch `step`, from 0."""
        window = int(np.searchsorted(self.firsts, step, side="right")) - 1
        if self.planned is None or self.planned[0] != window:
            self.planned = window, self.plan(window)
        return self.planned[1].batches[step - self.firsts[window]]

    def plan(self, window: int) -> Plan:
        """The batches of a window."""
        first, last = self.starts[window : window + 2].tolist()
        taken = [(t, example) for t, stream in enumerate(self.streams) for example in stream.between(first[t], last[t])]
        if not taken:  # a window of few batches between two long examples: it has one that is seen soon anyhow
            t = int(np.argmax(np.subtract(last, first)))
            taken = [(t, self.streams[t].between(first[t], first[t] + 2 * int(self.lengths[t].max()))[0])]
        bins = int(self.firsts[window + 1] - self.firsts[window])
        batches, left_out = spread([int(self.lengths[t][e]) for t, e in taken], bins, self.budget)
        batches = [batch or batches[b % len(taken)] for b, batch in enumerate(batches)]
        return Plan([[taken[i] for i in batch] for batch in batches], len(left_out))
