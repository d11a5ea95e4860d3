"""What a run tells those who listen to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.engine.config import Config


class Listener:
    """What happens in a run, a method each; any object with some of these methods will do.

        class Early:
            def evaluated(self, step, metrics):
                print(step, metrics["sst2"]["accuracy"])

        engine.fit(on=[Early()])

    An exception in one of them is told, and the listener hears no more; the run goes on. `values` and `metrics` are
    what a line of metrics.jsonl has.
    """

    def started(self, config: "Config", folder: Path) -> None:
        """Everything is checked, and the first step follows; `folder` is the run's."""

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Every ten steps: losses by task, learning rate, tokens per second and so on."""

    def evaluated(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Losses and scores by task, of the validation examples."""

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Both of these, as numbers by a name such as 'evaluation/metrics/sst2/accuracy'."""

    def saved(self, step: int, folder: Path) -> None:
        """There is a new checkpoint."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is over and its model saved; `summary` is what summary.json holds."""

    def closed(self, error: BaseException | None) -> None:
        """Nothing more is told; `error` is what ended the run, if anything did."""
