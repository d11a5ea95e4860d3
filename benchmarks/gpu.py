"""All that needs an NVIDIA GPU, in one call of at most nine minutes: tests, then benchmarks, then whole training steps.

    make gpu                                 # on a machine where `make test` works
    make gpu PYTHON=python3 VENV=            # with what PYTHON has: torch, triton, transformers, pytest-benchmark
    make gpu DRY=1                           # the same parts on the CPU, on tiny sizes: shows that they can run

Every part has a budget of time; what it has done by then counts. A part that fails does not stop the next one. Results
go into benchmarks/results/<device>/; a table of the parts comes last.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data", ROOT / "shared" / "data"  # real data: beside the repository, or inside it


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    budget: int  # seconds


def parts(data: Path | None, dry: bool) -> list[Part]:
    """What is run, in order. Warnings fail no test here: nobody has seen this machine's before."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    # what torch.compile makes takes long to compile: it takes part in two cases only
    small = ["--sizes", "smoke", "--no-record"] if dry else ["-k", "not (FlexAttention or compiled) or (768 and both)"]
    tests = ["tests/test_dispatch.py"] if dry else ["tests", "-m", "gpu", "--continue-on-collection-errors"]
    benchmarks = ["benchmarks", "--benchmark-only", "--benchmark-disable-gc", "--deadline", "165", *small]
    found = [
        Part("tests", [*pytest, "--durations=5", *tests], 150),
        Part("benchmarks", [*pytest, "--benchmark-columns=median,iqr,rounds", *benchmarks], 200),
    ]
    if data:
        step = [sys.executable, "benchmarks/step.py", str(data), "--rounds", "1", "--seconds", "0.1" if dry else "3"]
        if dry:
            found.append(Part("training steps", [*step, "--no-record", "--systems", "9 heads"], 100))
        else:
            small = ["trunkline", "trunkline, compiled", "padded", "packed", "packed, compiled"]
            found.append(Part("steps of small", [*step, "--shape", "small", "--systems", *small], 100))
            tiny = ["trunkline", "trunkline, compiled", "trunkline, CUDA graph", "packed"]
            found.append(Part("steps of tiny", [*step, "--systems", *tiny], 80))
    return found


def run(part: Part) -> tuple[str, float]:
    """How a part ended, and its seconds. It writes what it has to say while it runs."""
    print(f"\n=== {part.name}: {' '.join(part.command[1:])}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    try:
        code = subprocess.run(part.command, cwd=ROOT, env=environment, timeout=part.budget).returncode
        outcome = "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {part.budget} s"
    return outcome, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, on tiny sizes")
    parser.add_argument("--data", type=Path, help="laid out like the hub; default: shared/data, where it is")
    options = parser.parse_args()
    import torch

    if not options.dry and not torch.cuda.is_available():
        print("gpu: PyTorch finds no NVIDIA GPU; --dry (make gpu DRY=1) tries the parts on the CPU", file=sys.stderr)
        return 2
    data = options.data or next((folder for folder in DATA if folder.is_dir()), None)
    outcomes = [(part.name, *run(part)) for part in parts(data, options.dry)]
    if not data:
        outcomes.append(("training steps", "skipped: no data, give --data", 0.0))
    print(f"\n{'part':16} {'outcome':28} seconds")
    for name, outcome, seconds in outcomes:
        print(f"{name:16} {outcome:28} {seconds:7.1f}")
    return 0 if all(outcome == "passed" for _, outcome, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
