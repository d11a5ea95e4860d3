"""flash-attn 2 for the long sequences of a packed batch, where it is installed and asked for.

    TRUNKLINE_LONG_ATTENTION=flash_attn     # read at import; only float16 and bfloat16 on a GPU are concerned

Sequences in tiles stay with our kernel. Where a batch has both, the long sequences are gathered into a stream of their
own and so are the others, and their outputs are put back in place: more traffic than one call of ours makes.

T tokens, K keys, H query heads, G key/value heads, D head width
Source: the docstrings of flash_attn/flash_attn_interface.py (v2).
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from trunkline.kernels.attention.pack_plan import PackPlan

BACKENDS = ("trunkline", "flash_attn")
BACKEND = os.environ.get("TRUNKLINE_LONG_ATTENTION", BACKENDS[0])
if BACKEND not in BACKENDS:
    raise ValueError(f"TRUNKLINE_LONG_ATTENTION must be {' or '.join(BACKENDS)}, got {BACKEND!r}")


def serves(q: Tensor, plan: PackPlan) -> bool:
    """Whether flash-attn was chosen, and there is something that it can do."""
    return BACKEND == "flash_attn" and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and len(plan.blocks) > 0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackPlan,
    tiled: Callable[..., Tensor],
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout: float,
    deterministic: bool,
) -> Tensor:
    """`trunkline.kernels.attention.attention`, with flash-attn for what lies in blocks.

    Args:
        tiled: our function, of q, k, v and a plan, for what lies in tiles.

    Raises:
        ValueError: dropout; flash-attn draws other random numbers, which depend on its tiling.
        ImportError: flash-attn 2 is not installed.
    """
    if dropout:
        raise ValueError(
            f"attention: with TRUNKLINE_LONG_ATTENTION=flash_attn dropout must be 0, got {dropout}: "
            "flash-attn draws other random numbers than our kernels"
        )
    flash_attn_varlen_func, parts = _flash_attn_varlen_func(), _parts(plan)

    def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=parts.cu_seqlens,
            cu_seqlens_k=parts.cu_seqlens_k,
            max_seqlen_q=parts.longest,
            max_seqlen_k=parts.longest_k,
            softmax_scale=scale,
            causal=causal,
            window_size=window or (-1, -1),
            softcap=softcap or 0.0,
            deterministic=deterministic,
        )

    if parts.short is None:
        return in_blocks(q, k, v)
    in_tiles = partial(tiled, plan=parts.tiles)
    out = torch.empty_like(q)
    for tokens, function in ((parts.long, in_blocks), (parts.short, in_tiles)):
        out.index_copy_(0, tokens, function(*(x.index_select(0, tokens) for x in (q, k, v))))
    return out


def _flash_attn_varlen_func() -> Callable[..., Tensor]:
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError) as error:  # flash-attn 4 has the same name and no such function
        raise ImportError(
            "TRUNKLINE_LONG_ATTENTION=flash_attn needs flash-attn 2: pip install flash-attn --no-build-isolation"
        ) from error


@dataclass(frozen=True)
class _Parts:
    """The two streams of a batch: its sequences in blocks, and those in tiles."""

    cu_seqlens: Tensor  # of the sequences in blocks
    cu_seqlens_k: Tensor
    longest: int
    longest_k: int
    long: Tensor  # (tokens in blocks,) int64, their places in the stream
    short: Tensor | None  # (the others,) int64; None where all are in blocks
    tiles: PackPlan  # of the others


@lru_cache(maxsize=1)  # every layer asks for the same
def _parts(plan: PackPlan) -> _Parts:
    """Waits for the device, once a batch."""
    device, bounds, bounds_k = plan.cu_seqlens.device, plan.cu_seqlens.cpu(), plan.cu_seqlens_k.cpu()
    in_blocks = torch.ones(len(bounds) - 1, dtype=torch.bool)
    for start, end in plan.tiles.tolist():
        in_blocks[(bounds[:-1] >= start) & (bounds[1:] <= end)] = False
    lengths, lengths_k = bounds.diff(), bounds_k.diff()

    def boundaries(lengths: Tensor) -> Tensor:
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    of_block = in_blocks.repeat_interleave(lengths)
    return _Parts(
        cu_seqlens=boundaries(lengths[in_blocks]).to(device),
        cu_seqlens_k=boundaries(lengths_k[in_blocks]).to(device),
        longest=int(lengths[in_blocks].max()),
        longest_k=int(lengths_k[in_blocks].max()),
        long=of_block.nonzero().flatten().to(device),
        short=None if of_block.all() else (~of_block).nonzero().flatten().to(device),
        tiles=PackPlan.of(boundaries(lengths[~in_blocks])).to(device),
    )
