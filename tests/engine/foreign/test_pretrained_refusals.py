"""Checkpoints that are not covered, do not fit or cannot be had: each fault has a name."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import POSITIONS, TOKENS, V, change, change_tensors, error_of, make, states, their_states
from trunkline.engine.network.trunk import Trunk

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


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
