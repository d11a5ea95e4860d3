"""The mix's answer to how training goes: after every evaluation, which tasks get more examples, and which stop.

The share that `mixing` plans for a task is multiplied by a factor, and by 0 once the task has stopped:

    progress     p / mean p, where p is by how much of itself the validation loss falls from one evaluation to the next,
                 averaged over the evaluations, each counting half as much as the one after it; a rise counts as 0
    loss_ratio   r / mean r, where r is the validation loss by what it was before the first step

within [1/4, 4], with means over the tasks that go on. A task stops after `patience` evaluations in a row in which
neither its validation loss nor its score was better than ever before.

N tasks
Sources: learning progress as a measure of what to sample is from Graves et al., Automated Curriculum Learning for
Neural Networks, arXiv:1704.03003, section 3; r / mean r is the relative inverse training rate of Chen et al., GradNorm,
arXiv:1711.02257, section 3, here of validation losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import Model
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.settings import ADAPTIVE, Mixing
from trunkline.engine.tasks.task import Task
from trunkline.training.data.mixing import Mixer
from trunkline.training.scoring.metrics import first_score

LOWEST, HIGHEST = 0.25, 4.0  # factors of a planned share: no task is forgotten, and none takes everything
KEPT = 0.5  # of the fall so far, when a new one is averaged in
SMALL = 1e-12


@dataclass
class State:
    """What a checkpoint has to hold, (N,) each but the last; JSON."""

    first_loss: list[float] = field(default_factory=list)  # on the validation splits, before the first step
    last_loss: list[float] = field(default_factory=list)
    fall: list[float] = field(default_factory=list)  # averaged; empty before the second evaluation
    best_loss: list[float] = field(default_factory=list)
    best_score: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # evaluations since the loss or the score was the best one
    stopped: list[int | None] = field(default_factory=list)  # the step
    changes: list[tuple[int, list[float]]] = field(default_factory=list)  # step and factors of every choice, in order


class Adaptive:
    """Changes a run's mixer at evaluations, and keeps the heads of stopped tasks as they are.

    Args:
        mixing: the method; where it reacts to nothing, neither does this.
        tasks: N of them.
        model: trunk and heads.
        mixer: of the training batches; its windows end at evaluations.
        accumulate: batches of a step.
    """

    def __init__(self, mixing: Mixing, tasks: Sequence[Task], model: Model, mixer: Mixer, accumulate: int):
        self.mixing, self.tasks, self.model, self.mixer, self.accumulate = mixing, tasks, model, mixer, accumulate
        self.state = State()
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, rows of it, their values

    @property
    def all_stopped(self) -> bool:
        """Whether no task is left to train on."""
        return bool(self.state.stopped) and None not in self.state.stopped

    def evaluated(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Chooses what is seen from here on.

        Args:
            step: steps done.
            metrics: of every task, by name and metric, on its validation split.

        Returns:
            What is logged: shares of the examples, factors, and the steps at which tasks stopped, each by task. Empty
            where the mix does not react to training.
        """
        if not self.mixing.reacts:
            return {}
        loss = np.array([metrics[task.name]["loss"] for task in self.tasks])
        score = np.array([first_score(task, metrics[task.name]) for task in self.tasks])
        self._remember(step, loss, score)
        factors = self._factors(loss)
        self.state.changes.append((step, factors.tolist()))
        shares = factors if self.all_stopped else self.mixer.change(step * self.accumulate, factors)
        names = [task.name for task in self.tasks]
        return {
            "shares": dict(zip(names, shares.tolist(), strict=True)),
            "factors": dict(zip(names, factors.tolist(), strict=True)),
            "stopped": {name: at for name, at in zip(names, self.state.stopped, strict=True) if at is not None},
        }

    def _remember(self, step: int, loss: np.ndarray, score: np.ndarray) -> None:
        """Takes an evaluation into the state, and stops the tasks that waited too long."""
        state = self.state
        if not state.first_loss:
            state.first_loss = state.last_loss = state.best_loss = loss.tolist()
            state.best_score = score.tolist()
            state.waiting, state.stopped = [0] * len(loss), [None] * len(loss)
            return
        before = np.array(state.last_loss)
        fall = (before - loss) / np.maximum(before, SMALL)
        state.fall = (KEPT * np.array(state.fall) + (1 - KEPT) * fall if state.fall else fall).tolist()
        better = (loss < state.best_loss) | (score > state.best_score)
        state.waiting = np.where(better, 0, np.array(state.waiting) + 1).tolist()
        state.last_loss = loss.tolist()
        state.best_loss = np.minimum(state.best_loss, loss).tolist()
        state.best_score = np.maximum(state.best_score, score).tolist()
        for t, waiting in enumerate(state.waiting):
            if state.stopped[t] is None and self.mixing.patience is not None and waiting >= self.mixing.patience:
                state.stopped[t] = step
        self._hold()

    def _factors(self, loss: np.ndarray) -> np.ndarray:
        """(N,) of the planned shares."""
        going = np.array([at is None for at in self.state.stopped])
        factors = np.ones(len(loss))
        if self.mixing.method in ADAPTIVE and self.state.fall and going.any():
            if self.mixing.method == "progress":
                values = np.maximum(self.state.fall, 0.0)
            else:
                values = loss / np.maximum(self.state.first_loss, SMALL)
            if (mean := values[going].mean()) > 0:  # where no loss falls, nobody is before the others
                factors = np.clip(values / mean, LOWEST, HIGHEST)
        return np.where(going, factors, 0.0)

    def _hold(self) -> None:
        """Notes what of the parameters belongs to stopped tasks only."""
        assert isinstance(self.model, MultiTaskModel)  # of a Bi-LSTM no task stops
        stopped = torch.tensor([at is not None for at in self.state.stopped], device=self.model.device)
        held = [(parameter, stopped[task].nonzero()[:, 0]) for parameter, task in self.model.task_parameters()]
        writing = [at for task, at in zip(self.tasks, self.state.stopped, strict=True) if _writes(task)]
        if writing and None not in writing and not self.model.trunk.config.tie_vocabulary:
            vocabulary = self.model.vocabulary
            held.append((vocabulary, torch.arange(len(vocabulary), device=vocabulary.device)))
        self.held = [(p, rows, p.detach()[rows].clone()) for p, rows in held if len(rows)]

    def hold(self) -> None:
        """Undoes what the optimizer's step did to the heads of stopped tasks, whose gradients are 0: the moments of
        earlier gradients and the weight decay go on moving them."""
        with torch.no_grad():
            for parameter, rows, values in self.held:
                parameter[rows] = values

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; the model has to have its weights already."""
        self.state = State(**state)
        for step, factors in self.state.changes:
            if any(factors):
                self.mixer.change(step * self.accumulate, np.array(factors))
        if self.state.stopped:
            self._hold()


def _writes(task: Task) -> bool:
    return HEADS[task.head].group == "vocabulary"
