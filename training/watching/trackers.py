"""Where a run's numbers go besides its folder: TensorBoard, Weights & Biases, trackio, MLflow.

Each is a listener of the run (see listener.py) whose package is imported when it is named. What these packages call
things: https://docs.wandb.ai/ref/python, https://huggingface.co/docs/trackio, https://mlflow.org/docs/latest/api_reference.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.training.watching.listener import Listener

if TYPE_CHECKING:
    from trunkline.engine.config import Config

PROJECT = "trunkline"  # where the environment names none


class Tracker(Listener):
    """One of them."""

    package: str

    def __init__(self) -> None:
        try:
            self.library = import_module(self.package)
        except ImportError as error:
            name = self.package.partition(".")[0]
            raise ValueError(
                f"track: {name} cannot be imported ({error}): pip install {name}, or leave it out"
            ) from error


class TensorBoard(Tracker):
    """Event files in the run's folder."""

    package = "tensorboard"
    writer: Any = None

    def started(self, config: "Config", folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # made with the first values: the folder may still hold an earlier run
        self.make = lambda: SummaryWriter(str(folder / "tensorboard"))

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        self.writer = self.writer or self.make()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def closed(self, error: BaseException | None) -> None:
        if self.writer:
            self.writer.close()


class WeightsAndBiases(Tracker):
    """WANDB_PROJECT, WANDB_MODE and so on are heeded."""

    package = "wandb"
    run: Any = None

    def started(self, config: "Config", folder: Path) -> None:
        self.run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, config=asdict(config)
        )

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finished(self, summary: Mapping[str, Any]) -> None:
        self.run.summary.update(scores(summary))

    def closed(self, error: BaseException | None) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if error is None else 1)


class Trackio(Tracker):
    """On this machine; TRACKIO_PROJECT names the project, `trackio show` shows it."""

    package = "trackio"
    run: Any = None

    def started(self, config: "Config", folder: Path) -> None:
        self.run = self.library.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=folder.name, config=asdict(config)
        )

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finished(self, summary: Mapping[str, Any]) -> None:
        self.run.log(scores(summary))

    def closed(self, error: BaseException | None) -> None:
        if self.run is not None:
            self.run.finish()


class MLflow(Tracker):
    """MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are heeded; inside a run of the user's it is a nested one."""

    package = "mlflow"
    run: Any = None

    def started(self, config: "Config", folder: Path) -> None:
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            self.library.set_experiment(PROJECT)
        nested = self.library.active_run() is not None
        self.run = self.library.start_run(run_name=folder.name, nested=nested)
        settings = {name: str(value)[:500] for name, value in asdict(config).items()}  # as much as all servers take
        self.library.log_params(settings)

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        self.library.log_metrics(dict(values), step=step, run_id=self.run.info.run_id)

    def finished(self, summary: Mapping[str, Any]) -> None:
        self.library.log_metrics(scores(summary), run_id=self.run.info.run_id)

    def closed(self, error: BaseException | None) -> None:
        if self.run is not None:
            self.library.end_run("FINISHED" if error is None else "FAILED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a finished run, by names such as 'final/sst2/accuracy'."""
    return {
        f"final/{task}/{metric}": value
        for task, about in summary["tasks"].items()
        for metric, value in about["metrics"].items()
    }
