"""The backward passes of a run's steps, with the weights that the method of the config gives the tasks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trunkline.engine.network.balanced_backward import BalancedBackward
from trunkline.engine.network.bilstm import BiLSTM, Model
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.settings import Balancing
from trunkline.kernels.tasks.task_loss import LossSums
from trunkline.training.balancing.methods import FROM_GRADIENTS, FROM_LOSSES, Seen, State

LOGGED = 32  # tasks up to which every two are compared in metrics.jsonl: more could not be told apart in a chart


class Balancer:
    """In every step: `start`, then `forward` and `backward` for each of its batches, then `finish`.

    Args:
        settings: the method.
        model: trunk and heads, with N tasks.
        seed: of the methods that draw lots.
        forward: what makes the losses of a batch, with the arguments of `MultiTaskModel.forward`, where that is not the
            model itself but, say, its compiled form. Steps in which the tasks' own gradients are looked at do without.
        total: sums a tensor over all processes, in place, where a step's batches are spread over several: what the
            weights are made from is the same on all of them. None: all batches are here.

    Raises:
        ValueError: `settings.layers` names something that is no linear layer.
    """

    def __init__(
        self,
        settings: Balancing,
        model: Model,
        seed: int,
        forward: Callable[[PackedBatch, Tensor | None], LossSums] | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ):
        self.settings, self.model, self.seed = settings, model, seed
        self.losses_of, self.total = forward or model, total
        self.function = (FROM_LOSSES | FROM_GRADIENTS)[settings.method]
        if not isinstance(model, BiLSTM):  # whose config looks at no gradients
            self.parts = BalancedBackward(model, settings.layers)
        self.state = State(len(model.tasks))
        self.losses: list[Tensor] = []  # (N,) of every batch of the step
        self._forget()

    def looks(self, step: int) -> bool:
        """Whether the tasks' own gradients are looked at in a step."""
        watch = self.settings.watch
        return self.settings.method in FROM_GRADIENTS or (watch > 0 and step % watch == 0)

    def holds(self, step: int) -> bool:
        """Whether the graphs of all batches of a step are held until `finish`."""
        return self.settings.method != "fixed" or self.looks(step)

    @property
    def knows_factors(self) -> bool:
        """Whether the losses' gradients are known before the backward pass: the factors that `forward` is given."""
        return self.settings.method == "fixed"

    def start(self, step: int) -> None:
        """Begins a step, also where an attempt at it was broken off."""
        self.losses.clear()
        if self.looks(step):
            self.parts.passes.clear()

    def forward(self, batch: PackedBatch, factor: Tensor, step: int) -> LossSums:
        """What the model returns for a batch.

        Args:
            batch: of the step.
            factor: (N,) by which its loss sums will be multiplied before they are handed to `backward`.
            step: from 0.
        """
        if self.looks(step):
            return self.parts.forward(batch)
        return self.losses_of(batch, factor if self.knows_factors else None)

    def backward(self, losses: Tensor, step: int) -> None:
        """As much of a batch's backward pass as does not depend on the weights.

        Args:
            losses: (N,) the batch's part of every task's mean loss, times the fixed weight of the task.
            step: from 0.
        """
        if self.looks(step):
            self.parts.upper(losses.sum())
        elif self.settings.method == "fixed":
            losses.sum().backward()
        else:
            self.losses.append(losses)  # with its graph
            return
        self.losses.append(losses.detach())

    def finish(self, counts: Tensor, step: int) -> None:
        """The rest of the backward pass of all batches of the step.

        Args:
            counts: (N,) sums of the row weights; 0 for tasks that are absent.
            step: from 0.
        """
        losses = torch.stack(self.losses).sum(0)
        self.losses.clear()
        if self.looks(step):
            weights = self._weigh(losses, counts, self.parts.gram(self.total), step)
            self.parts.lower(weights)
        elif self.settings.method != "fixed":
            weights = self._weigh(losses.detach(), counts, losses.new_zeros(0), step)
            (losses @ weights).backward()

    def _weigh(self, losses: Tensor, counts: Tensor, gram: Tensor, step: int) -> Tensor:
        """(N,) weights; 1 for the tasks that no weight would make a difference for."""
        N = len(losses)
        losses = losses if self.total is None else self.total(losses.clone())
        numbers = torch.cat([losses, counts.to(losses.dtype), gram.flatten().to(losses.dtype)])
        host = numbers.cpu().double().numpy()  # waits for the device
        loss, count, products = host[:N], host[N : 2 * N], host[2 * N :].reshape(-1, N)
        present = count > 0
        if self.settings.method in FROM_GRADIENTS:
            present &= products.diagonal() > 0
        weights, tasks = np.ones(N), np.flatnonzero(present)
        if len(tasks) and np.isfinite(host).all():  # where it is not, the step is left out
            own = products[np.ix_(tasks, tasks)] if len(products) else products
            random = np.random.default_rng([self.seed, step])
            weights[tasks] = self.function(Seen(tasks, loss[tasks], count[tasks], own, step, random), self.state)
            self._remember(tasks, weights, products)
        return losses.new_tensor(weights)

    def _remember(self, tasks: np.ndarray, weights: np.ndarray, products: np.ndarray) -> None:
        self.weights[tasks] += weights[tasks]
        self.steps[tasks] += 1
        if len(products):
            norms = np.sqrt(products.diagonal())
            known = np.outer(norms, norms) > 0
            self.cosines[known] += (products / np.where(known, np.outer(norms, norms), 1.0))[known]
            self.pairs += known

    def _forget(self) -> None:
        N = len(self.model.tasks)
        self.weights, self.steps = np.zeros(N), np.zeros(N)
        self.cosines, self.pairs = np.zeros((N, N)), np.zeros((N, N))

    def log(self) -> dict[str, Any]:
        """Means since the last call: weights by task, and cosines between the gradients of every two tasks, None for
        those that never met. Empty where nothing was weighed."""
        names = [task.name for task in self.model.tasks]
        seen = zip(names, self.weights, self.steps, strict=True)
        values: dict[str, Any] = {"task_weights": {name: weight / steps for name, weight, steps in seen if steps}}
        if self.pairs.any() and len(names) <= LOGGED:
            values["cosines"] = [
                [round(cosine / met, 4) if met else None for cosine, met in zip(*of_task, strict=True)]
                for of_task in zip(self.cosines, self.pairs, strict=True)
            ]
        self._forget()
        return values if values["task_weights"] else {}

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint has to hold, as JSON."""
        return {name: array.tolist() for name, array in self.state.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.state.update({name: np.array(values) for name, values in state.items()})
