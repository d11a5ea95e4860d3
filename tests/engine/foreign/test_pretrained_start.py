"""A run that starts from another's weights: a Hugging Face checkpoint or a finished run."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import yaml

from conftest import tiny_rows, write_jsonl
from trunkline import Engine, Trunk, TrunkConfig
from trunkline.engine.config import Config
from trunkline.engine.foreign import pretrained
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import preset
from trunkline.engine.settings import Batch
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.config_file import config_from, load_config
from trunkline.training.data.corpus import load_corpus
from trunkline.training.estimate import step_memory

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 265  # bytes, three special tokens, six merges
FIELDS = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 160}
GATED = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "tie_vocabulary": False}
TASKS = {
    "colour": {"head": "classify", "text": ["text"], "label": "label", "labels": ["red", "black", "white", "brown"]},
    "prose": {"head": "language-model", "text": ["text"]},
}


# the first layout adds SEPARATOR and SUMMARY to a vocabulary
each_layout = pytest.mark.parametrize(("layout", "added"), [(1, 2), (2, 0)])


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
    source = engine.config.tokenizer or engine.config.init
    engine.build(Tokenizer.load(source, layout=engine.config.layout, grows=False))
    return engine


@each_layout
def test_a_run_starts_from_a_checkpoint(settings, checkpoint, layout, added):
    engine = started(settings, init=str(checkpoint), layout=layout)
    theirs = Trunk.from_pretrained(checkpoint)
    vocabulary = engine.tokenizer.vocab_size
    assert vocabulary == VOCABULARY + added
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
    assert engine.tokenizer.digest == Tokenizer.load(str(checkpoint), grows=False).digest
    assert engine.tokenizer.vocab_size == VOCABULARY  # the checkpoint has learnt no other token
    trained, before = engine.model.trunk.state_dict(), Trunk.from_pretrained(checkpoint).state_dict()
    moved = (trained["blocks.0.qkv.weight"] - before["blocks.0.qkv.weight"]).abs()
    assert 0 < moved.max() < 0.01
    assert load_config(run / "config.yaml").trunk == replace(engine.config.trunk, vocab_size=VOCABULARY)
    model = pytest.importorskip("transformers") and engine.model.trunk.to_hugging_face()
    assert torch.equal(model.lm_head.weight, trained["tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@each_layout
def test_a_vocabulary_of_its_own_is_the_start_of_ours(settings, tmp_path, dtype, layout, added):
    vocabulary = torch.randn(VOCABULARY, 32)
    folder = foreign(tmp_path / "llama", TrunkConfig(**FIELDS, **GATED), vocabulary)
    Trunk.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    engine = started(settings, init=str(folder), layout=layout)
    expected = vocabulary.to(dtype).float()
    assert torch.equal(engine.model.vocabulary[:VOCABULARY], expected)
    assert engine.model.vocabulary.shape == (VOCABULARY + added, 32)
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
    assert torch.equal(engine.model.weight, theirs.model.weight)  # so are the heads, of the same tasks
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
    torch.manual_seed(1)  # other weights
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


# A tokenizer and a checkpoint that do not belong together


@pytest.mark.parametrize("entries", [VOCABULARY - 1, VOCABULARY + 1025])
def test_a_tokenizer_of_another_checkpoint_is_found_before_anything_is_encoded(settings, tmp_path, entries):
    folder = foreign(tmp_path / "other", preset("small", **FIELDS | {"vocab_size": entries}))
    config = config_from({**settings, "init": str(folder)})
    words = f"tokenizer of '{folder}' has {VOCABULARY} entries, the vocabulary of the checkpoint '{folder}' {entries}"
    with pytest.raises(ValueError, match=words):
        load_corpus(config, tell=pytest.fail)


def test_a_vocabulary_that_is_rounded_up_is_no_other(settings, tmp_path):
    folder = foreign(tmp_path / "padded", preset("small", **FIELDS | {"vocab_size": VOCABULARY + 1024}))
    corpus = load_corpus(config_from({**settings, "init": str(folder)}))
    assert corpus.tokenizer.vocab_size == VOCABULARY
    assert load_corpus(config_from({**settings, "init": str(folder), "layout": 1})).tokenizer.added == 2


# The pooler


def bert(folder: Path, **changes) -> Path:
    """A classifier of BERT's kind, with a tokenizer of its kind."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=100, max_position_embeddings=40, **sizes, **changes)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(96)}, "w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["[CLS]", "[SEP]", "[PAD]", "[UNK]"])
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 97), ("[CLS]", 96))
    inner.save(str(folder / "tokenizer.json"))
    return folder


def test_answers_of_a_classifier_are_those_of_transformers(tmp_path):
    """The template, token types, the pooler and a head, from text to logits: with the head copied they are all there
    is."""
    transformers = pytest.importorskip("transformers")
    folder = bert(tmp_path / "bert", num_labels=3)
    labels = ("no", "yes", "maybe")
    tasks = [Task(name, "classify", ("a", "b")[:n], "label", labels) for n, name in ((1, "one"), (2, "two"))]
    tasks.append(Task("tags", "tag", ("a",), "label", labels))
    settings = {"trunk": pretrained.shape_of(str(folder)), "batch": Batch(tokens=64, max_length=20), "device": "cpu"}
    engine = Engine.from_config(Config(tuple(tasks), init=str(folder), projection="pooler", **settings))
    engine.build(Tokenizer.load(str(folder), grows=False))
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        for place in (0, 3):
            engine.model.weight[place : place + 3] = theirs.classifier.weight
            engine.model.bias[place : place + 3] = theirs.classifier.bias
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    texts = [(" ".join(f"w{i}" for i in range(1, n)), " ".join(f"w{i}" for i in range(50, 90 - n))) for n in (2, 9, 15)]
    for task, columns in ((0, 1), (1, 2)):
        laid = [Layout(engine.tokenizer, 20, causal=False).lay(text[:columns]) for text in texts]
        batch = pack([Example(task, text.tokens, np.array([0]), types=text.types) for text in laid], 3, 64)
        ours = engine.model.eval().logits(engine.model.hidden(batch), task)[np.argsort(batch.order)]
        inputs = fast(
            *zip(*[text[:columns] for text in texts], strict=True) if columns == 2 else ([text[0] for text in texts],),
            truncation=True,
            max_length=20,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=True,
        )
        assert inputs["token_type_ids"].any() == (columns == 2)
        torch.testing.assert_close(ours, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
    # what a step on this model would take is found without its weights, too
    batch = pack([Example(1, text.tokens, np.array([0]), types=text.types) for text in laid], 3, 64)
    assert step_memory(engine.config, [batch], "cpu").peak > 0
    # a head that looks at words starts from the trunk as it is
    x = torch.randn(5, 32)
    offsets = torch.tensor([0, 0, 0, 5], dtype=torch.int32)
    assert torch.equal(engine.model.project(x, offsets), x)
    assert engine.save(tmp_path / "saved")
    loaded = Engine.load(tmp_path / "saved", device="cpu")
    assert loaded.predict(texts, ["two"]) == engine.predict(texts, ["two"])
    assert torch.equal(loaded.model.project(x, offsets), x)


def test_an_engine_from_before_there_were_layouts_keeps_its_own(tmp_path):
    folder = bert(tmp_path / "bert")
    tasks = (Task("one", "regress", ("a",), "label"),)
    settings = {"trunk": pretrained.shape_of(str(folder)), "batch": Batch(tokens=64, max_length=20), "device": "cpu"}
    answers = []
    for layout in (1, 2):
        engine = Engine.from_config(Config(tasks, init=str(folder), layout=layout, **settings))
        engine.build(Tokenizer.load(str(folder), layout=layout, grows=False))
        saved = engine.save(tmp_path / str(layout))
        answers.append(engine.predict(["w1 w2"])["one"])
    path = tmp_path / "1" / "engine.json"
    before = json.loads(path.read_text())
    del before["layout"]
    path.write_text(json.dumps(before))
    loaded = Engine.load(tmp_path / "1", device="cpu")
    assert (loaded.config.layout, loaded.tokenizer.template) == (1, None)
    assert loaded.predict(["w1 w2"])["one"] == answers[0] != answers[1]
    assert Engine.load(saved, device="cpu").predict(["w1 w2"])["one"] == answers[1]


def test_a_pooler_is_learnt_by_each_task_alone(tmp_path):
    folder = bert(tmp_path / "bert")
    tasks = [Task(name, "regress", ("a",), "label") for name in ("one", "two")]
    trunk = Trunk.from_pretrained(folder, dropout=0.0)
    model = MultiTaskModel(trunk, tasks, "pooler")
    assert torch.equal(model.projection_weight[0], model.projection_weight[1])
    batch = pack([Example(1, np.array([96, 5, 97]), np.array([0]), values=np.array([3.0]))], 2)
    model(batch).loss.sum().backward()
    assert not model.projection_weight.grad[0].any()
    x = model.hidden(batch).detach().requires_grad_()
    expected = torch.tanh(x @ trunk.pooler[0].T + trunk.pooler[1])
    torch.testing.assert_close(model.project(x, batch.rows.offsets), expected)
    assert model.projection_weight.grad[1].any()


def test_a_checkpoint_without_a_pooler_says_so(settings, checkpoint):
    with pytest.raises(ValueError, match="projection: pooler: the checkpoint that the trunk comes from has none; use"):
        started(settings, init=str(checkpoint), projection="pooler")
    assert started(settings, projection="pooler", tokenizer=str(checkpoint)).model.kept.tolist() == [0, 1]
