"""What each of several ranks holds and exchanges in a step: arithmetic, before any of them is started.

    replicate   all-reduce of the gradients, once a step                         2 (W - 1) / W of their bytes
    shard       in every batch all-gather of the weights, of blocks twice          (W - 1) / W of theirs, each time
                and reduce-scatter of the gradients                                (W - 1) / W of theirs

With S slices there are W / S replicas: S takes the place of W in what `shard` exchanges, and in every batch a slice's
gradients are summed over the replicas, as those of `replicate` are.

These are the bytes that a rank sends, and receives as many, in rings; what lies between two ranks is counted once.

W ranks
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from trunkline.engine.network.model import MultiTaskModel
from trunkline.training.distributed.gradient_exchange import BUCKET
from trunkline.training.distributed.sharding import placement

if TYPE_CHECKING:
    from trunkline.training.estimate import Memory

MOMENTS = 2  # of AdamW, float32 as the gradients of what learns in float32 are
INSIDE = "NVLink, H100"  # a machine
LINKS = {  # bytes a second and direction that makers state; a machine's network is shared by its GPUs
    INSIDE: (450e9, "GPU"),
    "400 Gbit/s a GPU": (50e9, "GPU"),
    "100 Gbit/s a machine": (12.5e9, "machine"),
}


@dataclass(frozen=True)
class Cost:
    """Bytes of one rank."""

    memory: int  # the most that exists at a time
    exchanged: int  # sent in a step
    inside: int = 0  # of which between the ranks of one replica, where there are several
    slices: int = 0  # ranks of such a replica

    def seconds(self, link: str, ranks_of_machine: int) -> float:
        """That the exchange takes where nothing hides it; inside a replica that one machine holds it is fast."""
        rate, of = LINKS[link]
        inside = self.inside if self.slices and ranks_of_machine % self.slices == 0 else 0
        far = (self.exchanged - inside) / (rate / (ranks_of_machine if of == "machine" else 1))
        return inside / LINKS[INSIDE][0] + far


def replicated(memory: "Memory", ranks: int) -> Cost:
    """
    Args:
        memory: of a step on one device, of as many batches as a rank has.
    """
    bucket = min(BUCKET, memory.gradients) if ranks > 1 else 0
    return Cost(memory.peak + bucket, 2 * (ranks - 1) * memory.gradients // ranks)


def sharded(model: MultiTaskModel, memory: "Memory", ranks: int, batches: int, slices: int = 0) -> Cost:
    """
    Args:
        model: of which shapes and dtypes count, frozen where it is frozen.
        memory: as of `replicated`.
        batches: that a rank has in a step.
        slices: of a replica; 0: there is one replica, of all ranks.
    """
    slices = slices or ranks
    replicas = ranks // slices
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.trunk.blocks]
    learning = [sum(p.nbytes for p in block.parameters() if p.requires_grad) for block in model.trunk.blocks]
    weights, gradients = sum(p.nbytes for p in model.parameters()), memory.gradients
    others, others_learning = weights - sum(blocks), gradients - sum(learning)
    kept = slice_of(model, slices)
    learnt = slice_of(model, slices, learning=True)
    # whole at a time: all but the blocks, with its gradient; a block with its gradient, and the one that comes next
    together = others + others_learning + 2 * max(blocks) + max(learning)
    working = memory.peak - memory.weights - memory.optimizer - gradients  # activations and what comes and goes
    held = kept + (1 + MOMENTS) * learnt + together + max(0, working)
    gathered = batches * (2 * sum(blocks) + others)
    inside = (slices - 1) * (gathered + batches * gradients) // slices
    if replicas == 1:
        return Cost(held, inside)
    return Cost(held, inside + batches * 2 * (replicas - 1) * learnt // replicas, inside, slices)


def slice_of(model: nn.Module, ranks: int, learning: bool = False) -> int:
    """Bytes of the first rank's slices, which are the largest, of all parameters or of those that learn."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad or not learning:
            side = placement(ranks, parameter).dim
            rows = -(-parameter.shape[side] // ranks)
            total += rows * prod(parameter.shape[:side] + parameter.shape[side + 1 :]) * parameter.element_size()
    return total
