"""What users hold: a trunk with its tasks, to be trained, scored, asked, saved and loaded.

The engine ties the rooms together; the arithmetic is in network/, the loop in training/run/. `fit`, `evaluate` and
`load`, of a run that is not finished, are the only calls up into training.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from trunkline.engine.adapting import (
    config_with,
    keep_all,
    load_adapter,
    make_adapters,
    merged,
    save_adapters,
    with_digest,
)
from trunkline.engine.answers import ask
from trunkline.engine.config import TRAINED, Config, changed, config_from, with_vocabulary
from trunkline.engine.console import tell
from trunkline.engine.device import usable_device
from trunkline.engine.foreign import pretrained
from trunkline.engine.foreign.export import export
from trunkline.engine.foreign.formats import Format
from trunkline.engine.network.bilstm import BiLSTM, Model, heads_of
from trunkline.engine.network.generate import Search
from trunkline.engine.network.kept_heads import keep_heads
from trunkline.engine.network.model import MultiTaskModel, in_model_order
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.engine.saved import (
    NoInitialisation,
    all_tensors,
    check_weights,
    own_tensors,
    read_saved,
    summary_beside,
    write_saved,
)
from trunkline.engine.shown import engine_html, with_metrics
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.given import listed
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.kernels.attention import attention_elsewhere

# what it is made from
FIXED = ("tasks", "trunk", "architecture", "init", "projection", "label_smoothing", "tokenizer", "device")


class Engine:
    """One trunk and the tasks it serves.

        engine = Engine(trunk="tiny", tasks=["sst2", "stsb", "dialogsum"], data="../data", steps=500)
        engine.fit()
        engine.predict(["a gripping film"], tasks=["sst2"])

    Args:
        trunk: a preset's name, a `TrunkConfig` or its fields, or a `Trunk` whose weights are the start (its tokenizer
            goes with it); None: what `init` brings, or 'tiny'.
        tasks: names of embedded tasks, or `Task`s.
        tokenizer: as `Config.tokenizer`, or a `Tokenizer`.
        settings: any other field of `trunkline.engine.config.Config`; of a part such as the optimizer, a dict of its
            fields will do.

    Raises:
        ValueError: settings that contradict one another.
    """

    tokenizer: Tokenizer | None  # None before fit() or load(), as is the model
    _model: Model | None

    def __init__(
        self,
        trunk: str | TrunkConfig | Mapping[str, Any] | Trunk | None = None,
        tasks: Sequence[str | Task] = (),
        tokenizer: str | Tokenizer = "",
        **settings: Any,
    ):
        if isinstance(tokenizer, str):
            settings["tokenizer"] = tokenizer
        elif given := [name for name in TRAINED if name in settings]:
            raise ValueError(f"engine: {given[0]} is of a tokenizer that is trained, and one is given: leave it out")
        start = trunk if isinstance(trunk, Trunk) else None
        if start is not None and (init := settings.get("init")):
            raise ValueError(f"engine: a Trunk and init='{init}' are two starts: give one of them")
        shape = trunk.config if isinstance(trunk, Trunk) else trunk
        if isinstance(shape, TrunkConfig) and settings.get("init"):
            shape = asdict(shape)
        if shape is None:
            shape = {} if settings.get("init") else "tiny"
        self._hold(config_from({"tasks": listed(tasks, "engine: tasks"), "trunk": shape, **settings}), start)
        if isinstance(tokenizer, Tokenizer):
            self.tokenizer = tokenizer

    def _hold(self, config: Config, trunk: Trunk | None = None) -> None:
        self.config = config
        self.tasks = in_model_order(config.all_tasks)
        self.device = usable_device(config.device)
        self.summary: dict[str, Any] = {}  # of its last training and evaluation, as far as there is one
        self.kept: list[str] = []  # tasks whose heads come from where the trunk does
        self.added: list[str] = []  # tasks whose heads have not seen their labels yet
        self._trunk, self._model, self.tokenizer = trunk, None, None

    @classmethod
    def from_config(cls, config: Config) -> "Engine":
        engine = cls.__new__(cls)
        engine._hold(config)
        return engine

    @property
    def model(self) -> Model:
        """Trunk and heads; a `BiLSTM` where the config's architecture says so.

        Raises:
            ValueError: the engine has not been trained or loaded yet, so its vocabulary is not known.
        """
        if self._model is None:
            raise ValueError("this engine has no weights yet: call fit(), or Engine.load(folder)")
        return self._model

    def build(self, tokenizer: Tokenizer, in_slices: bool = False) -> Model:
        """The model for this tokenizer: the one there is, or a new one from the config's seed; on the device, or on the
        host and without the blocks that lie in a file, for `sharding.shard` to lay it `in_slices`."""
        self.tokenizer = tokenizer
        if self._model is None:
            torch.manual_seed(self.config.seed)
            starts = self._trunk is None and self.config.init
            if starts:
                self.config = with_digest(self.config)
                self._trunk = pretrained.load(self.config.init, self.config.trunk.dropout, torch.float32, in_slices)
                self._trunk.grow_vocabulary(tokenizer.vocab_size)
                self.config = replace(self.config, trunk=self._trunk.config)
            elif self._trunk is None:
                self.config = with_vocabulary(self.config, tokenizer)
            elif self.config.trunk.vocab_size < tokenizer.vocab_size:
                raise ValueError(
                    f"engine: the tokenizer has {tokenizer.vocab_size} entries, "
                    f"more than the trunk's vocabulary of {self.config.trunk.vocab_size}"
                )
            self._model = make_model(self.config, self._trunk)
            if starts:
                self._go_on_from(self.config.init)
            if not in_slices:
                self._model.to(self.device)
        if isinstance(self._model, MultiTaskModel):
            self._model.trunk.checkpointing = self.config.checkpointing
        return self._model

    def _go_on_from(self, init: str) -> None:
        """The heads of a run of ours go on with the trunk; what is new is said."""
        model = self._with_trunk
        if model.num_vocabulary and not model.trunk.config.tie_vocabulary and model.trunk.vocabulary is None:
            names = ", ".join(task.name for task in model.tasks[-model.num_vocabulary :])
            tell(f"'{init}' has no vocabulary head (lm_head): that of {names} starts from random numbers")
        folder = Path(init)
        if any((place / pretrained.SETTINGS).is_file() for place in (folder, folder / "model")):
            other = Engine.load(folder, device="cpu").model
            assert isinstance(other, MultiTaskModel)
            self.kept, new = keep_heads(model, other)
            kept = ", ".join(self.kept) or "no task"
            tell(f"from '{init}': heads of {kept} are kept; new: {', '.join(new) or 'none'}")

    @property
    def compiles(self) -> bool:
        """Whether training compiles the model; not in slices, nor with flash-attn, whose part of a batch is chosen on
        the host."""
        if self.config.parallel == "shard":
            return False
        if attention_elsewhere.FORCED == "flash_attn":
            if self.config.compile is True:
                raise ValueError("TRUNKLINE_LONG_ATTENTION=flash_attn cannot be compiled: leave it or compile=true out")
            return False
        return self.device.type == "cuda" if self.config.compile == "auto" else self.config.compile

    def autocast(self) -> AbstractContextManager:
        """bfloat16 products on GPUs that have them; float32 elsewhere."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    def fit(
        self, *, resume: bool = False, overwrite: bool = False, on: Sequence[Any] = (), **changes: Any
    ) -> dict[str, Any]:
        """Trains on the tasks' training splits and writes the run folder.

        Args:
            resume: go on with the run in the folder.
            overwrite: replace the run in the folder.
            on: listeners, which have some of the methods of `trunkline.Listener`.
            changes: fields of the config to change first, such as steps=500.

        Returns:
            What summary.json holds: per task its metrics, trivial baseline and losses; speed; environment.

        Raises:
            ValueError: data or settings that cannot be used, or a change of what the engine is made of.
        """
        from trunkline.training.run.loop import train

        if fixed := ", ".join(name for name in changes if name in FIXED):
            raise ValueError(f"fit: {fixed} cannot be changed once there is an engine: make another one")
        config = changed(self.config, changes)
        here = {name: os.path.abspath(path) for name in ("data", "base") if (path := getattr(config, name))}
        self.config = replace(config, **here)  # so that the run's data is found from anywhere
        self.summary = train(self, resume=resume, overwrite=overwrite, on=listed(on, "fit: on"))
        return self.summary

    def evaluate(self, examples: int = 0) -> dict[str, dict[str, float]]:
        """Loss and metrics of every task on its validation split.

        Args:
            examples: of each task, evenly spaced; 0: all.
        """
        from trunkline.training.scoring.evaluation import evaluate_engine

        metrics = evaluate_engine(self, examples)
        self.summary = with_metrics(self.summary, metrics)
        return metrics

    def predict(
        self, texts: Iterable[str | Sequence[str]], tasks: Sequence[str] = (), scores: bool = False
    ) -> dict[str, list[Any]]:
        """What the tasks say of each text; all of them share its pass through the trunk.

        Passes are of `batch.tokens` tokens, however many texts there are.

        Args:
            texts: each a text, or a tuple of texts for tasks on several (a premise and a hypothesis).
            tasks: names; none: every task of the engine that predicts classes, numbers, tags or spans.
            scores: whether predictions come with their probabilities.

        Returns:
            By task, one prediction a text: a class name, a list of them, a number, a tag for each word, or the words of
            a span. With `scores` each is an `Answer`.

        Raises:
            ValueError: an unknown task, one that generates text, or a text that does not fit the task.
        """
        return ask.predict(self, texts, listed(tasks, "predict: tasks"), scores)

    def generate(self, texts: Iterable[str], task: str, search: Search | None = None) -> list[str]:
        """Writes the text that a task asks for, such as a summary, for each document; so many at a time as are held by
        eight times `batch.tokens` tokens.

        Args:
            texts: the documents.
            task: name of a 'generate' task.
            search: greedy or beam search and lengths; default: the config's.

        Raises:
            ValueError: an unknown task, or one that does not generate; what is no text; a search that cannot be, or
                whose texts do not fit the trunk's positions.
        """
        return ask.generate(self, texts, task, search or self.config.search)

    def temperature(self, task: int) -> float:
        """By which a task's logits are divided for probabilities."""
        return float(heads_of(self.model).temperature[task])

    @property
    def known_tokenizer(self) -> Tokenizer:
        """As `tokenizer`, but an error before there is one."""
        self.model  # noqa: B018  the error for an engine without weights
        assert self.tokenizer is not None
        return self.tokenizer

    def place_of(self, name: str) -> int:
        names = [task.name for task in self.tasks]
        if name not in names:
            raise ValueError(f"engine: no task '{name}'; there are {', '.join(names)}")
        return names.index(name)

    def save(self, folder: str | Path) -> Path:
        """Writes weights (safetensors), settings (JSON) and tokenizer; nothing is pickled.

        Raises:
            ValueError: the folder holds the weights of something else.
            OSError: the disk is full, not writable, ...
        """
        write_saved(Path(folder), own_tensors(self.model, self.config), self.config, self.known_tokenizer)
        return Path(folder)

    def save_adapters(self, folder: str | Path, tasks: Sequence[str] = ()) -> Path:
        """Writes adapters as PEFT does, each in a folder of its task's or group's name; heads are not in them.

        Args:
            tasks: whose adapters are written; none: all.

        Raises:
            ValueError: there are no adapters, or no such task.
        """
        places = [self.place_of(name) for name in listed(tasks, "save_adapters: tasks")]
        return save_adapters(self._with_trunk, self.config, Path(folder), places)

    def export(self, folder: str | Path, to: Format, tasks: Sequence[str] = ()) -> list[Path]:
        """Writes tasks for other programs.

        hugging-face: of each task a folder of its name, with a stock class of transformers that has equal logits.
        peft: adapters, see `save_adapters`. onnx: one graph with all tasks that answer, checked in onnxruntime.

        Args:
            folder: a new or empty one.
            tasks: names; none: all that can be written so.

        Raises:
            ValueError: the folder is in use, there is no such task, or a task cannot be written so; says why.
            ImportError: for onnx `trunkline[onnx]` is needed.
        """
        return export(self, Path(folder), to, listed(tasks, "export: tasks"))

    def load_adapter(self, name: str, source: str | Path) -> None:
        """Puts the adapter in a folder that PEFT or `save_adapters` wrote in the place of that of a task or group.

        Raises:
            ValueError: it is damaged, is of another trunk, or has what is not covered: DoRA, modules_to_save ...
        """
        load_adapter(self._with_trunk, self.config, name, source)

    def add_task(self, task: Task, adapter: str | Path = "") -> None:
        """Adds a task with a head and an adapter of its own; `fit` then trains these alone, and not a bit of the others
        changes. `fit(optimizer={"freeze": []})` lets all learn again.

        Args:
            task: of another name than those there are.
            adapter: a folder that PEFT or `save_adapters` wrote, to start from; empty: a new one.

        Raises:
            ValueError: there are no adapters, or there is such a task; or as `load_adapter`.
        """
        before = self._with_trunk
        config = config_with(self.config, task)
        model = make_model(config, before.trunk)
        assert isinstance(model, MultiTaskModel)
        keep_all(model.to(self.device), before)
        if adapter:
            load_adapter(model, config, task.name, adapter)
        self.config, self.tasks, self._model = config, in_model_order(config.all_tasks), model
        self.added.append(task.name)

    def merge(self, task: str) -> Trunk:
        """A trunk with a task's adapter in its weights, for `Trunk.save_pretrained`; the engine stays as it is.

        Raises:
            ValueError: an unknown task, no adapters, or outputs that differ from the unmerged ones.
        """
        return merged(self._with_trunk, self.place_of(task))

    @property
    def _with_trunk(self) -> MultiTaskModel:
        model = self.model
        if not isinstance(model, MultiTaskModel):
            raise ValueError("engine: a Bi-LSTM has no adapters")
        return model

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> "Engine":
        """What `save` wrote, the model of a run, a checkpoint of one, such as RUN/checkpoints/best, or a hub id.

        Of a run that is not finished it is the newest checkpoint, which is said on standard error.

        Raises:
            ValueError: the folder holds none of these, or something that is damaged; names the file.
        """
        config, tokenizer, weights, path = read_saved(Path(folder).expanduser())
        config = replace(config, device=device)
        engine = cls.from_config(config)
        if config.adapters is not None and config.adapters.trunk_digest:  # the trunk lies elsewhere
            model = engine.build(tokenizer)
            weights = all_tensors(weights, model, config)
            check_weights(weights, model.state_dict(), path)
            model.load_state_dict(weights)
        elif (layers := config.trunk.num_layers) > len(weights):
            raise ValueError(f"engine: {path} does not fit its settings: {layers} layers need more")
        else:
            with NoInitialisation():
                with torch.device("meta"):  # shapes only: what does not fit takes no memory
                    trunk = Trunk(config.trunk) if config.architecture == "trunk" else None
                    check_weights(weights, make_model(with_vocabulary(config, tokenizer), trunk).state_dict(), path)
                engine._hold(config, Trunk(config.trunk) if config.architecture == "trunk" else None)
                engine.build(tokenizer).load_state_dict(weights)
        engine.summary = summary_beside(path)
        return engine

    _repr_html_ = engine_html  # what a notebook shows of it


def make_model(config: Config, trunk: Trunk | None = None) -> Model:
    """A new model as the config describes it, with new weights where no trunk is given."""
    tasks = in_model_order(config.all_tasks)
    if config.architecture == "bilstm":
        return BiLSTM(config.trunk, tasks, config.label_smoothing)
    trunk, names = trunk or Trunk(config.trunk), [task.name for task in tasks]
    adapters = make_adapters(config.adapters, trunk, names) if config.adapters else None
    return MultiTaskModel(trunk, tasks, config.projection, config.label_smoothing, adapters)
