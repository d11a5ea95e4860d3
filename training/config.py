"""A run's settings: frozen dataclasses, read from YAML with key=value overrides, saved beside what the run made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from trunkline.engine import pretrained
from trunkline.engine.generate import Search
from trunkline.engine.trunk import PRESETS, Checkpointing, TrunkConfig
from trunkline.training.balancing import FROM_GRADIENTS, Balancing
from trunkline.training.builtin import get_task
from trunkline.training.mixing import ADAPTIVE, Mixing
from trunkline.training.profiling import RECORDED, WARM_UP
from trunkline.training.tasks import Task

if TYPE_CHECKING:
    import jsonargparse


@dataclass(frozen=True)
class Batch:
    """What goes into one step."""

    tokens: int = 2048
    """Token budget of a packed batch."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    max_length: int = 512
    """Longest example, in tokens; what happens to longer ones is their task's policy."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine to a tenth of the learning rate."""

    learning_rate: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.05
    """Share of the steps in which it rises."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    """Longest gradient, in the 2-norm over all parameters; longer ones are scaled down."""
    give_up_after: int = 5
    """Steps in a row whose loss or gradient is not finite that end the run; fewer are left out, named and counted."""


@dataclass(frozen=True)
class Evaluation:
    """When and on how much of the validation splits the model is scored."""

    every: int = 200
    """Steps between evaluations during training; each writes a checkpoint."""
    examples: int = 256
    """Of each task, during training; 0: all. The last evaluation takes all."""
    texts: int = 16
    """Of each generating task, texts written and scored during training; 0: none. The last evaluation takes all."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on besides its data."""

    tasks: tuple[str | Task, ...]
    """Names of embedded tasks (`trunkline tasks` lists them), or the fields of your own."""
    data: str = ""
    """Folder laid out like the Hugging Face hub; empty: the hub itself. Generated tasks and files need neither."""
    run: str = "runs/run"
    """Folder that the run writes: configuration, tokenizer, metrics, checkpoints, model, report."""
    base: str = ""
    """Folder that file names of tasks start from; set to that of the YAML file."""
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    """Fields of the trunk, or the name of a preset (tiny, small, medium, bert-base), or both: {preset: tiny, ...}."""
    init: str = ""
    """Folder or hub id of a Hugging Face checkpoint, or folder of a finished run, whose trunk and tokenizer are the
    start; of `trunk`, only the dropout may then be another."""
    architecture: Literal["trunk", "bilstm"] = "trunk"
    """What the heads stand on: the trunk; or the Bi-LSTM with attention that it is compared with, which takes width,
    layers and dropout from `trunk`."""
    projection: Literal["", "none", "gelu", "tanh"] = ""
    """Activation of a per-task projection before every head; empty: no projection; none: a linear one."""
    weights: dict[str, float] = field(default_factory=dict)
    """Factor of each task's mean loss in the sum over tasks, by name; 1 where none is given."""
    balancing: Balancing = Balancing()
    """How the tasks are weighed besides, in every step anew; the name of a method, or its fields."""
    class_weights: dict[str, list[float]] = field(default_factory=dict)
    """Factor of the loss of every class's examples in training, by task, in the order of its classes. A rare class that
    counts more is predicted more often, as F1 asks for."""
    prompt_weight: float = 0.0
    """Of generating tasks: how much a token of the prompt counts beside one of the target; above 0, writing is learnt
    from documents as well as from summaries."""
    label_smoothing: float = 0.0
    """Share of the probability spread over all classes."""
    tokenizer: str = ""
    """Folder, tokenizer.json or hub id; empty: that of `init`; else a byte-level BPE trained on the run's own text."""
    vocab_size: int = 8192
    """Entries of a tokenizer that is trained."""
    lowercase: bool = False
    """A tokenizer that is trained does not tell capitals from small letters, so a small vocabulary has room for more
    words; generated text is in small letters."""
    steps: int = 1000
    """Optimizer steps."""
    batch: Batch = Batch()
    mixing: Mixing = Mixing()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    search: Search = Search()
    """How texts are generated."""
    seed: int = 0
    """Of weights, order, dropout and generated data."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    compile: bool | Literal["auto"] = "auto"
    """Whether forward and backward pass are compiled into one graph for batches of fixed shapes; auto: on a GPU. A CPU
    spends its time in products, which are what they are: it gains a twentieth there, and takes half a minute first."""
    checkpointing: Checkpointing = "none"
    """Activations that are computed again in the backward pass instead of kept: none; block: all but the inputs of the
    blocks; selective: all but these, products and attention. The gradients are the same."""
    profile: bool = False
    """Write a trace of a few steps, and a table of where their time goes, to the folder profile of the run."""

    def __post_init__(self):
        if not isinstance(self.balancing, Balancing):  # from Python, too, the name of a method, or fields
            object.__setattr__(self, "balancing", Balancing(**_tuples(_expand_method(self.balancing))))
        names = [task.name for task in self.all_tasks]
        if not names:
            raise ValueError("config: tasks is empty")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"config: tasks names {', '.join(repeated)} twice")
        if self.architecture == "bilstm":
            self._check_bilstm()
        if self.batch.max_length > self.batch.tokens:
            raise ValueError(
                f"config: batch.max_length {self.batch.max_length} is more than a batch holds, "
                f"batch.tokens {self.batch.tokens}"
            )
        generates = any(task.head == "generate" for task in self.all_tasks)
        positions = self.batch.max_length + (self.search.max_new_tokens if generates else 0)
        if positions > self.trunk.max_positions:
            raise ValueError(
                f"config: batch.max_length {self.batch.max_length} and search.max_new_tokens "
                f"{self.search.max_new_tokens} need more than trunk.max_positions {self.trunk.max_positions}"
            )
        for key, given in (("weights", self.weights), ("mixing.shares", self.mixing.shares)):
            if strangers := [name for name in given if name not in names]:
                raise ValueError(f"config: {key} names {', '.join(strangers)}, which is none of {', '.join(names)}")
            if wrong := {name: value for name, value in given.items() if not value > 0}:
                raise ValueError(f"config: {key} must be above 0, got {wrong}")
        for name, factors in self.class_weights.items():
            task = next((task for task in self.all_tasks if task.name == name), None)
            if task is None or not task.labels or len(factors) != len(task.labels) or not min(factors) > 0:
                expected = f"{len(task.labels)} numbers above 0" if task and task.labels else "tasks with classes only"
                raise ValueError(f"config: class_weights of '{name}': expected {expected}, got {list(factors)}")
        needs_shares = self.mixing.method == "fixed" or (self.mixing.method in ADAPTIVE and self.mixing.shares)
        if needs_shares and (missing := [name for name in names if name not in self.mixing.shares]):
            raise ValueError(
                f"config: mixing.method {self.mixing.method} needs mixing.shares for every task; "
                f"{', '.join(missing)} lack"
            )
        for task in self.all_tasks:
            others = task.max_target_tokens + 2 if task.head == "generate" else len(task.text)
            if self.batch.max_length <= others:
                raise ValueError(
                    f"config: batch.max_length {self.batch.max_length} leaves no room for the text of task "
                    f"'{task.name}', whose separators and target take {others} tokens"
                )
        looks = self.balancing.method in FROM_GRADIENTS or self.balancing.watch
        if self.checkpointing == "selective" and looks:
            raise ValueError(
                "config: checkpointing selective does not go with a balancing that looks at gradients, whose backward "
                "pass needs the activations twice; use block"
            )
        least = {
            "steps": (self.steps, 1),
            "vocab_size": (self.vocab_size, 1),
            "seed": (self.seed, 0),
            "prompt_weight": (self.prompt_weight, 0),
            "batch.accumulate": (self.batch.accumulate, 1),
            "optimizer.give_up_after": (self.optimizer.give_up_after, 1),
            "evaluation.every": (self.evaluation.every, 1),
            "evaluation.examples": (self.evaluation.examples, 0),
            "evaluation.texts": (self.evaluation.texts, 0),
            "search.max_new_tokens": (self.search.max_new_tokens, 1),
            "search.beams": (self.search.beams, 1),
            "search.min_new_tokens": (self.search.min_new_tokens, 0),
            "search.no_repeat_ngram": (self.search.no_repeat_ngram, 0),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"config: {name} must be at least {minimum}, got {value}")
        if self.profile and self.steps < WARM_UP + RECORDED:
            raise ValueError(f"config: profile takes {WARM_UP + RECORDED} steps at least, got steps {self.steps}")
        if self.mixing.temperature <= 0:
            raise ValueError(f"config: mixing.temperature must be more than 0, got {self.mixing.temperature}")

    def _check_bilstm(self) -> None:
        refused = {
            "init": self.init,
            "projection": self.projection,
            "prompt_weight": self.prompt_weight,
            "balancing.method": self.balancing.method if self.balancing.method in FROM_GRADIENTS else "",
            "balancing.watch": self.balancing.watch,
            "mixing.patience": self.mixing.patience,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"config: {name} is for a trunk; with architecture bilstm it cannot be {value!r}")

    @property
    def all_tasks(self) -> list[Task]:
        return [get_task(task) if isinstance(task, str) else task for task in self.tasks]


def load_config(path: Path, overrides: Sequence[str] = (), kind: type[Config] = Config) -> Config:
    """Reads a run's YAML and changes what `overrides` say.

    Args:
        path: the file; relative file names of its tasks start from its folder.
        overrides: 'key=value' or 'key.inner=value', the value in YAML.
        kind: `Config`, or one with more fields.

    Raises:
        ValueError: no such file, not YAML, an unknown key (the nearest valid one is named) or a wrong type.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config {path}: expected 'key: value' lines, got {settings!r}")
    settings = {"run": f"runs/{path.stem}", "base": str(path.parent), **settings}
    for override in overrides:
        _override(settings, override)
    return config_from(settings, kind)


def config_from(settings: Mapping[str, Any], kind: type[Config] = Config) -> Config:
    """The config that plain dicts, lists and values describe.

    Raises:
        ValueError: an unknown key (the nearest valid one is named) or a wrong type.
    """
    import jsonargparse

    trunk = _expand_preset(settings.get("trunk", {}))
    if (init := settings.get("init")) and isinstance(trunk, Mapping):
        trunk = {**trunk, **asdict(trunk_of(init, trunk))}
    settings = {**settings, "trunk": trunk}
    if "balancing" in settings:
        settings["balancing"] = _expand_method(settings["balancing"])
    _check_keys(settings, kind, "")
    parser = config_parser(kind)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(settings))))
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"config: {' '.join(str(error).split())}") from error


def config_parser(kind: type[Config] = Config) -> "jsonargparse.ArgumentParser":
    """A parser that knows every key, its type, its default and what its docstring says."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, prog="trunkline train CONFIG.yaml")
    parser.add_class_arguments(kind)
    return parser


def restore_config(settings: Mapping[str, Any]) -> Config:
    """The config whose `asdict` these settings are."""
    inner = {f.name: f.type for f in fields(Config) if isinstance(f.type, type) and is_dataclass(f.type)}
    values: dict[str, Any] = {k: inner[k](**_tuples(value)) if k in inner else value for k, value in settings.items()}
    tasks = [task if isinstance(task, str) else Task(**_tuples(task)) for task in values.pop("tasks")]
    return Config(tasks=tuple(tasks), **values)


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, which JSON does not have."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def save_config(config: Config, path: Path) -> None:
    """Writes a config that `load_config` reads back."""
    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"config: expected key=value, got '{override}'")
    *path, last = key.split(".")
    for name in path:
        inner = settings.get(name)
        settings[name] = {SHORT[name]: inner} if name in SHORT and isinstance(inner, str) else (inner or {})
        settings = settings[name]
        if not isinstance(settings, dict):
            raise ValueError(f"config: '{override}': '{name}' is {settings!r} and has no keys")
    try:
        settings[last] = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise ValueError(f"config: '{override}': {error}") from error


SHORT = {"trunk": "preset", "balancing": "method"}  # keys that may have one of their fields as their value


def _expand_method(balancing: Any) -> Any:
    """The fields of the balancing: a method's name stands for it, and one layer for a list of one."""
    if isinstance(balancing, str):
        balancing = {"method": balancing}
    if isinstance(balancing, dict) and isinstance(balancing.get("layers"), str):
        balancing = {**balancing, "layers": [balancing["layers"]]}
    return balancing


def _expand_preset(trunk: Any) -> Any:
    """The fields of the trunk, with those of its preset where it does not give them itself."""
    if isinstance(trunk, str):
        trunk = {"preset": trunk}
    if not isinstance(trunk, dict) or "preset" not in trunk:
        return trunk
    name = trunk["preset"]
    if name not in PRESETS:
        raise ValueError(f"config: trunk '{name}' is no preset; there are {', '.join(PRESETS)}")
    return {**PRESETS[name], **{key: value for key, value in trunk.items() if key != "preset"}}


def trunk_of(init: str, given: Mapping[str, Any]) -> TrunkConfig:
    """The trunk that `init` brings, with the dropout that is given.

    The size of the vocabulary is no contradiction: it is set from the tokenizer, which may have added entries.

    Raises:
        ValueError: `init` cannot be loaded, or its trunk differs in another field that is given.
    """
    shape = pretrained.shape_of(init)
    for name, value in given.items():
        found = getattr(shape, name, value)  # names that there are not are found by `_check_keys`
        if name not in ("dropout", "vocab_size") and value != found:
            raise ValueError(f"config: trunk.{name} is {value}, but {found} in '{init}', which init starts from")
    return replace(shape, dropout=given.get("dropout", shape.dropout))


def _check_keys(settings: Any, of: type, where: str) -> None:
    """Names the nearest valid key for one that does not exist."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"config: expected keys and values for {where.rstrip('.')}, got {settings!r}")
    known = {field.name: field for field in fields(of)}
    for key, value in settings.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"config: unknown key '{where}{key}'; did you mean '{where}{near}'?")
        if value is None and known[key].default is not None:
            raise ValueError(f"config: '{where}{key}' has no value")
        inner = known[key].type
        if isinstance(inner, type) and is_dataclass(inner):
            _check_keys(value, inner, f"{where}{key}.")
        if issubclass(of, Config) and key == "tasks" and isinstance(value, Iterable):
            for number, task in enumerate(value):
                if not isinstance(task, str):
                    _check_keys(task, Task, f"tasks[{number}].")
