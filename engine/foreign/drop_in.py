"""Attention under the names and with the semantics that other libraries gave it, on our kernels.

`flash_attn_func` and `flash_attn_varlen_func` are those of flash-attn 2, `scaled_dot_product_attention` is that of
PyTorch. What our kernels cannot do and PyTorch can is left to PyTorch: with the same result, one warning a reason, and
a count in `attention_counts`.

B batch, S query tokens a row, K key tokens a row, T packed tokens, H query heads, G key/value heads, D head width
Sources: the docstrings of flash_attn/flash_attn_interface.py (v2) and of torch.nn.functional.
"""

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trunkline.engine.foreign.plans import bounds_of, once_a_batch, padded_plan, stream_plan, whole_rows_plan
from trunkline.kernels.arguments import FLOATS, check_tensors
from trunkline.kernels.attention.attention import MAX_WIDTH, attention
from trunkline.kernels.attention.pack_plan import PackPlan

_counts: Counter[str] = Counter()


def attention_counts() -> dict[str, int]:
    """How often each drop-in was called since the process began, and how often it left the work to PyTorch.

    Returns:
        {"patch": 24, "patch: a 4-D mask": 2, ...}: calls on our kernels under the name of the drop-in, calls left to
        PyTorch under its name and the reason. A call in a compiled graph counts once, when it is compiled.
    """
    return dict(_counts)


@torch.compiler.assume_constant_result  # run by torch.compile when it meets the call, and not part of the graph
def count_call(name: str, left_to_torch: str | None = None) -> None:
    """Counts a call of the drop-in `name`; `left_to_torch` is the reason why it is not on our kernels."""
    if left_to_torch is None:
        _counts[name] += 1
        return
    reason = f"{name}: {left_to_torch}"
    _counts[reason] += 1
    if _counts[reason] == 1:
        warnings.warn(
            f"trunkline leaves a call to PyTorch's own attention. {reason}. "
            "The result is the same; trunkline.attention_counts() counts such calls.",
            stacklevel=3,
        )


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn.flash_attn_func` of flash-attn 2, on any device and also in float32 and float64.

    Args:
        q: (B, S, H, D).
        k: (B, K, G, D); G divides H.
        v: (B, K, G, D).
        dropout_p: probability of dropping a weight; 0 in evaluation.
        softmax_scale: factor of the scores; default 1 / sqrt(D).
        causal: the last query sees all keys, the one before all but the last, and so on (bottom-right).
        window_size: (left, right): query i sees keys i + K - S - left to i + K - S + right; -1 is no bound.
        softcap: scores s become softcap * tanh(s / softcap); 0 is no cap.
        deterministic: the same gradients, to the bit, in every run.

    Returns:
        (B, S, H, D). A query that sees no key gets 0.

    Raises:
        ValueError: shapes or dtypes that do not fit; `alibi_slopes` or `return_attn_probs`, which our kernels lack.
    """
    check_tensors("flash_attn_func", {"q": q, "k": k, "v": v})
    _unsupported("flash_attn_func", alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs or None)
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] == v.shape[0]):
        raise ValueError(
            f"flash_attn_func: q must be (B, S, H, D) and k, v (B, K, G, D), "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    count_call("flash_attn_func")
    plan = whole_rows_plan(q.shape[0], q.shape[1], k.shape[1], q.device)
    out = attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        plan,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap or None,
        dropout=dropout_p,
        deterministic=deterministic,
    )
    return out.view(q.shape)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func` of flash-attn 2, on any device and also in float32 and float64.

    The boundaries are read on the host, once for as long as the same tensors are passed. `max_seqlen_q` and
    `max_seqlen_k` are accepted and not needed.

    Args:
        q: (T, H, D) packed queries.
        k: (keys, G, D) packed keys; G divides H.
        v: (keys, G, D).
        cu_seqlens_q: (sequences + 1,) int32, first query of every sequence and the end of the last, T.
        cu_seqlens_k: (sequences + 1,) int32, the same for the keys.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic: as in `flash_attn_func`, inside every
            sequence.

    Returns:
        (T, H, D). A query that sees no key gets 0.

    Raises:
        ValueError: shapes, dtypes or boundaries that do not fit; `alibi_slopes`, `return_attn_probs` or `block_table`,
            which our kernels lack.
    """
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_tensors("flash_attn_varlen_func", {"q": q, "k": k, "v": v}, integers=bounds)
    _unsupported(
        "flash_attn_varlen_func",
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs or None,
        block_table=block_table,
    )
    if not q.ndim == k.ndim == v.ndim == 3:
        raise ValueError(
            f"flash_attn_varlen_func: q must be (T, H, D) and k, v (keys, G, D), "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    count_call("flash_attn_varlen_func")
    return attention(
        q,
        k,
        v,
        stream_plan(cu_seqlens_q, cu_seqlens_k, len(q), len(k)),
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap or None,
        dropout=dropout_p,
        deterministic=deterministic,
    )


def _unsupported(function: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{function}: {name} is not supported")


def heads_second(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, **settings: Any) -> Tensor:
    """`attention` for q (B, H, S, D) and k, v (B, G, K, D), the layout of PyTorch and Hugging Face.

    Views where the tensors lie as projections make them, (B, S, H, D) transposed; otherwise they are copied.

    Returns:
        (B, S, H, D), contiguous.
    """
    B = len(q)
    q, k, v = (as_under_autocast(x).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = attention(q, k, v, plan, **settings)  # (B * S, H, D)
    return out.view(B, -1, *out.shape[1:])


def as_under_autocast(x: Tensor) -> Tensor:
    """Autocast runs PyTorch's attention in its lower precision; so do we."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(device))
    return x


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with its errors.

    Our kernels take 4-D inputs without a mask, causal or not, and a bool mask (B, 1, 1, K) that keeps one stretch of
    keys in every row (padding; looking at it waits for the device). The rest is left to PyTorch. Dropout has the same
    distribution, but other random numbers.

    Args:
        query: (B, H, S, D).
        key: (B, H, K, D), or (B, G, K, D) with `enable_gqa`.
        value: (B, H, K, D), or (B, G, K, D) with `enable_gqa`.
        attn_mask: bool, True where a query sees a key, or a number to add to the score; broadcast to (B, H, S, K).
        dropout_p: probability of dropping a weight; 0 in evaluation.
        is_causal: query i sees keys 0 to i (top-left).
        scale: factor of the scores; default 1 / sqrt(D).
        enable_gqa: query heads share key/value heads.

    Returns:
        (B, H, S, D). A query that sees no key gets 0.
    """
    query, key, value = (as_under_autocast(x) for x in (query, key, value))
    reason = _not_ours(query, key, value, enable_gqa, dropout_p, scale)
    plan = None
    if reason is None:
        B, S, K = query.shape[0], query.shape[2], key.shape[2]
        if is_causal and K > S:  # the last query is query S - 1, also where there are more keys
            key, value, K = key[:, :, :S], value[:, :, :S], S
        if attn_mask is None and not (is_causal and K < S):
            plan = whole_rows_plan(B, S, K, query.device)
        elif attn_mask is None:
            reason = "is_causal with fewer keys than queries"
        elif is_causal or attn_mask.dtype != torch.bool or attn_mask.shape != (B, 1, 1, K):
            reason = "attn_mask is not a bool mask of keys, (B, 1, 1, K)"
        elif (plan := _keys_plan(attn_mask, S)) is None:
            reason = "attn_mask keeps keys that do not lie side by side"
    if plan is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        count_call("scaled_dot_product_attention", left_to_torch=reason)
        return out
    count_call("scaled_dot_product_attention")
    out = heads_second(query, key, value, plan, causal=is_causal, scale=scale, dropout=dropout_p)
    return out.transpose(1, 2)


def _not_ours(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, dropout_p: float, scale: float | None
) -> str | None:
    """Why our kernels cannot take these inputs; inputs that nobody can take are PyTorch's to complain about."""
    if not 0 <= dropout_p < 1:
        return "dropout_p is not in [0, 1)"
    if scale is not None and not scale > 0:
        return "scale is not above 0"
    if query.is_nested or not query.ndim == key.ndim == value.ndim == 4:
        return "inputs are not 4-D"
    if key.shape != value.shape or key.shape[3] != query.shape[3] or query.shape[3] > MAX_WIDTH:
        return f"heads of key and value are not equally wide, or wider than {MAX_WIDTH}"
    if len(query) != len(key) or not query.numel() or not key.numel():
        return "the batch is broadcast or empty"
    if query.shape[1] % key.shape[1] or (query.shape[1] != key.shape[1] and not enable_gqa):
        return "the numbers of heads do not fit"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in FLOATS:
        return "dtypes are mixed or not floating point"
    return None


@once_a_batch
def _keys_plan(attn_mask: Tensor, queries: int) -> PackPlan | None:
    """The plan of rows in which all queries see the keys that `attn_mask` (B, 1, 1, K) keeps; None if these have gaps.

    Looks at the values of the mask, which a graph cannot, so a graph gets None too.
    """
    if torch.compiler.is_compiling():
        return None
    first, end, whole = bounds_of(attn_mask[:, 0, 0])
    if not whole:
        return None
    none = torch.zeros_like(first)
    return padded_plan(torch.stack([none, none + queries, first, end], 1), queries, attn_mask.shape[3])
