"""Everything a run depends on besides its data, as frozen dataclasses; a run saves the one it used."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trunkline.engine.checks import at_least, check, from_to_below, made, raise_all, short
from trunkline.engine.foreign import pretrained
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.generate import Search
from trunkline.engine.network.trunk import PRESETS, Checkpointing, TrunkConfig
from trunkline.engine.settings import (
    ADAPTIVE,
    GRADIENT_METHODS,
    Adapters,
    Balancing,
    Batch,
    Evaluation,
    Mixing,
    Optimizer,
    Tracking,
    not_in_slices,
)
from trunkline.engine.tasks.builtin import BUILTIN, get_task
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer

WARM_UP, RECORDED = 5, 3  # steps of a profile
TRAINED = ("vocab_size", "lowercase")  # of a tokenizer that is trained, and of no other
WEIGHTS = at_least(1e-20, 1e20)  # of tasks and classes: beyond, they are lost in float32
RANGES = {
    "steps": at_least(1, 10**9),
    "vocab_size": at_least(1, 2**24),
    "seed": at_least(0, 2**42),
    "prompt_weight": at_least(0, 1e20),
    "label_smoothing": from_to_below(0, 1),
    "devices": at_least(1, 1024),
    "slices": at_least(0, 1024),
    "rank_timeout": at_least(1, 10**6),
}


@dataclass(frozen=True)
class Config:
    """Everything a run depends on besides its data."""

    tasks: tuple[str | Task, ...]
    """Names of embedded tasks (`trunkline tasks` lists them), or the fields of your own."""
    data: str = ""
    """Folder laid out like the Hugging Face hub; empty: the hub itself. Generated tasks and files need neither. In a
    YAML file this, `init` and `tokenizer` may be relative to the file; as key=value they start from where you are."""
    run: str = "runs/run"
    """Folder that the run writes: configuration, tokenizer, metrics, checkpoints, model, report."""
    base: str = ""
    """Folder that file names of tasks start from; set to that of the YAML file."""
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    """Fields of the trunk, or the name of a preset (tiny, small, medium, bert-base), or both: {preset: tiny, ...}."""
    init: str = ""
    """Folder or hub id of a Hugging Face checkpoint, or folder of a finished run, whose trunk and tokenizer are the
    start, and the heads of a run whose tasks are the same; of `trunk`, only the dropout may then be another."""
    architecture: Literal["trunk", "bilstm"] = "trunk"
    """What the heads stand on: the trunk; or the Bi-LSTM with attention that it is compared with, which takes width,
    layers and dropout from `trunk`."""
    vectors: str = ""
    """File of word vectors, as GloVe's, that a Bi-LSTM's embeddings start from."""
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
    """Entries of a tokenizer that is trained; with `init` or `tokenizer` an error, as is `lowercase`."""
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
    adapters: Adapters | None = None
    """Low-rank adapters (LoRA), which learn with the heads while the trunk stays as it is; none: the trunk learns."""
    evaluation: Evaluation = Evaluation()
    search: Search = Search()
    """How texts are generated."""
    seed: int = 0
    """Of weights, order, dropout and generated data."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    devices: int | Literal["all"] = 1
    """GPUs of this machine, or processes on a CPU, that work on the run together, each on some of a step's batches;
    all: every GPU there is. The run is the same with any number of them, up to `batch.accumulate`. Under torchrun it is
    torchrun that says how many there are."""
    parallel: Literal["replicate", "shard"] = "replicate"
    """What each of several processes holds. replicate: all of the model. shard: a slice of every weight, gradient and
    moment of the optimizer (FSDP2), for trunks that do not fit; a block is whole where it is computed. The run is the
    same, and may go on with the other. Of balancing 'fixed' alone."""
    slices: int = 0
    """Of parallel shard: in how many slices the model lies, which must divide the number of processes. With fewer of
    them than processes there are replicas, and weights are gathered inside each; 0: as many as there are processes."""
    rank_timeout: float = 600.0
    """Seconds after which a process that does not answer the others ends the run."""
    compile: bool | Literal["auto"] = "auto"
    """Whether forward and backward pass are compiled into one graph for batches of fixed shapes; auto: on a GPU. A CPU
    spends its time in products, which are what they are: it gains a twentieth there, and takes half a minute first."""
    checkpointing: Checkpointing = "none"
    """Activations that are computed again in the backward pass instead of kept: none; block: all but the inputs of the
    blocks; selective: all but these, products and attention. The gradients are the same."""
    track: tuple[Tracking, ...] = ()
    """Where losses and scores go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow, each of a package of its
    own. One that fails is left out, and never ends the run."""
    profile: bool = False
    """Write a trace of a few steps, and a table of where their time goes, to the folder profile of the run."""

    def __post_init__(self):
        object.__setattr__(self, "trunk", trunk_fields(self.trunk))  # the name of a preset, of a method, or fields
        object.__setattr__(self, "balancing", balancing_fields(self.balancing))
        for name in ("data", "run", "base", "init", "tokenizer", "vectors"):
            if isinstance(path := getattr(self, name), str):
                object.__setattr__(self, name, os.path.expanduser(path))
        try:
            check(self, "", **RANGES)
            raise_all(list(self._contradictions()))
        except ValueError as error:
            raise ValueError(f"config: {str(error).removeprefix('config: ')}") from error

    def _contradictions(self) -> Iterator[str]:
        tasks = self.all_tasks
        names = [task.name for task in tasks]
        if not names:
            yield "tasks is empty"
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            yield f"tasks names {', '.join(repeated)} twice"
        if self.architecture == "bilstm":
            yield from self._not_for_bilstm()
        elif self.vectors:
            yield "vectors are for architecture bilstm: a trunk's embeddings are those of `init`"
        elif following := [task.name for task in tasks if HEADS[task.head].follows and not self.trunk.causal]:
            of = f"the one of '{self.init}' is not" if self.init else "trunk.causal is false"
            yield f"task '{following[0]}' predicts next tokens, which needs a causal trunk: {of}"
        if self.parallel == "shard":
            yield from not_in_slices(self, names)
        elif self.slices:
            yield f"slices {self.slices} are of parallel shard, and parallel is {self.parallel}"
        yield from self._too_long()
        if source := self.tokenizer or self.init:
            for name in TRAINED:
                if getattr(self, name) != getattr(Config, name):
                    yield f"{name} is of a tokenizer that is trained, and '{source}' brings its own: leave {name} out"
        frozen = [name for name in names if name in self.optimizer.freeze]
        if frozen and (self.mixing.reacts or len(frozen) == len(names)):
            yield (
                f"optimizer.freeze names {', '.join(frozen)}: "
                + ("no task is left to learn" if len(frozen) == len(names) else "its share cannot react to training")
            )
        if self.adapters is not None:
            yield from self._adapters(names)
        for key, given in (("weights", self.weights), ("mixing.shares", self.mixing.shares)):
            if strangers := [name for name in given if name not in names]:
                yield f"{key} names {', '.join(strangers)}, which is none of {', '.join(names)}"
            if wrong := {name: value for name, value in given.items() if not value > 0}:
                yield f"{key} must be above 0, got {wrong}"
            elif lost := {name: value for name, value in given.items() if WEIGHTS.broken(value)}:
                yield f"{key} must be {WEIGHTS.broken(next(iter(lost.values())))}, got {lost}"
        for name, factors in self.class_weights.items():
            task = next((task for task in tasks if task.name == name), None)
            classes = len(task.labels) if task and not HEADS[task.head].several else 0
            if not classes or len(factors) != classes or not min(factors) > 0:
                expected = f"{classes} numbers above 0" if classes else "tasks with one class for a row only"
                yield f"class_weights of '{name}': expected {expected}, got {short(list(factors))}"
            elif wanted := next(filter(None, map(WEIGHTS.broken, factors)), ""):
                yield f"class_weights of '{name}' must be {wanted}, got {short(list(factors))}"
        needs_shares = self.mixing.method == "fixed" or (self.mixing.method in ADAPTIVE and self.mixing.shares)
        if needs_shares and (missing := [name for name in names if name not in self.mixing.shares]):
            yield f"mixing.method {self.mixing.method} needs mixing.shares for every task; {', '.join(missing)} lack"
        looks = self.balancing.method in GRADIENT_METHODS or self.balancing.watch
        if self.checkpointing == "selective" and looks:
            yield (
                "checkpointing selective does not go with a balancing that looks at gradients, whose backward pass "
                "needs the activations twice; use block"
            )
        if self.profile and self.steps < WARM_UP + RECORDED:
            yield f"profile takes {WARM_UP + RECORDED} steps at least, got steps {self.steps}"
        rate, decay = self.optimizer.learning_rate, self.optimizer.weight_decay
        if not isinstance(rate, str) and rate * decay >= 1:
            yield (
                f"optimizer.weight_decay {decay} with optimizer.learning_rate {rate} takes more from a weight than "
                "there is of it"
            )

    def _too_long(self) -> Iterator[str]:
        longest, room = self.batch.max_length, self.trunk.max_positions
        if longest > self.batch.tokens:
            yield f"batch.max_length {longest} is more than a batch holds, batch.tokens {self.batch.tokens}"
        generates = any(HEADS[task.head].writes for task in self.all_tasks)
        if longest + (self.search.max_new_tokens if generates else 0) > room:
            yield (
                f"batch.max_length {longest} and search.max_new_tokens {self.search.max_new_tokens} need more than "
                f"trunk.max_positions {room}"
            )
        for task in self.all_tasks:
            others = HEADS[task.head].room(task)
            if longest <= others:
                yield (
                    f"batch.max_length {longest} leaves no room for the text of task '{task.name}', whose separators "
                    f"and target take {others} tokens"
                )

    def _adapters(self, names: list[str]) -> Iterator[str]:
        assert self.adapters is not None
        try:
            groups = self.adapters.groups(names)
        except ValueError as error:
            yield str(error)
            return
        looks = self.balancing.method != "fixed" or self.balancing.watch
        if looks and len(groups) == len(names) > 1:
            yield (
                "balancing weighs tasks by what they share, and adapters of their own share nothing: use adapters.of "
                "shared or groups, or balancing fixed"
            )

    def _not_for_bilstm(self) -> Iterator[str]:
        refused = {
            "adapters": self.adapters,
            "init": self.init,
            "projection": self.projection,
            "prompt_weight": self.prompt_weight,
            "balancing.method": self.balancing.method if self.balancing.method in GRADIENT_METHODS else "",
            "balancing.watch": self.balancing.watch,
            "mixing.patience": self.mixing.patience,
        }
        for name, value in refused.items():
            if value:
                yield f"{name} is for a trunk; with architecture bilstm it cannot be {value!r}"

    @property
    def all_tasks(self) -> list[Task]:
        return [get_task(task) if isinstance(task, str) else task for task in self.tasks]


def config_from(settings: Mapping[str, Any], kind: type[Config] = Config) -> Config:
    """The config that plain dicts, lists and values describe; what they leave open fits what they say.

    Raises:
        ValueError: lists all that is wrong; of an unknown key or value the nearest valid one.
    """
    trunk, init = trunk_fields(settings.get("trunk", {})), settings.get("init")
    if init and isinstance(init, str | os.PathLike) and isinstance(trunk, Mapping):
        trunk = {**trunk, **asdict(trunk_of(os.path.expanduser(init), trunk))}
    settings = {**settings, "trunk": trunk}
    if "balancing" in settings:
        settings = {**settings, "balancing": balancing_fields(settings["balancing"])}
    try:
        return made(kind, _fitted(settings))
    except ValueError as error:
        raise ValueError(f"config: {str(error).removeprefix('config: ')}") from error


def restore_config(settings: Mapping[str, Any]) -> Config:
    """The config whose `asdict` these settings are.

    Raises:
        ValueError: they are of no config.
    """
    if settings.get("init") or settings.get("tokenizer"):  # both used to be allowed, and these ignored
        settings = {name: value for name, value in settings.items() if name not in TRAINED}
    return made(Config, {"layout": 1, **settings})  # of engines from before there were two


def _fitted(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """With lengths, where none are given, that the trunk's positions and the batch have room for.

    Where the usual lengths do not fit, an answer gets a quarter of the positions, and the target of a generating task
    half of its longest example.
    """
    tasks = settings.get("tasks", ())
    batch, search = (_part(settings, name) for name in ("batch", "search"))
    if batch is None or search is None or not isinstance(tasks, list | tuple):
        return settings  # something is wrong, which is said where it is found
    room = (_part(settings, "trunk") or {}).get("max_positions", TrunkConfig.max_positions)
    numbers = (
        room,
        *(part.get(name, 1) for part, name in ((batch, "tokens"), (batch, "max_length"), (search, "max_new_tokens"))),
    )
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return settings
    writes = any(_writes(task) for task in tasks)
    if "max_new_tokens" not in search and writes:
        left = room - batch["max_length"] if "max_length" in batch else max(1, room // 4)
        search["max_new_tokens"] = max(1, min(Search.max_new_tokens, left))
    if "max_length" not in batch:
        left = room - search["max_new_tokens"] if writes else room
        batch["max_length"] = max(1, min(Batch.max_length, batch.get("tokens", Batch.tokens), left))
    longest = batch["max_length"]
    target = Task.max_target_tokens if Task.max_target_tokens + 2 < longest else max(1, (longest - 2) // 2)
    return {**settings, "batch": batch, "search": search, "tasks": [_with_target(task, target) for task in tasks]}


def _part(settings: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The fields that are given of a part; None where it is none."""
    part = settings.get(name, {})
    if is_dataclass(part) and not isinstance(part, type):
        return asdict(part)
    return dict(part) if isinstance(part, Mapping) else None


def _writes(task: Any) -> bool:
    """Whether the answer of a task, or of what is given for one, is a text."""
    if isinstance(task, str):
        task = BUILTIN.get(task)
    head = task.get("head") if isinstance(task, Mapping) else getattr(task, "head", None)
    return isinstance(head, str) and head in HEADS and HEADS[head].writes


def _with_target(task: Any, target: int) -> Any:
    """The task, with a target of that many tokens where it does not say, or, of an embedded one, has no room."""
    if isinstance(task, Mapping) and _writes(task):
        return {"max_target_tokens": target, **task}
    if isinstance(task, str) and _writes(task) and BUILTIN[task].max_target_tokens > target:
        return replace(BUILTIN[task], max_target_tokens=target)
    return task


def trunk_fields(trunk: Any) -> Any:
    """The fields of the trunk: the name of a preset stands for its fields, and may be given with others."""
    if isinstance(trunk, str):
        trunk = {"preset": trunk}
    if not isinstance(trunk, Mapping) or "preset" not in trunk:
        return trunk
    name = trunk["preset"]
    if name not in PRESETS:
        raise ValueError(f"config: trunk '{name}' is no preset; there are {', '.join(PRESETS)}")
    return {**PRESETS[name], **{key: value for key, value in trunk.items() if key != "preset"}}


def balancing_fields(balancing: Any) -> Any:
    """The fields of the balancing: a method's name stands for it, and one layer for a list of one."""
    if isinstance(balancing, str):
        balancing = {"method": balancing}
    if isinstance(balancing, Mapping) and isinstance(balancing.get("layers"), str):
        balancing = {**balancing, "layers": [balancing["layers"]]}
    return balancing


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with some fields changed; a dict changes the fields it names of the part that it stands for.

    Raises:
        ValueError: an unknown field, or settings that cannot be.
    """
    current = {field.name: getattr(config, field.name) for field in fields(config)}
    for name, value in changes.items():
        before = current.get(name)
        if is_dataclass(before) and not isinstance(before, type) and isinstance(value, Mapping):
            value = {**asdict(before), **value}
        current[name] = value
    return config_from(current, type(config))


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
    if not config.init:
        return
    own, entries = tokenizer.vocab_size - tokenizer.added, pretrained.shape_of(config.init).vocab_size
    if not entries - PADDED <= own <= entries:
        raise ValueError(
            f"config: the tokenizer of '{config.tokenizer or config.init}' has {own} entries, the vocabulary of the "
            f"checkpoint '{config.init}' {entries}: name the tokenizer that it was trained with"
        )


def with_tokenizer(config: Config, source: Path) -> Config:
    """The config with a tokenizer that there is, whatever it says of one to be trained."""
    return replace(config, tokenizer=str(source), **{name: getattr(Config, name) for name in TRAINED})


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with a trunk that has an embedding for every token."""
    return replace(config, trunk=replace(config.trunk, vocab_size=tokenizer.vocab_size))
