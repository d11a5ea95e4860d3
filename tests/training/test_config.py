"""A config is read, changed and written back as it was; what is wrong with one is said before anything is done."""

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from trunkline.engine.config import Config, restore_config
from trunkline.engine.network.generate import Search
from trunkline.engine.network.trunk import PRESETS, TrunkConfig
from trunkline.engine.settings import Adapters, Balancing, Batch, Evaluation, Mixing, Optimizer
from trunkline.engine.tasks.task import Task
from trunkline.training.config_file import config_from, load_config, save_config
from trunkline.training.data.corpus import load_corpus

OWN = Task("mine", "classify", ("first|text", "second"), "gold", ("no", "yes"), metrics=("f1",), train="a.csv")
FULL = Config(
    tasks=("sst2", OWN, Task("notes", "language-model", ("text",), hub="somebody/notes")),
    data="some where",
    run="runs/é",
    base="configs",
    trunk=TrunkConfig(hidden_size=96, num_heads=6, num_kv_heads=2, positions="rotary", norm="rms", bias=False),
    projection="gelu",
    layout=1,
    counting="tasks",
    weights={"mine": 2.0, "sst2": 0.5},
    balancing=Balancing("cagrad", ("blocks.0.qkv", "blocks.2"), 5),
    class_weights={"mine": [1.0, 2.5]},
    prompt_weight=0.25,
    label_smoothing=0.1,
    vocab_size=300,
    lowercase=True,
    steps=9,
    batch=Batch(tokens=4096, accumulate=2, max_length=256),
    mixing=Mixing("fixed", 3.0, {"sst2": 1.0, "mine": 2.5, "notes": 0.1}, patience=4),
    optimizer=Optimizer(learning_rate=3e-5, warmup=0.1, clip=0.5),
    adapters=Adapters(rank=8, layers=("qkv", "blocks.2"), of="shared", rslora=True),
    evaluation=Evaluation(every=3, examples=0, texts=0),
    search=Search(max_new_tokens=32, beams=4, length_penalty=0.8, min_new_tokens=2, no_repeat_ngram=3),
    seed=11,
    device="cpu",
    devices=2,
    rank_timeout=60.0,
    track=("tensorboard", "trackio"),
    profile=True,
    compile=True,
    checkpointing="block",
)
ONE = {"tasks": ["sst2"]}
FIELDS = {"name": "mine", "head": "classify", "text": ["a"], "label": "b", "labels": ["no", "yes"]}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text("tasks: [sst2, rte]\nbatch: {tokens: 1024}\n")
    return path


def error_of(settings: dict) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        config_from(settings)
    return str(caught.value)


def override_error(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        load_config(path, overrides)
    return str(caught.value)


# Files


@pytest.mark.parametrize("config", [FULL, Config(tasks=("sst2",), base=".")], ids=["full", "default"])
def test_saved_and_loaded_it_is_the_same(config, tmp_path):
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert restore_config(json.loads(json.dumps(asdict(config)))) == config


def test_the_full_config_differs_from_the_default_everywhere():
    default = Config(tasks=("sst2",))
    alike = [field.name for field in fields(Config) if getattr(FULL, field.name) == getattr(default, field.name)]
    # the first needs a checkpoint: test_pretrained_start.py; the others refuse some of the rest
    assert alike == ["init", "architecture", "vectors", "tokenizer", "parallel", "slices"]


@pytest.mark.parametrize(
    "settings",
    [
        {"projection": "gelu"},
        {"prompt_weight": 0.5},
        {"balancing": {"method": "pcgrad"}},
        {"balancing": {"watch": 5}},
        {"mixing": {"patience": 2}},
    ],
    ids=str,
)
def test_what_a_bilstm_cannot_have_is_refused(settings):
    others = {"tasks": ["sst2"], "architecture": "bilstm"}
    assert config_from(others).architecture == "bilstm"
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.* is for a trunk; with architecture bilstm"):
        config_from({**others, **settings})


@pytest.mark.parametrize("name", ["demo", "glue"])
def test_the_configs_of_the_repository_are_valid(name):
    config = load_config(Path(__file__).resolve().parents[2] / "training" / "configs" / f"{name}.yaml")
    assert config.run == f"runs/{name}"
    assert len(config.all_tasks) >= 4


def test_what_a_file_does_not_say_is_the_default(demo):
    config = load_config(demo)
    assert config == Config(
        tasks=("sst2", "rte"), run="runs/demo", base=str(demo.parent), batch=Batch(tokens=1024, max_length=512)
    )
    assert [task.name for task in config.all_tasks] == ["sst2", "rte"]


@pytest.mark.parametrize("content", ["", "- a", "sst2", "tasks: [a", "tasks: \x01"])
def test_a_file_that_holds_no_settings_is_named(content, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"^config .*bad\.yaml: "):
        load_config(tmp_path / "bad.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run: é".encode("latin-1"))
    for name in ("missing.yaml", "latin.yaml", "."):
        with pytest.raises(ValueError, match=f"^config {tmp_path / name}: "):
            load_config(tmp_path / name)


def test_files_of_tasks_start_from_the_folder_of_the_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    for folder in ("configs", "data", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\nwords,yes\nmore words,0\n,1\n")
    (tmp_path / "data" / "dev.csv").write_text("text,label\nwords,no\n")
    task = {"name": "mine", "head": "classify", "text": ["text"], "label": "label", "labels": ["no", "yes"]}
    task |= {"train": "../data/train.csv", "validation": "../data/dev.csv"}
    (tmp_path / "configs" / "run.yaml").write_text(
        yaml.safe_dump({"tasks": [task, "sentiment"], "vocab_size": 300}, allow_unicode=True)
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (tmp_path / "configs" / "run.yaml", Path("../configs/run.yaml")):
        corpus = load_corpus(load_config(path))
        assert [task.name for task in corpus.tasks] == ["mine", "sentiment"]
        train, validation = corpus.train[0], corpus.validation[0]
        assert [train.reference(i) for i in range(len(train))] == [1, 0]
        assert (train.counts.empty, len(validation), validation.reference(0)) == (1, 1, 0)
        assert corpus.tokenizer.decode(train.tokens_of(1)) == "more words"
        assert max(split.tokens.max() for split in corpus.train) < corpus.tokenizer.vocab_size == 300


@pytest.mark.parametrize("value", ["5", '"\\ud83d"'])
def test_text_that_a_tokenizer_cannot_be_trained_on_is_an_error_with_its_row(value, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": 0}}\n{{"text": {value}, "label": 1}}\n')
    task = Task("mine", "classify", ("text",), "label", ("no", "yes"), train="a.jsonl", validation="a.jsonl")
    with pytest.raises(ValueError, match=r"^task 'mine': .*\(a\.jsonl, row 2\)$"):
        load_corpus(Config(tasks=(task,), base=str(tmp_path)))


def test_data_and_a_tokenizer_may_lie_beside_the_yaml(demo, tmp_path, monkeypatch):
    for folder in ("configs/hub", "configs/words", "elsewhere/hub", "home/hub"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = demo.rename(tmp_path / "configs" / "demo.yaml")
    path.write_text("tasks: [sst2]\ndata: hub\ntokenizer: words\n")
    config = load_config(path)
    assert (config.data, config.tokenizer) == (str(path.parent / "hub"), str(path.parent / "words"))
    assert load_config(path, ["data=hub"]).data == "hub"  # of the shell, from where one is
    path.write_text("tasks: [sst2]\ndata: ~/hub\ntokenizer: not/here\n")
    config = load_config(path)
    assert (config.data, config.tokenizer) == (str(tmp_path / "home" / "hub"), "not/here")


@pytest.mark.parametrize("trained", ["vocab_size: 300", "lowercase: true"])
def test_what_is_of_a_trained_tokenizer_does_not_go_with_another_one(demo, trained):
    name = trained.partition(":")[0]
    demo.write_text(f"tasks: [sst2]\n{trained}\ntokenizer: words\n")
    with pytest.raises(ValueError, match=f"{name} is of a tokenizer that is trained, and 'words' brings its own"):
        load_config(demo)
    demo.write_text(f"tasks: [sst2]\n{trained}\n")
    assert getattr(load_config(demo, ["tokenizer="]), name) != getattr(Config, name)
    assert getattr(load_config(demo, ["tokenizer=words"]), name) == getattr(Config, name)  # as the shell says
    with pytest.raises(ValueError, match=f"{name} is of"):
        load_config(demo, ["tokenizer=words", trained.replace(": ", "=")])
    saved = asdict(Config(tasks=("sst2",))) | yaml.safe_load(trained) | {"tokenizer": "words"}  # as it was allowed
    assert getattr(restore_config(saved), name) == getattr(Config, name)


# Overrides


def test_overrides_change_values_at_every_depth(demo):
    config = load_config(
        demo,
        [
            "steps=5",
            "data=a=b",
            "run=x/y",
            "batch.max_length=64",
            "optimizer.learning_rate=1e-4",
            "search.beams=3",
            "trunk.num_layers=2",
            "tasks=[sst2]",
            "weights.sst2=2",
            "mixing.shares={sst2: 3}",
            "steps=6",
        ],
    )
    assert (config.steps, config.data, config.run, config.tasks) == (6, "a=b", "x/y", ("sst2",))
    assert config.batch == Batch(tokens=1024, max_length=64)
    assert config.optimizer == Optimizer(learning_rate=1e-4)
    assert (config.search.beams, config.trunk.num_layers) == (3, 2)
    assert (config.weights, config.mixing.shares) == ({"sst2": 2.0}, {"sst2": 3.0})


def test_an_override_without_a_value_empties_a_text(demo):
    demo.write_text("tasks: [sst2]\ndata: somewhere\nprojection: gelu\n")
    config = load_config(demo, ["data=", "projection="])
    assert (config.data, config.projection) == ("", "")
    assert "steps" in override_error(demo, "steps=")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "config: expected key=value, got 'steps'"),
        ("steps=[", "config: 'steps=[': "),
        ("run.steps=3", "config: 'run.steps=3': 'run' is 'runs/demo' and has no keys"),
        ("batch.tokens.x=3", "config: 'batch.tokens.x=3': 'tokens' is 1024 and has no keys"),
    ],
)
def test_an_override_that_is_none_is_an_error(override, message, demo):
    assert override_error(demo, override).startswith(message)


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_trunk(name):
    assert config_from(ONE | {"trunk": name}).trunk == TrunkConfig(**PRESETS[name])


def test_a_preset_with_changes():
    trunk = {"preset": "small", "num_layers": 3, "max_positions": 2048}
    expected = replace(TrunkConfig(**PRESETS["small"]), num_layers=3, max_positions=2048)
    assert config_from(ONE | {"trunk": trunk}).trunk == expected
    assert trunk["preset"] == "small"  # the caller's dict is left alone


@pytest.mark.parametrize("before", ["", "trunk: tiny", "trunk: {preset: tiny}", "trunk: {num_layers: 9}"])
def test_a_preset_on_the_command_line(before, demo):
    demo.write_text(f"tasks: [sst2]\n{before}\n")
    assert load_config(demo, ["trunk=small"]).trunk == TrunkConfig(**PRESETS["small"])
    changed = load_config(demo, ["trunk.preset=small", "trunk.num_layers=2"]).trunk
    assert changed == replace(TrunkConfig(**PRESETS["small"]), num_layers=2)
    assert load_config(demo, ["trunk=small", "trunk.num_heads=6"]).trunk.num_heads == 6


@pytest.mark.parametrize("before", ["", "balancing: mgda", "balancing: {watch: 3}", "balancing: {layers: blocks.1}"])
def test_a_balancing_method_on_the_command_line(before, demo):
    demo.write_text(f"tasks: [sst2]\n{before}\n")
    assert load_config(demo, ["balancing=pcgrad"]).balancing == Balancing("pcgrad")
    changed = load_config(demo, ["balancing.method=famo", "balancing.layers=last", "balancing.watch=10"]).balancing
    assert changed == Balancing("famo", ("last",), 10)
    assert "balancing" in override_error(demo, "balancing=pcgard")


def test_an_unknown_preset_is_an_error_with_the_known_ones():
    assert error_of(ONE | {"trunk": "smal"}) == (
        "config: trunk 'smal' is no preset; there are tiny, small, medium, bert-base"
    )


# Keys and types


@pytest.mark.parametrize(
    ("settings", "wrong", "right"),
    [
        ({"stepz": 1}, "stepz", "steps"),
        ({"taks": []}, "taks", "tasks"),
        ({1: 2}, "1", ""),
        ({"batch": {"token": 1}}, "batch.token", "batch.tokens"),
        ({"optimizer": {"lerning_rate": 1}}, "optimizer.lerning_rate", "optimizer.learning_rate"),
        ({"mixing": {"temprature": 1}}, "mixing.temprature", "mixing.temperature"),
        ({"evaluation": {"evry": 1}}, "evaluation.evry", "evaluation.every"),
        ({"search": {"beam": 1}}, "search.beam", "search.beams"),
        ({"trunk": {"hiden_size": 1}}, "trunk.hiden_size", "trunk.hidden_size"),
        ({"trunk": {"preset": "tiny", "num_layer": 1}}, "trunk.num_layer", "trunk.num_layers"),
        ({"tasks": ["sst2", {"nam": "x"}]}, "tasks[1].nam", "tasks[1].name"),
        ({"tasks": [FIELDS | {"max_target": 3}]}, "tasks[0].max_target", "tasks[0].max_target_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_key_is_an_error_with_the_nearest(settings, wrong, right):
    assert error_of(ONE | settings).startswith(f"config: unknown key '{wrong}'; did you mean '{right}")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"run": 2024}, "run"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate"),
        ({"batch": {"tokens": [1]}}, "batch.tokens"),
        ({"trunk": {"causal": "maybe"}}, "trunk.causal"),
        ({"trunk": {"norm": "batch"}}, "trunk.norm"),
        ({"mixing": {"method": "fixd"}}, "mixing.method"),
        ({"projection": "selu"}, "projection"),
        ({"batch": 5}, "batch"),
        ({"trunk": 5}, "trunk"),
        ({"tasks": "sst2"}, "tasks"),
        ({"tasks": 5}, "tasks"),
        ({"tasks": ["sst2", 5]}, "tasks[1]"),
        ({"tasks": [FIELDS | {"head": "clasify"}]}, "task 'mine': there is no head 'clasify'; did you mean 'classify'"),
        ({"tasks": [FIELDS | {"labels": [False, True]}]}, "tasks[0].labels[0]"),  # what YAML makes of [no, yes]
        ({"tasks": [FIELDS | {"text": "a"}]}, "tasks[0].text"),
        ({"tasks": [FIELDS | {"generated": "perhaps"}]}, "tasks[0].generated"),
        ({"weights": {"sst2": "much"}}, "weights"),
        ({"weights": {"sst2": None}}, "weights"),
        ({"weights": ["sst2"]}, "weights"),
        ({"mixing": {"shares": {"sst2": [1]}}}, "mixing.shares"),
    ],
    ids=str,
)
def test_a_wrong_type_is_an_error_with_its_key(settings, key):
    message = error_of(ONE | settings)
    assert message.startswith("config: ")
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"steps": None}, "steps"),
        ({"run": None}, "run"),
        ({"tasks": None}, "tasks"),
        ({"trunk": None}, "trunk"),
        ({"batch": {"tokens": None}}, "batch.tokens"),
        ({"tasks": [FIELDS | {"label": None}]}, "tasks[0].label"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_without_a_value_is_an_error(settings, key):
    assert re.fullmatch(f"config: '{re.escape(key)}' has no value( \\(in 'mine'\\))?", error_of(ONE | settings))


def test_nothing_is_a_value_where_it_is_the_default():
    assert config_from(ONE | {"trunk": {"num_kv_heads": None}}).trunk == TrunkConfig()


def test_numbers_may_be_written_as_whole_or_with_an_exponent(demo):
    demo.write_text("tasks: [sst2]\noptimizer: {learning_rate: 1e-3, clip: 1}\n")  # to YAML 1.1 1e-3 is a text
    config = load_config(demo, ["optimizer.weight_decay=2e-2"])
    assert config.optimizer == Optimizer(learning_rate=1e-3, clip=1.0, weight_decay=2e-2)
