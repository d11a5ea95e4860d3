"""Everything a run depends on besides its data, as frozen dataclasses; a run saves the one it used."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from trunkline.engine.foreign import pretrained
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.generate import Search
from trunkline.engine.network.trunk import Checkpointing, TrunkConfig
from trunkline.engine.settings import ADAPTIVE, GRADIENT_METHODS, Balancing, Batch, Evaluation, Mixing, Optimizer
from trunkline.engine.tasks.builtin import get_task
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer

WARM_UP, RECORDED = 5, 3  # steps of a profile


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
    projection: Literal["", "none", "gelu", "tanh", "pooler"] = ""
    """Activation of a per-task projection x + act(x W + b) before every head; empty: no projection; none: a linear one.
    pooler: tanh(x W + b), each task's starting as the pooler of the checkpoint, for tasks with a class or a number per
    example; other heads have x + tanh(x W + b)."""
    counting: Literal["examples", "tasks"] = "examples"
    """What counts alike in a step: every example, whatever its task; or every task, whose loss is then the mean over as
    few examples as it has in the step. Of balancing 'fixed' alone: the other methods weigh tasks."""
    weights: dict[str, float] = field(default_factory=dict)
    """Factor of each task's loss, by name; 1 where none is given."""
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
    layout: Literal[1, 2] = 2
    """How texts are put together. 2: as the tokenizer's own template says, such as [CLS] text [SEP] text [SEP], with
    token types, and with no token that a checkpoint has not learnt. 1: text separator text end, whatever the tokenizer,
    as runs before had it. Without `init` and a template the two are the same."""
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
            object.__setattr__(self, "balancing", Balancing(**_tuples(balancing_of(self.balancing))))
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
        generates = any(HEADS[task.head].writes for task in self.all_tasks)
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
            others = HEADS[task.head].room(task)
            if self.batch.max_length <= others:
                raise ValueError(
                    f"config: batch.max_length {self.batch.max_length} leaves no room for the text of task "
                    f"'{task.name}', whose separators and target take {others} tokens"
                )
        looks = self.balancing.method in GRADIENT_METHODS or self.balancing.watch
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
            "evaluation.last_examples": (self.evaluation.last_examples, 0),
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
            "balancing.method": self.balancing.method if self.balancing.method in GRADIENT_METHODS else "",
            "balancing.watch": self.balancing.watch,
            "mixing.patience": self.mixing.patience,
        }
        for name, value in refused.items():
            if value:
                raise ValueError(f"config: {name} is for a trunk; with architecture bilstm it cannot be {value!r}")

    @property
    def all_tasks(self) -> list[Task]:
        return [get_task(task) if isinstance(task, str) else task for task in self.tasks]


def restore_config(settings: Mapping[str, Any]) -> Config:
    """The config whose `asdict` these settings are."""
    inner = {f.name: f.type for f in fields(Config) if isinstance(f.type, type) and is_dataclass(f.type)}
    settings = {"layout": 1, **settings}  # of engines from before there were two
    values: dict[str, Any] = {k: inner[k](**_tuples(value)) if k in inner else value for k, value in settings.items()}
    tasks = [task if isinstance(task, str) else Task(**_tuples(task)) for task in values.pop("tasks")]
    return Config(tasks=tuple(tasks), **values)


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples, which JSON does not have."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def balancing_of(balancing: Any) -> Any:
    """The fields of the balancing: a method's name stands for it, and one layer for a list of one."""
    if isinstance(balancing, str):
        balancing = {"method": balancing}
    if isinstance(balancing, dict) and isinstance(balancing.get("layers"), str):
        balancing = {**balancing, "layers": [balancing["layers"]]}
    return balancing


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


PADDED = 1024  # entries that a checkpoint may have beyond its tokenizer's: vocabularies are rounded up


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """
    Raises:
        ValueError: the tokenizer is not that of the checkpoint that `init` brings.
    """
    own, entries = tokenizer.vocab_size - tokenizer.added, config.trunk.vocab_size
    if config.init and not entries - PADDED <= own <= entries:
        raise ValueError(
            f"config: the tokenizer of '{config.tokenizer or config.init}' has {own} entries, the vocabulary of the "
            f"checkpoint '{config.init}' {entries}: name the tokenizer that it was trained with"
        )


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with a trunk that has an embedding for every token."""
    return replace(config, trunk=replace(config.trunk, vocab_size=tokenizer.vocab_size))
