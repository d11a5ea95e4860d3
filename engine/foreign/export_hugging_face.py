"""One task of an engine as a Hugging Face model of a stock class, with the same logits.

    a class, several, a number   ...ForSequenceClassification
    tags, sentences              ...ForTokenClassification
    a span                       ...ForQuestionAnswering
    a text                       the family's class with a vocabulary head

Where no stock class computes what the engine does, that is said, and nothing is written. Only JSON, safetensors and
tokenizer.json are written; transformers need not be installed.

D width, C columns of the task
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from torch import Tensor

from trunkline.engine.adapting import merged
from trunkline.engine.foreign.families import Family, family_of
from trunkline.engine.foreign.pretrained import trunk_tensors, write
from trunkline.engine.foreign.shapes import matching_family, settings_of
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.text.template import Frame
from trunkline.engine.text.tokenizer import FILE

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

ELSE = "use --to onnx, which computes what the engine does"
SENTENCES = ("left out", "chosen")  # classes of a sentence


@dataclass(frozen=True)
class _Stock:
    """What a family's classes for tasks call their head."""

    sequence: str
    tokens: str
    span: str = ""
    """Empty: the family has no class for it, or one that does otherwise."""
    pooler: str = ""
    """The layer before the head of a sequence, tanh(x W^T + b); empty: there is none, and the head has no bias."""


_BERT = _Stock("classifier", "classifier", "qa_outputs", "bert.pooler.dense")
_ROBERTA = _Stock("classifier.out_proj", "classifier", "qa_outputs", "classifier.dense")
STOCK: Mapping[str, _Stock] = {
    "bert": _BERT,
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _ROBERTA),
    "gpt2": _Stock("score", "classifier", "qa_outputs"),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), _Stock("score", "score")),
}


def export_hugging_face(engine: "Engine", task: str, folder: Path) -> Path:
    """Writes one task as transformers loads it: `AutoModelForSequenceClassification.from_pretrained(folder)`.

    The logits are those of the engine, not divided by its temperature, which config.json names.

    Raises:
        ValueError: an unknown task, or one that no stock class computes; says why, and what does.
    """
    t = engine.place_of(task)
    model = engine.model
    if not isinstance(model, MultiTaskModel):
        raise ValueError("export: a Bi-LSTM is no model of transformers")
    trunk = model.trunk if model.adapters is None else merged(model, t)
    with torch.no_grad():
        try:
            settings, tensors = _exported(engine, model, trunk, t)
        except ValueError as error:
            hint = "" if HEADS[engine.tasks[t].head].group == "vocabulary" else f"; {ELSE}"
            raise ValueError(f"export: task '{task}': {error}{hint}") from error
    assert engine.tokenizer is not None
    padding = settings.get("pad_token_id")
    if padding is None:  # any but END, by which the classes of causal models find the last token of a text
        tokenizer = engine.tokenizer
        padding = next(id for id in (tokenizer.separator, 0, 1) if id is not None and id != tokenizer.end)
    write(folder, {**settings, "pad_token_id": padding, "eos_token_id": engine.tokenizer.end}, tensors)
    write_tokenizer(engine, t, padding, folder)
    return folder


def _exported(
    engine: "Engine", model: MultiTaskModel, trunk: Trunk, t: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors."""
    task, head = model.tasks[t], HEADS[model.tasks[t].head]
    kind = matching_family(trunk.config)
    settings = settings_of(trunk.config, kind)
    family = family_of(settings)
    settings["dtype"] = "float32"
    if not trunk.config.tie_vocabulary:
        settings["tie_word_embeddings"] = False
    assert engine.tokenizer is not None
    marks = [id for mark in engine.tokenizer.frame(len(task.text), trunk.config.causal).marks for id in mark.ids]
    if family.offset and settings["pad_token_id"] in marks:  # its positions count tokens that are not padding
        raise ValueError(f"token {settings['pad_token_id']}, {family.name}'s padding, stands around the engine's texts")
    if head.group == "vocabulary":
        return _causal(model, trunk, family, settings)
    if kind not in STOCK:
        raise ValueError(f"the classes of {family.name} have a layer of their own before the head")
    stock = STOCK[kind]
    tensors: dict[str, Tensor] = {}
    if head.pools:
        name, module = "ForSequenceClassification", stock.sequence
        tensors |= _pooler(model, t, stock)
        settings["problem_type"] = (
            "regression" if head.squared else f"{'multi' if head.several else 'single'}_label_classification"
        )
    else:
        _refuse_projection(model)
        of_span = head.group == "span"
        name, module = ("ForQuestionAnswering", stock.span) if of_span else ("ForTokenClassification", stock.tokens)
        if not module:
            raise ValueError(f"{family.name} has no class for a span like the engine's")
    weight, bias = _head(model, t)
    settings["architectures"] = [f"{family.name}{name}"]
    labels = task.labels or (SENTENCES if len(weight) == 2 and head.group == "table" else ("LABEL_0", "LABEL_1"))
    settings["id2label"] = {str(place): label for place, label in enumerate(labels[: len(weight)])}
    settings["label2id"] = {label: place for place, label in enumerate(labels[: len(weight)])}
    settings["temperature_of_logits"] = engine.temperature(t)
    tensors |= trunk_tensors(trunk, family, settings, family.prefix)
    tensors[f"{module}.weight"] = weight
    if head.pools and not stock.pooler:
        _fold(bias, weight, tensors, family)
    else:
        tensors[f"{module}.bias"] = bias
    return settings, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _head(model: MultiTaskModel, t: int) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of a task; of a regression in the labels' units."""
    if t >= model.num_small:
        weight = model.span_weight[t - model.num_small]
        return weight.clone(), weight.new_zeros(2)
    first, last = model.class_offsets[t : t + 2].tolist()
    weight, bias = model.weight[first:last].clone(), model.bias[first:last].clone()
    if model.regression[t]:
        weight, bias = weight * model.spread[t], bias * model.spread[t] + model.center[t]
    return weight, bias


def _pooler(model: MultiTaskModel, t: int, stock: _Stock) -> dict[str, Tensor]:
    if not stock.pooler:
        _refuse_projection(model)
        return {}
    if not model.pools:
        raise ValueError("the stock class has a pooler before its head, which projection: pooler trains")
    weight, bias = model.projection_weight[t].T.clone(), model.projection_bias[t].clone()
    return {f"{stock.pooler}.weight": weight, f"{stock.pooler}.bias": bias}


def _refuse_projection(model: MultiTaskModel) -> None:
    if model.activation:
        raise ValueError("a projection of the task's own stands before its head, and none in the stock class")


def _fold(bias: Tensor, weight: Tensor, tensors: dict[str, Tensor], family: Family) -> None:
    """Puts the bias (C,) of a head (C, D), which the stock class lacks, into that of the norm before it.

    W (n + d) = W n + b for the shortest d with W d = b, which there is where the rows of W are independent.
    """
    if not bias.any():
        return
    (final,) = family.tensors["final_norm"]
    name = f"{family.prefix}{final}.bias"
    if name not in tensors:
        raise ValueError(f"{family.name}'s class has no bias in its head, nor in the norm before it")
    shift = torch.linalg.lstsq(weight.double().cpu(), bias.double().cpu()[:, None], driver="gelsd").solution[:, 0]
    if not torch.allclose(weight.double().cpu() @ shift, bias.double().cpu(), rtol=0, atol=1e-6):
        raise ValueError(f"{family.name}'s class has no bias in its head, and this one fits into no norm's")
    tensors[name] = (tensors[name].double().cpu() + shift).to(tensors[name].dtype)


def _causal(
    model: MultiTaskModel, trunk: Trunk, family: Family, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not family.causal_model:
        raise ValueError(f"{family.name} has no class that writes")
    _refuse_projection(model)
    if model.vocabulary_bias is not None and bool(model.vocabulary_bias.any()):
        raise ValueError("its vocabulary head has a bias")
    settings["architectures"] = [family.causal_model]
    tensors = trunk_tensors(trunk, family, settings, family.prefix)
    if not trunk.config.tie_vocabulary:
        tensors[family.output] = model.vocabulary_weight.clone()
    return settings, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def write_tokenizer(engine: "Engine", t: int, padding: int, folder: Path) -> None:
    """tokenizer.json, whose template makes of a task's texts what the engine reads, and what transformers wants beside
    it."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    writes = HEADS[engine.tasks[t].head].group == "vocabulary"
    causal = engine.config.trunk.causal
    one = tokenizer.prompt_frame() if HEADS[engine.tasks[t].head].writes else tokenizer.frame(1, causal)
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    if tokenizer.template is None or HEADS[engine.tasks[t].head].writes:
        inner.post_processor = _template(inner, one, tokenizer.frame(2, causal))
    inner.save(str(folder / FILE))
    name_of = inner.id_to_token
    beside = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": engine.config.batch.max_length,
        "eos_token": name_of(tokenizer.end),
        "pad_token": name_of(padding),
        "padding_side": "left" if writes else "right",
        "model_input_names": [
            "input_ids",
            "attention_mask",
            *(["token_type_ids"] * (engine.config.trunk.token_types > 1)),
        ],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(beside, indent=2) + "\n", encoding="utf-8")
    if writes:
        search = engine.config.search
        generation = {
            "eos_token_id": list(tokenizer.ends),
            "pad_token_id": padding,
            "max_new_tokens": search.max_new_tokens,
            "num_beams": search.beams,
            "min_new_tokens": search.min_new_tokens or None,
            "no_repeat_ngram_size": search.no_repeat_ngram,
            "length_penalty": search.length_penalty,
        }
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _template(inner: tokenizers.Tokenizer, one: Frame, two: Frame) -> Any:
    """A post-processor that puts the marks of frames around one text and two."""
    special: dict[str, dict[str, Any]] = {}

    def written(frame: Frame) -> list[str]:
        parts: list[str] = []
        for place, marks in enumerate(frame.marks):
            if marks.ids:
                name = f"<{'-'.join(map(str, marks.ids))}>"
                tokens = [inner.id_to_token(id) for id in marks.ids]
                special[name] = {"id": name, "ids": list(marks.ids), "tokens": tokens}
                parts.append(f"{name}:{marks.types[0]}")
            if place < len(frame.types):
                parts.append(f"${'AB'[place]}:{frame.types[place]}")
        return parts

    single, pair = written(one), written(two)
    return tokenizers.processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(special.values()))
