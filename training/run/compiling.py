"""What a compiled graph of a run is fitted to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trunkline.engine.config import Config
from trunkline.engine.network.compiled import CompiledModel, FixedShapes
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import PackedBatch
from trunkline.kernels.dispatch import REPLACED
from trunkline.training.data.batches import Members, Packer
from trunkline.training.data.mixing import Mixer

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine
    from trunkline.training.run.run import Run

MANY = 10  # one in so many batches that do not fit the graph is told
LOOKED_AT = 16  # batches at the beginning, in the middle and at the end of a run


def sample_of(config: Config, mixer: Mixer) -> list[Members]:
    """What is in some of the run's batches, from its beginning, its middle and its end."""
    batches = config.steps * config.batch.accumulate
    starts = (0, batches // 2, max(0, batches - LOOKED_AT))
    numbers = sorted({number for start in starts for number in range(start, min(start + LOOKED_AT, batches))})
    return [mixer.batch(number) for number in numbers]


def to_be_compiled(engine: "Engine", packer: Packer, sample: Sequence[Members]) -> CompiledModel | None:
    """The engine's model, to be compiled for batches like these; None where it stays as it is."""
    if not engine.compiles or not isinstance(engine.model, MultiTaskModel):  # a Bi-LSTM stays as it is
        return None
    model, config = engine.model.train(), engine.config
    shapes = FixedShapes.of([packer.pack(members, config.batch.tokens) for members in sample], model.groups)
    held = config.balancing.method != "fixed" and config.batch.accumulate > 1
    # a CUDA graph has memory for one batch; where weights come from losses, those of a step are held until the last
    # and references, where a kernel was switched off, look at a batch on the host
    return CompiledModel(model, shapes, cuda_graphs=False if held or REPLACED else None)


def warm_up(run: "Run", members: Members) -> None:
    """Compiles, with a batch or, where memory is too short for it, a part of one."""
    if not (compiled := run.compiled):
        return
    known = torch.ones_like(run.weights) if run.balancer.knows_factors else None

    def work(batches: Sequence[PackedBatch]) -> None:
        with run.engine.autocast():
            compiled.warm_up(batches[0].to(run.engine.device), known)

    run.parts.run(work, [run.packer.pack(members, run.config.batch.tokens)], [members])
    run.progress.compile_seconds += compiled.seconds
    compiled.uncompiled = 0  # of a single example, which is longer than a part
    run.display.tell(f"compiled the model in {compiled.seconds:.0f} s")


def tell_of_uncompiled(run: "Run") -> None:
    """Once, where many batches go without the graph: they are slower, and need more memory."""
    batches = run.progress.step * run.config.batch.accumulate
    if not run.told and run.progress.uncompiled * MANY > batches:
        run.told = True
        run.display.tell(
            f"{run.progress.uncompiled} of {batches} batches so far have more sequences or rows than the compiled "
            "model has room for, and go without it: slower, with the same gradients"
        )
