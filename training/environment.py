"""What a number depends on besides the settings: command, versions, processor, GPU."""

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def command() -> str:
    """The line that this process was started with, without folders of the program."""
    program = Path(sys.argv[0])
    is_cli = program.stem in ("cli", "__main__")  # python -m trunkline
    return shlex.join(["trunkline" if is_cli else program.name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Of what a run computes with."""
    found = {}
    for package in ("trunkline", "triton", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from its source folder
            found[package] = "not installed"
    # torch's own says what it was built for, which its package's metadata may not
    return {**found, "torch": str(torch.__version__), "python": platform.python_version()}


def environment() -> dict[str, Any]:
    """What a run's numbers depend on besides its settings."""
    return {
        **versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": _waiting(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def described(where: dict[str, Any]) -> str:
    """An environment in a few words."""
    device = where["gpu"] or f"{where['processor']}, {where['cores']} cores, float32"
    return f"{device}, Python {where['python']}, torch {where['torch']}"


def _waiting() -> str:
    """How threads wait for one another."""
    if policy := os.environ.get("OMP_WAIT_POLICY"):
        return policy.lower()
    turns = os.environ.get("GOMP_SPINCOUNT")
    return f"spin {turns} times, then sleep" if turns else "as OpenMP does"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
