"""Compiles every Triton kernel as it is launched on an NVIDIA GPU, on a machine that needs none, and reads the result.

    python -m trunkline.benchmarks.microbenchmarks.certify [KERNEL ...] [--arch sm_90 ...] [--quick] [--jobs 2]

The launches are found by running each public function of kernels/ forward and backward on its example inputs, as
tensors without data, with Triton's just-in-time compiler replaced by a recorder; and once more for each other tile that
`trunkline tune` may choose. Each distinct launch is then compiled
ahead of time, and registers, spills, shared memory and matrix instructions are read from the machine code with the
tools in the Triton wheel. What cannot be seen this way: time, races, deadlocks.

A finding makes the command fail: code that does not compile, registers spilled to local memory, more shared memory than
a block can have, a matrix product that Hopper's warpgroup instructions (wgmma) could do but do not, and one of these
that reads a register written behind its fence.
A kernel may spill on an architecture if its file says how many instructions and why:
SPILLS = {("_backward_kernel", 80): (12, "the reason")}.

Compiled kernels and their measures stay in Triton's cache, so the next run takes seconds.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trunkline.benchmarks.microbenchmarks.examples import Kernel, first, leaves, map_tensors, shipped_kernels
from trunkline.benchmarks.microbenchmarks.preset_shapes import preset_shapes
from trunkline.kernels.decisions import Question, questions, trying
from trunkline.kernels.dispatch import TRITON

ARCHITECTURES = (90, 80, 100)  # H100 and H200, A100, B200
# shared memory a block can have: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H200 and B200: some kernels choose their grid by them
MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
MEASURES = "measures.json"  # beside the compiled kernel in Triton's cache


@dataclass(frozen=True)
class Launch:
    """All that decides what machine code a launch runs."""

    kernel: str  # the public function it was launched from
    shape: str
    dtype: str
    arch: int
    function: Any  # triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    allowed_spills: int

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def configuration(self) -> str:
        """Constants that the kernel's author chose, and the number of warps and pipeline stages."""
        shown = []
        for (place, *inside), value in self.constants.items():
            parameter = self.function.params[place]
            if parameter.is_constexpr and not inside and value not in (None, False):
                shown.append(
                    parameter.name if value is True else f"{parameter.name}={getattr(value, '__name__', value)}"
                )
        return " ".join([*shown, f"warps={self.options['num_warps']}", f"stages={self.options['num_stages']}"])


@dataclass(frozen=True)
class Certificate:
    """What was read from the machine code of a launch."""

    kernel: str
    shape: str
    dtype: str
    arch: int
    name: str
    configuration: str
    registers: int = 0  # a thread
    spills: int = 0  # instructions that load from or store to local memory
    shared: int = 0  # bytes a block
    matrix: str = ""  # matrix instructions, by kind
    size: int = 0  # bytes of machine code and its description
    findings: list[str] = field(default_factory=list)


class Driver:
    """Stands in for the GPU's driver: answers what a launch asks before it compiles. The architecture is the device."""

    arch = 90

    def __init__(self) -> None:
        self.utils = SimpleNamespace(get_device_properties=self._properties)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def _properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.arch],
            "max_num_regs": 65536,
            "multiprocessor_count": PROCESSORS[self.arch],
            "warpSize": 32,
        }


DRIVER = Driver()


class _Unfilled(TorchDispatchMode):
    """Normal random numbers are not drawn: of the large inputs only the shapes matter here."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = operation.overloadpacket.__name__
        if name == "randn":
            return torch.empty(arguments[0], **{k: v for k, v in keywords.items() if k != "generator"})
        if name == "normal_":
            return arguments[0]
        return operation(*arguments, **keywords)


class _TritonOnly(TorchDispatchMode):
    """Every op runs its Triton implementation, whatever the device of its tensors."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        return TRITON.get(operation, operation)(*arguments, **keywords or {})


def record_launches(kernels: Iterable[Kernel], archs: Sequence[int], quick: bool = False) -> list[Launch]:
    """All distinct launches of the kernels; see `certify`."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    found: dict[tuple, Launch] = {}
    tried: set[tuple[int, Question]] = set()
    current: tuple[Kernel, str, torch.dtype]

    def record(
        function: Any,
        key: str,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> None:
        kernel, shape, dtype = current
        allowed, _ = function.fn.__globals__.get("SPILLS", {}).get((function.__name__, DRIVER.arch), (0, ""))
        names = kernel.name, shape, str(dtype).removeprefix("torch.")
        found.setdefault(
            (DRIVER.arch, function, key),
            Launch(*names, DRIVER.arch, function, signature, constants, attributes, vars(options), allowed),
        )

    def run_every_configuration(autotuner: Any, *arguments: Any, **keywords: Any) -> None:
        autotuner.nargs = dict(zip(autotuner.arg_names, arguments, strict=False))
        for configuration in autotuner.prune_configs(keywords):
            chosen = configuration.all_kwargs()
            if configuration.pre_hook is not None:
                configuration.pre_hook({**autotuner.nargs, **keywords, **chosen})
            autotuner.fn.run(*arguments, **{**keywords, **chosen})

    driver.set_active(DRIVER)
    JITFunction._do_compile = record  # returns no kernel, so nothing is launched either
    Autotuner.run = run_every_configuration
    for kernel in kernels:
        others = {} if quick else getattr(kernel.module, "ALSO_CERTIFIED", {})
        for place, (shape, sizes) in enumerate((kernel.shapes | preset_shapes(kernel.name) | others).items()):
            for dtype in getattr(kernel.module, "KERNEL_DTYPES", (torch.bfloat16, torch.float16, torch.float32)):
                if place and dtype != torch.bfloat16:
                    continue
                arguments: dict[str, Any] | None = None
                for arch in archs:
                    if quick and arch != archs[0] and (place or dtype != torch.bfloat16):
                        continue
                    current, DRIVER.arch = (kernel, shape, dtype), arch
                    if arguments is None:
                        with _Unfilled():
                            arguments = kernel.example(torch.device("cpu"), dtype, **sizes)
                        arguments = map_tensors(lambda x: x.detach().to("meta"), arguments)
                    _run(kernel, arguments, dtype, None if quick else tried)
    return list(found.values())


def _run(
    kernel: Kernel, arguments: dict[str, Any], dtype: torch.dtype, tried: set[tuple[int, Question]] | None
) -> None:
    """Forward and, where there are gradients, backward; and once more with each candidate that `trunkline tune` has,
    of questions that were not `tried` yet on this architecture. None: no candidates."""
    inputs = leaves(arguments, dtype)

    def run() -> None:
        with _TritonOnly():
            output = first(kernel.function(**arguments))
            if output.requires_grad:
                torch.autograd.grad(output, list(inputs.values()), torch.empty_like(output), allow_unused=True)

    with questions() as asked:
        run()
    for question in () if tried is None else asked:
        others = [] if (DRIVER.arch, question) in tried else question.answers[1:]
        tried.add((DRIVER.arch, question))
        for other in others:
            with trying(question, other):
                run()


def certify(kernels: Iterable[Kernel], archs: Sequence[int], quick: bool = False, jobs: int = 1) -> list[Certificate]:
    """Records, compiles and measures, in a process of its own: Triton's launcher is gone afterwards.

    Args:
        kernels: whose launches; at all of their shapes and those of the trunk's presets in bfloat16, at the first also
            in float16 and float32, or in those of these that its file lists as KERNEL_DTYPES. And at those that it
            lists as ALSO_CERTIFIED.
        archs: compute capabilities times ten: 80, 90, 100.
        quick: architectures after the first only at the first shape, in bfloat16; nothing that is ALSO_CERTIFIED, and
            no other candidates of a decision.
        jobs: processes that compile.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("certify: TRITON_INTERPRET=1 runs kernels in Python; nothing would be compiled: unset it")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as a launch does; Triton 3.9 warns when it is not said
    global _launches
    _launches = record_launches(kernels, archs, quick)
    # forked, not spawned: a kernel's Python function reaches the worker without being pickled
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_certificate, range(len(_launches))))


_launches: list[Launch] = []


def _certificate(index: int) -> Certificate:
    """Compiles one launch, unless it is in Triton's cache, and judges it."""
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    launch = _launches[index]
    about = launch.kernel, launch.shape, launch.dtype, launch.arch, launch.name, launch.configuration
    DRIVER.arch = launch.arch
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    try:
        compiled = triton.compile(source, target=DRIVER.get_current_target(), options=launch.options)
    except Exception as error:  # whatever a compiler throws, it is a finding
        return Certificate(*about, findings=[f"does not compile: {type(error).__name__}: {error}"])
    cache = get_cache_manager(compiled.hash)
    if not (file := cache.get_file(MEASURES)):
        file = cache.put(json.dumps(_measure(compiled)), MEASURES, binary=False)
    measures = json.loads(Path(file).read_text())
    missed, unfenced = measures.pop("missed"), measures.pop("unfenced")

    findings = []
    if measures["spills"] > launch.allowed_spills:
        allowed = f", {launch.allowed_spills} are allowed" if launch.allowed_spills else ""
        findings.append(f"spills: {measures['spills']} instructions reach local memory{allowed}")
    if measures["shared"] > SHARED_MEMORY[launch.arch]:
        findings.append(f"shared memory: {measures['shared']:,} bytes, a block has {SHARED_MEMORY[launch.arch]:,}")
    if launch.arch == 90 and missed:
        findings.append(f"no wgmma for {', '.join(missed)}")
    if unfenced:
        findings.append(f"registers written between the fence and the wgmma that reads them: {unfenced[0]}")
    return Certificate(*about, **measures, findings=findings)


def _measure(compiled: Any) -> dict[str, Any]:
    """Reads a compiled kernel with the disassembler in the Triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def output(*command: str) -> str:
            return subprocess.run(
                [tools / command[0], *command[1:], file.name], check=True, capture_output=True, text=True
            ).stdout

        registers = re.search(r"REG:(\d+)", output("cuobjdump", "--dump-resource-usage"))
        assembly = output("nvdisasm", "--print-code")
    assert registers, "cuobjdump names no registers"
    counts = {name: compiled.asm["ptx"].count(instruction) for name, instruction in MATRIX_INSTRUCTIONS.items()}
    return {
        "registers": int(registers.group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", assembly)),
        "shared": compiled.metadata.shared,
        "matrix": " ".join(f"{name} {count}" for name, count in counts.items() if count),
        "size": len(compiled.asm["cubin"]),
        "missed": _missed_products(compiled.asm["ttgir"]),
        "unfenced": unfenced_products(assembly),
    }


def unfenced_products(assembly: str) -> list[str]:
    """wgmma instructions of machine code whose left matrix lies in registers that changed after the last fence.

    The PTX may have the fence too early: LLVM moves what writes these registers behind it, and ptxas must mend that.
    """
    found, changed = [], set()
    for name, operands in re.findall(r"(?:\*/|^)\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*) +([^;]*);", assembly, re.M):
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
        if name == "WARPGROUP.ARRIVE":
            changed.clear()
        elif name.startswith("HGMMA"):
            left = re.match(r"R\d+, R(\d+),", operands)
            if left and changed & set(range(int(left.group(1)), int(left.group(1)) + 4)):
                found.append(f"{name} {operands.strip()}")
        elif registers and operands.startswith("R"):
            wide = 4 if ".128" in name or ".M88.4" in name else 2 if ".64" in name or ".WIDE" in name else 1
            changed |= set(range(registers[0], registers[0] + wide))
    return found


def _missed_products(intermediate: str) -> list[str]:
    """Matrix products of 16-bit numbers with 64 rows or more that were left to the instructions of a single warp.

    Triton writes `tt.dot` for those, and `ttng.warp_group_dot` for what becomes wgmma.
    """
    shape = r"tensor<(\d+)x(\d+)x(f16|bf16)\b[^:]*?"
    products = re.findall(rf"\btt\.dot\b[^\n]*? : {shape} \* {shape} ->", intermediate)
    return [f"({m}, {k}) @ ({k}, {n}) {dtype}" for m, k, dtype, _, n, _ in products if int(m) >= 64]


def print_table(certificates: Sequence[Certificate]) -> None:
    header = ("arch", "regs", "spills", "shared", "matrix instructions", "cubin")
    form = "  {:6} {:>5} {:>6} {:>8} {:22} {:>6}  {}"
    for (kernel, name), rows in groupby(certificates, key=lambda c: (c.kernel, c.name)):
        print(f"\n{kernel}: {name}")
        print(form.format(*header, "first launched at, and configuration"))
        for row in rows:
            numbers = (
                row.registers,
                row.spills,
                f"{row.shared / 1024:.1f}K",
                row.matrix or "-",
                f"{row.size / 1024:.0f}K",
            )
            print(form.format(f"sm_{row.arch}", *numbers, f"{row.shape} {row.dtype}: {row.configuration}"))


def main() -> None:
    """Prints the table and the findings, and ends the program with 1 after a finding."""
    kernels = shipped_kernels()
    names = [kernel.name for kernel in kernels]
    architectures = [f"sm_{arch}" for arch in ARCHITECTURES]
    parser = argparse.ArgumentParser("certify", description="compile all Triton kernels for NVIDIA GPUs, without one")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--arch", nargs="+", choices=architectures, default=architectures, help="default: all")
    parser.add_argument("--quick", action="store_true", help="architectures after the first only at one shape each")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile; default 1")
    options = parser.parse_args()
    if unknown := sorted(set(options.kernels) - set(names)):
        parser.error(f"there is no kernel {', '.join(unknown)}; there are {', '.join(names)}")
    try:
        import triton
    except ImportError as error:
        parser.error(f"needs Triton: {error}")
    chosen = [kernel for kernel in kernels if kernel.name in options.kernels or not options.kernels]
    archs = [int(name.removeprefix("sm_")) for name in options.arch]
    try:
        certificates = certify(chosen, archs, options.quick, options.jobs)
    except ValueError as error:
        parser.error(str(error))
    certificates.sort(key=lambda c: (c.kernel, c.name))
    print_table(certificates)
    print(f"\nTriton {triton.__version__}: {len(certificates)} launches of {len(chosen)} public functions")
    for kernel in chosen:
        if not any(certificate.kernel == kernel.name for certificate in certificates):
            print(f"{kernel.name}: launches nothing, so nothing is certified")
    failed = [certificate for certificate in certificates if certificate.findings]
    for c in failed:
        print(f"{c.kernel}, {c.name}, sm_{c.arch}, {c.shape} {c.dtype}, {c.configuration}: {'; '.join(c.findings)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
