"""Several ranks on this machine, started by torchrun's own launcher; and what torchrun says to a process."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trunkline.engine.console import warn
from trunkline.training.run.interruption import EXIT_CODE

if TYPE_CHECKING:
    from trunkline.engine.config import Config

SAID = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, to every process
USER_ERROR = 2  # exit code for what the user can put right, and of a rank that leaves it to another one to say so
SHARED = ("train", "eval", "predict")  # commands whose work several ranks share


def is_rank() -> bool:
    """Whether torchrun, or somebody who does as it does, started this process."""
    return all(name in os.environ for name in SAID)


def is_first() -> bool:
    """Whether this process is the one that speaks for all of a run."""
    return not is_rank() or os.environ["RANK"] == "0"


def check_shared(command: str) -> None:
    """
    Raises:
        ValueError: there are several ranks, and this command is one process's: each would do all of it, into one place.
        SystemExit: this is another rank than the one that says so.
    """
    if command not in SHARED and is_rank() and (ranks := int(os.environ["WORLD_SIZE"])) > 1:
        if not is_first():
            raise SystemExit(USER_ERROR)
        raise ValueError(
            f"{command} is the work of one process, and torchrun started {ranks}: start it without torchrun; what "
            f"several share is {', '.join(SHARED)}"
        )


def number_of_ranks(config: "Config") -> int:
    """How many processes a config asks for, each with a device of its own.

    Raises:
        ValueError: more than there are GPUs, or than batches in a step.
    """
    import torch

    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    ranks = max(1, gpus) if config.devices == "all" else config.devices
    if 0 < gpus < ranks:
        raise ValueError(f"devices={ranks}: this machine has {gpus} GPUs; devices=all takes them all")
    if ranks > config.batch.accumulate:
        raise ValueError(too_few_batches(config.batch.accumulate, ranks))
    return ranks


def too_few_batches(batches: int, ranks: int) -> str:
    return (
        f"batch.accumulate {batches} is how many batches make a step, and {ranks} ranks need one each: set "
        f"batch.accumulate to {ranks} or more; the step is then the same on any number of ranks up to that"
    )


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Runs the `trunkline` command with these arguments as so many processes; its exit code comes back."""
    import uuid

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # what the launcher logs is told below, in our words
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any port that is free
        max_restarts=0,
    )
    try:
        elastic_launch(agent, sys.executable)("-m", "trunkline", *arguments)
    except SignalException as error:
        return EXIT_CODE + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            warn(f"rank {rank}, process {failure.pid}, was ended by {name}")
            return EXIT_CODE - failure.exitcode
        return failure.exitcode
    return 0
