"""Training: one function, from a config to a run folder.

Every step is a pure function of the weights, the seed and the number of the step: what a batch sees follows from the
seed and the batch's number, and so does dropout. So a checkpoint holds no random state, a resumed run repeats the bits
of an uninterrupted one, and it makes no difference which of a run's ranks works on which batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trunkline.training.distributed.ranks import Ranks
from trunkline.training.run.folder import RunFolder, after_restart
from trunkline.training.run.run import Run
from trunkline.training.watching.audience import Audience

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine


def train(engine: "Engine", *, resume: bool = False, overwrite: bool = False, on: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains an engine as its config says and writes the run folder. `Engine.fit` says what comes back."""
    config = engine.config
    with Ranks(config) as ranks:
        if ranks.restarted:
            resume, overwrite = after_restart(config, resume, overwrite)
        audience = Audience(config.track if ranks.first else (), on if ranks.first else (), tell=print)
        with RunFolder(config, resume, overwrite, writes=ranks.first) as folder, audience:
            with Run(engine, folder, audience, ranks) as run:
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
