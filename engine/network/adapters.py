"""Low-rank adapters (LoRA) on a trunk's linear layers: of each task, of groups of tasks, or one of all.

The stream is sorted by task, so that the rows of an adapter lie together, and one call serves all adapters of a layer.
The trunk hands every linear layer's input and output to `Segments`, which knows which rows are whose.

T tokens, R labelled rows, N tasks, A adapters, D width in, K rank, P parts of a fused layer, W their columns
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.engine.network.packing import PackedBatch
from trunkline.kernels.adapters.low_rank import low_rank
from trunkline.kernels.tasks.task_projection import task_projection


@dataclass(frozen=True)
class Part:
    """Columns of a linear layer that have an adapter of their own: all, or queries, or keys ..."""

    name: str
    """What the checkpoint's family calls the layer that these columns are, such as layers.0.self_attn.q_proj."""
    first: int
    end: int


class AdaptedLayer(nn.Module):
    """The adapters of one linear layer, all A of them.

    Args:
        adapters: A.
        width: D of what goes into the layer.
        parts: of its output, ascending.
        rank: K.
        scale: of what the adapters add.
    """

    def __init__(self, adapters: int, width: int, parts: Sequence[Part], rank: int, scale: float):
        super().__init__()
        self.parts, self.rank, self.scale = tuple(parts), rank, scale
        columns = sum(part.end - part.first for part in parts)
        self.down = nn.Parameter(torch.empty(adapters, width, len(parts) * rank))  # (A, D, P K)
        self.up = nn.Parameter(torch.zeros(adapters, rank, columns))  # (A, K, W): 0, so that nothing is added at first
        bound = 1 / math.sqrt(width)  # as PEFT's, which is that of nn.Linear
        nn.init.uniform_(self.down, -bound, bound)

    def of_part(self, p: int) -> tuple[Tensor, Tensor]:
        """The A (A, D, K) and B (A, K, C_p) of a part: views."""
        begin = sum(part.end - part.first for part in self.parts[:p])
        down = self.down[:, :, p * self.rank : (p + 1) * self.rank]
        return down, self.up[:, :, begin : begin + self.parts[p].end - self.parts[p].first]

    @torch.no_grad()
    def factors(self, x: Tensor, dy: Tensor, offsets: Tensor, of_task: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of what goes into every A and B and the gradient of what comes out: their products are gradients.

        Args:
            x: (rows, D) sorted by task.
            dy: (rows, C) the gradient of what comes out of the layer with its adapters.
            offsets: (N + 1,) int32, where the rows of each task begin.
            of_task: (N,) the adapter of each task.
        """
        offsets = F.pad(offsets[:-1], (0, 1), value=len(x))
        for p, part in enumerate(self.parts):
            down, up = (weight[of_task].to(dy.dtype) for weight in self.of_part(p))
            arriving = self.scale * dy[:, part.first : part.end]
            hidden = task_projection(x, down, down.new_zeros(len(down), self.rank), offsets)
            dhidden = task_projection(arriving, up.mT.contiguous(), down.new_zeros(len(down), self.rank), offsets)
            yield x, dhidden
            yield hidden, arriving

    def forward(self, x: Tensor, y: Tensor, offsets: Tensor, chosen: Tensor | None) -> Tensor:
        """(rows, D) and the layer's (rows, C) -> (rows, C).

        Args:
            x: sorted by segment.
            y: what the layer makes of it.
            offsets: (segments + 1,) int32
            chosen: (segments,) the adapter of each segment; None: one after the other.
        """
        down, up = (w if chosen is None else w[chosen] for w in (self.down, self.up))
        ends = [end for part in self.parts for end in (part.first, part.end)]
        return low_rank(y, x.to(y.dtype), down.to(y.dtype), up.to(y.dtype), offsets, ends, self.scale)


class Adapters(nn.Module):
    """All adapters of a trunk.

    Args:
        names: of the A adapters: of the tasks, of the groups, or 'shared'.
        of_task: (N,) the adapter of each task, by its place.
        layers: of the trunk that have adapters -> width in and parts of the output.
        rank: K
        alpha: what an adapter adds is multiplied by alpha / K.
        dropout: of what goes into adapters, in training.
        rslora: alpha / sqrt(K) instead (Kalajdzievski, arXiv:2312.03732).
    """

    of_task: Tensor  # (N,) int64

    def __init__(
        self,
        names: Sequence[str],
        of_task: Sequence[int],
        layers: Mapping[str, tuple[int, Sequence[Part]]],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        super().__init__()
        self.names, self.places = tuple(names), tuple(of_task)
        self.alpha, self.dropout, self.rslora = alpha, dropout, rslora
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.layers = nn.ModuleDict(
            {_key(name): AdaptedLayer(len(names), width, parts, rank, scale) for name, (width, parts) in layers.items()}
        )
        self.register_buffer("of_task", torch.tensor(of_task), persistent=False)

    def layer(self, name: str) -> AdaptedLayer | None:
        """The adapters of a linear layer of the trunk, such as blocks.3.qkv; None: it has none."""
        key = _key(name)
        if key not in self.layers:
            return None
        layer = self.layers[key]
        assert isinstance(layer, AdaptedLayer)
        return layer

    def of_batch(self, batch: PackedBatch) -> "Segments":
        """The adapter of every token and row of a batch. The dummy sequence goes with the last task's."""
        tokens = F.pad(batch.token_offsets[:-1], (0, 1), value=len(batch.tokens))
        if len(self.names) == 1:
            tokens, rows = (torch.stack([ends[0], ends[-1]]) for ends in (tokens, batch.rows.offsets))
            return Segments(self, tokens, rows, None)
        in_order = self.places == tuple(range(len(self.names)))
        return Segments(self, tokens, batch.rows.offsets, None if in_order else self.of_task)

    def of_one(self, task: int, tokens: int, rows: int) -> "Segments":
        """The adapter of a single task for so many tokens, and rows of them."""
        device = self.of_task.device
        of_tokens, of_rows = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (tokens, rows))
        return Segments(self, of_tokens, of_rows, self.of_task[task : task + 1])

    def absent(self, examples: Sequence[int]) -> list[int]:
        """The adapters without examples, given how many each task has."""
        present = {adapter for adapter, count in zip(self.places, examples, strict=True) if count}
        return [a for a in range(len(self.names)) if a not in present]


@dataclass(frozen=True)
class Segments:
    """Which rows are whose: what a trunk asks about each of its linear layers."""

    adapters: Adapters
    tokens: Tensor  # (segments + 1,) int32, where the tokens of each segment begin
    rows: Tensor  # (segments + 1,) int32, the same of labelled rows
    chosen: Tensor | None  # (segments,) int64, the adapter of each segment; None: one after the other

    def __call__(self, name: str, x: Tensor, y: Tensor, on_rows: bool) -> Tensor:
        """What a layer called `name` gives, (rows, C), with what adapters make of its input, (rows, D)."""
        layer = self.adapters.layer(name)
        if layer is None:
            return y
        x = F.dropout(x, self.adapters.dropout, self.adapters.training)
        return layer(x, y, self.rows if on_rows else self.tokens, self.chosen)


def _key(name: str) -> str:
    """Names of modules have no points in them."""
    return name.replace(".", "_")
