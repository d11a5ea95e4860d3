"""What users hold: a trunk with its tasks, to be trained, scored, asked, saved and loaded.

The engine ties the rooms together; the arithmetic is in network/, the loop in training/run/. `fit`, `evaluate` and
`load`, of a run that is not finished, are the only calls up into training.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trunkline.engine.adapting import (
    config_with,
    keep_all,
    load_adapter,
    make_adapters,
    merged,
    save_adapters,
    with_digest,
)
from trunkline.engine.config import TRAINED, Config, changed, config_from, with_vocabulary
from trunkline.engine.console import tell
from trunkline.engine.device import usable_device
from trunkline.engine.foreign.pretrained import SETTINGS, WEIGHTS
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.bilstm import BiLSTM, Model
from trunkline.engine.network.generate import Search, check_search, prompts_at_once
from trunkline.engine.network.kept_heads import keep_heads
from trunkline.engine.network.model import MultiTaskModel, in_model_order
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.engine.saved import all_tensors, check_weights, own_tensors, read_saved, summary_beside
from trunkline.engine.shown import engine_html, with_metrics
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.given import fits, listed, text_rows
from trunkline.engine.text.layout import Laid, Layout
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.kernels.attention import attention_flash

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

    def build(self, tokenizer: Tokenizer) -> Model:
        """The model for this tokenizer: the one there is, or a new one from the config's seed."""
        self.tokenizer = tokenizer
        if self._model is None:
            torch.manual_seed(self.config.seed)
            starts = self._trunk is None and self.config.init
            if starts:
                self.config = with_digest(self.config)
                dropout = self.config.trunk.dropout
                self._trunk = Trunk.from_pretrained(self.config.init, dropout=dropout, dtype=torch.float32)
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
            self._model.to(self.device)
        if isinstance(self._model, MultiTaskModel):
            self._model.trunk.checkpointing = self.config.checkpointing
        return self._model

    def _go_on_from(self, init: str) -> None:
        """The heads of a run of ours go on with the trunk; what is new is said."""
        model = self.model
        assert isinstance(model, MultiTaskModel)
        if model.num_vocabulary and not model.trunk.config.tie_vocabulary and model.trunk.vocabulary is None:
            names = ", ".join(task.name for task in model.tasks[-model.num_vocabulary :])
            tell(f"'{init}' has no vocabulary head (lm_head): that of {names} starts from random numbers")
        folder = Path(init)
        if any((place / SETTINGS).is_file() for place in (folder, folder / "model")):
            other = Engine.load(folder, device="cpu").model
            assert isinstance(other, MultiTaskModel)
            self.kept, new = keep_heads(model, other)
            kept = ", ".join(self.kept) or "no task"
            tell(f"from '{init}': heads of {kept} are kept; new: {', '.join(new) or 'none'}")

    @property
    def compiles(self) -> bool:
        """Whether training compiles the model; not with flash-attn, whose part of a batch is chosen on the host."""
        if attention_flash.BACKEND == "flash_attn":
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
        from trunkline.training.data.corpus import load_corpus
        from trunkline.training.scoring.evaluation import evaluate

        config = self.config
        corpus = load_corpus(config, self._tokenizer)
        with self.autocast():
            scored = evaluate(
                self.model,
                corpus.tokenizer,
                corpus.validation,
                tokens=config.batch.tokens,
                search=config.search,
                examples=examples,
            )
        metrics = {name: task.metrics for name, task in scored.items()}
        self.summary = with_metrics(self.summary, metrics)
        return metrics

    def predict(self, texts: Iterable[str | Sequence[str]], tasks: Sequence[str] = ()) -> dict[str, list[Any]]:
        """What the tasks say of each text; all of them share its pass through the trunk.

        Passes are of `batch.tokens` tokens, however many texts there are.

        Args:
            texts: each a text, or a tuple of texts for tasks on several (a premise and a hypothesis).
            tasks: names; none: every task of the engine that predicts classes, numbers, tags or spans.

        Returns:
            By task, one prediction a text: a class name, a number, a tag for each word, or the words of a span.

        Raises:
            ValueError: an unknown task, one that generates text, or a text that does not fit the task.
        """
        parts = text_rows(texts, "predict")
        asked = [self._index(name) for name in listed(tasks, "predict: tasks")] or [
            t for t, task in enumerate(self.tasks) if HEADS[task.head].group != "vocabulary"
        ]
        for t in asked:
            task = self.tasks[t]
            if HEADS[task.head].group == "vocabulary":
                raise ValueError(f"predict: task '{task.name}' writes text: use generate()")
            for place, text in enumerate(parts):
                if not fits(task, text):
                    raise ValueError(
                        f"predict: task '{task.name}' takes {len(task.text)} text(s) {list(task.text)}, "
                        f"got {text!r:.120} at place {place}"
                    )
        layout = Layout(self._tokenizer, self.config.batch.max_length, self.config.trunk.causal)
        # what a trunk makes of a text serves all tasks; a Bi-LSTM's attention is each task's own
        passes = [[t] for t in asked] if self.config.architecture == "bilstm" else self._of_one_adapter(asked)
        predictions: dict[str, list[Any]] = {self.tasks[t].name: [] for t in asked}
        for together in passes:
            for laid, wanted in self._batches(map(layout.lay, parts), together):
                for name, answers in self._predict(laid, wanted, together).items():
                    predictions[name] += answers
        return predictions

    def _of_one_adapter(self, asked: Sequence[int]) -> list[list[int]]:
        """Tasks, by their places, that share what a trunk makes of a text: all, where there are no adapters."""
        model = self.model
        assert isinstance(model, MultiTaskModel)
        passes: dict[int, list[int]] = {}
        for t in asked:
            passes.setdefault(0 if model.adapters is None else model.adapters.places[t], []).append(t)
        return list(passes.values())

    def _batches(
        self, texts: Iterable[Laid], asked: Sequence[int]
    ) -> Iterator[tuple[list[Laid], list[list[Sequence[int]]]]]:
        """Texts and the rows of them that every task looks at, in batches with the token budget of both."""
        laid: list[Laid] = []
        wanted: list[list[Sequence[int]]] = []
        room = self.config.batch.tokens
        for text in texts:
            rows = [HEADS[self.tasks[t].head].rows(text) for t in asked]
            size = max(len(text.tokens), sum(map(len, rows)))
            if laid and size > room:
                yield laid, wanted
                laid, wanted, room = [], [], self.config.batch.tokens
            laid.append(text)
            wanted.append(rows)
            room -= size
        if laid:
            yield laid, wanted

    def _predict(
        self, laid: Sequence[Laid], wanted: Sequence[Sequence[Sequence[int]]], asked: Sequence[int]
    ) -> dict[str, list[Any]]:
        """What tasks, by their places, say of each text, from one pass.

        `wanted`: of each text, the rows that each of these tasks looks at.
        """
        typed = self.config.trunk.token_types > 1
        examples = [
            Example(
                asked[0],
                text.tokens,
                np.array([*chain.from_iterable(rows)], np.int64),
                types=text.types if typed else None,
            )
            for text, rows in zip(laid, wanted, strict=True)
        ]
        predictions: dict[str, list[Any]] = {self.tasks[t].name: [None] * len(laid) for t in asked}
        model = self.model.eval()
        with torch.inference_mode(), self.autocast():
            batch = pack(examples, len(self.tasks)).to(self.device)
            x = model.hidden(batch)  # (R, D)
            sizes = [len(rows) for place in batch.order for rows in wanted[place]]
            own = iter(x.split(sizes))
            for place in batch.order:
                for t in asked:
                    task, head = self.tasks[t], HEADS[self.tasks[t].head]
                    value = head.predict(model.logits(next(own), t).float().cpu())
                    predictions[task.name][place] = head.describe(task, value, laid[place])
        return predictions

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
        documents = text_rows(texts, "generate")
        t = self._index(task)
        if not HEADS[self.tasks[t].head].writes:
            raise ValueError(f"generate: task '{task}' has head '{self.tasks[t].head}': use predict()")
        for place, document in enumerate(documents):
            if len(document) != 1:
                raise ValueError(f"generate: task '{task}' takes 1 text, got {document!r:.120} at place {place}")
        search = search or self.config.search
        check_search(search, self.config.trunk.vocab_size)
        layout = Layout(self._tokenizer, self.config.batch.max_length, causal=True)
        prompts = [layout.prompt(text, self.tasks[t].max_target_tokens).tokens for (text,) in documents]
        model = self.model.eval()
        written = [""] * len(prompts)
        for places in prompts_at_once([len(prompt) for prompt in prompts], search, self.config.batch.tokens):
            with self.autocast():
                made = model.generate([prompts[place] for place in places], t, layout.tokenizer.ends, search)
            for place, tokens in zip(places, made, strict=True):
                written[place] = layout.tokenizer.decode(tokens)
        return written

    @property
    def _tokenizer(self) -> Tokenizer:
        self.model  # noqa: B018  the error for an engine without weights
        assert self.tokenizer is not None
        return self.tokenizer

    def _index(self, name: str) -> int:
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
        folder = Path(folder)
        if (folder / WEIGHTS).exists() and not (folder / SETTINGS).exists():
            raise ValueError(f"engine: {folder} holds a checkpoint that is not ours: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{WEIGHTS}.partial"
        try:
            save_file(own_tensors(self.model, self.config), partial)
        except SafetensorError as error:  # how safetensors tells of a full disk
            partial.unlink(missing_ok=True)
            raise OSError(f"engine: {folder / WEIGHTS} is not saved: {error}") from error
        partial.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner only, whatever the umask
        partial.replace(folder / WEIGHTS)  # weights that were loaded may still lie in a file of that name
        (folder / SETTINGS).write_text(json.dumps(asdict(self.config), indent=1), encoding="utf-8")
        self._tokenizer.save(folder)
        return folder

    def save_adapters(self, folder: str | Path) -> Path:
        """Writes every adapter as PEFT does, each in a folder of its task's or group's name; heads are not in them.

        Raises:
            ValueError: there are no adapters.
        """
        return save_adapters(self._with_trunk, self.config, Path(folder))

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
        return merged(self._with_trunk, self._index(task))

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
            engine.summary = summary_beside(path)
            return engine
        if config.trunk.num_layers > len(weights):
            raise ValueError(f"engine: {path} does not fit its settings: {config.trunk.num_layers} layers need more")
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
    trunk = trunk or Trunk(config.trunk)
    adapters = config.adapters and make_adapters(config.adapters, trunk, [task.name for task in tasks])
    return MultiTaskModel(trunk, tasks, config.projection, config.label_smoothing, adapters)
