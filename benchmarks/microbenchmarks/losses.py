"""The losses of the heads on a CPU: time beside what people do today, and the memory that a vocabulary takes.

    python benchmarks/microbenchmarks/losses.py [--rounds 40]

Forward and backward, float32. Small heads: 512 rows of nine tasks, and of four tasks with up to 256 classes, at width
768, beside a Python loop over the tasks; few and many rows of 10 and of 1,000 tasks, at two widths. The gradient of
1,000 tasks' weights has to be written whatever the rows, 6 MB at width 768: what filling it with zeros takes is
measured, too, in the cache; in a step it takes longer. A vocabulary head: 1,024 rows, width 256, 8,192 words, beside
`F.cross_entropy(F.linear())`; of both also the peak memory beyond the inputs, each in a process of its own, by the
kernel's account of it (Linux).
"""

import argparse
import ctypes
import itertools
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from trunkline.benchmarks.microbenchmarks.examples import kernel_of
from trunkline.benchmarks.microbenchmarks.measure import OURS, check, in_turns
from trunkline.benchmarks.microbenchmarks.peers import PEERS, System, trunkline
from trunkline.benchmarks.record import record
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.kernels.tasks import task_loss
from trunkline.kernels.vocabulary import linear_cross_entropy
from trunkline.training.environment import environment

VOCABULARY = {"rows": 1024, "width": 256, "vocabulary": 8192}
SIZES = (512, 256), (512, 768), (4096, 768)  # rows and width of 10 and of 1,000 tasks
WARM_UP = 3  # rounds
Call = Callable[[int], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    keep_freed_memory()  # as training does; 32 MB of logits would be new pages every time but for room left in the heap
    room = [torch.empty(4 << 20) for _ in range(16)]
    del room
    small: dict[str, Call] = {}
    for shape in ("9 tasks", "256 classes"):
        small[shape] = _call(*_task_loss(shape, OURS))
        small[f"{shape}, loop over tasks"] = _call(*_task_loss(shape, "loop over tasks"))
    for rows, width in SIZES:
        for shape in ("10 tasks", "1000 tasks"):
            small[f"{shape}, {rows} x {width}"] = _call(*_task_loss(shape, OURS, rows=rows, width=width))
    small["1000 tasks, zeros"] = lambda _: torch.zeros(2000, 768)
    vocabulary = {name: _call(_vocabulary(name)) for name in (OURS, "eager")}
    seconds = {
        "task_loss": in_turns(small, options.rounds, warm_up=WARM_UP, calls_a_turn=20),
        "linear_cross_entropy": in_turns(vocabulary, options.rounds, warm_up=WARM_UP),
    }
    times = {name: median(rounds) for of_one in seconds.values() for name, rounds in of_one.items()}
    memory = {name: peak_memory(name) for name in vocabulary}
    ratios = {
        "loop over 9 tasks / task_loss": times["9 tasks, loop over tasks"] / times["9 tasks"],
        "256 classes, loop over tasks / task_loss": times["256 classes, loop over tasks"] / times["256 classes"],
        **{
            f"1000 tasks / 10 tasks, {size}": times[f"1000 tasks, {size}"] / times[f"10 tasks, {size}"]
            for size in (f"{rows} x {width}" for rows, width in SIZES)
        },
        "eager / linear_cross_entropy": times["eager"] / times[OURS],
        "memory, linear_cross_entropy / eager": memory[OURS] / memory["eager"],
    }
    for name, value in times.items():
        print(f"{name:38} {1000 * value:8.3f} ms")
    for name, size in memory.items():
        print(f"{name + ', peak memory':38} {size / 1e6:8.1f} MB")
    for name, ratio in ratios.items():
        print(f"{name:38} {ratio:8.2f}")
    content = {
        "command": f"python benchmarks/microbenchmarks/losses.py --rounds {options.rounds}",
        "unit": "seconds a call",
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "peak_bytes": memory,
        "ratios": ratios,
    }
    record("losses", content, environment())


def _task_loss(shape: str, name: str, **sizes: int) -> list[System]:
    """Two with inputs of their own: what `task_loss` remembers of its last inputs may help its backward pass alone."""
    kernel = kernel_of(task_loss)
    arguments = kernel.example(torch.device("cpu"), torch.float32, **{**kernel.shapes[shape], **sizes})
    make = trunkline if name == OURS else PEERS[kernel.name][name]
    check(kernel, make, arguments, torch.float32)
    return [make(kernel, arguments, torch.float32) for _ in range(2)]


def _vocabulary(name: str) -> System:
    kernel = kernel_of(linear_cross_entropy)
    arguments = kernel.example(torch.device("cpu"), torch.float32, **VOCABULARY)
    return (trunkline if name == OURS else PEERS[kernel.name][name])(kernel, arguments, torch.float32)


def _call(*systems: System) -> Call:
    """Forward and backward of one system after the other."""
    turns = itertools.cycle(systems)

    def call(_: int = 0) -> tuple[Tensor, ...]:
        system = next(turns)
        loss = system.forward()
        return torch.autograd.grad(loss, list(system.inputs.values()), torch.ones_like(loss))

    return call


def peak_memory(name: str) -> int:
    """Bytes that forward and backward of a vocabulary head need beyond inputs; 'trunkline' or a peer, on Linux."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name,))


def _peak(name: str) -> int:
    call = _call(_vocabulary(name))
    call()  # libraries load their code and take their buffers
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(what: str) -> int:
    """Bytes in memory: VmRSS now, VmHWM at most so far."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {what} in /proc/self/status"
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
