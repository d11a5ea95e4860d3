"""Tensors of more than 2^31 elements, of which only the last rows exist in memory: does an index of 32 bits pass over?

    python -m virtual_gpu.large [--arch 80 90]

Only the last blocks are run, and shadow memory for races is off. Takes some minutes.
"""

import argparse
import math
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trunkline.kernels.attention import attention_long, attention_short
from trunkline.kernels.attention.attention import attention_reference
from trunkline.kernels.attention.pack_plan import PackPlan
from trunkline.kernels.tasks import task_loss_triton, task_projection_triton
from trunkline.kernels.tasks.task_gram import _gradients_triton
from trunkline.kernels.tasks.task_projection import task_projection_reference
from trunkline.kernels.vocabulary import linear_cross_entropy_triton
from virtual_gpu.device import ARCHITECTURES, VirtualGPU

bf16 = torch.bfloat16


def sparse(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    """Zeros that take no memory until they are written (0x4000: MAP_NORESERVE)."""
    room = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(room, dtype=dtype).view(shape)


def filled(rows: int, *shape: int, seed: int = 0) -> Tensor:
    """Random in its last rows."""
    x = sparse(*shape)
    assert x.numel() > 2**31
    x[-rows:] = torch.randn(rows, *shape[1:], generator=torch.Generator().manual_seed(seed)).to(bf16)
    return x


def judge(name: str, arch: int, gpu: VirtualGPU, pairs: list[tuple[Tensor, Tensor]]) -> bool:
    errors = [float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs]
    fine = all(e < 0.02 for e in errors) and not gpu.findings
    print(
        f"{'ok    ' if fine else 'FAILED'} sm_{arch} {name}: relative errors {' '.join(f'{e:.1e}' for e in errors)}",
        flush=True,
    )
    for finding in gpu.findings[:5]:
        print(f"    {finding}")
    return fine


def attention(arch: int) -> bool:
    T, H, D, rows = 270_000, 64, 128, 200
    q, k, v, dout = (filled(rows, T, H, D, seed=i) for i in range(4))
    fine = True
    for name, lengths in (("short", [60, 100, 40]), ("long", [200])):
        bounds = torch.tensor([0, T - rows, *(T - rows + torch.tensor(lengths).cumsum(0)).tolist()], dtype=torch.int32)
        ends = bounds[1:].tolist()
        spans = torch.zeros(T, 2, dtype=torch.int32)
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            spans[a:b] = torch.tensor([a, b], dtype=torch.int32)
        out, dq, dk, dv = (sparse(T, H, D) for _ in range(4))
        settings = (D**-0.5, -1, 0, 0.0, 0.0, 0)
        with VirtualGPU(arch, check=False) as gpu:
            if name == "short":
                tiles = torch.tensor([[ends[0], ends[1]], [ends[2], ends[3]], [ends[1], ends[2]]], dtype=torch.int32)
                attention_short.forward(q, k, v, out, spans, tiles, 2, *settings)
                attention_short.backward(dout, q, k, v, dq, dk, dv, spans, tiles, 2, *settings)
            else:
                blocks, lse = torch.tensor([[1, 1], [1, 0]], dtype=torch.int32), torch.zeros(H, T)
                attention_long.forward(q, k, v, out, lse, bounds, bounds, blocks, *settings)
                attention_long.backward(dout, q, k, v, out, lse, dq, dk, dv, bounds, bounds, blocks, blocks, *settings)
        leaves = [x[-rows:].double().requires_grad_() for x in (q, k, v)]
        plan = PackPlan.of(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
        exact = attention_reference(*leaves, plan, causal=True)
        grads = torch.autograd.grad(exact, leaves, dout[-rows:].double())
        pairs = [(x[-rows:], y.detach()) for x, y in zip((out, dq, dk, dv), (exact, *grads), strict=True)]
        fine &= judge(f"attention_{name}, {T} x {H} x {D}", arch, gpu, pairs)
    return fine


def last(count: int) -> Callable[[str, int], tuple[int, int]]:
    return lambda name, blocks: (max(0, blocks - count), -1)


def projection(arch: int) -> bool:
    R, rows, fine = 600_000, 70, True
    offsets = torch.tensor([0, R - rows, R], dtype=torch.int32)
    # with an activation, the blocks of its derivative that belong to the last rows are not the last ones of 32 columns
    for D, C, activation in ((4096, 32, "gelu"), (32, 4096, "none")):
        x = filled(rows, R, D) if D > C else sparse(R, D)
        if D < C:
            x[-rows:] = torch.randn(rows, D).to(bf16)
        weight, bias = (torch.randn(2, D, C) / D**0.5).to(bf16), torch.randn(2, C).to(bf16)
        dy = sparse(R, C)
        dy[-rows:] = torch.randn(rows, C).to(bf16)
        tiles = -(-D // 128) * -(-C // 128)

        def own(name: str, blocks: int, tiles: int = tiles) -> tuple[int, int]:
            """Of dweight those of the last task, whose rows are one chunk; of the rest the last rows in any order."""
            if name == "_weight_gradient_kernel":
                return (tiles, -1) if blocks == 2 * tiles else (0, 0)
            return max(0, blocks - 400), -1

        with VirtualGPU(arch, check=False, blocks=own) as gpu:
            y, z = task_projection_triton.forward(x, weight, bias, offsets, activation, True)
            dx, dweight, _ = task_projection_triton.backward(dy, x, weight, bias, z, offsets, activation)
        leaves = [t.double().requires_grad_() for t in (x[-rows:], weight[1:], bias[1:])]
        exact = task_projection_reference(*leaves, torch.tensor([0, rows]), activation)
        grads = torch.autograd.grad(exact, leaves, dy[-rows:].double())
        fine &= judge(
            f"task_projection, {R} x {D} to {C}",
            arch,
            gpu,
            [(y[-rows:], exact.detach()), (dx[-rows:], grads[0]), (dweight[1:], grads[1])],
        )
    return fine


def gram(arch: int) -> bool:
    R, rows, D, C = 600_000, 70, 4096, 32
    offsets = torch.tensor([0, R - rows, R], dtype=torch.int32)
    x, dy = filled(rows, R, D), sparse(R, C)
    dy[-rows:] = torch.randn(rows, C).to(bf16)
    with VirtualGPU(arch, check=False, blocks=last(D // 128)) as gpu:
        dw = _gradients_triton(x, dy, offsets)
    return judge(f"task_gradients, {R} x {D}", arch, gpu, [(dw[1], dy[-rows:].double().T @ x[-rows:].double())])


def heads(arch: int) -> bool:
    R, rows, D = 600_000, 70, 4096
    x, weight, bias = filled(rows, R, D), (torch.randn(6, D) / D**0.5).to(bf16), torch.randn(6).to(bf16)
    offsets, classes = torch.tensor([0, R - rows, R], dtype=torch.int32), torch.tensor([0, 3, 6], dtype=torch.int32)
    target = torch.randint(3, (R,), generator=torch.Generator().manual_seed(0))
    with VirtualGPU(arch, check=False, blocks=last(64)) as gpu:
        _, gradient = task_loss_triton.forward(
            x,
            weight,
            bias,
            offsets,
            target,
            torch.zeros(R),
            torch.ones(R),
            classes,
            torch.zeros(2, dtype=torch.bool),
            3,
            0.0,
        )
        dx, dweight, _ = task_loss_triton.backward(torch.ones(2), gradient, x, weight, bias, offsets, classes)
    leaves = [x[-rows:].double().requires_grad_(), weight[3:].double().requires_grad_()]
    loss = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*leaves, bias[3:].double()), target[-rows:], reduction="sum"
    )
    grads = torch.autograd.grad(loss, leaves)
    return judge(f"task_loss, {R} x {D}", arch, gpu, [(dx[-rows:], grads[0]), (dweight[3:], grads[1])])


def vocabulary(arch: int) -> bool:
    R, V, rows = 17_000, 128_256, 4
    logits = filled(rows, R, V)
    exact = logits[-rows:].double().requires_grad_()
    target = torch.randint(V, (R,), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(exact, target[-rows:], reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), exact)
    losses, correct = torch.zeros(R), torch.zeros(R)
    with VirtualGPU(arch, check=False, blocks=last(rows)) as gpu:
        linear_cross_entropy_triton.rows_triton(
            logits, None, target, torch.ones(R), torch.ones(R), losses, correct, 0.0, 0.0, 0.0
        )
    return judge(
        f"linear_cross_entropy, {R} x {V}", arch, gpu, [(losses[-rows:], loss.detach()), (logits[-rows:], gradient)]
    )


def main(arguments: Sequence[str] | None = None) -> bool:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    fine = True
    for arch in parser.parse_args(arguments).arch:
        for part in (vocabulary, gram, heads, projection, attention):
            fine &= part(arch)
    return fine


if __name__ == "__main__":
    raise SystemExit(not main())
