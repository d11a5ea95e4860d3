"""Whole training steps: Trunkline beside what people do with Hugging Face, in real tokens a second.

    python benchmarks/systems/step.py DATA [--shape tiny] [--device cuda] [--seconds 1] [--rounds 30]
        [--systems NAME ...]

DATA is laid out like the hub: eight GLUE tasks and DialogSum, at most 2,000 examples of each, mixed alike. All systems
(training_systems.py) train the same shape with the same optimizer on batches of about as many tokens. Each runs in a
process of its own, which waits while the others are timed; one that fails is left out, and its row says why. They take
turns, round after round, and in every round the machine's matrix rate is measured, too. Turns are short and many,
because batches differ, most of all those of one task, and so does a machine's speed; a system's turns count together.
A token is real if it is no padding. The shape llama-1b is trained on random texts, without DATA, one system after the
other: together they do not fit a GPU.

Utilisation: the operations of the products that forward and backward cannot do without, from the last block's attention
on at the labelled tokens only, over what the machine does in that time in its best product.
"""

import argparse
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trunkline.benchmarks.record import record
from trunkline.benchmarks.systems.training_systems import SHAPES, Amount, Shape, System, autocast, make
from trunkline.kernels.products import mm
from trunkline.training.run.profiling import between, moment

PARTS = ("batching", "forward", "backward", "optimizer")
OURS = ["trunkline", "trunkline, compiled"]
PEERS = ["padded", "grouped", "packed", "packed, compiled"]
WARM_UP = 5  # steps
MATRIX = {"cpu": (2048, torch.float32), "cuda": (8192, torch.bfloat16)}  # side of the product, dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn, which has one step at least")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--systems", nargs="+", help="default: all that the device has")
    parser.add_argument("--no-record", action="store_true", help="write no results")
    options = parser.parse_args()
    large = options.shape == "llama-1b"
    if not large and not options.data:
        parser.error(f"shape {options.shape} is trained on DATA")

    names = options.systems or systems_of(options.shape, torch.device(options.device))
    data = None if large else options.data
    turns: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for group in [[name] for name in names] if large else [names]:
        try:
            in_turns_of_processes(group, options, data, turns, missing, lambda: write(turns, missing, options))
        except KeyboardInterrupt:  # the clock's: what there is by now counts
            break
    if turns:
        show(turns)
    for name, reason in missing.items():
        print(f"{name:22} left out: {reason}")


def systems_of(shape: str, device: torch.device) -> list[str]:
    gpu = device.type == "cuda"
    ours = [*OURS, "trunkline, CUDA graph"] if gpu and shape == "tiny" else OURS
    if shape == "llama-1b":
        return [*ours, "hugging face", "hugging face, compiled", "hugging face, Liger"]
    return [*ours, *PEERS, *(["packed, Liger"] if gpu else []), *(["9 heads", "300 heads"] if shape == "tiny" else [])]


@dataclass(frozen=True)
class Failure:
    """What a process says instead of a result, and the last that it says."""

    reason: str


def in_turns_of_processes(
    names: list[str],
    options: argparse.Namespace,
    data: Path | None,
    turns: dict[str, list[dict[str, Any]]],
    missing: dict[str, str],
    after_round: Callable[[], None],
) -> None:
    """Adds to `turns` what every turn of every system measured, and to `missing` why one has no more of them.

    Processes get ready one after the other: it takes all cores, and on a GPU memory that the next would miss.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}

    def heard(name: str) -> Any:
        """What a process says; None where it failed, and then nobody asks it again."""
        try:
            said = workers[name].recv()
        except EOFError:
            said = Failure("its process ended without a word")
        if not isinstance(said, Failure):
            return said
        missing[name] = said.reason
        del workers[name]
        print(f"{name}: left out: {said.reason}", flush=True)
        return None

    for name in ["matrix", *names]:
        workers[name], theirs = context.Pipe()
        arguments = (name, SHAPES[options.shape], data, options.device, theirs)
        context.Process(target=work, args=arguments, daemon=True).start()
        theirs.close()  # only its process has it now: when that ends, we hear of it
        if (seconds := heard(name)) is not None:
            print(f"{name}: ready after {seconds:.0f} s", flush=True)
    if "matrix" not in workers:
        raise SystemExit(f"the machine's matrix rate is not to be had: {missing['matrix']}")
    for _ in range(options.rounds):
        workers["matrix"].send(0.2)
        if (rate := heard("matrix")) is None:
            raise SystemExit(f"the machine's matrix rate is not to be had: {missing['matrix']}")
        for name in [name for name in names if name in workers]:
            workers[name].send(options.seconds)
            if (turn := heard(name)) is not None:
                turns.setdefault(name, []).append(turn | {"matrix": rate})
        after_round()
    for connection in workers.values():
        connection.send(0.0)


def work(name: str, shape: Shape, data: Path | None, device_name: str, connection: Connection) -> None:
    """Gets a system ready, then trains it for as many seconds as it is told to, again and again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # goes to all processes; the first one says what was measured
    try:
        _work(name, shape, data, torch.device(device_name), connection)
    except EOFError:
        pass  # nobody is there to ask for more
    except torch.OutOfMemoryError as error:
        connection.send(Failure(f"out of memory: {str(error).splitlines()[0]}"))
    except Exception as error:  # whatever it is, the others are measured all the same
        traceback.print_exc()
        connection.send(Failure(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))


def _work(name: str, shape: Shape, data: Path | None, device: torch.device, connection: Connection) -> None:
    began = time.perf_counter()
    if name == "matrix":
        turn: Callable[[float], Any] = lambda seconds: matrix_rate(device, seconds)  # noqa: E731
    else:
        before = resident()
        system = make(name, shape, data, device)
        optimizer = system.optimizer()
        system.model.train()
        steps(system, optimizer, shape, device, WARM_UP, float("inf"), before)
        turn = lambda seconds: steps(system, optimizer, shape, device, 1, seconds, before)  # noqa: E731
    seconds, answer = 1.0, time.perf_counter() - began
    while seconds:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the others need it
        connection.send(answer)
        if seconds := connection.recv():
            answer = turn(seconds)


def steps(
    system: System,
    optimizer: torch.optim.Optimizer,
    shape: Shape,
    device: torch.device,
    at_least: int,
    seconds: float,
    resident_before: int,
) -> dict[str, Any]:
    """Trains for `seconds`, or without end for `at_least` steps, and tells what came of it, as sums over the steps."""
    amount, marks, memory = Amount(), [], 0
    began, host = time.perf_counter(), 0.0
    while len(marks) < at_least if seconds == float("inf") else time.perf_counter() - began < seconds:
        started = time.perf_counter()
        mark = [moment(device)]
        batch, of_batch = next(system.batches)
        mark.append(moment(device))
        with autocast(device):
            loss = system.loss(batch)
        mark.append(moment(device))
        if device.type == "cpu":
            memory = max(memory, resident() - resident_before)  # here nearly all of it is in use
        loss.backward()
        mark.append(moment(device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=not system.keeps_gradients)
        mark.append(moment(device))
        marks.append(mark)
        amount += of_batch
        host += time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated()
    wall = time.perf_counter() - began
    return {
        "steps": len(marks),
        "seconds": wall,
        "host_seconds": host,
        "parts": {part: sum(between(m[i], m[i + 1]) for m in marks) for i, part in enumerate(PARTS)},
        "tokens": amount.tokens,
        "padding": amount.padding,
        "operations": amount.operations(shape.trunk),
        "memory": memory,
    }


def resident() -> int:
    """Bytes of this process in memory; 0 where only Linux would know."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def matrix_rate(device: torch.device, seconds: float) -> float:
    """Operations a second of the best of many large products."""
    size, dtype = MATRIX[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        first = moment(device)
        mm(a, b)
        second = moment(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, between(first, second))
    return 2 * size**3 / best


def show(turns: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the table."""
    systems = {name: _together(of_system) for name, of_system in turns.items()}
    rates = {name: system["tokens_per_second"] for name, system in systems.items()}
    best = _best_peer(rates)
    print(f"\n{'system':22} {'real tokens/s':>14} {'of best peer':>13} {'padding':>8} {'ms a step':>10}", end="")
    print("".join(f"{part:>11}" for part in PARTS), f"{'MiB':>8} {'utilisation':>12}")
    for name, system in systems.items():
        ratio = f"{rates[name] / best:.2f}x" if "heads" not in name else ""
        print(f"{name:22} {rates[name]:14,.0f} {ratio:>13} {system['padding']:8.1%}", end="")
        print(f" {1000 * system['seconds_per_step']:10,.1f}", end="")
        print("".join(f"{1000 * system['parts'][part]:11,.1f}" for part in PARTS), end="")
        print(f" {system['memory'] / 2**20:8,.0f} {system['utilisation']:12.1%}")
    if {"9 heads", "300 heads"} <= rates.keys():
        print(f"300 heads take {rates['9 heads'] / rates['300 heads']:.3f}x the time of 9 heads")


def write(turns: dict[str, list[dict[str, Any]]], missing: dict[str, str], options: argparse.Namespace) -> None:
    """Writes all that was measured so far as JSON."""
    from trunkline.training.environment import environment

    if options.no_record or not turns:
        return
    systems = {name: _together(of_system) for name, of_system in turns.items()}
    rates = {name: system["tokens_per_second"] for name, system in systems.items()}
    content: dict[str, Any] = {
        "command": " ".join(
            ["python benchmarks/systems/step.py", *(["DATA"] if options.data else []), f"--shape {options.shape}"]
            + [f"--seconds {options.seconds:g} --rounds {options.rounds}"]
        ),
        "shape": options.shape,
        "tokens": SHAPES[options.shape].tokens,
        "unit": "real tokens/s",
        "matrix_rate": median(turn["matrix"] for turn in next(iter(turns.values()))),
        "tokens_per_second": rates,
        "turns": {name: [turn["tokens"] / turn["seconds"] for turn in of_system] for name, of_system in turns.items()},
        "padding": {name: system["padding"] for name, system in systems.items()},
        "best_peer": _best_peer(rates),
        "systems": systems,
        "missing": missing,
    }
    if {"9 heads", "300 heads"} <= rates.keys():
        content["time_300_heads_over_9"] = rates["9 heads"] / rates["300 heads"]
    record("step" if options.shape == "tiny" else f"step-{options.shape}", content, environment())


def _best_peer(rates: dict[str, float]) -> float:
    peers = [rate for name, rate in rates.items() if "heads" not in name and not name.startswith("trunkline")]
    return max(peers, default=max(rates.values()))


def _together(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """All turns of a system as one."""

    def total(key: str) -> float:
        return sum(turn[key] for turn in turns)

    steps, seconds, tokens = total("steps"), total("seconds"), total("tokens")
    return {
        "tokens_per_second": tokens / seconds,
        "seconds_per_step": seconds / steps,
        "host_seconds_per_step": total("host_seconds") / steps,
        "tokens_per_step": tokens / steps,
        "parts": {part: sum(turn["parts"][part] for turn in turns) / steps for part in PARTS},
        "padding": total("padding") / (tokens + total("padding")),
        "memory": max(turn["memory"] for turn in turns),
        "utilisation": total("operations") / sum(turn["seconds"] * turn["matrix"] for turn in turns),
    }


if __name__ == "__main__":
    main()
