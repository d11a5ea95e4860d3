"""What the instructions of every kernel do, in numbers that Nsight Compute would give: per thread, and in bytes.

    python -m virtual_gpu.counts [--arch 80 90] [--only WORD]

Counted in PTX, before ptxas merges and drops instructions; bytes are sectors of 32, before any cache.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from trunkline.kernels.attention import attention
from trunkline.kernels.tasks import task_gram, task_loss, task_projection
from trunkline.kernels.vocabulary import linear_cross_entropy
from virtual_gpu.cases.linear_layers import LARGE_TILES
from virtual_gpu.device import ARCHITECTURES, Record, VirtualGPU

GLOBAL = ("ld_global", "st_global", "cp_async", "atom_global")
SHARED = ("ld_shared", "st_shared", "ldmatrix", "stmatrix")
KINDS: dict[str, tuple[str, ...]] = {  # what an opcode begins with
    "matrix": ("mma", "wgmma"),
    "global": GLOBAL,
    "shared": SHARED,
    "sync": ("bar_", "cp_async_", "wgmma_", "fence_"),
    "shuffle": ("shfl", "vote", "redux"),
    "branch": ("bra", "ret"),
    "mufu": ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div_f32"),
    "convert": ("cvt", "pack", "unpack"),
}


def kind(op: str) -> str:
    for name in ("sync", *KINDS):  # a wait for wgmma is no product
        if op.startswith(KINDS[name]):
            return name
    return "float" if op.endswith("_f32") else "integer"


def facts(record: Record) -> dict[str, float]:
    """Instructions a thread by kind, and bytes, transactions and arithmetic of the whole launch."""
    program, statistics = record.program, record.outcome.statistics
    threads = record.grid[0] * record.grid[1] * record.grid[2] * record.warps * 32
    out: dict[str, float] = defaultdict(float)
    for place, (op, *_) in enumerate(program.ops):
        row, operands = statistics[place], program.pool[program.spans[place][0] :]
        out[kind(op)] += row["lanes"] / threads
        out["all"] += row["lanes"] / threads
        if op in GLOBAL:
            out["written" if op == "st_global" else "read"] += 32.0 * row["sectors"]
            out["sectors"] += row["sectors"]
            out["fewest sectors"] += row["ideal"]
        if op in SHARED:
            out["wavefronts"] += row["sectors"]
            out["fewest wavefronts"] += row["ideal"]
        if op == "mma":
            out["flop"] += float(row["warps"]) * 2 * 16 * 8 * operands[1]
        if op == "wgmma":
            out["flop"] += float(row["warps"]) / 4 * 2 * 64 * operands[0] * operands[1]
    out["distinct read"], out["distinct written"] = record.outcome.unique_read, record.outcome.unique_written
    return out


def by_kernel(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Sums over the launches of each kernel."""
    total: dict[str, dict[str, float]] = {}
    for record in records:
        own = total.setdefault(record.kernel, defaultdict(float))
        for key, value in facts(record).items():
            own[key] += value
    return total


def show(title: str, records: Sequence[Record], least: dict[str, float]) -> None:
    """`least`: kernel -> bytes it cannot do without; and with "flop " before it, arithmetic."""
    print(f"\n## {title}")
    for record in records:
        each = facts(record)
        names = ("matrix", "float", "mufu", "convert", "global", "shared", "shuffle", "sync", "branch", "integer")
        counts = " ".join(f"{name} {each[name]:.0f}" for name in names if each[name] >= 0.5)
        launched = f"grid {record.grid}, {record.warps} warps, {record.shared} B shared"
        print(f"{record.kernel} sm_{record.arch} {launched}: {each['all']:.0f} instructions a thread ({counts})")
    for name, f in by_kernel(records).items():
        moved, needed, useful = f["read"] + f["written"], least.get(name), least.get(f"flop {name}")
        print(
            f"  {name}: MB read {f['read'] / 1e6:.2f} (distinct {f['distinct read'] / 1e6:.2f}), "
            f"written {f['written'] / 1e6:.2f} (distinct {f['distinct written'] / 1e6:.2f})"
            + (f", {moved / needed:.2f} x the unavoidable {needed / 1e6:.2f}" if needed else "")
            + f"; sectors {f['sectors'] / max(f['fewest sectors'], 1):.2f} of the fewest"
            + f"; bank wavefronts {f['wavefronts'] / max(f['fewest wavefronts'], 1):.2f} of the fewest"
            + f"; {f['flop'] / 1e9:.3f} GFLOP of matrix units"
            + (f", useful {useful / f['flop']:.2f}" if useful and f["flop"] else "")
        )
        for line in dearest([record for record in records if record.kernel == name]):
            print(f"    {line}")


def dearest(records: Sequence[Record]) -> Iterator[str]:
    """The places in the source that pay most for how they reach memory."""
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        for place, (op, *_) in enumerate(record.program.ops):
            if op in GLOBAL + SHARED:
                what = "bank wavefronts" if op in SHARED else "sectors"
                sums = found[what, f"{op} at {record.program.lines[place][2]}"]
                sums[0] += float(record.outcome.statistics[place]["sectors"])
                sums[1] += float(record.outcome.statistics[place]["ideal"])
    for (what, where), (used, fewest) in sorted(found.items(), key=lambda x: x[1][1] - x[1][0])[:4]:
        if used > 1.2 * fewest:
            yield f"{what}: {where}, {used:.0f} instead of {fewest:.0f}"


def counted(arch: int, function: Callable[..., Any], arguments: dict[str, Any], inputs: Sequence[str]) -> list[Record]:
    """Launches of a function forward and, for these inputs, backward."""
    leaves = [arguments[name].requires_grad_() for name in inputs]
    with VirtualGPU(arch, statistics=True) as gpu:
        result = function(**arguments)
        output = result if isinstance(result, torch.Tensor) else result[0]
        if leaves:
            torch.autograd.grad(output, leaves, torch.ones_like(output))
    return gpu.records


ATTENTION: dict[str, dict[str, Any]] = {
    "24 x 32": {"lengths": [32] * 24, "heads": 2, "head_dim": 64, "causal": False},
    "6 x 128": {"lengths": [128] * 6, "heads": 2, "head_dim": 64, "causal": False},
    "mix of 10 to 130, causal, 6 heads on 2": {
        "lengths": [20, 31, 12, 45, 66, 17, 120, 90, 24, 38], "heads": 6, "kv_heads": 2, "head_dim": 64, "causal": True,
    },
    "1024, causal": {"lengths": [1024], "heads": 2, "head_dim": 64, "causal": True},
    "1024, causal, 8 heads on 2 of 128": {
        "lengths": [1024], "heads": 8, "kv_heads": 2, "head_dim": 128, "causal": True,
    },
}  # fmt: skip


def of_attention(arch: int, name: str) -> None:
    shape = ATTENTION[name]
    lengths, causal = shape["lengths"], shape["causal"]
    T, H, D, G = sum(lengths), shape["heads"], shape["head_dim"], shape.get("kv_heads", shape["heads"])
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths) * H
    bytes_ = {
        "_forward_kernel": 2 * H + 2 * G, "_backward_kernel": 3 * H + 4 * G, "_backward_in_steps_kernel": 3 * H + 4 * G,
        "_query_gradient_kernel": 4 * H + 2 * G, "_key_gradient_kernel": 2 * H + 4 * G,
    }  # fmt: skip
    products = {"_forward_kernel": 4, "_query_gradient_kernel": 6, "_key_gradient_kernel": 8}
    least: dict[str, float] = {kernel: 2 * T * D * heads for kernel, heads in bytes_.items()}
    least |= {f"flop {kernel}": products.get(kernel, 10) * D * pairs for kernel in bytes_}
    arguments = attention.example("cpu", torch.bfloat16, **shape)
    records = counted(arch, attention.attention, arguments, "qkv")
    show(f"attention, {name}, bfloat16, sm_{arch}", records, least)


def of_layers(arch: int, large: bool) -> None:
    R, D, C, N = 1024, 256, 256, 3
    least: dict[str, float] = {
        "_product_kernel": 2 * 2 * (R * D + N * D * C + 2 * R * C), "flop _product_kernel": 2 * 2 * R * D * C,
        "_gradient_kernel": 2 * 3 * R * C, "_weight_gradient_kernel": 2 * (R * D + R * C + N * D * C),
        "flop _weight_gradient_kernel": 2 * R * D * C,
        "_gradients_kernel": 2 * 2 * R * D + 4 * N * C * D, "flop _gradients_kernel": 2 * R * D * C,
    }  # fmt: skip
    arguments = task_projection.example("cpu", torch.bfloat16, rows=R, tasks=N, width=D, columns=C)
    with mock.patch.object(*LARGE_TILES) if large else nullcontext():
        records = counted(arch, task_projection.task_projection, arguments, ("x", "weight", "bias"))
    size = f"{R} x {D} x {C}, {N} tasks, bfloat16, sm_{arch}"
    show(f"task_projection, {'large' if large else 'small'} tiles, {size}", records, least)
    if not large:
        arguments = task_gram.example("cpu", torch.bfloat16, R, N, D, C)
        show(f"task_gradients, {size}", counted(arch, task_gram.task_gradients, arguments, ()), least)


def task_loss_records(arch: int, classes: int, rows: int) -> list[Record]:
    arguments = task_loss.example("cpu", torch.bfloat16, rows=rows, tasks=4, width=768, classes=classes)
    return counted(arch, task_loss.task_loss, arguments, ("x", "weight", "bias"))


def of_task_loss(arch: int, classes: int, rows: int) -> None:
    least: dict[str, float] = {
        "_forward_kernel": 2 * rows * 768 + 4 * rows * classes,
        "_backward_kernel": 2 * 2 * rows * 768 + 4 * rows * classes,
        "flop _backward_kernel": 2 * 2 * rows * 768 * classes,
    }
    title = f"task_loss, {rows} rows, {classes} classes, bfloat16, sm_{arch}"
    show(title, task_loss_records(arch, classes, rows), least)


def of_vocabulary(arch: int) -> None:
    arguments = linear_cross_entropy.example("cpu", torch.bfloat16, rows=64, width=64, vocabulary=32768)
    records = counted(arch, linear_cross_entropy.linear_cross_entropy, arguments, ("x", "weight"))
    title = f"linear_cross_entropy, 64 rows, 32768 words, bfloat16, sm_{arch}"
    show(title, records, {"_row_kernel": 2 * 2 * 64 * 32768})


WHAT: dict[str, Callable[[int], None]] = {
    **{f"attention {name}": partial(of_attention, name=name) for name in ATTENTION},
    "layers, small tiles": partial(of_layers, large=False),
    "layers, large tiles": partial(of_layers, large=True),
    **{
        f"task_loss {classes} classes": partial(of_task_loss, classes=classes, rows=rows)
        for classes, rows in ((3, 512), (17, 2048), (256, 256))
    },
    "vocabulary": of_vocabulary,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("virtual_gpu.counts")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help=f"of {', '.join(WHAT)}: those that have this word")
    options = parser.parse_args(arguments)
    for arch in options.arch:
        for name, count in WHAT.items():
            if options.only in name:
                count(arch)


if __name__ == "__main__":
    main()
