"""The trunk and all heads that answer as one ONNX graph, for padded batches.

    input_ids, attention_mask (B, L), token_type_ids where the trunk has any -> logits of every task, under its name:
    (B, C) of tasks with one answer for a text, (B, L, C) of those that answer for every token

What a stock class of transformers lacks, such as a projection of each task's own, is in it. Attention is the plain one:
a graph for other runtimes knows no packed stream. It is checked against the engine in onnxruntime before it is there.

B texts, L tokens of the longest, T = B * L, H query heads, G key/value heads, E head width, C columns of a task
"""

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.engine.answers.ask import answering
from trunkline.engine.foreign.export_hugging_face import write_tokenizer
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

CLOSE = 1e-4  # that logits of the graph may be from the engine's
PADDING = 0  # id; the mask says which tokens are of a text
TEXTS = (7, 1, 12)  # tokens of what it is checked on


class Padded(nn.Module):
    """A model's answers to padded batches."""

    def __init__(self, model: MultiTaskModel, tasks: Sequence[int]):
        super().__init__()
        self.model, self.tasks = model, tuple(tasks)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Logits of every task."""
        trunk, config = self.model.trunk, self.model.trunk.config
        B, L = input_ids.shape
        place = torch.arange(L, device=input_ids.device)
        there = attention_mask.bool()
        sees = there[:, None, None, :]  # (B, 1, 1, L)
        apart = place[None, :] - place[:, None]  # (L, L) of a key from a query
        if config.causal:
            sees = sees & (apart <= 0)
        local = sees & (apart.abs() <= config.window) if config.window else sees

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: None, whole: Tensor | None) -> Tensor:
            q, k, v = (part.unflatten(0, (B, L)).transpose(1, 2) for part in (q, k, v))  # (B, heads, L, E)
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
            mask = sees if config.window_of(layer) is None else local
            # a query that is padding sees itself: what comes out of it is not used, but must not be NaN
            mask = mask | torch.eye(L, dtype=torch.bool, device=q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).flatten(0, 1)  # (T, H, E)

        repeated = None
        if config.exact_match:  # whether an earlier token of the same text is the same
            same = (input_ids[:, :, None] == input_ids[:, None, :]) & (apart < 0) & there[:, None, :]
            repeated = same.any(-1).flatten()
        types = None if token_type_ids is None else token_type_ids.flatten()
        positions = place.repeat(B)
        x = trunk(input_ids.flatten(), positions, attend, repeated=repeated, types=types)  # (T, D)
        states = x.unflatten(0, (B, L))
        last = attention_mask.sum(1) - 1 if config.causal else torch.zeros(B, dtype=torch.int64, device=x.device)
        pooled = states[torch.arange(B, device=x.device), last]  # (B, D)
        logits = []
        for t in self.tasks:
            pools = HEADS[self.model.tasks[t].head].pools
            own = self._logits(pooled if pools else x, t)
            logits.append(own if pools else own.unflatten(0, (B, L)))
        return tuple(logits)

    def _logits(self, x: Tensor, t: int) -> Tensor:
        """As `MultiTaskModel.logits`, with nothing that depends on numbers in tensors."""
        model = self.model
        if model.activation:
            y = x @ model.projection_weight[t] + model.projection_bias[t]
            y = {"none": lambda z: z, "gelu": F.gelu, "tanh": torch.tanh}[model.activation](y)
            x = y if model.pools and HEADS[model.tasks[t].head].pools else x + y
        if t >= model.num_small:
            return F.linear(x, model.span_weight[t - model.num_small])
        columns = [HEADS[task.head].columns(task) for task in model.tasks[:t]]
        first, last = sum(columns), sum(columns) + HEADS[model.tasks[t].head].columns(model.tasks[t])
        logits = F.linear(x, model.weight[first:last], model.bias[first:last])
        return logits * model.spread[t] + model.center[t] if HEADS[model.tasks[t].head].squared else logits


def export_onnx(engine: "Engine", tasks: Sequence[str], path: Path) -> Path:
    """Writes model.onnx, beside it model.json, which says what its outputs are called and mean, and the tokenizer as
    transformers loads it.

    Args:
        tasks: names; none: all that answer.

    Raises:
        ValueError: an unknown task, one that writes, a Bi-LSTM, or a graph that answers otherwise than the engine.
        ImportError: onnx, onnxscript or onnxruntime are absent.
    """
    model = engine.model
    if not isinstance(model, MultiTaskModel):
        raise ValueError("export: a Bi-LSTM cannot be exported")
    if model.adapters is not None:
        raise ValueError(
            "export: a graph has one trunk for all tasks, and these have adapters of their own: use --to hugging-face, "
            "which writes each task with its adapter merged, or --to peft"
        )
    chosen = [engine.place_of(name) for name in tasks] or answering(engine)
    if writing := [engine.tasks[t].name for t in chosen if t not in answering(engine)]:
        raise ValueError(f"export: task '{writing[0]}' writes text: use --to hugging-face")
    if not chosen:
        raise ValueError("export: no task of the engine answers without writing: use --to hugging-face")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which torch.onnx needs
    except ImportError as error:
        raise ImportError(
            f"export: --to onnx needs trunkline[onnx]: pip install 'trunkline[onnx]' ({error})"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [engine.tasks[t].name for t in chosen]
    padded = Padded(model.eval(), chosen).cpu()
    inputs = _inputs(engine)
    dynamic = {name: {0: "texts", 1: "tokens"} for name in inputs}
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of a missing torchvision, which nothing here needs
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")  # of deprecations in torch.onnx
            torch.onnx.export(
                padded,
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=names,
                dynamic_shapes=tuple(dynamic.values()),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        log.setLevel(level)
        model.to(engine.device)
    _check(engine, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), chosen, path)
    about = {
        task.name: {
            "head": task.head,
            "labels": list(task.labels),
            "temperature": engine.temperature(t),
            "shape": "texts, columns" if HEADS[task.head].pools else "texts, tokens, columns",
        }
        for t, task in ((t, engine.tasks[t]) for t in chosen)
    }
    write_tokenizer(engine, chosen[0], PADDING, path.parent)
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return path


def _inputs(engine: "Engine") -> dict[str, Tensor]:
    """Texts of `TEXTS` tokens, by the names of the graph's inputs."""
    config, generator = engine.config.trunk, torch.Generator().manual_seed(0)
    longest = min(max(TEXTS), config.max_positions)
    lengths = torch.tensor([min(length, longest) for length in TEXTS])
    ids = torch.randint(config.vocab_size, (len(TEXTS), longest), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    types = {"token_type_ids": torch.randint(2, ids.shape, generator=generator)} if config.token_types > 1 else {}
    return {"input_ids": ids, "attention_mask": mask, **types}


def _check(engine: "Engine", session: "onnxruntime.InferenceSession", tasks: Sequence[int], path: Path) -> None:  # type: ignore[name-defined]  # noqa: F821
    """
    Raises:
        ValueError: the graph answers otherwise than the engine.
    """
    inputs = {name: tensor.numpy() for name, tensor in _inputs(engine).items()}
    inputs = {
        name: np.concatenate([array, array[:1]]) for name, array in inputs.items()
    }  # other sizes than it was made of
    found = session.run(None, inputs)
    model = engine.model
    assert isinstance(model, MultiTaskModel)
    for place, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        ids = inputs["input_ids"][place, :length]
        types = inputs["token_type_ids"][place, :length].astype(np.uint8) if "token_type_ids" in inputs else None
        batch = pack([Example(tasks[0], ids, np.arange(length), types=types)], len(engine.tasks)).to(engine.device)
        with torch.inference_mode():
            x = model.eval().hidden(batch)
            for t, logits in zip(tasks, found, strict=True):
                own = model.logits(x, t).float().cpu().numpy()
                own = own[-1 if model.trunk.config.causal else 0] if HEADS[engine.tasks[t].head].pools else own
                got = logits[place] if own.ndim == 1 else logits[place, :length]
                error = float(np.abs(got - own).max() / max(1.0, np.abs(own).max()))
                if not error <= CLOSE:
                    name = engine.tasks[t].name
                    raise ValueError(
                        f"export: {path} answers otherwise than the engine: '{name}' is off by {error:.1e}"
                    )
