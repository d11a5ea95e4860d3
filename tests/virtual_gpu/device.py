"""Stands in for the GPU under Triton: `with VirtualGPU(arch)` the project's own host code runs on CPU tensors, its
kernels are compiled as for that GPU, and every launch is executed by machine/ from the compiled PTX.

Fresh `torch.empty` memory is filled with NaN, and reading it before it is written is reported.
"""

import ctypes
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trunkline.benchmarks.microbenchmarks.certify import Driver
from trunkline.kernels.dispatch import TRITON
from virtual_gpu.executable import CACHE, Executable, Finding, Options, Outcome, extent
from virtual_gpu.ptx import Program

ARCHITECTURES = (80, 90)  # A100, H100 and H200
ENVIRONMENT = {
    "TRITON_CACHE_DIR": str(CACHE / "triton"),  # what is compiled here has no machine code: nobody else may find it
    "TRITON_DEFAULT_FP_FUSION": "1",  # as a launch does
}
FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass(frozen=True)
class Record:
    """One launch: what it was, and what came of it."""

    module: str
    kernel: str
    arch: int
    grid: tuple[int, int, int]
    warps: int
    shared: int  # bytes
    constants: str
    program: Program
    outcome: Outcome


class _Launcher:
    """What Triton calls to launch a kernel that it has compiled."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
        """`rest`: metadata of the kernel and of the launch, two hooks, and the kernel's arguments."""
        _current[-1].launch(self.source, self.metadata, ptx, (x, y, z), rest[4:])


class _Driver(Driver):
    """As for certification, and a kernel's machine code is its PTX."""

    launcher_cls = _Launcher

    def __init__(self) -> None:
        super().__init__()
        self.utils.load_binary = lambda name, ptx, shared, device: (None, ptx.decode(), 0, 0, 1024)
        self.utils.unload_module = lambda module: None


_DRIVER = _Driver()
_current: list["VirtualGPU"] = []
_executables: dict[tuple[str, int, int], Executable] = {}


class VirtualGPU:
    """Runs what is inside as if CPU tensors lay on a GPU of compute capability `arch` / 10.

    Args:
        arch: one of ARCHITECTURES.
        options: fields of `Options`.
    """

    def __init__(self, arch: int, **options: Any) -> None:
        self.arch, self.options = arch, Options(**options)
        self.records: list[Record] = []
        self._fresh: dict[
            int, tuple[Tensor, np.ndarray]
        ] = {}  # of a storage: who keeps it, and which bytes are written

    def __enter__(self) -> Self:
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime import driver

        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, ENVIRONMENT))
            # ptxas takes most of the time, and certification runs it
            stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()))
            stack.enter_context(mock.patch.object(driver, "_active", _DRIVER))
            stack.enter_context(mock.patch.object(_DRIVER, "arch", self.arch))
            _current.append(self)
            stack.callback(_current.pop)
            stack.enter_context(_Dispatch(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def findings(self) -> list[Finding]:
        """Those that are not harmless."""
        return [finding for record in self.records for finding in record.outcome.findings if not finding.harmless]

    @property
    def harmless(self) -> list[Finding]:
        return [finding for record in self.records for finding in record.outcome.findings if finding.harmless]

    def launch(self, source: Any, metadata: Any, ptx: str, grid: tuple[int, int, int], values: tuple) -> None:
        if max(grid[1:]) > 65535 or grid[0] >= 2**31:
            raise RuntimeError(f"{metadata.name}: grid {grid} is not possible")
        if self.options.change:
            ptx = self.options.change(ptx, metadata.name)
        key = (ptx, metadata.num_warps * 32, metadata.shared)
        executable = _executables.get(key) or _executables.setdefault(key, Executable(*key))
        named = zip(source.signature.items(), values, strict=True)
        arguments = [(name, kind, value) for (name, kind), value in named if kind != "constexpr"]
        arguments += [("scratch", "*i8", None)] * (len(executable.program.params) - len(arguments))
        outcome = executable.run(grid, arguments, self.options, self._written)
        constants = " ".join(
            f"{source.fn.params[place].name}={value}"
            for (place, *_), value in source.constants.items()
            if value is not None and value is not False
        )
        about = (
            source.fn.fn.__module__,
            metadata.name,
            self.arch,
            grid,
            metadata.num_warps,
            metadata.shared,
            constants,
        )
        self.records.append(Record(*about, executable.program, outcome))

    def _written(self, pointer: int) -> np.ndarray | None:
        return self._fresh[pointer][1] if pointer in self._fresh else None

    def made(self, x: Tensor) -> None:
        """Fresh memory: NaN, and nobody has written it."""
        if self.options.check and x.device.type == "cpu" and x.numel():
            storage = x.untyped_storage()
            ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
            self._fresh[storage.data_ptr()] = (x, np.zeros(storage.nbytes(), np.uint8))

    def filled(self, x: Tensor) -> None:
        """PyTorch has written it."""
        if x.device.type == "cpu" and x.numel() and (entry := self._fresh.get(x.untyped_storage().data_ptr())):
            first = x.storage_offset() * x.element_size()
            entry[1][first : first + extent(x) * x.element_size()] = 1


class _Dispatch(TorchDispatchMode):
    """Sends the project's ops to their Triton implementations, and tells the GPU what PyTorch does to memory."""

    def __init__(self, gpu: VirtualGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if operation in TRITON:
            with self:
                return TRITON[operation](*arguments, **keywords)
        result = operation(*arguments, **keywords)
        if operation.overloadpacket.__name__ in FRESH:
            self.gpu.made(result)
            return result
        for place, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = arguments[place] if place < len(arguments) else keywords.get(argument.name)
                for x in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(x, Tensor):
                        self.gpu.filled(x)
        return result
