"""What a checkpoint holds of a run, and how a run goes on from one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from trunkline.engine import checkpoint
from trunkline.engine.console import tell
from trunkline.engine.saved import all_tensors, own_tensors
from trunkline.training.distributed.sharding import own_slices, sliced
from trunkline.training.run.folder import check_goes_on
from trunkline.training.run.progress import Progress

if TYPE_CHECKING:
    from trunkline.training.run.run import Run

CHECKPOINTS = 2  # of the newest that are kept: one to fall back to


def save_run(run: "Run", path: Path) -> None:
    """Writes model, optimizer, balancing, mix and progress, and removes older checkpoints; the first rank does.

    Of a model in slices every rank writes its own: whether, and in how many, it goes on is for the next run to say.

    Raises:
        OSError: the disk is full, not writable, ...; earlier checkpoints stay.
    """
    if not (run.ranks.first or run.ranks.shards):
        return
    tensors, part = own_slices(
        {
            "model": own_tensors(run.model, run.config),
            "optimizer": checkpoint.optimizer_tensors(run.optimizer, run.model.named_parameters()),
        },
        run.ranks,
    )
    state = {
        "progress": asdict(run.progress),
        "balancing": run.balancer.state_dict(),
        "mixing": run.adaptive.state_dict(),
        "settings": run.fingerprint,
    }
    checkpoint.save(path.parent, path.name, tensors, state, part)
    if run.ranks.first:
        checkpoint.prune(path.parent, CHECKPOINTS)


def resume_run(run: "Run") -> Progress:
    """Puts the newest valid checkpoint into model, optimizer, balancing and mix.

    Raises:
        ValueError: there is none, it belongs to a run with other settings or data, or ranks find different ones.
    """
    path = checkpoint.newest(run.folder / "checkpoints", warn=tell)
    if path is None:
        raise ValueError(f"run folder {run.folder} has no checkpoint to resume from")
    run.ranks.check_same("checkpoints", {"newest": path.name, "digest": checkpoint.digest(path)})
    tensors, state = checkpoint.load(path)
    progress = Progress(**state["progress"])
    check_goes_on(state["settings"], run.fingerprint, progress.step)
    own = sliced(tensors["model"], run.model.state_dict())
    run.model.load_state_dict(all_tensors(own, run.model, run.config))
    as_weights = {f"{name}.{entry}": p for name, p in run.model.named_parameters() for entry in checkpoint.ENTRIES}
    moments = sliced(tensors.get("optimizer", {}), as_weights)
    checkpoint.load_optimizer_tensors(run.optimizer, run.model.named_parameters(), moments)
    run.balancer.load_state_dict(state["balancing"])
    run.adaptive.load_state_dict(state["mixing"])
    tell(f"resuming at step {progress.step}")
    return progress
