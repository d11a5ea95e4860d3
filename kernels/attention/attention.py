"""Packed attention: softmax(q k^T * scale) v inside every sequence of a packed batch, never across sequences.

Backward, with P the probabilities, O the output and delta_i = sum_d dO_id O_id:
    dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale * dS K,   dK = scale * dS^T Q.
With a soft cap c the scores are c tanh(s / c), and dS is multiplied by 1 - tanh^2; with dropout P is multiplied by
Z / (1 - p) where it meets V and dV, Z being 1 or 0, and so is dO V^T.
Saved for backward: q, k, v, the output and, 4 bytes a query and head, the log-sum-exp (of base 2 in the kernels, which
need it in blocks alone: in tiles it is room that nobody fills).

Short sequences are worked on in tiles (attention_short.py), longer ones in blocks (attention_long.py) or, where those
are faster, by other kernels (attention_elsewhere.py); without kernels, all of it in plain PyTorch (attention_torch.py).

T tokens, K keys (T for self-attention), H query heads, G key/value heads (H a multiple of G), D head width, S sequences
Source: Dao, FlashAttention-2, arXiv:2307.08691, section 3.1; block-diagonal tiles as in Krell et al., arXiv:2107.02027.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.arguments import check_tensors
from trunkline.kernels.attention import attention_elsewhere, attention_long, attention_short, attention_torch
from trunkline.kernels.attention.attention_scores import kept_reference
from trunkline.kernels.attention.pack_plan import SHORT, Layout, PackPlan
from trunkline.kernels.dispatch import INTERPRET, register
from trunkline.kernels.once_differentiable import once_differentiable

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 256  # of a head: what the kernels hold in one piece
BEYOND = 1 << 20  # a block after the last of any sequence


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackPlan,
    *,
    causal: bool,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The definition: one sequence after the other, all scores at once."""
    lengths, lengths_k = plan.cu_seqlens.diff().tolist(), plan.cu_seqlens_k.diff().tolist()
    repeat = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    left, right = window or (-1, -1)
    head = torch.arange(q.shape[1], device=q.device)[:, None, None]
    row, column = torch.arange(len(q), device=q.device), torch.arange(len(k), device=q.device)
    of_queries = (x.split(lengths) for x in (q, row[:, None]))
    of_keys = (x.split(lengths_k) for x in (k, v, column))
    out = []
    for queries, rows, keys, values, columns in zip(*of_queries, *of_keys, strict=True):
        queries = queries.transpose(0, 1)  # (H, L, D)
        keys, values = (x.transpose(0, 1).repeat_interleave(repeat, 0) for x in (keys, values))
        scores = queries @ keys.transpose(1, 2) * scale  # (H, L, D) @ (H, D, N) -> (H, L, N)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = (columns - columns[-1:]) - (rows - rows[-1:])  # 0 where query and key are as far from their end
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if causal:
            hidden |= ahead > 0
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)  # a query that sees no key gets 0
        if dropout:
            kept = kept_reference(seed, rows, columns, head, dropout)
            weights = weights.masked_fill(~kept, 0.0) / (1 - dropout)
        out.append((weights @ values).transpose(0, 1))
    return torch.cat(out)


def _forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    narrow_tiles: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(q, rows):
        return attention_torch.forward(q, k, v, layout, narrow_tiles, scale, left, right, softcap, dropout, seed, rows)
    q, k, v = map(_with_dense_heads, (q, k, v))
    spans, tiles, blocks, cu_seqlens, _, cu_seqlens_k = _fitting(q, layout)
    out, lse = _forward_fake(q)  # every token is in a tile or a block; for those in tiles nothing is kept
    settings = (scale, left, right, softcap, dropout, 0 if seed is None else int(seed))
    if len(tiles):
        attention_short.forward(q, k, v, out, spans, tiles, narrow_tiles, *settings)
    if len(blocks):
        attention_long.forward(q, k, v, out, lse, cu_seqlens, cu_seqlens_k, blocks, *settings)
    return out, lse


def _backward_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[Tensor],
    narrow_tiles: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
    rows: Tensor | None,
    deterministic: bool,
    joined: bool,
) -> list[Tensor]:
    if not _has_kernel(q, rows):
        given = (scale, left, right, softcap, dropout, seed, rows, deterministic, joined)
        return attention_torch.backward(dout, q, k, v, out, lse, layout, narrow_tiles, *given)
    dout, (q, k, v) = dout.contiguous(), map(_with_dense_heads, (q, k, v))
    spans, tiles, blocks, cu_seqlens, key_blocks, cu_seqlens_k = _fitting(q, layout)
    gradients = _gradients_fake(q, k, v, joined)
    dq, dk, dv = gradients[0].split([x.shape[1] for x in (q, k, v)], 1) if joined else gradients
    settings = (scale, left, right, softcap, dropout, 0 if seed is None else int(seed))
    if len(tiles):
        attention_short.backward(dout, q, k, v, dq, dk, dv, spans, tiles, narrow_tiles, *settings)
    if len(blocks) or len(key_blocks):
        tensors = (dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens, cu_seqlens_k, blocks, key_blocks)
        attention_long.backward(*tensors, *settings)
    return gradients


def _has_kernel(q: Tensor, rows: Tensor | None) -> bool:
    """The reference takes float64, which is for checks, heads of exact float32 wider than 128, for which there are not
    registers enough, and queries of some tokens alone."""
    return rows is None and q.dtype in KERNEL_DTYPES and q.shape[2] <= attention_long.widest(q.dtype)


def _fitting(q: Tensor, layout: list[Tensor]) -> Layout:
    """The layout; where heads are too wide for tiles, with a block for each of the sequences in them instead.

    Nobody has to know on the host which these are: every sequence gets a first block, and those that have one already
    get one beyond their end, where there is nothing to do.
    """
    given = Layout.of(layout)
    if q.shape[2] <= attention_short.widest(q.dtype) or not len(given.tiles):
        return given
    lengths = given.cu_seqlens.diff()
    first = torch.stack([torch.arange(len(lengths), dtype=torch.int32, device=q.device), BEYOND * (lengths > SHORT)], 1)
    blocks = torch.cat([given.blocks, first.int()])
    return given._replace(tiles=given.tiles[:0], blocks=blocks, key_blocks=blocks)


def _with_dense_heads(x: Tensor) -> Tensor:
    """The kernels take any strides between tokens and heads, and none inside a head."""
    return x if x.stride(2) == 1 else x.contiguous()


def _forward_fake(q, *rest):
    statistics = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=statistics)


def _backward_fake(dout, q, k, v, *rest):
    return _gradients_fake(q, k, v, joined=rest[-1])


def _gradients_fake(q, k, v, joined):
    if joined:
        return [q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])]
    return [x.new_empty(x.shape) for x in (q, k, v)]


_forward = register("attention_forward", reference=attention_torch.forward, triton=_forward_triton, fake=_forward_fake)
_backward = register(
    "attention_backward", reference=attention_torch.backward, triton=_backward_triton, fake=_backward_fake
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, whole, seed, rows, deterministic, settings, *layout):
        out, lse = _forward(q, k, v, layout, *settings, seed, rows)
        ctx.save_for_backward(q, k, v, out, lse, seed, rows, *layout)
        ctx.settings, ctx.deterministic, ctx.joined = settings, deterministic, whole is not None
        return out

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx, dout):
        q, k, v, out, lse, seed, rows, *layout = ctx.saved_tensors
        how = (*ctx.settings, seed, rows, ctx.deterministic, ctx.joined)
        gradients = _backward(dout, q, k, v, out, lse, layout, *how)
        of_inputs = (None, None, None, *gradients) if ctx.joined else (*gradients, None)
        return *of_inputs, *[None] * (4 + len(layout))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackPlan,
    *,
    causal: bool,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    deterministic: bool = False,
    rows: Tensor | None = None,
    whole: Tensor | None = None,
) -> Tensor:
    """Attention inside every sequence of a packed batch; nothing passes from one sequence to another.

    The last query of a sequence stands at its last key, also where there are more keys than queries (a cache) or
    fewer. A query that sees no key gets 0, and gives no gradient.

    Args:
        q: (T, H, D) queries; float32, float16, bfloat16 or float64. D up to 256. Views are fine.
        k: (K, G, D) keys; G divides H: grouped-query attention.
        v: (K, G, D) values.
        plan: the batch's `PackPlan`, on the device of `q`.
        causal: a query sees the key at its own position and those before it; otherwise all keys of its sequence.
        scale: factor of the scores, above 0; default 1 / sqrt(D).
        window: (left, right), how many keys before and after its own position a query sees; -1: no bound.
        softcap: c; scaled scores s become c tanh(s / c).
        dropout: probability of leaving a key out, in [0, 1); what is kept is multiplied by 1 / (1 - dropout).
        seed: of dropout, in [0, 2^63); the same seed leaves out the same keys, however the stream is tiled. None draws
            one from torch's default generator.
        deterministic: the same bits in every run; costs some time in the backward pass of long sequences.
        rows: (R,) int64, the tokens whose output is wanted, in any order; None: all. On a CPU a few take less time.
        whole: (T, H + 2 G, D), the tensor that q, k and v are the heads of, in this order. The kernels then write its
            gradient, where three tensors would have to be copied into one.

    Returns:
        (T, H, D), or with `rows` (R, H, D); contiguous, the dtype of `q`. Sums are taken in float32 at least; float32
        is multiplied in full precision unless `torch.backends.cuda.matmul.fp32_precision` is "tf32". Gradients flow to
        q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another or the plan; settings out of their range; and,
            on the CPU, rows that there are not.
    """
    _check(q, k, v, plan, rows, whole)
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must be in [0, 1), got {dropout}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"attention: seed must be in [0, 2^63), got {seed}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap must be above 0, got {softcap}; None is no soft cap")
    if scale is not None and not scale > 0:
        raise ValueError(f"attention: scale must be above 0, got {scale}; None is 1 / sqrt(D)")
    left, right = (-1, -1) if window is None else window
    if left < -1 or right < -1:
        raise ValueError(f"attention: window must be (left, right), each at least 0 or -1 for no bound, got {window}")
    plain = window is None and softcap is None and not dropout
    if (library := attention_elsewhere.chosen(q, k, plan, causal, plain)) != attention_elsewhere.OURS:
        asked: dict[str, Any] = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
        asked["deterministic"] = deterministic
        ours = partial(attention, **asked)
        out = attention_elsewhere.attention(library, q, k, v, plan, ours, dropout=dropout, **asked)
        return out if rows is None else _taken(out, rows)
    settings = (
        plan.narrow_tiles,
        q.shape[2] ** -0.5 if scale is None else float(scale),
        left,
        0 if causal else right,
        float(softcap or 0.0),
        float(dropout),
    )
    drawn = _seed(seed) if dropout else None
    if rows is not None and 4 * len(rows) <= len(q) and q.device.type == "cpu" and not INTERPRET:
        of_rows = _taken(q, rows)
        return _Attention.apply(of_rows, k, v, None, drawn, rows, deterministic, settings, *plan.layout)
    of_whole = (q, k, v) if whole is None else (q.detach(), k.detach(), v.detach())
    out = _Attention.apply(*of_whole, whole, drawn, None, deterministic, settings, *plan.layout)
    return out if rows is None else _taken(out, rows)


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """(T, H, D) -> (R, H, D); nobody looks at the rows' values but the one who takes them."""
    if torch.compiler.is_compiling():
        return x[rows]
    if x.device.type != "cpu":
        return x[rows]  # whose gradient is the same in every run there
    try:
        return x.index_select(0, rows)  # and none of those counted from the end
    except IndexError as error:
        raise ValueError(f"attention: rows must be in [0, {len(x)}): {error}") from error


def _seed(seed: int | None) -> Tensor:
    """On the CPU, so that nobody waits for a GPU to read it; a tensor, so that torch.compile does not freeze it."""
    if seed is None:
        return torch.randint(2**63 - 1, (), device="cpu")
    return torch.tensor(seed, dtype=torch.int64, device="cpu")


def _check(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, rows: Tensor | None, whole: Tensor | None) -> None:
    check_tensors(
        "attention", {"q": q, "k": k, "v": v}, others={"plan": plan.cu_seqlens}, optional={"rows": rows, "whole": whole}
    )
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and k.shape[2] == q.shape[2]
    if not fits or not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "attention: q must be (T, H, D) and k, v (K, G, D) with H a multiple of G, "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if not 1 <= q.shape[2] <= MAX_WIDTH:
        raise ValueError(f"attention: heads must be 1 to {MAX_WIDTH} wide, got {q.shape[2]}")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(
            f"attention: rows must be (R,) int64 on {q.device}, got {rows.dtype} of shape {list(rows.shape)}"
        )
    heads = (len(k), q.shape[1] + 2 * k.shape[1], q.shape[2])
    if whole is not None and whole.shape != heads:
        raise ValueError(f"attention: whole must be {heads}, the heads of q, k and v, got {list(whole.shape)}")
    if (len(q), len(k)) != (plan.num_tokens, plan.num_keys):
        raise ValueError(
            f"attention: the plan is of {plan.num_tokens} tokens and {plan.num_keys} keys, "
            f"got q of {len(q)} and k of {len(k)}; every batch has a plan of its own"
        )


_MANY = {"heads": 12, "head_dim": 64, "causal": False}
_MIX = {"lengths": [48] * 512 + [128] * 256 + [768] * 32, "causal": True}  # tiles of both widths, and blocks
SHAPES: dict[str, dict] = {
    "1024 x 32": {"lengths": [32] * 1024, **_MANY},
    "1024 x 64": {"lengths": [64] * 1024, **_MANY},
    "512 x 128": {"lengths": [128] * 512, **_MANY},
    "1024 x 48 + 32 x 768": {"lengths": [48] * 1024 + [768] * 32, **_MANY},
    "64 x 1024 causal": {"lengths": [1024] * 64, "heads": 12, "head_dim": 64, "causal": True},
    "8 x 8192 causal": {"lengths": [8192] * 8, "heads": 16, "head_dim": 128, "causal": True},
    "mix causal, 12 heads on 4": {**_MIX, "heads": 12, "kv_heads": 4, "head_dim": 64},
    "mix causal, 32 heads on 8": {**_MIX, "heads": 32, "kv_heads": 8, "head_dim": 128},
}
# nothing to time, but code of its own: other widths of heads, and what is done to a score
ALSO_CERTIFIED: dict[str, dict] = {
    **{f"heads of {D}": {**_MIX, "heads": 4, "head_dim": D} for D in (32, 96, 128)},
    "soft cap": {**_MIX, "heads": 4, "head_dim": 64, "softcap": 30.0},
    "dropout": {**_MIX, "heads": 4, "head_dim": 64, "dropout": 0.1},
    "long, heads of 256": {"lengths": [768], "heads": 4, "kv_heads": 2, "head_dim": 256, "causal": True},
}


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    lengths: list[int],
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Arguments of `attention` for sequences of these lengths, random and always the same."""
    generator = torch.Generator(device).manual_seed(0)  # a host would draw the largest for a minute

    def random(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, head_dim, generator=generator, device=device).to(dtype)

    q, k, v = random(heads), random(kv_heads or heads), random(kv_heads or heads)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "plan": PackPlan.of(bounds).to(device), **settings}
