"""Other libraries' kernels for the long sequences of a packed batch: where they are asked for, or were faster.

    TRUNKLINE_LONG_ATTENTION=flash_attn     # read at import; only float16 and bfloat16 on a GPU are concerned

Without it `trunkline tune` decides, and what is neither causal nor full attention of a batch to itself (windows, soft
caps, dropout, caches) stays with our kernels. Sequences in tiles always do. Where a batch has both, the long sequences
are gathered into a stream of their own and their outputs are put back in place: more traffic than one call of ours
makes. Nobody waits for the device for it, and shapes depend on a plan's shapes alone, so that it can be compiled.

T tokens, H query heads, G key/value heads, D head width, S sequences, L tokens of the longest
Source: the docstrings of torch/nn/attention/varlen.py, flash_attn/flash_attn_interface.py (v2) and
flash_attn/cute/interface.py (v4).
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.attention.pack_plan import QUERY_BLOCK, SHORT, PackPlan
from trunkline.kernels.decisions import decision

OURS = "trunkline"


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, bounds: "Bounds", scale: float | None, causal: bool) -> Tensor:
    """PyTorch's own: flash-attn 2 for streams."""
    from torch.nn.attention.varlen import varlen_attn as function

    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    if k.shape[1] < q.shape[1]:  # an argument that torch 2.11 does not have
        options["enable_gqa"] = True
    out = function(q, k, v, *bounds, scale=scale, **options)
    assert isinstance(out, Tensor)  # with the log-sum-exp only where that is asked for
    return out


def cudnn(q: Tensor, k: Tensor, v: Tensor, bounds: "Bounds", scale: float | None, causal: bool) -> Tensor:
    """Of padded sequences: (T, H, D) -> (S, H, L, D) and back."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cu_seqlens, _, longest, _ = bounds
    lengths, place = cu_seqlens.diff(), torch.arange(longest, device=q.device)
    real = place < lengths[:, None]  # (S, L)
    there = torch.where(real, cu_seqlens[:-1, None] + place, -1).flatten()  # (S * L,)
    token = torch.arange(len(q), device=q.device, dtype=torch.int32)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True).clamp(max=len(lengths) - 1)
    back = torch.where(token < cu_seqlens[-1], sequence * longest + token - cu_seqlens[sequence], -1)  # (T,)
    q, k, v = (take(x, there, back).unflatten(0, real.shape).transpose(1, 2) for x in (q, k, v))
    # causal: padding stands behind everything, so nothing sees it; no row may be without a key
    mask = None if causal else (place < lengths.clamp(min=1)[:, None])[:, None, None]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        grouped = k.shape[1] < q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return take(out.transpose(1, 2).flatten(0, 1), back, there)


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, bounds: "Bounds", scale: float | None, causal: bool, **options: Any
) -> Tensor:
    """flash-attn 2. `options`: window_size, softcap, deterministic."""
    try:
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError) as error:  # flash-attn 4 has the same name and no such function
        raise ImportError("flash-attn 2 is not installed: pip install flash-attn --no-build-isolation") from error
    cu_seqlens, cu_seqlens_k, longest, longest_k = bounds
    of_sequences = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    longest_ones = {"max_seqlen_q": longest, "max_seqlen_k": longest_k}
    return function(q, k, v, **of_sequences, **longest_ones, softmax_scale=scale, causal=causal, **options)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, bounds: "Bounds", scale: float | None, causal: bool) -> Tensor:
    try:
        function = importlib.import_module("flash_attn.cute.interface").flash_attn_varlen_func
    except ImportError as error:
        raise ImportError("flash-attn 4 is not installed: pip install flash-attn-4") from error
    cu_seqlens, cu_seqlens_k, longest, longest_k = bounds
    of_sequences = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    longest_ones = {"max_seqlen_q": longest, "max_seqlen_k": longest_k}
    out = function(q, k, v, **of_sequences, **longest_ones, softmax_scale=scale, causal=causal)
    return out[0] if isinstance(out, tuple) else out  # with the log-sum-exp


Bounds = tuple[Tensor, Tensor, int, int]  # of queries and keys: cu_seqlens (S + 1,) int32, and the longest sequence
LIBRARIES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (varlen_attn, cudnn, flash_attn, flash_attn_4)
}
NOT_COMPILED = ("flash_attn", "flash_attn_4")  # with the model: what they do between the kernels cannot be traced
FORCED = os.environ.get("TRUNKLINE_LONG_ATTENTION", "")
if FORCED not in ("", OURS, "flash_attn"):
    raise ValueError(f"TRUNKLINE_LONG_ATTENTION must be {OURS} or flash_attn, got {FORCED!r}")


@decision(lambda *facts: [*LIBRARIES])
def long_attention(dtype: torch.dtype, D: int, H: int, G: int, causal: bool) -> str:
    """Whose kernels work on long sequences."""
    return OURS


def chosen(q: Tensor, k: Tensor, plan: PackPlan, causal: bool, plain: bool) -> str:
    """Who works on the long sequences of a batch. `plain`: without window, soft cap or dropout."""
    if not (q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and len(plan.blocks)):
        return OURS
    if FORCED:
        return FORCED
    if not plain or plan.cu_seqlens_k is not plan.cu_seqlens:
        return OURS
    library = long_attention(q.dtype, q.shape[2], q.shape[1], k.shape[1], causal)
    return OURS if torch.compiler.is_compiling() and library in NOT_COMPILED else library


def attention(
    library: str,
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
    """`trunkline.kernels.attention.attention`, with a library for what lies in blocks.

    Args:
        library: of `LIBRARIES`.
        tiled: our function, of q, k, v and a plan, for what lies in tiles.

    Raises:
        ValueError: dropout; flash-attn draws other random numbers, which depend on its tiling.
        ImportError: the library is not installed.
    """
    if dropout:
        raise ValueError(
            f"attention: with TRUNKLINE_LONG_ATTENTION=flash_attn dropout must be 0, got {dropout}: "
            "flash-attn draws other random numbers than our kernels"
        )
    function = partial(LIBRARIES[library], scale=scale, causal=causal)
    if library == "flash_attn":
        options = {"window_size": window or (-1, -1), "softcap": softcap or 0.0, "deterministic": deterministic}
        function = partial(function, **options)
    if not len(plan.tiles):
        cross = plan.cu_seqlens_k is not plan.cu_seqlens
        longest_k = _longest_key(plan) if cross else plan.max_seqlen
        return function(q, k, v, (plan.cu_seqlens, plan.cu_seqlens_k, plan.max_seqlen, longest_k))
    long = long_part(plan) if torch.compiler.is_compiling() else _remembered(plan)
    bounds = (long.cu_seqlens, long.cu_seqlens, plan.max_seqlen, plan.max_seqlen)
    out = function(*(take(x, long.token, long.slot) for x in (q, k, v)), bounds)
    in_blocks = (long.slot >= 0)[:, None, None]
    short = tiled(*(_WithoutGradient.apply(x, in_blocks) for x in (q, k, v)), plan=long.tiles)
    return torch.where(in_blocks, take(out, long.slot, long.token), short)


@dataclass(frozen=True)
class Long:
    """The stream of a plan's long sequences, of as many slots as its blocks have; some at the end are empty."""

    cu_seqlens: Tensor  # (S + 1,) int32; of no more sequences than there can be
    token: Tensor  # (slots,) of every slot the token in the batch, -1: none
    slot: Tensor  # (T,) of every token its slot, -1: it is in a tile
    tiles: PackPlan  # the plan without its blocks


def long_part(plan: PackPlan) -> Long:
    """For sequences that attend to themselves: those above 128 tokens are in blocks."""
    T, slots = plan.num_tokens, len(plan.blocks) * QUERY_BLOCK
    lengths, device = plan.cu_seqlens.diff(), plan.cu_seqlens.device
    order = (lengths <= SHORT).int().argsort(stable=True)[: len(plan.blocks) // 2]  # a long one has two blocks at least
    own = torch.where(lengths > SHORT, lengths, 0)[order]
    cu_seqlens = F.pad(own.cumsum(0), (1, 0)).int()
    slot = torch.arange(slots, device=device)
    place = torch.bucketize(slot, cu_seqlens[1:], right=True).clamp(max=len(order) - 1)
    token = torch.where(slot < cu_seqlens[-1], plan.cu_seqlens[order[place]] + slot - cu_seqlens[place], -1)
    of_token = slot.new_full((T + 1,), -1).index_put(
        (torch.where(token < 0, T, token),), torch.where(token < 0, -1, slot)
    )
    no_blocks = plan.blocks[:0]
    return Long(cu_seqlens, token, of_token[:T], replace(plan, blocks=no_blocks, key_blocks=no_blocks))


_remembered = lru_cache(maxsize=1)(long_part)  # every layer asks for the same


@lru_cache(maxsize=1)
def _longest_key(plan: PackPlan) -> int:
    """Waits for the device, once a batch."""
    return int(plan.cu_seqlens_k.diff().max())


def take(x: Tensor, there: Tensor, back: Tensor) -> Tensor:
    """x[there], and zeros where that is -1. `back` is the way back of a gradient: no sums, so no atomics either."""
    return _Take.apply(x, there, back)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return _rows(x, there)

    @staticmethod
    def backward(ctx, dy):
        (back,) = ctx.saved_tensors
        return _rows(dy, back), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    missing = (index < 0).view(-1, *[1] * (x.ndim - 1))
    return x[index.clamp(min=0)].masked_fill(missing, 0)


class _WithoutGradient(torch.autograd.Function):
    """x, from where no gradient comes to the rows of a mask: what is in blocks has none from the tiles."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        (mask,) = ctx.saved_tensors
        return dx.masked_fill(mask, 0), None
