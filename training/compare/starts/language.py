"""How likely a model finds tokens, one after another."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, batches_of, pack


def log_probabilities(
    model: MultiTaskModel, task: int, texts: Sequence[np.ndarray], firsts: Sequence[int], tokens: int
) -> list[Tensor]:
    """Of the tokens of every text from the one at its place in `firsts`, at least 1, in float32 on the CPU.

    Args:
        model: with a causal trunk; the adapter of `task` is in use, and none of its heads.
        tokens: of a batch.
    """
    weight = vocabulary_of(model)
    made: list[Tensor] = [torch.empty(0)] * len(texts)
    model.eval()
    with torch.inference_mode():
        for places in batches_of([len(text) for text in texts], tokens):
            examples = [Example(task, texts[i], np.arange(firsts[i] - 1, len(texts[i]) - 1)) for i in places]
            batch = pack(examples, len(model.tasks)).to(model.device)
            rows = [len(examples[place].rows) for place in batch.order]
            for place, x in zip(batch.order, model.hidden(batch).split(rows), strict=True):
                i = places[place]
                target = torch.from_numpy(np.asarray(texts[i][firsts[i] :], np.int64)).to(x.device)
                made[i] = -F.cross_entropy((x @ weight.T.to(x.dtype)).float(), target, reduction="none").cpu()
    return made


def vocabulary_of(model: MultiTaskModel) -> Tensor:
    """(V, D) what tokens are predicted with; of a model that has not learnt one, the checkpoint's."""
    trunk = model.trunk
    if trunk.config.tie_vocabulary or model.num_vocabulary:
        return model.vocabulary_weight
    assert trunk.vocabulary is not None, "a causal trunk whose vocabulary is not tied has one of its own"
    return trunk.vocabulary.to(model.device)
