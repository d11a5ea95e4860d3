"""What else computes the same: every way that users have today, for each public function of kernels/.

A peer takes the arguments of our function and prepares everything that it may have before the clock starts: padded
inputs, masks, a compiled function. Where it is not installed, or cannot do what is asked, it says so by `Unavailable`.
The first peer of every function is its definition in kernels/, which the others are held against.
"""

import importlib.util
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.benchmarks.microbenchmarks.examples import Kernel, first, leaves, map_tensors
from trunkline.kernels.attention.attention_elsewhere import LIBRARIES

Arguments = dict[str, Any]


class Unavailable(Exception):
    """Why a peer cannot take part."""


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class System:
    """One way of computing an output from inputs, both in a layout of its own."""

    forward: Callable[[], Tensor]
    inputs: dict[str, Tensor]  # that gradients flow to; named as in our function
    to_ours: Callable[[Tensor], Tensor] = _same  # its layout -> that of our function
    from_ours: Callable[[Tensor], Tensor] = _same


Peer = Callable[[Kernel, Arguments, torch.dtype], System]


def trunkline(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    arguments = map_tensors(lambda x: x.detach().clone(), arguments)
    return System(lambda: first(kernel.function(**arguments)), leaves(arguments, dtype))


def definition(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    """The reference at the top of the kernel's file, in the arguments' dtype."""
    reference = getattr(kernel.module, f"{kernel.name}_reference")
    arguments = map_tensors(lambda x: x.detach().clone(), arguments)
    inputs = leaves(arguments, dtype)
    known = {key: arguments[key] for key in inspect.signature(reference).parameters if key in arguments}
    return System(lambda: first(reference(**known)), inputs)


# attention

PACKED_MASK_TOKENS = 16384  # beyond, a mask of T x T takes gigabytes


def _on_gpu(arguments: Arguments) -> None:
    if not next(x for x in arguments.values() if isinstance(x, Tensor)).is_cuda:
        raise Unavailable("needs an NVIDIA GPU")


def _import(name: str) -> Any:
    if not importlib.util.find_spec(name):
        raise Unavailable(f"{name} is not installed")
    return importlib.import_module(name)


def _attention_inputs(arguments: Arguments, layout: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: layout(arguments[name].detach()).requires_grad_() for name in ("q", "k", "v")}


def _packed(function: Callable[..., Any], arguments: Arguments) -> System:
    """For functions of (T, H, D), as ours."""
    inputs = _attention_inputs(arguments, torch.clone)
    return System(lambda: first(function(*inputs.values())), inputs)


def _elsewhere(name: str) -> Peer:
    """What could serve our long sequences, with all of a batch."""

    def prepare(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
        _on_gpu(arguments)
        plan, function = arguments["plan"], LIBRARIES[name]
        bounds = (plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen)
        return _packed(lambda q, k, v: function(q, k, v, bounds, None, arguments["causal"]), arguments)

    return prepare


def _padded(backend: str | None) -> Callable[..., System]:
    def prepare(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
        lengths = arguments["plan"].cu_seqlens.diff()
        real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (S, L)

        def pad(x: Tensor) -> Tensor:  # (T, H, D) -> (S, H, L, D)
            padded = x.new_zeros(*real.shape, *x.shape[1:])
            padded[real] = x
            return padded.transpose(1, 2).contiguous()

        def unpad(x: Tensor) -> Tensor:
            return x.transpose(1, 2)[real]

        # causal: padding stands behind everything, so nothing sees it
        mask = None if arguments["causal"] or bool(real.all()) else real[:, None, None]
        if backend:
            _on_gpu(arguments)
            if mask is not None and backend == "FLASH_ATTENTION":
                raise Unavailable("takes no mask")
        inputs = _attention_inputs(arguments, pad)
        return System(lambda: _sdpa(inputs, mask, arguments, backend), inputs, unpad, pad)

    return prepare


def _sdpa(inputs: dict[str, Tensor], mask: Tensor | None, arguments: Arguments, backend: str | None = None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = inputs["k"].shape[1] < inputs["q"].shape[1]
    causal = arguments["causal"] and mask is None
    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
        return F.scaled_dot_product_attention(*inputs.values(), attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _document(arguments: Arguments) -> Tensor:
    """(T,) the sequence of every token"""
    bounds = arguments["plan"].cu_seqlens
    tokens = torch.arange(len(arguments["q"]), device=bounds.device)
    return torch.bucketize(tokens, bounds[1:], right=True)


def _one_row(x: Tensor) -> Tensor:
    """(T, H, D) -> (1, H, T, D)"""
    return x.transpose(0, 1)[None].contiguous()


def _many_rows(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def packed_mask(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    """As Hugging Face does it: one row, and a mask of T x T that is true inside every sequence."""
    document = _document(arguments)
    if len(document) > PACKED_MASK_TOKENS:
        raise Unavailable(f"a mask of {len(document):,} x {len(document):,}")
    mask = document[:, None] == document
    if arguments["causal"]:
        mask = mask.tril()
    inputs = _attention_inputs(arguments, _one_row)
    return System(lambda: _sdpa(inputs, mask, arguments), inputs, _many_rows, _one_row)


def flex_attention(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    _on_gpu(arguments)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document, causal = _document(arguments), arguments["causal"]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[query] == document[key]
        return same & (query >= key) if causal else same

    tokens, grouped = len(document), arguments["k"].shape[1] < arguments["q"].shape[1]
    blocks = torch.compile(create_block_mask)(visible, None, None, tokens, tokens, device=document.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    inputs = _attention_inputs(arguments, _one_row)
    return System(
        lambda: compiled(*inputs.values(), block_mask=blocks, enable_gqa=grouped), inputs, _many_rows, _one_row
    )


# vocabulary heads


def _plain_loss(arguments: Arguments, *extras: str) -> dict[str, Tensor]:
    """The inputs of a loss that knows one task and, of our options, only the label smoothing and `extras`."""
    if arguments["num_tasks"] > 1:
        raise Unavailable("knows one task only")
    for name in ("z_loss", "softcap"):
        if arguments.get(name) and name not in extras:
            raise Unavailable(f"has no {name}")
    names = ("x", "weight", "bias")
    return {
        name: arguments[name].detach().clone().requires_grad_() for name in names if arguments.get(name) is not None
    }


def _compiled(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    _on_gpu(arguments)
    target, smoothing = arguments["target"], arguments.get("label_smoothing", 0.0)

    @torch.compile(dynamic=False)
    def loss(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), target, reduction="sum", label_smoothing=smoothing)

    inputs = _plain_loss(arguments)
    return System(lambda: loss(**inputs).float().view(1), inputs)


def _torch_linear_cross_entropy(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable("not in this torch")
    inputs, target = _plain_loss(arguments), arguments["target"]
    options = {"reduction": "sum", "label_smoothing": arguments.get("label_smoothing", 0.0)}

    def forward() -> Tensor:
        return function(inputs["x"], inputs["weight"], target, linear_bias=inputs.get("bias"), **options).view(1)

    return System(forward, inputs)


def _liger(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    _on_gpu(arguments)
    inputs, target = _plain_loss(arguments, "z_loss", "softcap"), arguments["target"]
    loss = _import("liger_kernel").transformers.LigerFusedLinearCrossEntropyLoss(
        reduction="sum",
        label_smoothing=arguments.get("label_smoothing", 0.0),
        lse_square_scale=arguments.get("z_loss", 0.0),
        softcap=arguments.get("softcap") or None,
    )
    return System(lambda: loss(inputs["weight"], inputs["x"], target, inputs.get("bias")).view(1), inputs)


def _quack(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    _on_gpu(arguments)
    function = _import("quack.linear_cross_entropy").chunked_linear_cross_entropy
    inputs, target = _plain_loss(arguments), arguments["target"]
    if arguments.get("label_smoothing") or "bias" in inputs:
        raise Unavailable("has no label_smoothing and no bias")
    return System(lambda: function(inputs["x"], inputs["weight"], target, reduction="sum").view(1), inputs)


def _cut_cross_entropy(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    _on_gpu(arguments)
    function = _import("cut_cross_entropy").linear_cross_entropy
    inputs, target = _plain_loss(arguments, "softcap"), arguments["target"]
    if arguments.get("label_smoothing"):
        raise Unavailable("has no label_smoothing")
    options = {"reduction": "sum", "softcap": arguments.get("softcap") or None}

    def forward() -> Tensor:
        return function(inputs["x"], inputs["weight"], target, bias=inputs.get("bias"), **options).view(1)

    return System(forward, inputs)


# gradients by task


def _backward_per_task(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    """What a backward pass for each task costs: the others' rows are zeros, but they are multiplied all the same."""
    x, dy, offsets = (arguments[name] for name in ("x", "dy", "offsets"))
    row = torch.arange(len(x), device=x.device)[:, None]
    masks = ((row >= offsets[:-1]) & (row < offsets[1:])).to(dtype)  # (R, N)

    def forward() -> Tensor:
        gradients = torch.stack([((dy * mask[:, None]).T @ x).flatten().float() for mask in masks.T])
        return gradients @ gradients.T

    return System(forward, {})


def _gram_of_segments(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    def forward() -> Tensor:
        gradients = kernel.module.task_gradients_reference(**arguments).flatten(1)
        return gradients @ gradients.T

    return System(forward, {})


# low_rank


def _peft_loop(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    """What PEFT does of adapters by sample, in inference alone: one adapter after the other, its rows taken out and put
    back; and here with gradients. A fused layer's parts are layers of their own there, each with its product."""
    a = map_tensors(lambda x: x.detach().clone(), arguments)
    inputs = leaves(a, dtype)
    ends, rank = a["offsets"].tolist(), a["up"].shape[1]
    segments = [torch.arange(first, last, device=a["x"].device) for first, last in zip(ends, ends[1:], strict=False)]

    def forward() -> Tensor:
        columns, begin = [], 0
        for p, (start, end) in enumerate(zip(a["parts"][::2], a["parts"][1::2], strict=True)):
            y, own = a["base"][:, start:end], slice(begin, begin + end - start)
            begin = own.stop
            for t, rows in enumerate(segments):
                down, up = a["down"][t][:, p * rank : (p + 1) * rank], a["up"][t][:, own]
                y = y.index_add(0, rows, a["scale"] * (a["x"][rows] @ down) @ up)
            columns.append(y)
        return torch.cat(columns, 1)

    return System(forward, inputs)


def _grouped_mm(kernel: Kernel, arguments: Arguments, dtype: torch.dtype) -> System:
    """torch's product of groups of rows, twice, as SkyRL and others have it."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("torch has no grouped_mm")
    a = map_tensors(lambda x: x.detach().clone(), arguments)
    inputs = leaves(a, dtype)
    if a["x"].device.type == "cuda" and dtype != torch.bfloat16:
        raise Unavailable("grouped_mm takes bfloat16 alone")
    ends, rank = a["offsets"][1:], a["up"].shape[1]

    def forward() -> Tensor:
        h = F.grouped_mm(a["x"], a["down"], offs=ends)
        columns, begin = [], 0
        for p, (start, end) in enumerate(zip(a["parts"][::2], a["parts"][1::2], strict=True)):
            own = slice(begin, begin + end - start)
            begin = own.stop
            hidden = h[:, p * rank : (p + 1) * rank].contiguous()
            added = F.grouped_mm(hidden, a["up"][:, :, own].contiguous(), offs=ends)
            columns.append(a["base"][:, start:end] + a["scale"] * added)
        return torch.cat(columns, 1)

    try:
        forward()
    except RuntimeError as error:
        raise Unavailable(f"grouped_mm: {str(error).splitlines()[0]}") from error
    return System(forward, inputs)


PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "loop over sequences": definition,
        "varlen_attn": _elsewhere("varlen_attn"),
        "SDPA padded": _padded(None),
        "SDPA padded, cuDNN": _padded("CUDNN_ATTENTION"),
        "SDPA padded, flash": _padded("FLASH_ATTENTION"),
        "SDPA packed mask": packed_mask,
        "FlexAttention": flex_attention,
        "flash_attn": _elsewhere("flash_attn"),
        "flash_attn 4": _elsewhere("flash_attn_4"),
    },
    "linear_cross_entropy": {
        "eager": definition,
        "compiled": _compiled,
        "F.linear_cross_entropy": _torch_linear_cross_entropy,
        "Liger": _liger,
        "QuACK": _quack,
        "cut_cross_entropy": _cut_cross_entropy,
    },
    "low_rank": {"loop over adapters": definition, "PEFT's loop": _peft_loop, "grouped_mm": _grouped_mm},
    "task_loss": {"loop over tasks": definition},
    "task_projection": {"loop over tasks": definition},
    "task_gram": {"loop over tasks": _gram_of_segments, "backward pass per task": _backward_per_task},
}
