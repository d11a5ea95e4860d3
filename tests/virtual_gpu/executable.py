"""A compiled kernel, ready to run: machine/ built with g++, and what is handed over to it.

Each pointer argument gets an address range of its own, 16 TiB from the next: whatever leaves the tensor is seen.
"""

import ctypes
import hashlib
import os
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from virtual_gpu.instructions import arrays, translate
from virtual_gpu.ptx import SMEM_BASE, Program

MACHINE = Path(__file__).parent / "machine"
# where the machine and compiled kernels are kept
CACHE = Path(os.environ.get("VIRTUAL_GPU_CACHE", Path(__file__).parents[2] / "build" / "virtual_gpu"))
WINDOW = 44  # bits of an argument's address range
MOST_INSTRUCTIONS = 50_000_000  # of a block: what takes more is a loop without end
MOST_FINDINGS = 512  # of a launch
IN_GLOBAL_MEMORY = 6  # so many kinds of findings, the first, are about an argument
HARMLESS = "(harmless)"

_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint64


# machine/interface.h has the same
class _Program(ctypes.Structure):
    _fields_ = [
        ("nins", _I), ("ins", _P), ("pool", _P), ("n32", _I), ("n64", _I), ("nspecial", _I), ("special", _P),
        ("nc32", _I), ("c32", _P), ("nc64", _I), ("c64", _P), ("smem_base", _I), ("smem_size", _I), ("sm_shift", _I),
        ("has_wgmma", _I),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", _I * 3), ("threads", _I), ("params", _P), ("nbuf", _I), ("buf", _P), ("nsto", _I), ("sto", _P),
        ("max_ins", _L), ("stat", _P), ("first_block", _I), ("last_block", _I), ("unique_read", _P),
        ("unique_written", _P), ("check", _I), ("order", _I), ("schedule", _I),
    ]  # fmt: skip


BUFFER = np.dtype([("lo", "u8"), ("hi", "u8"), ("host", "u8"), ("storage", "u8")])
STORAGE = np.dtype([("host", "u8"), ("size", "u8"), ("written", "u8"), ("shift", "i4"), ("pad", "i4")])
STATISTICS = np.dtype([("warps", "u8"), ("lanes", "u8"), ("sectors", "u8"), ("ideal", "u8"), ("bytes", "u8")])


@cache
def library() -> ctypes.CDLL:
    """The machine, built where it has not been yet."""
    sources = sorted(MACHINE.glob("*.h")) + [MACHINE / "machine.cpp"]
    flags = ["-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-std=c++17", "-w", "-shared", "-fPIC"]
    content = b"".join(file.read_bytes() for file in sources) + " ".join(flags).encode()
    file = CACHE / f"machine_{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *flags, "-o", half, sources[-1]], check=True)
        half.replace(file)
    built = ctypes.CDLL(str(file))
    built.vg_op.restype = built.vg_kind.restype = ctypes.c_char_p
    return built


@cache
def opcodes() -> dict[str, int]:
    return {library().vg_op(i).decode(): i for i in range(library().vg_ops())}


@dataclass(frozen=True)
class Finding:
    """Something that must not be, or with `harmless` need not be; at one instruction of one launch."""

    kind: str
    kernel: str
    place: str  # in the kernel's source
    line: int  # of the PTX
    text: str
    count: int
    detail: str

    @property
    def harmless(self) -> bool:
        return self.kind.startswith(HARMLESS)

    def __str__(self) -> str:
        where = f"{self.kernel}, {self.place}, PTX line {self.line} `{self.text[:90]}`"
        return f"{self.kind}: {where}, {self.count} times, {self.detail}"


@dataclass(frozen=True)
class Options:
    """How launches are executed.

    Args:
        statistics: count instructions, memory transactions and bank conflicts.
        check: look for races and unwritten memory.
        reverse: blocks run last to first.
        schedule: of the warps of a block, 0: in step, 1 or 2: one after the other from the first or from the last.
        blocks: (kernel name, blocks of the grid) -> first and end of those to run; None: all.
        change: (PTX, kernel name) -> PTX, to seed faults.
    """

    statistics: bool = False
    check: bool = True
    reverse: bool = False
    schedule: int = 0
    blocks: Callable[[str, int], tuple[int, int]] | None = None
    change: Callable[[str, str], str] | None = None


class Outcome(NamedTuple):
    """What came of a launch."""

    findings: list[Finding]
    statistics: np.ndarray | None  # of each instruction, STATISTICS
    unique_read: int  # bytes of global memory
    unique_written: int


Argument = tuple[str, str, Any]  # name, type in Triton's signature, and a tensor, None or a number


def extent(x: Tensor) -> int:
    """Elements from the first to the last that a tensor of any strides reaches."""
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0


class Executable:
    """The PTX of a kernel, translated for the machine."""

    def __init__(self, ptx: str, threads: int, shared: int) -> None:
        self.threads, self.shared = threads, shared
        self.program: Program = translate(ptx)
        self._keep: list[np.ndarray] = []  # what the structure points to
        p, data = self.program, arrays(self.program, opcodes())
        special = [(reg, kind) for kind, reg in p.special.items()]
        c32 = [(reg, value) for value, reg in p.const32.items()]
        c64 = [(reg, 0, value) for value, reg in p.const64.items()]
        self._structure = _Program(
            len(p.ops), self._at(data["ins"]), self._at(data["pool"]), p.n32, p.n64,
            len(special), self._table(special, "i4,i4"), len(c32), self._table(c32, "i4,u4"),
            len(c64), self._table(c64, "i4,i4,u8"), SMEM_BASE, shared, 0 if p.byte_shared else 1, int(p.has_wgmma),
        )  # fmt: skip

    def _at(self, array: np.ndarray) -> int:
        self._keep.append(array)
        return array.ctypes.data

    def _table(self, rows: list, dtype: str) -> int:
        return self._at(np.array(rows, dtype) if rows else np.zeros(1, dtype))

    def run(
        self,
        grid: tuple[int, int, int],
        arguments: list[Argument],
        options: Options,
        written: Callable[[int], np.ndarray | None],
    ) -> Outcome:
        """Executes a launch.

        Args:
            grid: blocks.
            arguments: in the order of the PTX's parameters.
            options: how.
            written: address of a storage -> of each of its bytes, whether it was written; None: all were.
        """
        params, buffers, names, storages = self._place(arguments)
        rows = []
        for pointer, (_, size, widths) in storages.items():
            shadow = written(pointer)
            rows.append((pointer, size, 0 if shadow is None else shadow.ctypes.data, 0 if min(widths) == 1 else 1, 0))
        buffer_table = np.array(buffers or [(0, 0, 0, 0)], BUFFER)
        storage_table = np.array(rows or [(0, 0, 0, 0, 0)], STORAGE)
        statistics = np.zeros(len(self.program.ops), STATISTICS) if options.statistics else None
        unique = np.zeros((2, len(rows) + 1), np.uint64)
        block = (ctypes.c_char * len(params)).from_buffer(params)
        name, count = self.program.name, grid[0] * grid[1] * grid[2]
        first, end = options.blocks(name, count) if options.blocks else (0, -1)
        launch = _Launch(
            (_I * 3)(*grid), self.threads, ctypes.addressof(block), len(buffers), buffer_table.ctypes.data, len(rows),
            storage_table.ctypes.data, MOST_INSTRUCTIONS, None if statistics is None else statistics.ctypes.data,
            first, end, unique[0].ctypes.data, unique[1].ctypes.data,
            int(options.check), int(options.reverse), options.schedule,
        )  # fmt: skip
        out = np.zeros((MOST_FINDINGS, 7), np.int64)
        structure, launch_at = ctypes.byref(self._structure), ctypes.byref(launch)
        found = library().vg_run(structure, launch_at, _P(out.ctypes.data), MOST_FINDINGS)
        findings = [self._finding(row, names) for row in out[:found].tolist()]
        return Outcome(findings, statistics, int(unique[0].sum()), int(unique[1].sum()))

    def _place(self, arguments: list[Argument]) -> tuple[bytearray, list[tuple], list[str], dict[int, tuple]]:
        """Parameters as bytes; of the tensors their ranges and names; of the storages number, bytes and widths."""
        params = bytearray(sum(size for _, size, _ in self.program.params) + 64)
        buffers: list[tuple] = []
        names: list[str] = []
        storages: dict[int, tuple[int, int, list[int]]] = {}
        for (_, size, offset), (name, kind, value) in zip(self.program.params, arguments, strict=True):
            if kind.startswith("*"):
                address = 0
                if value is not None:
                    pointer, storage = value.data_ptr(), value.untyped_storage()
                    address = (len(buffers) + 1 << WINDOW) + (1 << WINDOW - 1) + (pointer & 0xFFF)
                    place = storages.setdefault(storage.data_ptr(), (len(storages), storage.nbytes(), []))
                    place[2].append(value.element_size())
                    buffers.append((address, address + extent(value) * value.element_size(), pointer, place[0]))
                    names.append(name)
                struct.pack_into("<Q", params, offset, address)
            elif kind in ("fp32", "f32"):
                struct.pack_into("<f", params, offset, value)
            elif kind in ("fp64", "f64"):
                struct.pack_into("<d", params, offset, value)
            else:
                params[offset : offset + size] = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
        return params, buffers, names, storages

    def _finding(self, row: list[int], names: list[str]) -> Finding:
        kind, instruction, times, block, thread, address, other = row
        line, text, place = self.program.lines[min(instruction, len(self.program.lines) - 1)]
        detail = f"first: block {block}, thread {thread}, "
        if kind < IN_GLOBAL_MEMORY:
            detail += f"byte {address} of {names[other]}" if other >= 0 else f"address {address:#x}"
        else:
            detail += f"at {address}" + (f", other warp {other}" if other >= 0 else "")
        return Finding(library().vg_kind(kind).decode(), self.program.name, place, line, text, times, detail)
