"""Attention: tiles of both widths and blocks, every setting, and layouts that need kernels of their own."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.attention.attention import attention, attention_reference
from trunkline.kernels.attention.pack_plan import PackPlan
from virtual_gpu.case import Case, bounds, normal, placed

RAGGED = [63, 64, 65, 1, 30, 0, 33, 127, 128, 90, 0, 38, 129, 17, 2, 200]
SMALL = [17, 1, 0, 40, 2, 100, 28, 140]
MIXED = [*SMALL, 300]
ODD = [17, 1, 0, 40, 100, 140]


def case(
    name: str,
    lengths: list[int],
    heads: int = 2,
    kv_heads: int | None = None,
    width: int = 64,
    *,
    dtype: torch.dtype,
    lengths_k: list[int] | None = None,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    causal: bool = True,
    no_kernel: str = "",
    **settings: Any,
) -> Case:
    plan = PackPlan.of(bounds(lengths), None if lengths_k is None else bounds(lengths_k))
    T, K, G = sum(lengths), sum(lengths_k or lengths), kv_heads or heads
    q, k, v = normal(T, heads, width), normal(K, G, width, seed=1), normal(K, G, width, seed=2)
    settings["causal"] = causal
    return Case(
        "attention",
        name,
        lambda q, k, v: attention(q, k, v, plan, **settings),
        lambda q, k, v: attention_reference(q, k, v, plan, **settings),
        tuple(layout(x.to(dtype)) for x in (q, k, v)),
        no_kernel=no_kernel,
    )


def of_one_tensor(name: str, lengths: list[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> Case:
    """Heads of queries, keys and values side by side, and their gradients likewise."""
    plan, heads_of = PackPlan.of(bounds(lengths)), [heads, kv_heads, kv_heads]
    return Case(
        "attention",
        name,
        lambda whole: attention(*whole.split(heads_of, 1), plan, causal=True, whole=whole),
        lambda whole: attention_reference(*whole.split(heads_of, 1), plan, causal=True),
        (normal(sum(lengths), sum(heads_of), width).to(dtype),),
    )


def hugging_face(x: Tensor) -> Tensor:
    """Heads before tokens in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    run = partial(case, dtype=dtype)
    yield run("ragged, bidirectional", RAGGED, 3, causal=False)
    yield run("ragged, causal", RAGGED, 3)
    for lengths in ([1], [2], [17], [64], [128], [129], [500]):
        yield run(f"lengths {lengths}", lengths)
    yield run("lengths [0, 0]", [0, 0], no_kernel="no token")
    for window in ((5, 0), (10, 3), (0, 0), (-1, 70), (130, -1), (64, 64)):
        yield run(f"window {window}", MIXED, causal=False, window=window)
    yield run("causal window", MIXED, window=(20, 5))
    yield run("layout of Hugging Face", SMALL, 3, layout=hugging_face)
    yield of_one_tensor("one tensor", ODD, 2, 2, 64, dtype)
    yield of_one_tensor("one tensor, 4 heads on 2", SMALL, 4, 2, 40, dtype)
    for causal in (False, True):
        name = "cross attention, causal" if causal else "cross attention"
        yield run(name, [5, 0, 130, 1, 40, 3], lengths_k=[200, 7, 64, 0, 40, 300], causal=causal)
    yield run("6 heads on 2", RAGGED, 6, 2)
    yield run("8 heads on 2, width 128", SMALL, 8, 2, 128)
    for width in (32, 96, 128):
        yield run(f"width {width}", MIXED, 4, width=width)
    yield run("width 256, long", [300, 140], 4, 2, 256)
    yield run("width 256, short", [30, 140], width=256)
    yield run("soft cap", MIXED, 4, softcap=2.0)
    yield run("dropout", MIXED, 4, dropout=0.1, seed=3)
    yield run("dropout, seed of 63 bits", SMALL, 4, causal=False, dropout=0.6, seed=2**62 + 7)
    # what needs kernels of its own
    yield run("one head", ODD, 1)
    for off in (dtype.itemsize, 8, 16):
        yield run(f"{off} bytes off 64", ODD, 3, layout=partial(placed, bytes_off=off))
    yield run("heads of 16", ODD, 4, 2, 16)
    yield run("width 40", ODD, width=40)
    yield run("width 17", ODD, 2, 1, 17)
    yield run("soft cap and dropout, groups", ODD, 4, 2, softcap=2.0, dropout=0.2, seed=1)
    yield run("width 128, soft cap", ODD, width=128, softcap=2.0)
    harsh = {"causal": False, "softcap": 2.0, "dropout": 0.2, "seed": 1}
    yield run("width 256, soft cap, dropout", [140, 257], 2, 1, 256, **harsh)
