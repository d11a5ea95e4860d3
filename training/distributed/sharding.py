"""A model whose weights, gradients and optimizer lie in slices, one a rank: FSDP2, for trunks that do not fit.

    a rank keeps a slice of every parameter --> a block's slices are gathered where it is computed, and let go after it
    gradients of the whole block --> reduce-scatter, SUM --> each rank has the sums of its own slices --> AdamW on them

The blocks are gathered one at a time; what is left of the model, which every batch needs from its first token to its
last loss, is one more group. Sums and never means, as in `GradientExchange`.

Every forward and backward pass exchanges, so all ranks have as many of them.

With fewer slices than ranks there are W / slices replicas of the model (HSDP): weights are gathered inside a replica
alone, and the gradients of a slice are summed over the replicas as well.

W ranks
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from trunkline.engine import checkpoint
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.trunk import Trunk
from trunkline.training.distributed.ranks import Ranks

ENTERED = ("score", "generate")  # methods besides forward that all ranks call, with equal arguments


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Leaves of every parameter, as the first rank has it, this rank's slice, on the device.

    Until then the model may be on the host: a block at a time goes to the device whole. Of blocks whose weights still
    wait in a file (`Trunk.waiting`) every rank reads its slices alone, one weight after the other.

    Raises:
        ValueError: adapters of a width that the ranks do not divide; or a model that lies in slices already.
    """
    if isinstance(model, FSDPModule):
        raise ValueError("parallel shard: the model lies in slices of an earlier run: use Engine.load")
    assert isinstance(model, MultiTaskModel)  # as the config says
    ranks.copy_of_first(model)
    mesh = _mesh(ranks, device.type)
    place = partial(placement, ranks.slices)
    if model.adapters is not None and any(place(parameter).dim == 0 for parameter in model.adapters.parameters()):
        raise ValueError(
            f"parallel shard: {ranks.slices} slices divide neither side of some adapters: use a number of ranks, or "
            "slices, that divides the trunk's width and adapters.rank"
        )
    for module in (*model.trunk.blocks, model):
        fully_shard(module, mesh=mesh, shard_placement_fn=place)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if model.trunk.waiting:
        _read_blocks(model.trunk, device)
    for method in ENTERED:
        register_fsdp_forward_method(model, method)


def _mesh(ranks: Ranks, device: str) -> DeviceMesh:
    """Of the ranks in a row; or of replicas, each a row of ranks that have a slice."""
    if ranks.slices == ranks.size:
        return DeviceMesh.from_group(ranks.device, device)
    rows = torch.arange(ranks.size).view(-1, ranks.slices)
    return DeviceMesh.from_group(ranks.across, device, rows, mesh_dim_names=("replicas", "slices"))


def _read_blocks(trunk: Trunk, device: torch.device) -> None:
    for block in trunk.blocks:
        block.to_empty(device=device)
    for name in list(trunk.waiting):
        parameter = trunk.get_parameter(name).detach()
        parameter.copy_(_slice(trunk.waiting.pop(name)(), parameter))


def placement(ranks: int, parameter: nn.Parameter) -> Shard:
    """How a parameter is cut: along the first side that the ranks divide; uneven only along the first of all.

    Not along the first of three, which has tasks or adapters one after the other: all ranks have some of each, so that
    what is done with those of some tasks alone is done on every rank.
    """
    sides = range(1 if parameter.ndim == 3 else 0, parameter.ndim)
    return Shard(next((side for side in sides if parameter.shape[side] % ranks == 0), 0))


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, which shares memory with it; or all of what is not in slices."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors put together from all slices, one after the other, on the host of the rank that is to `keep` them."""
    together = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            together[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return together


def own_slices(
    tensors: Mapping[str, Mapping[str, Tensor]], ranks: Ranks
) -> tuple[dict[str, dict[str, Tensor]], checkpoint.Part]:
    """What this rank writes of a checkpoint of these tensors, by group and name."""
    own = {group: {name: local(tensor) for name, tensor in members.items()} for group, members in tensors.items()}
    if not ranks.shards:
        return own, checkpoint.WHOLE
    sides = {
        name: tensor.placements[-1].dim  # type: ignore[attr-defined]  # a Shard
        for members in tensors.values()
        for name, tensor in members.items()
        if isinstance(tensor, DTensor)
    }
    replica, number = divmod(ranks.rank, ranks.slices)
    gather = partial(ranks.gather, patient=True)
    return own, checkpoint.Part(number if replica == 0 else None, ranks.slices, sides, ranks.first, gather)


def sliced(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of whole tensors, which may lie in a file that is mapped, the slices of this rank; `like`: how each is to lie."""
    return {name: _slice(tensor, like.get(name)) for name, tensor in tensors.items()}


def _slice(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor  # of other shapes, and so an error where it is loaded; or a count of steps
    cut, mesh = like.placements[-1], like.device_mesh
    assert isinstance(cut, Shard)
    side, along = cut.dim, mesh.ndim - 1  # before it the replicas, where there are any
    most = -(-tensor.shape[side] // mesh.size(along))
    first = min(mesh.get_local_rank(along) * most, tensor.shape[side])
    part = tensor.narrow(side, first, min(most, tensor.shape[side] - first)).to(like.device).contiguous()
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
