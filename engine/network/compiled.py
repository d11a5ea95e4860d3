"""One graph for every step: batches padded to fixed shapes, and the model compiled for them.

A packed batch always has T tokens, but as many sequences, tiles, blocks and labelled rows as its examples make. What is
added here changes no result: sequences, tiles and blocks without tokens, and rows of weight 0. How many there are of
each is decided once a run, from some of its batches and with room to spare. A batch that has more of something goes
without the graph, so that nothing is compiled a second time.

T tokens, S sequences, R labelled rows, N tasks
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import LabelledRows, PackedBatch
from trunkline.kernels.attention.pack_plan import QUERY_BLOCK, PackPlan
from trunkline.kernels.tasks.task_loss import LossSums

SPARE = 16  # room beyond the largest batch that was looked at: a part of it, of so many, and one at least
MULTIPLE = 16  # of rows: products of 16-bit numbers want multiples of 8
# Products of a step that take an H200 about 5 ms, no longer than a host needs to launch the kernels of a small model.
SMALL_STEP = 4e12


@dataclass(frozen=True)
class FixedShapes:
    """What every batch is padded to."""

    tokens: int  # T, which all batches have already
    sequences: int  # S, of which at least one is empty
    narrow_tiles: int
    wide_tiles: int
    blocks: int
    longest: int  # tokens of a sequence: what others' attention kernels, which ask for it, are compiled for
    groups: tuple[int, ...]  # tasks of every group that shares a loss, N in all: `MultiTaskModel.groups`
    rows: tuple[int, ...]  # of every group

    @classmethod
    def of(cls, batches: Iterable[PackedBatch], groups: Sequence[int]) -> "FixedShapes":
        """Shapes with room for these batches and for others like them.

        Args:
            batches: at least one, all with one budget of tokens.
            groups: as `MultiTaskModel.groups`.
        """
        sizes = [(len(b.tokens), *_sizes(b.plan), *_rows_of_groups(b.rows, groups)) for b in batches]
        tokens, *largest = (max(values) for values in zip(*sizes, strict=True))
        spacious = (size + -(-size // SPARE) for size in largest)
        sequences, narrow_tiles, wide_tiles, blocks, longest, *counts = spacious
        longest = -(-longest // QUERY_BLOCK) * QUERY_BLOCK
        rows = [-(-count // MULTIPLE) * MULTIPLE for count in counts]
        if sum(rows) == tokens:  # the balanced backward pass tells rows from tokens by their number
            rows[-1] += MULTIPLE
        return cls(tokens, sequences + 1, narrow_tiles, wide_tiles, blocks, longest, tuple(groups), tuple(rows))

    @property
    def ends(self) -> tuple[int, ...]:
        """Where the rows of each group end."""
        return tuple(sum(self.rows[: g + 1]) for g in range(len(self.rows)))

    def has(self, batch: PackedBatch) -> bool:
        """Whether a batch has these shapes."""
        sizes = len(batch.plan.cu_seqlens) - 1, *_sizes(batch.plan)[1:], len(batch.rows.token), len(batch.tokens)
        of_plan = self.sequences, self.narrow_tiles, self.wide_tiles, self.blocks, self.longest
        wanted = *of_plan, sum(self.rows), self.tokens
        return sizes == wanted

    def pad(self, batch: PackedBatch) -> PackedBatch:
        """The batch in these shapes, with the same losses and gradients; as it is where it does not fit into them."""
        counts = _rows_of_groups(batch.rows, self.groups)
        room = (self.sequences - 1, self.narrow_tiles, self.wide_tiles, self.blocks, self.longest, *self.rows)
        fits = all(size <= most for size, most in zip((*_sizes(batch.plan), *counts), room, strict=True))
        # a row of weight 0 takes part in the softmax over its sequence: of spans it must lie in the tail
        has_place = batch.real_tokens < self.tokens or counts[1] == self.rows[1]
        if not fits or not has_place or len(batch.tokens) != self.tokens:
            return batch
        return replace(batch, plan=self._pad_plan(batch.plan), rows=self._pad_rows(batch.rows, counts))

    def _pad_plan(self, plan: PackPlan) -> PackPlan:
        missing = self.sequences + 1 - len(plan.cu_seqlens)
        cu_seqlens = F.pad(plan.cu_seqlens, (0, missing), value=self.tokens)
        narrow, wide = plan.tiles[: plan.narrow_tiles], plan.tiles[plan.narrow_tiles :]
        blocks = _filled(plan.blocks, self.blocks, (self.sequences - 1, 0))  # of the last sequence, which is empty
        return replace(
            plan,
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            tiles=torch.cat([_filled(narrow, self.narrow_tiles, (1, 1)), _filled(wide, self.wide_tiles, (1, 1))]),
            blocks=blocks,
            key_blocks=blocks,
            narrow_tiles=self.narrow_tiles,
            max_seqlen=self.longest,
        )

    def _pad_rows(self, rows: LabelledRows, counts: Sequence[int]) -> LabelledRows:
        """Every group's padding follows its last task's rows and belongs to that task."""
        added = [most - count for most, count in zip(self.rows, counts, strict=True)]
        last = [sum(self.groups[: g + 1]) - 1 for g in range(len(self.groups))]  # task of every group
        # any tokens will do: different ones, so that their gradients do not wait for each other, from all over the
        # stream, so that no tile has many
        places = [torch.arange(n) * self.tokens // n for n in added]
        places[1] = torch.full_like(places[1], self.tokens - 1)

        def padded(values: Tensor, padding: Sequence[Tensor | int]) -> Tensor:
            parts: list[Tensor] = []
            for own, n, fill in zip(values.split(list(counts)), added, padding, strict=True):
                parts += own, torch.as_tensor(fill, dtype=values.dtype, device=values.device).expand(n)
            return torch.cat(parts)

        per_task = list(rows.counts)
        for task, n in zip(last, added, strict=True):
            per_task[task] += n
        return LabelledRows(
            token=padded(rows.token, places),
            task=padded(rows.task, last),
            target=padded(rows.target, [0] * len(added)),
            value=padded(rows.value, [0] * len(added)),
            weight=padded(rows.weight, [0] * len(added)),
            offsets=torch.tensor([0, *per_task], dtype=torch.int32, device=rows.offsets.device).cumsum(0).int(),
            counts=tuple(per_task),
        )


def _sizes(plan: PackPlan) -> tuple[int, int, int, int, int]:
    """Sequences, narrow and wide tiles, blocks, and the longest sequence."""
    wide_tiles = len(plan.tiles) - plan.narrow_tiles
    return len(plan.cu_seqlens) - 1, plan.narrow_tiles, wide_tiles, len(plan.blocks), plan.max_seqlen


def _rows_of_groups(rows: LabelledRows, groups: Sequence[int]) -> list[int]:
    ends = [sum(groups[: g + 1]) for g in range(len(groups))]
    return [sum(rows.counts[end - size : end]) for end, size in zip(ends, groups, strict=True)]


def _filled(items: Tensor, count: int, item: tuple[int, int]) -> Tensor:
    """(n, 2) -> (count, 2)"""
    return torch.cat([items, items.new_tensor(item).expand(count - len(items), 2)])


class CompiledModel:
    """The model as a function of a batch, compiled: forward, losses and backward pass are one graph each.

    Args:
        model: trunk and heads, on their device.
        shapes: of the batches that take the graph; other batches take the model as it is.
        cuda_graphs: whether the graph's kernels are launched as one; None: of small models on a GPU. Gradients then
            have to keep their memory: `zero_grad(set_to_none=False)`.
        backend: of torch.compile.

    Attributes:
        uncompiled: batches so far that did not have the shapes.
        seconds: that `warm_up` took.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        shapes: FixedShapes,
        cuda_graphs: bool | None = None,
        backend: str = "inductor",
    ):
        parameters = sum(p.numel() for p in model.parameters())
        self.model, self.backend, self.uncompiled, self.seconds = model, backend, 0, 0.0
        self.cuda_graphs = cuda_graphs
        if cuda_graphs is None:
            self.cuda_graphs = model.device.type == "cuda" and 6.0 * parameters * shapes.tokens < SMALL_STEP
        self._compile(shapes)

    def _compile(self, shapes: FixedShapes) -> None:
        self.shapes, model, ends = shapes, self.model, shapes.ends

        def losses(batch: PackedBatch, dloss: Tensor | None) -> LossSums:
            return model.losses(model.hidden(batch), batch, ends=ends, dloss=dloss)

        mode = "reduce-overhead" if self.cuda_graphs else None
        self.compiled = torch.compile(losses, fullgraph=True, dynamic=False, backend=self.backend, mode=mode)

    def fit(self, shapes: FixedShapes) -> None:
        """Takes batches of these shapes from now on. What was compiled for others is freed, CUDA graphs included."""
        torch.compiler.reset()
        self._compile(shapes)

    def __call__(self, batch: PackedBatch, dloss: Tensor | None = None) -> LossSums:
        """As the model. With and without `dloss` are two graphs: a run has one of them."""
        if not self.shapes.has(batch):
            self.uncompiled += 1
            return self.model(batch, dloss)
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # nobody looks at what the last batch left
        return self.compiled(batch, dloss)

    def warm_up(self, batch: PackedBatch, dloss: Tensor | None = None) -> None:
        """Compiles, with a batch on the model's device, and `dloss` where it will be known. No gradient is left."""
        began = time.perf_counter()
        self.model.zero_grad(set_to_none=True)  # of an attempt that ran out of memory
        if self.cuda_graphs:  # a graph's output is overwritten by the next step: gradients are added to memory of ours
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        for _ in range(3 if self.cuda_graphs else 1):  # compile, record, replay
            losses = self(self.shapes.pad(batch), dloss).loss
            (losses.sum() if dloss is None else losses @ dloss).backward()
        self.model.zero_grad(set_to_none=not self.cuda_graphs)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.seconds = time.perf_counter() - began
