"""All that needs an NVIDIA GPU, in one call of at most nine minutes: tests, then benchmarks, then whole training steps.

    make gpu                                 # on a machine where `make test` works
    make gpu PYTHON=python3 VENV=            # with what PYTHON has: torch, triton, transformers, pytest-benchmark
    make gpu DRY=1                           # the same parts on the CPU, on tiny sizes: shows that they can run

Every part has a budget of time; what it has done by then counts: it is interrupted a little before, and killed at its
end. A part that fails does not stop the next one. Results go into benchmarks/results/<device>/ case by case, and where
the variable OUT names a folder, into OUT/results.tgz after every part; a table of the parts comes last.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data", ROOT / "shared" / "data"  # real data: beside the repository, or inside it
SHARDS = 8  # processes that share the tests
GRACE = 10  # seconds that an interrupted process has to say what it has done


@dataclass(frozen=True)
class Part:
    name: str
    commands: list[list[str]]  # side by side
    budget: int  # seconds


def parts(data: Path | None, dry: bool) -> list[Part]:
    """What is run, in order. Warnings fail no test here: nobody has seen this machine's before."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    tests = (
        ["tests/kernels/test_dispatch.py"] if dry else [*gpu_tests(), "-m", "gpu", "--continue-on-collection-errors"]
    )
    # tests mostly wait for kernels to be compiled; and what kills a process does not end all of them
    shards = 2 if dry else SHARDS
    found = [Part("tests", [[*pytest, *tests, "--shard", f"{i + 1}/{shards}"] for i in range(shards)], 150)]
    # each in a process of its own: after a fault of the device nothing more can be measured in one
    for name, chosen, budget in (
        ("attention", "attention", 110),
        ("vocabulary loss", "linear_cross_entropy", 50),
        ("task kernels", "not attention and not linear_cross_entropy", 40),
    ):
        # what torch.compile makes takes long to compile: it takes part in two cases only
        kept = f"({chosen}) and (not (FlexAttention or compiled) or (768 and both))"
        if name == "attention":  # a thousand sequences, one after the other, would take a quarter of the time
            kept += " and not loop"
        options = ["--sizes", "smoke"] if dry else ["--record", "--deadline", str(budget - 20)]
        command = [*pytest, "benchmarks", "--benchmark-only", "--benchmark-disable-gc", "-k", kept, *options]
        found.append(Part(name, [[*command, "--benchmark-columns=median,iqr,rounds"]], budget))
    if data:
        step = [sys.executable, "benchmarks/systems/step.py", str(data), "--rounds", "1" if dry else "3"]
        step += ["--seconds", "0.1" if dry else "1"]
        if dry:
            found.append(Part("training steps", [[*step, "--no-record", "--systems", "9 heads"]], 100))
        else:
            # the last two need much memory or time: what came before them is measured all the same
            small = ["trunkline, compiled", "trunkline", "grouped", "padded", "packed"]
            found.append(Part("steps of small", [[*step, "--shape", "small", "--systems", *small]], 100))
            tiny = ["trunkline, CUDA graph", "trunkline, compiled", "trunkline", "grouped", "packed"]
            found.append(Part("steps of tiny", [[*step, "--systems", *tiny]], 80))
    return found


def gpu_tests() -> list[str]:
    """Files with tests for a GPU: collecting all the others takes every process half a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    chosen = [file for file in files if "interpreter" in file.parts or "mark.gpu" in file.read_text(encoding="utf-8")]
    return [str(file.relative_to(ROOT)) for file in chosen]


def pack_results(folder: Path) -> None:
    """All results of NVIDIA cards as one file, for a machine of which nothing else comes back."""
    with tarfile.open(folder / "results.tgz", "w:gz") as packed:
        for results in sorted((ROOT / "benchmarks" / "results").glob("nvidia-*")):
            packed.add(results, arcname=results.name)


def run(part: Part) -> tuple[str, float]:
    """How a part ended, and its seconds; prints what its processes wrote, one after the other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    began, end = time.monotonic(), time.monotonic() + part.budget
    with ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile()) for _ in part.commands]
        running = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            for command, output in zip(part.commands, outputs, strict=True)
        ]
        stopped = not all(_ends(process, end - GRACE - time.monotonic()) for process in running)
        for process in running:
            process.send_signal(signal.SIGINT)  # pytest then says what it has done; nothing to one that has ended
        for command, output, process in zip(part.commands, outputs, running, strict=True):
            if not _ends(process, end - time.monotonic()):
                process.kill()
                process.wait()
            print(f"\n=== {part.name}: {shlex.join(command[1:])}", flush=True)
            output.seek(0)
            print(output.read().decode(errors="replace"), end="", flush=True)
    failed = sorted({process.returncode for process in running} - {0})
    outcome = f"failed ({', '.join(map(str, failed))})" if failed else "passed"
    return f"stopped after {part.budget - GRACE} s" if stopped else outcome, time.monotonic() - began


def _ends(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


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
    outcomes = []
    for part in parts(data, options.dry):
        outcomes.append((part.name, *run(part)))
        if out := os.environ.get("OUT"):
            pack_results(Path(out))
    if not data:
        outcomes.append(("training steps", "skipped: no data, give --data", 0.0))
    print(f"\n{'part':16} {'outcome':28} seconds")
    for name, outcome, seconds in outcomes:
        print(f"{name:16} {outcome:28} {seconds:7.1f}")
    return 0 if all(outcome == "passed" for _, outcome, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
