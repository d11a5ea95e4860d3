"""One backward pass in which the tasks' weights are decided on the way, from the tasks' own gradients.

Tokens of different tasks never meet in one sequence, so the gradient that arrives at a token comes from the loss of its
own task alone, and it makes no difference whether that loss is weighted or, later, what arrived. The pass is cut in two
at the input of the lowest block that has a chosen layer:

    losses --> heads --> blocks from the chosen one on --> cut           all weights 1; every module's dy is kept
                         dy of the chosen layers --> Gram matrix --> weights of the tasks
    dy * weight of the row's task --> parameters above the cut
    gradient at the cut * weight of the token's task --> blocks below --> embeddings

Nothing is computed twice, and the gradient of every parameter is that of sum over t of weight_t * loss_t.

T tokens, R labelled rows, N tasks, V vocabulary, D width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trunkline.engine.network.adapters import AdaptedLayer, Adapters
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.network.trunk import Trunk
from trunkline.kernels.tasks.task_gram import TaskGradients, task_gram
from trunkline.kernels.tasks.task_loss import LossSums


@dataclass
class _Call:
    """A module above the cut in one batch. It works on every token or row by itself."""

    module: nn.Module
    x: Tensor  # (T or R, ...) what went in
    y: Tensor  # (T or R, ...) what came out
    dy: Tensor = field(init=False)  # what arrives at y, once `upper` has found it


@dataclass
class _Pass:
    """What is kept of one batch between the two parts."""

    batch: PackedBatch
    below: Tensor  # (T, D) what came up to the cut
    cut: Tensor  # (T, D) the same, where the graph above begins
    calls: list[_Call]
    vocabulary: list[Tensor]  # (V, D) the vocabulary matrix, once for each task that predicts tokens
    # what `upper` finds
    dcut: Tensor = field(init=False)  # (T, D)
    dtask: list[Tensor] = field(init=False)  # gradients of the parameters whose rows are tasks' own
    dvocabulary: list[Tensor] = field(init=False)  # (V, D) of each of `vocabulary`

    def task_of(self, rows: int) -> Tensor:
        """(rows,) the task of each row; N for the tokens without one.

        The last block has only the labelled rows, each a token of its own: where they are as many as the tokens, they
        are the tokens.
        """
        return self.batch.rows.task if rows == len(self.batch.rows.task) else self.batch.task_of_token()

    def offsets(self, rows: int) -> Tensor:
        """(N + 1,) where the rows of each task lie."""
        return self.batch.rows.offsets if rows == len(self.batch.rows.task) else self.batch.token_offsets


class BalancedBackward:
    """A model's backward pass in two parts. `forward` and `upper` for every batch of a step, then `gram`, then `lower`.

    The modules are watched during `forward` alone: nothing is changed about the model.

    Args:
        model: trunk and heads.
        layers: names of linear layers of the trunk, or of the blocks they are in, such as 'blocks.3' or
            'blocks.2.mlp_out'; 'last' is the last block.

    Raises:
        ValueError: a name without linear layers.
    """

    def __init__(self, model: MultiTaskModel, layers: Sequence[str]):
        self.model = model
        self.chosen: dict[str, nn.Module] = {**linear_layers(model.trunk, layers)}
        first = min(int(name.split(".")[1]) for name in self.chosen)
        self.block, *others = model.trunk.blocks[first:]
        above = [module for block in (self.block, *others) for module in block.modules()]
        if (adapters := model.adapters) is not None:  # the trunk stays as it is: the tasks meet in its adapters
            self.chosen = {name: layer for name in self.chosen if (layer := adapters.layer(name)) is not None}
            if not self.chosen:
                raise ValueError(
                    f"balancing: of {', '.join(layers)} no layer has adapters; adapters.layers says which do"
                )
            names = [name for name, _ in model.trunk.named_modules() if name.startswith("blocks.")]
            of_names = [(int(name.split(".")[1]), adapters.layer(name)) for name in names]
            above += [layer for block, layer in of_names if layer is not None and block >= first]
        ends = ("final_norm", "last_layer", "last_norm")
        above += [module for name, module in model.trunk.named_children() if name in ends]
        self.above = [module for module in above if next(module.parameters(recurse=False), None) is not None]
        self.passes: list[_Pass] = []
        self.gradients: dict[nn.Module, TaskGradients] = {}

    def forward(self, batch: PackedBatch) -> LossSums:
        """What the model returns for a batch, which is remembered for `upper`."""
        below: list[Tensor] = []
        above: list[Tensor] = []
        calls: list[_Call] = []

        def cut(module: nn.Module, inputs: tuple) -> tuple:
            below.append(inputs[0])
            above.append(inputs[0].detach().requires_grad_())
            return above[0], *inputs[1:]

        def keep(module: nn.Module, inputs: tuple, y: Tensor) -> None:
            calls.append(_Call(module, inputs[0], y))

        hooks = [module.register_forward_hook(keep) for module in self.above]
        hooks.append(self.block.register_forward_pre_hook(cut))
        try:
            x = self.model.hidden(batch)
        finally:
            for hook in hooks:
                hook.remove()
        vocabulary = [self.model.vocabulary_weight.detach().requires_grad_() for _ in range(self.model.num_vocabulary)]
        self.passes.append(_Pass(batch, below[0], above[0], calls, vocabulary))
        return self.model.losses(x, batch, vocabulary)

    def upper(self, loss: Tensor) -> None:
        """The upper part for the batch that `forward` was last called with.

        Args:
            loss: sum of the tasks' losses, all with the weights that they have if nothing is balanced.
        """
        step = self.passes[-1]
        own = [parameter for parameter, _ in self.model.task_parameters()]
        wanted = [step.cut, *(call.y for call in step.calls), *own, *step.vocabulary]
        # The graph is kept for `lower`; with the gradients of activations asked for, those of weights are not computed.
        gradients = iter(torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True))
        step.dcut = next(gradients)
        for call in step.calls:
            call.dy = next(gradients)
        step.dtask = [next(gradients) for _ in own]
        step.dvocabulary = list(gradients)

    def gram(self, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(N, N) inner products of what the tasks' losses give the chosen weights, over all batches of the step.

        `total`: as of `task_gram`, where processes have some of the batches each.
        """
        if self.model.adapters is not None:
            return self._gram_of_adapters(self.model.adapters, total)
        self.gradients = {layer: task_gram(*self._by_task(layer), total) for layer in self.chosen.values()}
        return torch.stack([of_layer.gram for of_layer in self.gradients.values()]).sum(0)

    def _gram_of_adapters(self, adapters: Adapters, total: Callable[[Tensor], Tensor] | None) -> Tensor:
        """(N, N): tasks of different adapters have no weight in common, and their products are 0."""
        grams = []
        for layer in self.chosen.values():
            assert isinstance(layer, AdaptedLayer)
            x, dy, offsets = self._by_task(layer)
            pairs = layer.factors(x, dy, offsets, adapters.of_task)
            grams += [task_gram(*factors, offsets, total).gram for factors in pairs]
        together = adapters.of_task[:, None] == adapters.of_task
        return torch.stack(grams).sum(0) * together

    def lower(self, weights: Tensor) -> None:
        """The lower part for all batches of the step: adds to the gradients of all parameters.

        Args:
            weights: (N,) of the tasks, beside those in the losses.
        """
        kept = {layer: of.gradients for layer, of in self.gradients.items() if of.gradients is not None}
        for layer, gradients in kept.items():
            _add(layer.get_parameter("weight"), torch.tensordot(weights.to(gradients.dtype), gradients, 1))
        weights = torch.cat([weights, weights.new_zeros(1)])  # the last: of tokens that are no task's
        for step in self.passes:
            for (parameter, task), gradient in zip(self.model.task_parameters(), step.dtask, strict=True):
                _add(parameter, _scaled(gradient, weights[task]))
            for weight, gradient in zip(weights[-1 - len(step.vocabulary) : -1], step.dvocabulary, strict=True):
                _add(self.model.vocabulary_weight, gradient.mul_(weight))  # large, and nobody else has it
            for call in step.calls:
                done = call.module.weight if call.module in kept else None
                own = [p for p in call.module.parameters(recurse=False) if p.requires_grad and p is not done]
                if own:
                    dy = _scaled(call.dy, weights[step.task_of(len(call.y))])
                    for parameter, gradient in zip(own, torch.autograd.grad(call.y, own, dy), strict=True):
                        _add(parameter, gradient)
            if step.below.requires_grad:
                torch.autograd.backward(step.below, _scaled(step.dcut, weights[step.task_of(len(step.cut))]))
        self.passes.clear()
        self.gradients.clear()

    def _by_task(self, layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """What went into a layer, what arrives at its output, and offsets: rows of all batches, sorted by task."""
        calls = [(step, call) for step in self.passes for call in step.calls if call.module is layer]
        x, dy = torch.cat([call.x for _, call in calls]), torch.cat([call.dy for _, call in calls])
        x = x.to(dy.dtype)  # under autocast activations leave float32
        if len(calls) == 1:
            return x, dy, calls[0][0].offsets(len(x))
        task, order = torch.cat([step.task_of(len(call.y)) for step, call in calls]).sort(stable=True)
        offsets = torch.searchsorted(task, torch.arange(len(self.model.tasks) + 1, device=task.device))
        return x[order], dy[order], offsets.to(torch.int32)


def linear_layers(trunk: Trunk, names: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers of a trunk that `names` name, or that are in the blocks they name; 'last' is the last block.

    Raises:
        ValueError: a name without linear layers.
    """
    found: dict[str, nn.Linear] = {}
    for name in names:
        prefix = f"blocks.{len(trunk.blocks) - 1}" if name == "last" else name
        layers = {
            path: module
            for path, module in trunk.named_modules()
            if isinstance(module, nn.Linear) and (path == prefix or path.startswith(f"{prefix}."))
        }
        if not layers:
            raise ValueError(
                f"balancing: '{name}' names no linear layer of the trunk; there are 'last' and names such as "
                f"'blocks.{len(trunk.blocks) - 1}' and 'blocks.0.mlp_out'"
            )
        found |= layers
    return found


def _scaled(x: Tensor, of_row: Tensor) -> Tensor:
    """Every row of x, (R, ...), times its own factor, (R,)."""
    return x * of_row.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    if not parameter.requires_grad:
        return
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
