"""Tiles, warps and stages of the attention kernels: what was decided without a card, and what `trunkline tune` tries.

Every candidate is certified: what is compiled of it for sm_80, sm_90 and sm_100 keeps all it sums up in registers.

D head width
"""

import torch

from trunkline.kernels.decisions import decision
from trunkline.kernels.dispatch import INTERPRET, compute_capability, input_precision

Tile = dict[str, int]


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products are of no matrix unit: float32 where TF32 is not allowed. The interpreter has tiles as TF32."""
    return dtype == torch.float32 and input_precision(dtype) == "ieee" and not INTERPRET


def _tile(M: int, N: int, warps: int, stages: int) -> Tile:
    return {"BLOCK_M": M, "BLOCK_N": N, "num_warps": warps, "num_stages": stages}


# of 16-bit numbers, by kernel and head width: M, N, warps, stages, and the oldest architecture that has the registers
_OTHER_BLOCKS: dict[tuple[str, int], list[tuple[int, int, int, int, int]]] = {
    ("forward", 64): [(128, 64, 8, 3, 80), (128, 128, 8, 2, 90), (64, 64, 4, 2, 80), (64, 64, 4, 3, 80)],
    ("forward", 128): [
        (128, 64, 8, 3, 90), (128, 128, 8, 2, 90), (64, 64, 4, 2, 80), (64, 32, 4, 3, 80),
    ],
    ("query gradient", 64): [
        (128, 64, 8, 1, 80), (128, 32, 8, 2, 80), (64, 64, 4, 2, 90), (64, 32, 4, 2, 80), (64, 64, 4, 1, 80),
    ],
    ("query gradient", 128): [(128, 32, 8, 2, 80), (128, 64, 8, 1, 90), (64, 32, 4, 2, 80), (64, 64, 8, 2, 80)],
    ("key gradient", 64): [
        (64, 128, 8, 1, 80), (32, 128, 8, 2, 80), (64, 64, 4, 2, 90), (32, 64, 4, 2, 80), (64, 64, 4, 1, 90),
    ],
    ("key gradient", 128): [(32, 64, 4, 1, 80), (16, 128, 8, 2, 80)],
}  # fmt: skip


def _other_blocks(kernel: str, dtype: torch.dtype, D: int, plain: bool) -> list[Tile]:
    """None of float32, of very narrow or wide heads, and where a cap or dropout takes registers."""
    if dtype == torch.float32 or not plain or D not in (64, 128):
        return []
    return [_tile(*sizes) for *sizes, oldest in _OTHER_BLOCKS[kernel, D] if compute_capability() >= oldest]


@decision(_other_blocks)
def block_tile(kernel: str, dtype: torch.dtype, D: int, plain: bool) -> Tile:
    """Of long sequences: the largest whose sums stay in registers, on every architecture.

    kernel: "forward", "query gradient" or "key gradient". plain: neither soft cap nor dropout, which take registers of
    their own. Found by `make certify`, which says what spills: nothing but what attention_long.py lists.
    """
    capability = compute_capability()
    if is_exact(dtype):  # each thread holds whole rows of what it multiplies
        M, N, warps, stages = (32, 32, 8, 1) if D <= 64 else (16, 16, 8, 1)
    elif dtype == torch.float32:
        M, N, warps, stages = (64, 32, 8, 1) if D <= 64 else (32, 32, 8, 1)
    elif kernel == "key gradient" and D > 128:
        M, N, warps, stages = 64, 32, 8, 1  # 64 keys would be wgmma's, by 4 warps: dK and dV fill all their registers
    elif kernel == "key gradient" and D > 64:
        M, N, warps, stages = (32 if plain else 16, 128, 8, 1) if capability == 90 else (64, 64, 8, 1)
    elif kernel == "key gradient":
        M, N, warps, stages = 64 if plain and capability >= 90 else 32, 128, 8, 2
    elif D > 128:
        M, N, warps, stages = (128, 32, 8, 1) if kernel == "forward" and capability >= 90 else (32, 64, 8, 1)
    elif capability < 90 and D > 64:
        M, N, warps, stages = 64, 64 if kernel == "forward" else 32, 4, 2
    elif capability >= 100 and kernel == "forward" and not plain:
        M, N, warps, stages = 64, 64, 4, 1
    else:
        M, N, warps, stages = 128, 64, 8, 1 if kernel == "query gradient" and capability >= 100 else 2
    tile = _tile(M, N, warps, stages)
    if kernel == "query gradient" and capability == 90 and D == 64 and plain and dtype != torch.float32:
        # of the 166 that it would take: two blocks then share a multiprocessor. None spills in Triton 3.6, a few do in
        # 3.9, where tiles of 32 keys, another candidate, do not
        tile["maxnreg"] = 128
    return tile


def _other_warps(dtype: torch.dtype, block: int, D: int, group: int, plain: bool) -> list[Tile]:
    """Of tiles of 128 tokens none: less than 8 warps have not the registers, and more would share rows."""
    return [{"num_warps": 8}] if block == 64 and dtype != torch.float32 and plain and D in (64, 128) else []


@decision(_other_warps)
def short_forward(dtype: torch.dtype, block: int, D: int, group: int, plain: bool) -> Tile:
    """Of short sequences, forward, in tiles of `block` tokens; `group` query heads share the keys."""
    return {"num_warps": block // 16}


def _other_steps(dtype: torch.dtype, block: int, D: int, group: int, softcap: bool, dropout: bool) -> list[Tile]:
    """Of wide heads none on an A100: more than 16 queries, or fewer warps, leave dK and dV no registers."""
    if dtype == torch.float32 or softcap or dropout or D not in (64, 128) or (D > 64 and compute_capability() < 90):
        return []
    whole = group == 1 and D <= 64 and (block == 64 or compute_capability() >= 90)
    of_warps = (4, 8) if block == 64 else (8,)
    return [{"ROWS": rows, "num_warps": n} for rows in ((0, 16, 32) if whole else (16, 32)) for n in of_warps]


@decision(_other_steps)
def short_backward(dtype: torch.dtype, block: int, D: int, group: int, softcap: bool, dropout: bool) -> Tile:
    """The same, backward: queries that are worked on at a time; 0: all of them."""
    capability, warps = compute_capability(), block // 16
    if group == 1 and D <= 64 and (block == 64 or (capability >= 90 and not dropout)):
        return {"ROWS": 0, "num_warps": warps}
    # on an A100 two warps for every 16 keys of wide heads, each with half of the columns of dK and dV
    narrow, few = D <= 64, capability < 90
    return {"ROWS": 32 if narrow and not few else 16, "num_warps": 8 if few and not narrow else warps}
