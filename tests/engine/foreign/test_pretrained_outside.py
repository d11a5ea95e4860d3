"""A checkpoint's folder is not believed: odd settings, files outside of it and wrong tensors end in a ValueError."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trunkline import Trunk, TrunkConfig
from trunkline.engine.foreign.families import FAMILIES
from trunkline.engine.foreign.pretrained import INDEX, WEIGHTS, digest
from trunkline.engine.foreign.shapes import settings_of, trunk_config

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 32}
GATED = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "tie_vocabulary": False}
KINDS = {"gpt2": {"activation": "gelu_tanh"}, "llama": GATED, "bert": {
    "norm_position": "post", "embedding_norm": True, "causal": False, "token_types": 2,
}}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    trunk = Trunk(TrunkConfig(**SIZES, **KINDS[request.param]))
    return trunk.save_pretrained(tmp_path_factory.mktemp(request.param))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the callers check the words)
        Trunk.from_pretrained(folder)
    assert str(folder) in str(refused.value)
    return str(refused.value)


ODD = (None, True, 0, -1, 1.5, 10**9, 10**30, 1e400, "", "32", "x" * 10_000, [], [[1]], ["a"], {}, {"x": 1}, [None])
ODD_KEYS = """rope_parameters rope_scaling rope_theta sliding_window layer_types mlp_bias attention_bias
    use_sliding_window partial_rotary_factor quantization_config head_dim architectures pad_token_id local_attention
    decoder_bias trunk global_attn_every_n_layers global_rope_theta local_rope_theta is_decoder""".split()
ROPE = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_settings_are_taken_or_refused_with_a_value_error(family):
    settings = settings_of(TrunkConfig(**SIZES), family)
    changes = [{key: odd} for key in (*settings, *ODD_KEYS) for odd in ODD]
    for key in (*ROPE, "original_max_position_embeddings"):
        changes += [{"rope_parameters": {**ROPE, key: odd}} for odd in ODD]
        changes += [{"rope_parameters": {"full_attention": {**ROPE, key: odd}}} for odd in ODD]
    changes += [{"rope_parameters": {"full_attention": odd}} for odd in ODD]
    refused = []
    for change in changes:
        try:
            trunk_config({**settings, **change})
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert max(map(len, refused)) < 1000


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '"x"', "{", "\x00", "[" * 100_000, "{}", '{"model_type": ["gpt2"]}']
)
def test_settings_that_are_none_are_refused(copy, content):
    (copy / "config.json").write_text(content)
    refusal(copy)


def indexed(folder: Path, files: object) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "moved.safetensors")
    weight_map = dict.fromkeys(names, files) if isinstance(files, str) else files
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_of_files_in_the_folder_is_followed(copy):
    indexed(copy, "moved.safetensors")
    Trunk.from_pretrained(copy)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "{absolute}", "sub/../moved.safetensors", ".", "", "moved.bin"]
)
def test_an_index_does_not_lead_out_of_its_folder(copy, tmp_path, name):
    shutil.copy(copy / WEIGHTS, tmp_path / "secret.safetensors")
    indexed(copy, name.format(absolute=tmp_path / "secret.safetensors"))
    assert "which is no .safetensors file in its folder" in refusal(copy)
    with pytest.raises(ValueError, match="no .safetensors file in its folder"):
        digest(str(copy))


def test_a_pipe_is_not_waited_for(copy):
    indexed(copy, "pipe.safetensors")
    os.mkfifo(copy / "pipe.safetensors")
    assert "pipe.safetensors is missing or damaged" in refusal(copy)


@pytest.mark.parametrize("weight_map", [None, [], 3, {}, {"a": 3}, {"a": None}, {"a": ["x"]}])
def test_an_index_that_is_none_is_refused(copy, weight_map):
    indexed(copy, weight_map)
    assert "has no weight_map" in refusal(copy)


@pytest.mark.parametrize("change", [
    lambda w: w.to(torch.int32), lambda w: w[:-1], lambda w: w.flatten(), lambda w: w.new_zeros(0), lambda w: w[None],
])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(copy, change):
    tensors = load_file(copy / WEIGHTS)
    for name in tensors:
        if tensors[name].ndim > 1 and "lm_head" not in name:
            save_file({**tensors, name: change(tensors[name]).contiguous()}, copy / WEIGHTS)
            assert len(refusal(copy)) < 1000


def test_more_layers_than_tensors_take_no_time(copy):
    settings = json.loads((copy / "config.json").read_text())
    key = "n_layer" if "n_layer" in settings else "num_hidden_layers"
    (copy / "config.json").write_text(json.dumps({**settings, key: 4000}))
    assert "4000 layers, but" in refusal(copy)


def test_rope_settings_without_a_key(tmp_path):
    Trunk(TrunkConfig(**SIZES, **GATED)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = trunk_config({**settings, "rope_parameters": rope})
    assert config.rope_original_positions == settings["max_position_embeddings"]  # as transformers has it
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        with pytest.raises(ValueError, match=f"rope_type 'llama3' without {key}"):
            trunk_config({**settings, "rope_parameters": {k: v for k, v in rope.items() if k != key}})
