"""Rows sorted by task, cut into tiles of one task each, on a grid whose size depends on nothing the device knows.

Task t's tiles of SIZE rows begin at its own first row, and are numbered from offsets[t] // SIZE + t. That leaves every
task room enough, cdiv(r, SIZE) <= (offset + r) // SIZE - offset // SIZE + 1, so R // SIZE + N programs are enough for
any division of R rows among N tasks. A program finds its task by one look at the offsets; those left over have no rows
and return at once. No sum over the tasks, no list of tiles, and nothing to ask the device.

Without the first tile of each task the rest are numbered from offsets[t] // SIZE, and R // SIZE programs are enough.

R rows, N tasks
"""

import torch
from torch import Tensor

from trunkline.kernels.dispatch import tl, triton


@triton.jit
def rows_of_tile(offsets_ptr, tile, N, SIZE, AFTER_FIRST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Task of a tile, its first row, and the end of the task's rows; of no task if the first row is not before it."""
    task = -1
    for start in range(0, N, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        first_tile = tl.load(offsets_ptr + t, mask=t < N, other=0) // SIZE
        if not AFTER_FIRST:
            first_tile += t
        task += tl.sum(((first_tile <= tile) & (t < N)).to(tl.int32))
    start = tl.load(offsets_ptr + task)
    end = tl.load(offsets_ptr + task + 1)
    place = tile - start // SIZE + (1 if AFTER_FIRST else -task)
    return task, start + place * SIZE, end


def search_block(num_tasks: int) -> int:
    """Offsets that `rows_of_tile` looks at together."""
    return min(1024, triton.next_power_of_2(num_tasks))


def random_offsets(rows: int, tasks: int, device: torch.device | str, generator: torch.Generator) -> Tensor:
    """(N + 1,) int32: `rows` rows, each of any of `tasks` tasks."""
    task = torch.randint(tasks, (rows,), generator=generator, device=device)
    counts = torch.bincount(task, minlength=tasks)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
