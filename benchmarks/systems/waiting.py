"""How threads should wait for one another on a CPU, on a quiet machine and on one that others use as well.

    python benchmarks/systems/waiting.py DATA [--rounds 5] [--seconds 4]

An OpenMP thread that has nothing to do either spins, which costs nothing while every thread has a core to itself, or
sleeps. Steps of ours and of the Hugging Face loop (`grouped`) are timed with libgomp's ways of waiting, in turns; first
alone, then beside a process that keeps one core busy.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

from trunkline.benchmarks.record import record

WAYS = {
    "as libgomp does": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "spins briefly": {"GOMP_SPINCOUNT": "1000"},
}
SYSTEMS = ["trunkline", "grouped"]
BUSY = "while True: pass"
TURN = """
import sys, time
from pathlib import Path
import torch
from trunkline.benchmarks.systems.step import WARM_UP, steps
from trunkline.benchmarks.systems.training_systems import SHAPES, make
name, data, rounds, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
device, shape = torch.device("cpu"), SHAPES["tiny"]
system = make(name, shape, data, device)
optimizer = system.optimizer()
steps(system, optimizer, shape, device, WARM_UP, float("inf"), 0)
print("ready", flush=True)
for _ in sys.stdin:
    turn = steps(system, optimizer, shape, device, 1, seconds, 0)
    print(turn["tokens"] / turn["seconds"], flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    workers = {(s, way): start(s, WAYS[way], options) for s in SYSTEMS for way in WAYS}
    rates = {"quiet": in_turns(workers, options.rounds)}
    with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
        rates["busy"] = in_turns(workers, options.rounds)
        busy.kill()
    for worker in workers.values():
        worker.kill()
    report(rates, options)


def start(system: str, variables: dict[str, str], options: argparse.Namespace) -> subprocess.Popen:
    """A process that trains for a while whenever it reads a line, and is stopped in between: its threads may spin."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", TURN, system, str(options.data), str(options.rounds), str(options.seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    worker = subprocess.Popen(command, env=inherited | variables, **pipes)
    assert worker.stdout.readline() == "ready\n"  # one after the other: getting ready takes all cores
    worker.send_signal(signal.SIGSTOP)
    return worker


def in_turns(workers: dict[tuple[str, str], subprocess.Popen], rounds: int) -> dict[tuple[str, str], float]:
    """Real tokens a second of every worker, the median of its turns."""
    turns: dict[tuple[str, str], list[float]] = {key: [] for key in workers}
    for _ in range(rounds):
        for key, worker in workers.items():
            worker.send_signal(signal.SIGCONT)
            worker.stdin.write("\n")
            worker.stdin.flush()
            turns[key].append(float(worker.stdout.readline()))
            worker.send_signal(signal.SIGSTOP)
    return {key: median(of_worker) for key, of_worker in turns.items()}


def report(rates: dict[str, dict[tuple[str, str], float]], options: argparse.Namespace) -> None:
    """Prints the table and writes it as JSON."""
    from trunkline.training.environment import environment

    table = [
        {"system": system, "waiting": way, **{machine: of[system, way] for machine, of in rates.items()}}
        for system in SYSTEMS
        for way in WAYS
    ]
    for row in table:
        print(f"{row['system']:12} {row['waiting']:18} {row['quiet']:8,.0f} quiet {row['busy']:8,.0f} busy")
    command = f"python benchmarks/systems/waiting.py DATA --rounds {options.rounds} --seconds {options.seconds:g}"
    record("waiting", {"command": command, "tokens_per_second": table}, environment())


if __name__ == "__main__":
    main()
