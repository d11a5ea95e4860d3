"""The heads of a model that go on in another one, because they do the same."""

import torch

from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.tasks.task import Task


def keep_heads(model: MultiTaskModel, other: MultiTaskModel) -> tuple[list[str], list[str]]:
    """Gives the heads of `model` the weights of `other`'s, where their tasks are the same: name, head and classes.

    What all tasks share, the trunk and the matrix that predicts tokens, is left as it is.

    Returns:
        Names of the tasks whose heads are kept, and of those whose heads are new.
    """
    names = [task.name for task in model.tasks]
    if model.activation != other.activation:  # heads of another input
        return [], names
    places = {_identity(task): place for place, task in enumerate(other.tasks)}
    same = {t: places[_identity(task)] for t, task in enumerate(model.tasks) if _identity(task) in places}
    with torch.no_grad():
        for (ours, owner), (theirs, their_owner) in zip(model.task_parameters(), other.task_parameters(), strict=True):
            for t, place in same.items():
                ours[owner == t] = theirs[their_owner == place].to(ours)
        for t, place in same.items():
            if t < model.num_small:  # the unit of a regression
                model.center[t], model.spread[t] = other.center[place], other.spread[place]
    return [names[t] for t in same], [name for t, name in enumerate(names) if t not in same]


def _identity(task: Task) -> tuple[str, str, tuple[str, ...]]:
    return task.name, task.head, task.labels
