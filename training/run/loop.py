"""Training: one function, from a config to a run folder.

Every step is a pure function of the weights, the seed and the number of the step: what it sees comes from
(seed, step), and so does dropout. So a checkpoint holds no random state, and a resumed run repeats the bits of an
uninterrupted one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.training.run.folder import RunFolder
from trunkline.training.run.run import Run
from trunkline.training.watching.audience import Audience

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine


def train(engine: "Engine", *, resume: bool = False, overwrite: bool = False, on: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains an engine as its config says and writes the run folder. `Engine.fit` says what comes back."""
    audience = Audience(engine.config.track, on, tell=print)
    with RunFolder(engine.config, resume, overwrite) as folder, audience:
        with Run(engine, folder, audience) as run:
            run.first_look()
            while run.goes_on:
                with run.step():
                    members, batches = run.next_batches()
                    loss, weight = run.gradients(members, batches)
                    norm = run.update(loss)
                    run.count(batches, loss, weight)
                if run.logs_now:
                    run.write_log(norm)
                if run.evaluates_now:
                    run.evaluate()
                if run.evaluates_now or run.stop:
                    run.save()
                run.stop_if_asked()
        return run.finish()
