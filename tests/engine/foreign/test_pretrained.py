"""Hugging Face checkpoints: the same numbers here and there, every bit back, a name for what is not covered."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from trunkline.engine.foreign.families import FAMILIES
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig, preset
from trunkline.engine.tasks.task import Task

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

V, POSITIONS = 96, 80
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "bos_token_id": 1, "eos_token_id": 2}
_OTHER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_OTHER |= {"max_position_embeddings": POSITIONS}
_LLAMA = {**_OTHER, "num_key_value_heads": 2}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 32}
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
    "llama-text": ("LlamaForCausalLM", {**_LLAMA, "rope_parameters": _LLAMA3}),
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
every_model = pytest.mark.parametrize("name", MODELS)


def randomise(module: torch.nn.Module) -> None:
    """Weights so large that every part of the model shows in its output."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def make(name: str, **changes) -> torch.nn.Module:
    kind = getattr(transformers, MODELS[name][0])
    model = kind(kind.config_class(vocab_size=V, **{**MODELS[name][1], **changes})).eval()
    randomise(model)
    return model


@pytest.fixture
def saved(tmp_path: Path):
    """Writes a model as transformers does."""

    def write(model: torch.nn.Module | str, **options) -> Path:
        model = make(model) if isinstance(model, str) else model
        model.save_pretrained(tmp_path / "theirs", **options)
        return tmp_path / "theirs"

    return write


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


# There and back


@every_model
def test_a_ragged_batch_is_theirs(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    lengths = [33, 80, 1, 17]
    texts = [np.random.default_rng(length).integers(4, V, length) for length in lengths]
    batch = pack([Example(0, text, np.array([0])) for text in texts], 1)
    tokens, mask = torch.zeros(2, 4, 80, dtype=torch.int64)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], mask[i, : len(text)] = torch.from_numpy(text), 1
    with torch.no_grad():
        ours = trunk(batch.tokens, batch.positions, batch.plan).split([lengths[i] for i in batch.order])
    theirs = their_batch(model, tokens, attention_mask=mask)
    for i, states_of in zip(batch.order, ours, strict=True):
        torch.testing.assert_close(states_of, theirs[i, : lengths[i]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name, (kind, _) in MODELS.items() if kind.endswith(("LMHeadModel", "CausalLM"))]
)
def test_logits_are_theirs(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    network = MultiTaskModel(trunk, [Task("prose", "language-model", ("text",))]).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(TOKENS)[None]).logits[0]
        torch.testing.assert_close(network.logits(states(trunk, TOKENS), 0), theirs, atol=1e-5, rtol=1e-5)
        # and so is what is learnt from
        example = Example(0, TOKENS, np.arange(len(TOKENS) - 1), TOKENS[1:])
        loss = network(pack([example], 1)).loss[0]
        expected = F.cross_entropy(theirs[:-1], torch.from_numpy(TOKENS[1:]), reduction="sum")
        torch.testing.assert_close(loss, expected)


@every_model
def test_hidden_states_are_theirs(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    for tokens in (TOKENS, TOKENS[:1], TOKENS[:33]):
        torch.testing.assert_close(states(trunk, tokens), their_states(model, tokens), atol=1e-5, rtol=1e-5)


@every_model
def test_a_model_comes_back_bit_for_bit(name, saved):
    """Pooler, heads and vocabulary too."""
    model = make(name)
    back = Trunk.from_pretrained(saved(model)).to_hugging_face()
    assert type(back) is type(model)
    assert not back.training
    assert same_tensors(back.state_dict(), model.state_dict())
    ours, theirs = back.config.to_dict(), model.config.to_dict()
    assert {key for key in theirs if theirs[key] != ours[key]} <= {"_name_or_path"}
    with torch.no_grad():
        for got, expected in zip(*(m(torch.from_numpy(TOKENS)[None]).to_tuple() for m in (back, model)), strict=True):
            if isinstance(expected, Tensor):
                assert torch.equal(got, expected)


@every_model
def test_a_folder_comes_back_bit_for_bit(name, saved, tmp_path):
    theirs = saved(name)
    ours = Trunk.from_pretrained(theirs).save_pretrained(tmp_path / "ours")
    assert same_tensors(load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors"))
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    model = getattr(transformers, MODELS[name][0]).from_pretrained(ours)
    torch.testing.assert_close(
        their_states(model, TOKENS), states(Trunk.from_pretrained(ours), TOKENS), atol=1e-5, rtol=1e-5
    )


def test_weights_are_copies(saved):
    trunk = Trunk.from_pretrained(saved("qwen2"))
    before = {name: weight.clone() for name, weight in trunk.state_dict().items()}
    vocabulary = trunk.vocabulary.clone()
    randomise(trunk.to_hugging_face())
    assert same_tensors(trunk.state_dict(), before)
    assert torch.equal(trunk.vocabulary, vocabulary)


def test_trained_weights_go_out(saved, tmp_path):
    trunk = Trunk.from_pretrained(saved("llama-text"))
    randomise(trunk)
    vocabulary = torch.randn(V, 32)
    model = trunk.to_hugging_face(vocabulary)
    torch.testing.assert_close(their_states(model, TOKENS), states(trunk, TOKENS), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.lm_head.weight, vocabulary)
    again = Trunk.from_pretrained(trunk.save_pretrained(tmp_path / "ours", vocabulary))
    assert same_tensors(again.state_dict(), trunk.state_dict())
    assert torch.equal(again.vocabulary, vocabulary)


def test_precision_is_the_checkpoints_or_what_is_asked_for(saved, tmp_path):
    theirs = saved(make("qwen2").bfloat16())
    trunk, wide = Trunk.from_pretrained(theirs), Trunk.from_pretrained(theirs, dtype=torch.float32)
    assert {p.dtype for p in trunk.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*wide.parameters(), wide.vocabulary)} == {torch.float32}
    assert same_tensors(wide.bfloat16().state_dict(), trunk.state_dict())
    assert trunk.to_hugging_face().dtype == torch.bfloat16
    ours = trunk.save_pretrained(tmp_path / "ours")
    assert same_tensors(load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors"))


def test_dropout_is_the_checkpoints_or_what_is_asked_for(saved):
    theirs = saved(make("bert", hidden_dropout_prob=0.3))
    trunk = Trunk.from_pretrained(theirs)
    assert (trunk.config.dropout, trunk.blocks[0].dropout.p, trunk.training) == (0.3, 0.3, False)
    assert Trunk.from_pretrained(theirs, dropout=0.0).blocks[0].dropout.p == 0.0


def test_shards_are_read_together(saved):
    model = make("llama-text")
    theirs = saved(model, max_shard_size="20KB")
    assert len(list(theirs.glob("model-*.safetensors"))) > 2
    assert same_tensors(Trunk.from_pretrained(theirs).to_hugging_face().state_dict(), model.state_dict())


def test_old_checkpoints_are_read(saved):
    """Names of TensorFlow, masks among the weights, settings as transformers 4 wrote them."""
    bert = saved("bert-pretraining")
    expected = Trunk.from_pretrained(bert).state_dict()
    tensors = load_file(bert / "model.safetensors")
    renamed = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for name, x in tensors.items()
    }
    change_tensors(bert, {**dict.fromkeys(tensors), **renamed, "bert.embeddings.position_ids": torch.arange(80)[None]})
    assert same_tensors(Trunk.from_pretrained(bert).state_dict(), expected)

    gpt2 = saved("gpt2")
    mask = torch.ones(80, 80, dtype=torch.uint8).tril()
    change_tensors(gpt2, {"h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)})
    assert torch.equal(
        load_file(Trunk.from_pretrained(gpt2).save_pretrained(gpt2) / "model.safetensors")["h.0.attn.bias"], mask
    )

    llama = saved(make("llama-text"))
    expected = Trunk.from_pretrained(llama).config
    scaling = {key: value for key, value in _LLAMA3.items() if key not in ("rope_type", "rope_theta")}
    change(llama, rope_parameters=..., rope_theta=500.0, rope_scaling={"type": "llama3", **scaling}, head_dim=...)
    assert Trunk.from_pretrained(llama).config == replace(expected, head_dim=None)


# Trunks of our own

_SMALL = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": POSITIONS}
_GATED = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "norm_eps": 1e-6}
_LOCAL = {"positions": "rotary", "embedding_norm": True, "first_norm": False, "activation": "geglu"}
OWN = {
    "GPT2LMHeadModel": preset("small", **_SMALL, dropout=0.2),
    "BertModel": preset("bert-base", **_SMALL),
    "LlamaForCausalLM": TrunkConfig(**_SMALL, **_GATED, rope_factor=4.0, rope_original_positions=32),
    "LlamaModel": TrunkConfig(**_SMALL, **_GATED | {"bias": True}, num_kv_heads=2, head_dim=6, tie_vocabulary=False),
    "Qwen2ForCausalLM": TrunkConfig(**_SMALL, **_GATED, qkv_bias=True, rope_factor=2.0),
    "Qwen3ForCausalLM": TrunkConfig(**_SMALL, **_GATED, num_kv_heads=1, qk_norm=True, intermediate_size=40),
    "RobertaModel": preset("bert-base", **_SMALL, position_offset=2),
    "ModernBertModel": TrunkConfig(**_SMALL, **_LOCAL, causal=False, window=5),
    "ModernBertDecoderModel": TrunkConfig(**_SMALL, **_LOCAL, rope_theta_local=70.0),
    "ModernBertDecoderForCausalLM": TrunkConfig(**_SMALL, **_LOCAL, last_layer=True, window=5, global_every=2),
}


@pytest.mark.parametrize("architecture", OWN)
def test_a_trunk_of_ours_goes_out_and_comes_back(architecture, tmp_path):
    trunk = Trunk(OWN[architecture]).eval()
    randomise(trunk)
    model = trunk.to_hugging_face()
    assert type(model).__name__ == architecture
    torch.testing.assert_close(their_states(model, TOKENS), states(trunk, TOKENS), atol=1e-5, rtol=1e-5)
    if architecture.endswith(("LM", "LMHeadModel")):
        expected = states(trunk, TOKENS) @ trunk.tokens.weight.T
        with torch.no_grad():
            torch.testing.assert_close(model(torch.from_numpy(TOKENS)[None]).logits[0], expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "theirs", trunk.save_pretrained(tmp_path / "ours")):
        back = Trunk.from_pretrained(folder)
        assert same_tensors(back.state_dict(), trunk.state_dict())
        assert torch.equal(states(back, TOKENS), states(trunk, TOKENS))


def test_an_untied_vocabulary_makes_a_model_of_texts():
    trunk, vocabulary = Trunk(OWN["LlamaModel"]), torch.randn(V, 32)
    model = trunk.to_hugging_face(vocabulary)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(model.lm_head.weight, vocabulary)
    with pytest.raises(ValueError, match="vocabulary is tied to its embedding"):
        Trunk(OWN["GPT2LMHeadModel"]).to_hugging_face(vocabulary)


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        (preset("tiny"), "the nearest, gpt2, lacks positions 'rotary'"),
        (preset("small", bias=False), "the nearest, gpt2, lacks bias False"),
        (preset("small", qkv_bias=False), "the nearest, gpt2, lacks qkv_bias False"),
        (preset("small", causal=False, num_kv_heads=3), "the nearest, gpt2, lacks num_kv_heads 3, causal False"),
        (preset("small", head_dim=32), "the nearest, gpt2, lacks head_dim 32"),
        (preset("small", exact_match=True), "the nearest, gpt2, lacks exact_match True"),
        (preset("bert-base", activation="swiglu"), "the nearest, bert, lacks activation 'swiglu'"),
        (TrunkConfig(**_SMALL, **_GATED | {"activation": "gelu"}), "the nearest, llama, lacks activation 'gelu'"),
    ],
)
def test_a_shape_that_nobody_has_is_told_from_the_nearest(config, lacks):
    with torch.device("meta"):
        trunk = Trunk(config)
    with pytest.raises(
        ValueError, match="none of gpt2, bert, llama, qwen2, qwen3, mistral, roberta, .* has this"
    ) as caught:
        trunk.to_hugging_face()
    assert str(caught.value).endswith(lacks)


# A larger vocabulary


@pytest.mark.parametrize("name", ["gpt2-text", "llama-text", "bert-pretraining"])
def test_vocabulary_grows(name, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(saved(model))
    before, vocabulary = states(trunk, TOKENS), trunk.vocabulary
    trunk.grow_vocabulary(V - 5)
    assert trunk.config.vocab_size == V
    trunk.grow_vocabulary(V + 3)
    assert torch.equal(states(trunk, TOKENS), before)
    assert states(trunk, np.array([V, V + 2])).isfinite().all()
    assert trunk.tokens.weight.shape == (V + 3, 32)
    new, old = trunk.tokens.weight[V:], trunk.tokens.weight[:V]
    assert len({tuple(row) for row in new.tolist()}) == 3
    assert (new - old.mean(0)).abs().max() < 0.1
    larger = trunk.to_hugging_face()
    assert larger.config.vocab_size == V + 3
    assert larger.get_output_embeddings().weight.shape == (V + 3, 32)
    with torch.no_grad():
        logits, expected = (m(torch.from_numpy(TOKENS)[None])[0][0] for m in (larger, model))
    assert logits.shape == (POSITIONS, V + 3)
    torch.testing.assert_close(logits[:, :V], expected)
    if vocabulary is not None:
        assert torch.equal(trunk.vocabulary[:V], vocabulary)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type 'mixtral' is not covered; covered are gpt2, bert, llama"),
        ("llama", {"model_type": ...}, "model_type None is not covered"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False, other than True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True, other than False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True, other than False"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu', other than gelu, gelu_new"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder True"),
        ("bert", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', other than silu"),
        ("llama", {"attention_bias": True}, "biases in attention or in the MLP alone"),
        ("llama", {"mlp_bias": True}, "biases in attention or in the MLP alone"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'yarn'"),
        ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quant_method': 'fp8'}"),
        ("mistral", {"sliding_window": 79}, "sliding_window 79"),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 4097}, "sliding_window 4096"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ...}, "sliding_window 16"),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types linear_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias True, other than False"),
    ],
)
def test_an_option_that_is_not_covered_is_named(name, settings, words, saved):
    folder = change(saved(name), **settings)
    message = error_of(folder)
    assert words in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {"sliding_window": POSITIONS}),  # as far as any sequence reaches
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "layer_types": ...}),
    ],
)
def test_a_window_that_hides_nothing_is_no_obstacle(name, settings, saved):
    model = make(name)
    trunk = Trunk.from_pretrained(change(saved(model), **settings))
    torch.testing.assert_close(states(trunk, TOKENS), their_states(model, TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.layers.1.self_attn.k_proj.weight": None}, "1 tensors are missing: model.layers.1.self_attn.k_proj"),
        ({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}, "no place in a trunk: model.layers.1.self_attn.q_"),
        ({"model.layers.2.mlp.down_proj.weight": torch.ones(8)}, "no place in a trunk: model.layers.2.mlp.down_proj"),
        ({"model.embed_tokens.weight": torch.zeros(9, 32)}, "tokens.weight: expected [96, 32], got [9, 32]"),
    ],
)
def test_tensors_that_are_not_those_of_config_json_are_named(tensors, words, saved):
    assert words in error_of(change_tensors(saved("llama-text"), tensors))


def test_a_tied_vocabulary_must_be_the_embedding(saved):
    folder = saved("qwen3")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert Trunk.from_pretrained(change_tensors(folder, {"lm_head.weight": embedding.clone()})).vocabulary is None
    message = error_of(change_tensors(folder, {"lm_head.weight": embedding + 1}))
    assert "lm_head.weight differs from the embedding" in message


def test_nothing_is_unpickled(saved):
    folder = saved("gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = error_of(folder)
    for words in (
        "neither model.safetensors",
        "pytorch_model.bin would have to be unpickled",
        "save it as safetensors",
    ):
        assert words in message


def test_damaged_files_are_named(saved):
    folder = saved("llama-text", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    assert f"{shards[0]} is missing or damaged" in error_of(folder)
    save_file({"model.norm.weight": torch.ones(32)}, shards[0])
    assert "model.safetensors.index.json lists " in error_of(folder)
    shards[0].unlink()
    assert f"{shards[0]} is missing or damaged" in error_of(folder)
    (folder / "config.json").write_text("{")
    assert f"{folder / 'config.json'} is not JSON" in error_of(folder)
    (folder / "config.json").unlink()
    assert "neither config.json, of a checkpoint, nor engine.json" in error_of(folder)


def test_a_class_that_transformers_lacks_is_named(saved):
    trunk = Trunk.from_pretrained(change(saved("gpt2"), architectures=["pipeline"]))
    with pytest.raises(ValueError, match="transformers has no GPT2 model 'pipeline'"):
        trunk.to_hugging_face()


# The hub


def test_a_hub_id_is_downloaded_without_anything_that_runs(saved, monkeypatch):
    asked = {}

    def download(source: str, allow_patterns: list[str]) -> str:
        asked.update(source=source, patterns=allow_patterns)
        return str(folder)

    folder = saved("gpt2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Trunk.from_pretrained("somebody/model").config.vocab_size == V
    assert asked["source"] == "somebody/model"
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked["patterns"])


def test_without_a_connection_the_folder_that_would_serve_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("somebody/model-that-is-not-here", "no/hub/id"):
        message = error_of(source)
        assert f"'{source}' is no folder, and not to be had from the hub: " in message
        assert "a local folder with config.json and model.safetensors serves as well" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = error_of("somebody/model")
    assert "the hub needs trunkline[hub], which is not installed; a local folder with config.json" in message


def test_every_family_is_tried():
    tried = {getattr(transformers, kind).config_class.model_type for kind, _ in MODELS.values()}
    assert tried == FAMILIES.keys()
