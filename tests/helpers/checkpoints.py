"""Small Hugging Face checkpoints of every family that a trunk is read from, and what they compute."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk

transformers = pytest.importorskip("transformers")

V, POSITIONS = 96, 80
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "bos_token_id": 1, "eos_token_id": 2}
_OTHER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_OTHER |= {"max_position_embeddings": POSITIONS}
_LLAMA = {**_OTHER, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
_ROBERTA = {**_OTHER, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1}
_MODERN = {**_OTHER, "num_hidden_layers": 4, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1}
_MODERN |= {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_THETAS = {
    kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(_KINDS, (500.0, 50.0), strict=False)
}
MODELS = {
    "gpt2": ("GPT2Model", {**_GPT2, "n_inner": 48}),
    "gpt2-text": ("GPT2LMHeadModel", _GPT2),
    "gpt2-gelu": ("GPT2LMHeadModel", {**_GPT2, "activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt2-classes": ("GPT2ForSequenceClassification", {**_GPT2, "num_labels": 3}),
    "llama": ("LlamaModel", {**_LLAMA, "head_dim": 16}),
    "llama-text": ("LlamaForCausalLM", {**_LLAMA, "rope_parameters": LLAMA3}),
    "llama-biases": (
        "LlamaForCausalLM",
        {**_LLAMA, "rope_parameters": _LINEAR, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2ForCausalLM", {**_LLAMA, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "sliding_window": None}),
    "roberta": ("RobertaModel", _ROBERTA),
    "roberta-masks": ("RobertaForMaskedLM", {**_ROBERTA, "type_vocab_size": 1}),
    "roberta-classes": ("RobertaForSequenceClassification", {**_ROBERTA, "num_labels": 3}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {**_ROBERTA, "pad_token_id": 3, "max_position_embeddings": POSITIONS + 4}),
    "camembert": ("CamembertModel", _ROBERTA),
    "modernbert": ("ModernBertModel", _MODERN),
    "modernbert-masks": ("ModernBertForMaskedLM", {**_MODERN, "norm_bias": True, "layer_types": _KINDS}),
    "modernbert-classes": (
        "ModernBertForSequenceClassification",
        {**_MODERN, "attention_bias": True, "mlp_bias": True},
    ),
    "modernbert-decoder": ("ModernBertDecoderModel", {**_MODERN, "layer_types": _KINDS}),
    "modernbert-decoder-text": ("ModernBertDecoderForCausalLM", {**_MODERN, "rope_parameters": _THETAS}),
    "modernbert-decoder-classes": ("ModernBertDecoderForSequenceClassification", _MODERN),
    "bert": ("BertModel", _OTHER),
    "bert-pretraining": ("BertForPreTraining", _OTHER),
    "bert-classes": ("BertForSequenceClassification", {**_OTHER, "num_labels": 3, "hidden_act": "gelu_new"}),
}
OFFSET = ("roberta", "xlm-roberta", "camembert")  # positions begin after that of padding


def randomise(module: torch.nn.Module) -> None:
    """Weights so large that every part of the model shows in its output."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def make(name: str, **changes) -> torch.nn.Module:
    kind = getattr(transformers, MODELS[name][0])
    model = kind(kind.config_class(**{"vocab_size": V, **MODELS[name][1], **changes})).eval()
    randomise(model)
    return model


def change(folder: Path, **settings) -> Path:
    """Changes config.json; a key with the value ... goes."""
    path = folder / "config.json"
    changed = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    return folder


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> Path:
    """Changes model.safetensors; a tensor that is None goes."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return folder


def error_of(source: str | Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        Trunk.from_pretrained(source)
    return str(caught.value)


def states(trunk: Trunk, tokens: np.ndarray) -> Tensor:
    batch = pack([Example(0, tokens, np.array([0]))], 1)
    with torch.no_grad():
        return trunk(batch.tokens, batch.positions, batch.plan)


def their_states(model: torch.nn.Module, tokens: np.ndarray) -> Tensor:
    return their_batch(model, torch.from_numpy(tokens)[None])[0]


def their_batch(model: torch.nn.Module, tokens: Tensor, **masks) -> Tensor:
    """What a head is put on, (rows, tokens, D)."""
    if model.config.model_type in OFFSET:  # where a random token may be that of padding
        masks["position_ids"] = (torch.arange(tokens.shape[1]) + model.config.pad_token_id + 1).expand(tokens.shape)
    with torch.no_grad():
        states = model.base_model(tokens, **masks).last_hidden_state
        last = getattr(model, "lm_head", getattr(model, "head", None))
        return last(states) if model.config.model_type.startswith("modernbert") and last else states


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


TOKENS = np.random.default_rng(0).integers(V, size=POSITIONS)
