"""Trunk and heads as one module: from a packed batch to loss sums per task.

    tokens -> trunk -> rows with a label (R, D) -> per-task projection -> heads -> sums per task (N,)

T tokens, R labelled rows, N tasks, D width, K columns of the table of small heads, V vocabulary
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.engine.heads.head import GROUPS
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.adapters import Adapters
from trunkline.engine.network.generate import Search, generate
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.network.span_loss import span_loss
from trunkline.engine.network.trunk import Adapt, Trunk
from trunkline.kernels.tasks.task_loss import LossSums, task_loss
from trunkline.kernels.tasks.task_projection import task_projection
from trunkline.kernels.vocabulary.linear_cross_entropy import linear_cross_entropy

COLUMNS = 8  # products of 16-bit numbers want widths in multiples of it
FITTED = ("center", "spread", "temperature", "threshold")  # buffers that come from data, each with a value before

if TYPE_CHECKING:
    from trunkline.engine.tasks.task import Task


def in_model_order(tasks: Sequence["Task"]) -> list["Task"]:
    """Tasks whose heads share a loss stand together; otherwise the order stays."""
    return sorted(tasks, key=lambda task: GROUPS.index(HEADS[task.head].group))


class MultiTaskModel(nn.Module):
    """One trunk, a head for every task, and optionally a projection of each task's own between them.

    Args:
        trunk: the shared feature extractor.
        tasks: N of them, in the order of `in_model_order`; a batch names a task by its place here.
        projection: activation of the per-task projection x + act(x W_t + b_t), which starts as the identity; '' : none.
            'pooler': tanh(x W_t + b_t), which starts as the trunk's pooler, for tasks of one class or number an
            example, and x + tanh(x W_t + b_t) for the others.
        label_smoothing: of all classification and next-token losses.
        adapters: on the trunk's linear layers.

    Raises:
        ValueError: a task that predicts tokens on a bidirectional trunk, tasks out of order, or a pooler asked of a
            checkpoint without one.
    """

    class_offsets: Tensor  # (tasks of the table + 1,) int32, first column of each and the end of the last
    vocabulary_bias: Tensor | None  # (V,)
    regression: Tensor  # (tasks of the table,) bool
    center: Tensor  # (tasks of the table,) what a regression's labels are around, and 0
    spread: Tensor  # (tasks of the table,) the unit of a regression's loss, and 1
    several: Tensor | None  # (tasks of the table,) bool, whether columns are labels of their own; None: no task's are
    temperature: Tensor  # (tasks of table and spans,) by which logits are divided for probabilities
    threshold: Tensor  # (K,) the probability above which a label of several holds, and 1/2
    kept: Tensor  # (N,) factor of x beside its projection: 0 where it is a pooler, else 1

    def __init__(
        self,
        trunk: Trunk,
        tasks: Sequence["Task"],
        projection: str = "",
        label_smoothing: float = 0.0,
        adapters: Adapters | None = None,
    ):
        super().__init__()
        if list(tasks) != in_model_order(tasks):
            raise ValueError(f"model: tasks must be in the order of in_model_order, got {[t.name for t in tasks]}")
        D, N = trunk.config.hidden_size, len(tasks)
        groups = [HEADS[task.head].group for task in tasks]
        following = [task.name for task in tasks if HEADS[task.head].follows]
        if following and not trunk.config.causal:
            name = following[0]
            raise ValueError(f"model: task '{name}' predicts next tokens, which needs a causal trunk")
        self.trunk, self.tasks, self.adapters = trunk, tuple(tasks), adapters
        self.num_small, self.num_spans, self.num_vocabulary = (groups.count(group) for group in GROUPS)
        self.activation, self.label_smoothing = "tanh" if projection == "pooler" else projection, label_smoothing

        columns = [HEADS[task.head].columns(task) for task in tasks[: self.num_small]]
        self.width = max(columns, default=0)
        self.weight = nn.Parameter(torch.empty(sum(columns), D))  # (K, D) all small heads, side by side
        self.bias = nn.Parameter(torch.zeros(sum(columns)))
        self.span_weight = nn.Parameter(torch.empty(self.num_spans, 2, D))
        for parameter in (self.weight, self.span_weight):
            nn.init.normal_(parameter, std=0.02)
        if "vocabulary" in groups and not trunk.config.tie_vocabulary:
            start = torch.empty(trunk.config.vocab_size, D).normal_(std=0.02)
            self.vocabulary = nn.Parameter(start if trunk.vocabulary is None else trunk.vocabulary.clone())
        biased = "vocabulary" in groups and trunk.config.vocabulary_bias
        if biased and trunk.vocabulary_bias is not None:
            self.register_buffer("vocabulary_bias", trunk.vocabulary_bias.float())
        else:
            self.register_buffer("vocabulary_bias", torch.zeros(trunk.config.vocab_size) if biased else None)
        if projection:
            self.projection_weight = nn.Parameter(torch.zeros(N, D, D))
            self.projection_bias = nn.Parameter(torch.zeros(N, D))
        pooled = [projection == "pooler" and HEADS[task.head].pools for task in tasks]
        self.pools = any(pooled)
        if self.pools:
            weight, bias = _pooler(trunk)
            with torch.no_grad():
                for t in (t for t in range(N) if pooled[t]):
                    self.projection_weight[t], self.projection_bias[t] = weight.T.float(), bias.float()
        self.register_buffer("kept", torch.tensor([float(not of_task) for of_task in pooled]), persistent=False)
        offsets = torch.tensor([0, *accumulate(columns)], dtype=torch.int32)
        regression = torch.tensor([HEADS[task.head].squared for task in tasks[: self.num_small]], dtype=torch.bool)
        self.register_buffer("class_offsets", offsets, persistent=False)
        self.register_buffer("regression", regression, persistent=False)
        several = [HEADS[task.head].several for task in tasks[: self.num_small]]
        self.register_buffer("several", torch.tensor(several) if any(several) else None, persistent=False)
        self.register_buffer("center", torch.zeros(self.num_small))
        self.register_buffer("spread", torch.ones(self.num_small))
        self.register_buffer("temperature", torch.ones(self.num_small + self.num_spans))
        thresholds = [0.5 if task.threshold == "fit" else task.threshold for task in tasks[: self.num_small]]
        of_columns = [[threshold] * count for threshold, count in zip(thresholds, columns, strict=True)]
        self.register_buffer("threshold", torch.tensor([*chain.from_iterable(of_columns)], dtype=torch.float32))

    def set_units(self, labels: Mapping[int, np.ndarray]) -> None:
        """Lets regressions start from the mean of their labels, and measures their errors in standard deviations.

        What is learnt then does not depend on the labels' unit, and an error counts as much as that of a class.

        Args:
            labels: of training, by the place of the task; labels that are all the same have no spread and keep theirs.
        """
        for task, values in labels.items():
            self.center[task] = float(np.mean(values))
            if (spread := float(np.std(values))) > 0:
                self.spread[task] = spread

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        for name in FITTED:  # which earlier versions did not save: they had labels' own units
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *others)

    @property
    def vocabulary_weight(self) -> Tensor:
        """(V, D)"""
        return self.trunk.tokens.weight if self.trunk.config.tie_vocabulary else self.vocabulary

    def frozen_by_adapters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What stays as it is where there are adapters: the trunk, and the matrix that a checkpoint predicts with."""
        yield from ((f"trunk.{name}", parameter) for name, parameter in self.trunk.named_parameters())
        if self.num_vocabulary and not self.trunk.config.tie_vocabulary and self.trunk.vocabulary is not None:
            yield "vocabulary", self.vocabulary

    @property
    def groups(self) -> tuple[int, int, int]:
        """How many tasks have a head in the table, predict spans, and predict tokens."""
        return self.num_small, self.num_spans, self.num_vocabulary

    @property
    def device(self) -> torch.device:
        return self.trunk.tokens.weight.device

    def forward(self, batch: PackedBatch, dloss: Tensor | None = None) -> LossSums:
        """Loss sums of every task in the batch, (N,) each; a task without rows has sums of 0.

        `dloss`: (N,) the gradient that the losses will get, where that is known: it saves `linear_cross_entropy` work.
        """
        return self.losses(self.hidden(batch), batch, dloss=dloss)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """(R, D) the trunk's output at the labelled rows."""
        adapt = None if self.adapters is None else self.adapters.of_batch(batch)
        return self.trunk(batch.tokens, batch.positions, batch.plan, batch.rows.token, types=batch.types, adapt=adapt)

    def losses(
        self,
        x: Tensor,
        batch: PackedBatch,
        vocabulary: Sequence[Tensor] = (),
        ends: Sequence[int] = (),
        dloss: Tensor | None = None,
    ) -> LossSums:
        """(R, D) -> loss sums of every task, (N,) each.

        Args:
            x: (R, D) from `hidden`.
            vocabulary: where the tasks' gradients of `vocabulary_weight` are wanted apart, that matrix for each task.
            ends: where the rows of each of `groups` end; for a compiled graph, which must not depend on a batch's own
                numbers.
            dloss: as of `forward`.
        """
        rows, N = batch.rows, len(self.tasks)
        x = self.project(x, rows.offsets)
        first_span, first_vocabulary = self.num_small, self.num_small + self.num_spans
        a, b = ends[:2] or (sum(rows.counts[:first_span]), sum(rows.counts[:first_vocabulary]))
        sums = []
        if first_span:
            value = (rows.value[:a] - self.center[rows.task[:a]]) / self.spread[rows.task[:a]]
            sums.append(
                task_loss(
                    x[:a],
                    self.weight.to(x.dtype),
                    self.bias.to(x.dtype),
                    rows.offsets[: first_span + 1],
                    rows.target[:a],
                    value,
                    rows.weight[:a],
                    self.class_offsets,
                    self.regression,
                    width=self.width,
                    label_smoothing=self.label_smoothing,
                    several=self.several,
                )
            )
        if self.num_spans:
            task = rows.task[a:b] - first_span
            logits = torch.einsum("rd,rcd->rc", x[a:b], self.span_weight[task].to(x.dtype))
            sequence = torch.bucketize(rows.token[a:b], batch.plan.cu_seqlens[1:], right=True)
            number = (sequence.diff(prepend=sequence[:1]) != 0).cumsum(0)  # of those that have rows here
            sums.append(span_loss(logits, task, rows.target[a:b], rows.weight[a:b], number, self.num_spans))
        if self.num_vocabulary:
            x, weights = self._with_bias(x, vocabulary or [self.vocabulary_weight])
            per_weight = self.num_vocabulary // len(weights)
            firsts = range(first_vocabulary, N, per_weight)
            sums.append(
                linear_cross_entropy(
                    x[b:],
                    weights,
                    rows.target[b:],
                    rows.task[b:] - first_vocabulary,
                    rows.weight[b:],
                    num_tasks=[per_weight] * len(weights),
                    rows=[sum(rows.counts[first : first + per_weight]) for first in firsts] if vocabulary else None,
                    dloss=None if dloss is None else dloss[first_vocabulary:],
                    label_smoothing=self.label_smoothing,
                )
            )
        return LossSums(*(torch.cat(parts) for parts in zip(*sums, strict=True)))

    def score(self, batch: PackedBatch, task: int) -> tuple[LossSums, Tensor]:
        """For evaluation: loss sums of a batch whose examples are all of one task, and the task's `logits` of its rows;
        none of a task that predicts tokens, where they would take much memory."""
        x = self.hidden(batch)
        predicts_tokens = task >= self.num_small + self.num_spans
        return self.losses(x, batch), x[:0] if predicts_tokens else self.logits(x, task)

    def generate(
        self, prompts: Sequence[np.ndarray], task: int, end: int | Sequence[int], search: Search
    ) -> list[list[int]]:
        """Continues prompts as one task's head says: `trunkline.engine.network.generate.generate`."""
        return generate(self.trunk, partial(self.logits, task=task), prompts, end, search, self.adapts(task))

    def adapts(self, task: int) -> Callable[[int, int], Adapt] | None:
        """Gives a task's adapter for so many tokens, and rows of them; None: there is none."""
        return None if self.adapters is None else partial(self.adapters.of_one, task)

    def task_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters of which every row is one task's own, each with the tasks of its rows, int64."""
        tasks = torch.arange(len(self.tasks), device=self.device)
        small, spans = tasks[: self.num_small], tasks[self.num_small : self.num_small + self.num_spans]
        column = small.repeat_interleave(self.class_offsets.diff(), output_size=len(self.weight))
        owned = [(self.weight, column), (self.bias, column), (self.span_weight, spans)]
        if self.activation:
            owned += [(self.projection_weight, tasks), (self.projection_bias, tasks)]
        return owned

    def project(self, x: Tensor, offsets: Tensor) -> Tensor:
        """(R, D) -> (R, D): each row through its task's projection; rows of task t are offsets[t] : offsets[t + 1]."""
        if not self.activation:
            return x
        weight, bias = self.projection_weight.to(x.dtype), self.projection_bias.to(x.dtype)
        projected = task_projection(x, weight, bias, offsets, self.activation)
        if not self.pools:
            return x + projected
        kept = self.kept.to(x.dtype).repeat_interleave(offsets.diff(), output_size=len(x))  # (N,) -> (R,)
        return x * kept[:, None] + projected

    def logits(self, x: Tensor, task: int) -> Tensor:
        """What one task's head makes of hidden states, for inference.

        Args:
            x: (R, D) the trunk's output.
            task: place of the task in `tasks`.

        Returns:
            (R, C): C classes; 1 for a number; 2 for first and last of a span; the vocabulary for a text.
        """
        return self.logits_by_task(x, {task: len(x)})[task]

    def logits_by_task(self, x: Tensor, rows: Mapping[int, int]) -> dict[int, Tensor]:
        """`logits` of several tasks, whose projections are one call.

        Args:
            x: (R, D) the trunk's output, those of each task together, in the order of the tasks.
            rows: by task, how many are its own; may be none.
        """
        counts = [rows.get(task, 0) for task in range(len(self.tasks))]
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(x.device)
        parts = self.project(x, offsets).split(counts)
        return {task: self._head(parts[task], task) for task in rows}

    def _head(self, x: Tensor, task: int) -> Tensor:
        """(r, D), projected -> (r, C)"""
        if task < self.num_small:
            first, last = self.class_offsets[task : task + 2].tolist()
            logits = F.linear(x, self.weight[first:last].to(x.dtype), self.bias[first:last].to(x.dtype))
            if not self.regression[task]:
                return logits
            exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return exact * self.spread[task] + self.center[task]
        if task < self.num_small + self.num_spans:
            return F.linear(x, self.span_weight[task - self.num_small].to(x.dtype))
        y = (self.vocabulary_weight.to(x.dtype) @ x.T).T  # of few rows: on a CPU half the time of x @ weight.T
        return y if self.vocabulary_bias is None else y + self.vocabulary_bias.to(x.dtype)

    def predict(self, logits: Tensor, task: int) -> Any:
        """A task's prediction for one example, as its head makes it of the `logits` (r, C) of its rows."""
        head = HEADS[self.tasks[task].head]
        if head.several:
            first, last = self.class_offsets[task : task + 2].tolist()
            cut = self.temperature[task] * self.threshold[first:last].logit()  # (C,) that a logit has to exceed
            logits = logits - cut.to(logits)
        return head.predict(logits)

    def _with_bias(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """(R, D) and matrices (V, D) whose products have the vocabulary's bias: a column more, of which x has 1."""
        if self.vocabulary_bias is None:
            return x, weights
        column = F.pad(self.vocabulary_bias[:, None], (x.shape[1], COLUMNS - 1))  # (V,) -> (V, D + 8)
        x = torch.cat([x, F.pad(x.new_ones(len(x), 1), (0, COLUMNS - 1))], 1)  # (R, D) -> (R, D + 8)
        # padded and added, and not joined: the gradient then lies in memory as the matrix does
        return x, [F.pad(weight, (0, COLUMNS)) + column.to(weight.dtype) for weight in weights]


def _pooler(trunk: Trunk) -> tuple[Tensor, Tensor]:
    """Weight (D, D) and bias (D,) that poolers start from: the checkpoint's; new ones for a trunk of ours."""
    if trunk.pooler is not None:
        return trunk.pooler
    if trunk.origin is not None:
        raise ValueError(
            "projection: pooler: the checkpoint that the trunk comes from has none; use tanh, gelu or no projection"
        )
    D = trunk.config.hidden_size
    return torch.empty(D, D).normal_(std=0.02), torch.zeros(D)
