"""Ranks as forks of one process that has imported what they need: their imports take longer than their runs."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
IMPORTED = (
    "ranked_runs",
    "scipy.stats",
    "sklearn.metrics",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "trunkline.engine.engine",
    "trunkline.training.distributed.sharding",
    "trunkline.training.predict",
    "trunkline.training.run.loop",
    "trunkline.training.scoring.evaluation",
)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def environments(size: int) -> list[dict[str, str]]:
    """What torchrun would tell each of so many ranks."""
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    same |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [{**same, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def start(
    size: int, runs: Sequence[Mapping[str, Any]], folder: Path, killed: int | None = None
) -> list[list[dict[str, Any]]]:
    """Runs them on so many ranks; what came of each, by rank; nothing of one that kills it.

    Args:
        runs: of each the file of its 'config', 'values' that change it (key=value), and where there is any 'more' of
            them on the last rank, 'resume' and a 'fault'; or an 'engine' and a 'file' that it is asked about.
        folder: for what the ranks tell.
        killed: the rank that a fault of the last run kills or stops.
    """
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps(runs))
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    asked = {"folder": str(folder), "environments": environments(size), "killed": killed}
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    said = [[(folder / f"{kind}-{rank}").read_text() for rank in range(size)] for kind in ("output", "errors")]
    assert codes == [-signal.SIGKILL if rank == killed else 0 for rank in range(size)], said[1]
    assert said[0][1:] == [""] * (size - 1)  # the first one speaks for all
    told = [folder / f"rank-{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else [] for file in told]


@cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends with this one."""
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests" / "helpers", HERE)))
    server = subprocess.Popen(
        [sys.executable, "-c", "from deprecations import run; run('forked_ranks')"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # closes what it reads from, and waits
    return server


def serve() -> None:
    """Starts the ranks that each line of the input asks for, and says how they ended."""
    for name in IMPORTED:
        import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        killed, folder = asked["killed"], Path(asked["folder"])
        ranks = [_fork(folder, {**environment, "KILLED": str(killed)}) for environment in asked["environments"]]
        ended = {rank: os.waitpid(process, 0)[1] for rank, process in enumerate(ranks) if rank != killed}
        if killed is not None:
            os.kill(ranks[killed], signal.SIGKILL)  # if it only stopped
            ended[killed] = os.waitpid(ranks[killed], 0)[1]
        print(json.dumps([os.waitstatus_to_exitcode(ended[rank]) for rank in range(len(ranks))]), flush=True)


def _fork(folder: Path, environment: dict[str, str]) -> int:
    if process := os.fork():
        return process
    code = 1
    try:
        os.environ.update(environment)
        for stream, name in ((1, "output"), (2, "errors")):
            with (folder / f"{name}-{environment['RANK']}").open("w") as file:
                os.dup2(file.fileno(), stream)
        import_module("ranked_runs").main(folder / "runs.json")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
