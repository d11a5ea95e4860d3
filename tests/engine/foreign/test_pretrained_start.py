"""A run that starts from another's weights: a Hugging Face checkpoint or a finished run."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from conftest import tiny_rows, write_jsonl
from trunkline import Engine, Trunk, TrunkConfig
from trunkline.engine.foreign import pretrained
from trunkline.engine.network.trunk import preset
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.config_file import config_from, load_config

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 265  # bytes, three special tokens, six merges
FIELDS = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 160}
GATED = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "tie_vocabulary": False}
TASKS = {
    "colour": {"head": "classify", "text": ["text"], "label": "label", "labels": ["red", "black", "white", "brown"]},
    "prose": {"head": "language-model", "text": ["text"]},
}


def foreign(folder: Path, config: TrunkConfig, vocabulary: torch.Tensor | None = None) -> Path:
    """A checkpoint with a tokenizer that has no separator and no summary token of ours."""
    Trunk(config).save_pretrained(folder, vocabulary)
    tokenizer = Tokenizer.train(["the red cat is in the barn"] * 3, VOCABULARY)
    settings = json.loads(tokenizer.inner.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] == "<|end|>"]
    for name in ("<|separator|>", "<|summary|>"):
        settings["model"]["vocab"][f"unused {name[2:5]}"] = settings["model"]["vocab"].pop(name)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return foreign(tmp_path / "checkpoint", preset("small", **FIELDS, dropout=0.3))


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    """Of a run of one step."""
    for name in TASKS:
        write_jsonl(tmp_path / f"{name}.jsonl", tiny_rows(name, 30, seed=0))
    return {
        "tasks": [
            {"name": name, "train": f"{name}.jsonl", "validation": f"{name}.jsonl", **TASKS[name]} for name in TASKS
        ],
        "base": str(tmp_path),
        "run": str(tmp_path / "run"),
        "steps": 1,
        "batch": {"tokens": 256, "max_length": 100},
        "evaluation": {"examples": 4},
        "device": "cpu",
    }


def started(settings: dict, **changes) -> Engine:
    """An engine with the weights that it starts from."""
    engine = Engine.from_config(config_from({**settings, **changes}))
    engine.build(Tokenizer.load(engine.config.tokenizer or engine.config.init))
    return engine


def test_a_run_starts_from_a_checkpoint(settings, checkpoint):
    engine = started(settings, init=str(checkpoint))
    theirs = Trunk.from_pretrained(checkpoint)
    vocabulary = engine.tokenizer.vocab_size
    assert vocabulary == VOCABULARY + 2  # SEPARATOR and SUMMARY
    assert engine.config.trunk == replace(theirs.config, vocab_size=vocabulary)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(engine.model.trunk.state_dict()[name][: len(weight)], weight), name
    assert torch.equal(engine.model.vocabulary_weight, engine.model.trunk.tokens.weight)
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_it_trains_saves_and_goes_out_again(settings, checkpoint):
    config = config_from({**settings, "init": str(checkpoint)})
    Engine.from_config(config).fit()
    run = Path(config.run)
    engine = Engine.load(run, device="cpu")
    assert engine.tokenizer.digest == Tokenizer.load(str(checkpoint)).digest
    trained, before = engine.model.trunk.state_dict(), Trunk.from_pretrained(checkpoint).state_dict()
    moved = (trained["blocks.0.qkv.weight"] - before["blocks.0.qkv.weight"]).abs()
    assert 0 < moved.max() < 0.01
    assert load_config(run / "config.yaml").trunk == replace(engine.config.trunk, vocab_size=VOCABULARY)
    model = pytest.importorskip("transformers") and engine.model.trunk.to_hugging_face()
    assert torch.equal(model.lm_head.weight, trained["tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_vocabulary_of_its_own_is_the_start_of_ours(settings, tmp_path, dtype):
    vocabulary = torch.randn(VOCABULARY, 32)
    folder = foreign(tmp_path / "llama", TrunkConfig(**FIELDS, **GATED), vocabulary)
    Trunk.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    engine = started(settings, init=str(folder))
    expected = vocabulary.to(dtype).float()
    assert torch.equal(engine.model.vocabulary[:VOCABULARY], expected)
    assert engine.model.vocabulary.shape == (VOCABULARY + 2, 32)
    again = Trunk.from_pretrained(engine.save(tmp_path / "saved"))
    assert torch.equal(again.vocabulary, engine.model.vocabulary)
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_a_run_starts_from_a_finished_run(settings, checkpoint, tmp_path):
    first = {**settings, "tasks": settings["tasks"][:1], "init": str(checkpoint), "run": str(tmp_path / "first")}
    Engine.from_config(config_from(first)).fit()
    theirs = Engine.load(first["run"], device="cpu")
    engine = started(settings, init=first["run"])
    assert engine.tokenizer.digest == theirs.tokenizer.digest
    assert engine.config.trunk == theirs.config.trunk
    for name, weight in theirs.model.trunk.state_dict().items():
        assert torch.equal(engine.model.trunk.state_dict()[name], weight), name
    assert not torch.equal(engine.model.weight, theirs.model.weight)  # heads are new
    from_engine = started(settings, init=str(theirs.save(tmp_path / "engine")))
    assert torch.equal(from_engine.model.trunk.tokens.weight, engine.model.trunk.tokens.weight)


def test_only_the_dropout_may_be_another(settings, checkpoint):
    given = {**settings, "init": str(checkpoint)}
    assert config_from(given).trunk.dropout == 0.3
    assert started(given, trunk={"dropout": 0.0, "hidden_size": 32}).model.trunk.dropout.p == 0.0
    with pytest.raises(ValueError, match=r"trunk.num_layers is 3, but 2 in '.*checkpoint', which init starts from"):
        config_from({**given, "trunk": {"num_layers": 3}})
    with pytest.raises(ValueError, match="trunk.hidden_size is 768, but 32"):
        config_from({**given, "trunk": "small"})
    with pytest.raises(ValueError, match=r"unknown key 'trunk.droput'; did you mean 'trunk.dropout'\?"):
        config_from({**given, "trunk": {"droput": 0.1}})
    with pytest.raises(ValueError, match=r"max_length 200 .* need more than trunk.max_positions 160"):
        config_from({**given, "batch": {"tokens": 256, "max_length": 200}})
    with pytest.raises(ValueError, match="neither config.json, of a checkpoint, nor engine.json"):
        config_from({**given, "init": settings["base"]})


def test_from_python(settings, checkpoint):
    config = config_from(settings)
    given = {"tasks": config.all_tasks, "batch": config.batch, "init": str(checkpoint)}
    shape = pretrained.shape_of(str(checkpoint))
    assert Engine(**given).config.trunk == shape
    assert Engine(replace(shape, dropout=0.0), **given).config.trunk == replace(shape, dropout=0.0)
    with pytest.raises(ValueError, match="trunk.hidden_size is 256, but 32"):
        Engine("tiny", **given)
    with pytest.raises(ValueError, match="two starts: give one of them"):
        Engine(Trunk.from_pretrained(checkpoint), **given)
    assert Engine(tasks=config.all_tasks).config.trunk == preset("tiny")


def test_a_tokenizer_of_its_own_is_taken(settings, checkpoint, tmp_path):
    Tokenizer.train(["a cow"], 280).save(tmp_path)
    engine = started(settings, init=str(checkpoint), tokenizer=str(tmp_path / "tokenizer.json"))
    assert engine.tokenizer.digest == Tokenizer.load(str(tmp_path)).digest
    assert engine.config.trunk.vocab_size == VOCABULARY  # it is smaller than the checkpoint's


def test_a_run_resumes_from_its_own_start_only(settings, checkpoint, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "init": str(checkpoint), "evaluation": {"every": 1, "examples": 4}}))
    Engine.from_config(load_config(path)).fit()
    moved = checkpoint.rename(tmp_path / "elsewhere")
    resumed = Engine.from_config(load_config(path, [f"init={moved}"]))
    resumed.fit(resume=True)
    assert torch.equal(
        resumed.model.trunk.state_dict()["blocks.1.qkv.weight"],
        Engine.load(settings["run"], device="cpu").model.trunk.state_dict()["blocks.1.qkv.weight"],
    )
    foreign(moved, preset("small", **FIELDS, dropout=0.3))
    with pytest.raises(
        ValueError, match="a run cannot go on with other settings: init: [0-9a-f]{64} in the checkpoint"
    ):
        Engine.from_config(load_config(path, [f"init={moved}"])).fit(resume=True)


def test_digest_is_of_weights_and_settings(checkpoint, tmp_path):
    first = pretrained.digest(str(checkpoint))
    moved = checkpoint.rename(tmp_path / "elsewhere")
    assert pretrained.digest(str(moved)) == first
    Trunk.from_pretrained(moved).save_pretrained(moved)
    (moved / "tokenizer.json").write_text("{}")
    assert pretrained.digest(str(moved)) == first
    path = moved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resid_pdrop": 0.0}))
    assert pretrained.digest(str(moved)) != first


def test_settings_keep_where_the_start_is(settings, checkpoint):
    config = config_from({**settings, "init": str(checkpoint)})
    assert asdict(config)["init"] == str(checkpoint)
    assert config_from(settings).init == ""
