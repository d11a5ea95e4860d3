"""Runs the project's ops, forward and backward, on the virtual GPU: `make virtual`.

    python -m virtual_gpu.run [--arch 80 90] [--dtype bfloat16 float16 tf32 float32] [--only WORD ...] [--reverse]

PYTHONPATH must lead to the project's `src`, `tests` and `tests/helpers`. Every case is a line, also one for which
nothing is launched, with the reason. Ends with 1 after a wrong result or a finding, and where all cases were run and a
kernel of the project was not launched by any.
"""

import argparse
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

import trunkline.kernels
from virtual_gpu.case import Case, wrong_results
from virtual_gpu.cases import all_cases
from virtual_gpu.device import ARCHITECTURES, VirtualGPU

DTYPES = ("bfloat16", "float16", "tf32", "float32")
EXACT_AND_WIDE = "heads wider than 128 of float32 in full: the reference takes them"


def kernels() -> set[tuple[str, str]]:
    """Module and name of every Triton kernel of the project."""
    from triton.runtime.jit import JITFunction

    (folder,) = map(Path, trunkline.kernels.__path__)
    names = [".".join(file.relative_to(folder).with_suffix("").parts) for file in folder.rglob("*.py")]
    modules = [import_module(f"trunkline.kernels.{name}") for name in names]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    return {(f.fn.__module__, f.__name__) for f in functions if f.__name__.endswith("_kernel")}


def cases(dtype: str) -> list[Case]:
    return list(all_cases(torch.float32 if dtype == "tf32" else getattr(torch, dtype)))


def run(case: Case, arch: int, dtype: str, **options: bool) -> tuple[VirtualGPU, list[str]]:
    """The GPU after the case, and what is wrong: results, findings, launches where there must be none or the reverse.

    `dtype` is one of DTYPES: products of float32 are taken in TF32 or in full.
    """
    gpu = VirtualGPU(arch, **options)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        wrong = wrong_results(case, gpu, tf32=dtype == "tf32")
    except Exception as error:  # whatever the host code throws, it is this case's fault
        return gpu, [f"{type(error).__name__}: {error}\n{traceback.format_exc()}"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    wrong += map(str, gpu.findings)
    if bool(gpu.records) == bool(reason_without_kernel(case, dtype)):
        wrong.append(f"{len(gpu.records)} launches, and the reason for none is {case.no_kernel!r}")
    return gpu, wrong


def reason_without_kernel(case: Case, dtype: str) -> str:
    wide = case.op == "attention" and case.inputs[0].shape[2] > 128
    return EXACT_AND_WIDE if wide and dtype == "float32" else case.no_kernel


def main(arguments: Sequence[str] | None = None) -> bool:
    parser = argparse.ArgumentParser("virtual_gpu.run", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:3])
    parser.add_argument("--only", nargs="+", default=[], help="words that the name of an op and its case must have")
    parser.add_argument("--reverse", action="store_true", help="blocks run last to first")
    options = parser.parse_args(arguments)
    if find_spec("triton") is None or shutil.which("g++") is None:
        parser.error("needs Triton, which is for Linux, and g++")
    total: Counter = Counter()
    missing = kernels()
    for dtype in options.dtype:
        for case in cases(dtype):
            name = f"{case.op}: {case.name}"
            if not all(word in name for word in options.only):
                continue
            for arch in options.arch:
                started = time.process_time()
                gpu, wrong = run(case, arch, dtype, reverse=options.reverse)
                skipped = reason_without_kernel(case, dtype)
                state = "FAILED" if wrong else "skipped" if skipped else "ok"
                about = f"no kernel: {skipped}" if skipped else f"{len(gpu.records)} launches"
                seconds = time.process_time() - started
                print(f"{state:7} sm_{arch} {dtype:8} {name}  [{about}, {seconds:.1f} s]", flush=True)
                for line in wrong:
                    print(f"    {line}")
                for kind, count in Counter((f.kind, f.kernel, f.place) for f in gpu.harmless).items():
                    print(f"    {', '.join(kind)}: {count}")
                total[case.op, dtype, arch, state] += 1
                missing -= {(record.module, record.kernel) for record in gpu.records}
    if not total:
        parser.error(f"no case has {' and '.join(options.only)} in its name")
    print()
    for (op, dtype, arch, state), count in sorted(total.items()):
        print(f"{op:22} {dtype:9} sm_{arch} {state}: {count}")
    if missing := [] if options.only else sorted(missing):
        print(f"no case launched {', '.join(f'{module}.{name}' for module, name in missing)}")
    return not missing and not any(state == "FAILED" for *_, state in total)


if __name__ == "__main__":
    raise SystemExit(not main())
