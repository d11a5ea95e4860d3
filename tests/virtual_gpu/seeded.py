"""Small kernels that are right, with ways to make them wrong: for the test of the instrument itself."""

import re
from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, MASK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    if MASK:
        x, y = tl.load(x_ptr + i, mask=i < n, other=0.0), tl.load(y_ptr + i, mask=i < n, other=0.0)
    else:
        x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y, mask=i < n)


@triton.jit
def sum_kernel(x_ptr, out_ptr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * COLUMNS + tl.arange(0, COLUMNS))
    tl.store(out_ptr + row * COLUMNS + tl.arange(0, COLUMNS), tl.cumsum(x, 0) / tl.sum(x, 0))


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_at = k[None, :] * M + m[:, None] if A_TRANSPOSED else m[:, None] * K + k[None, :]
        b_at = n[None, :] * K + k[:, None] if B_TRANSPOSED else k[:, None] * N + n[None, :]
        a = tl.load(a_ptr + a_at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + b_at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def unwritten_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Adds up what the block before has written into x, or nobody."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i - BLOCK, mask=i >= BLOCK, other=0.0) + 1, mask=i < n)


def add(mask: bool = True, step: int = 128, blocks: int = 8, n: int = 1000) -> float:
    """The largest error."""
    x, y = torch.randn(n), torch.randn(n)
    out = torch.empty(n)
    add_kernel[(blocks,)](x, y, out, n, MASK=mask, STEP=step, BLOCK=128)
    return float((out - x - y).abs().max())


def sums() -> float:
    x, out = torch.rand(3, 1024), torch.empty(3, 1024)
    sum_kernel[(3,)](x, out, COLUMNS=1024, num_warps=4)
    return float((out - x.cumsum(1) / x.sum(1, keepdim=True)).abs().max())


def product(
    dtype: torch.dtype = torch.bfloat16,
    a_transposed: bool = False,
    b_transposed: bool = False,
    block: tuple[int, int, int] = (64, 64, 32),
    warps: int = 4,
    size: tuple[int, int, int] = (130, 144, 112),
) -> float:
    M, N, K = size
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), torch.empty(M, N)
    names = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True))
    given = (a.T.contiguous() if a_transposed else a, b.T.contiguous() if b_transposed else b, c, M, N, K)
    grid = (triton.cdiv(M, block[0]), triton.cdiv(N, block[1]))
    product_kernel[grid](*given, a_transposed, b_transposed, "tf32", **names, num_warps=warps, num_stages=3)
    error = float((c - a.double() @ b.double()).abs().max())
    return error / 50 if dtype == torch.float32 else error  # TF32 has ten bits


def unwritten() -> float:
    x, out = torch.empty(256), torch.empty(256)
    unwritten_kernel[(2,)](x, out, 256, BLOCK=128)
    return float(out.isnan().sum())


def read_of_another_block() -> float:
    x = torch.zeros(256)
    unwritten_kernel[(2,)](x, x, 256, BLOCK=128)
    return float((x - torch.tensor([1.0, 2.0]).repeat_interleave(128)).abs().max())


def without(pattern: str, place: int = 0, instead: str = "") -> Callable[[str, str], str]:
    """Changes one occurrence of a pattern in a kernel's PTX."""

    def change(ptx: str, name: str) -> str:
        found = list(re.finditer(pattern, ptx))
        assert found, f"{name} has no {pattern}"
        return ptx[: found[place].start()] + instead + ptx[found[place].end() :]

    return change
