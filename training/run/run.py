"""A run: all that training holds from its first step to its last, and the parts of a step.

`train` in loop.py says in which order they come.

N tasks
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from signal import Signals
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trunkline.engine import checkpoint
from trunkline.engine.console import tell
from trunkline.engine.network.bilstm import Model, heads_of
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.engine.network.packing import PackedBatch
from trunkline.engine.saved import own_tensors, write_saved
from trunkline.training.balancing.adaptive import Adaptive
from trunkline.training.balancing.balancer import Balancer
from trunkline.training.config_file import save_config
from trunkline.training.data.batches import Members, Packer, make_mixer, planned_and_packed, weight_sums
from trunkline.training.data.corpus import load_corpus
from trunkline.training.distributed.gradient_exchange import GradientExchange
from trunkline.training.distributed.ranks import Ranks
from trunkline.training.distributed.sharding import shard, whole
from trunkline.training.flops import training_flops
from trunkline.training.pages.report import write_report
from trunkline.training.pages.summary import summarise
from trunkline.training.run.compiling import sample_of, tell_of_uncompiled, to_be_compiled, warm_up
from trunkline.training.run.faults import Guard, Parts, named_culprits
from trunkline.training.run.faults import in_words as left_out_in_words
from trunkline.training.run.folder import RunFolder, fingerprint
from trunkline.training.run.interruption import Interruption
from trunkline.training.run.introduction import introduction
from trunkline.training.run.optimizer import freeze, make_optimizer, share_of_rate, untouched
from trunkline.training.run.preparation import prepare
from trunkline.training.run.profiling import Profile
from trunkline.training.run.progress import Interval, Log, NoLog, Progress
from trunkline.training.run.run_checkpoint import resume_run, save_run
from trunkline.training.scoring.calibration import Calibration, calibrate
from trunkline.training.scoring.evaluation import Scored, evaluate, mean_score
from trunkline.training.scoring.metrics import metric_names
from trunkline.training.self_test import self_test
from trunkline.training.watching.audience import Audience
from trunkline.training.watching.display import make_display

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

LOG_EVERY = 10  # steps between lines of metrics.jsonl
FIRST_LOOK = 32  # validation examples of each task before the first step: their loss is near that of a uniform guess


class Run:
    """A context; what `Engine.fit` says of its arguments, results and errors goes for this."""

    def __init__(self, engine: "Engine", folder: RunFolder, audience: Audience, ranks: Ranks):
        self.began = time.perf_counter()
        self.engine, self.folder, self.audience, self.ranks = engine, folder.path, audience, ranks
        ranks.check_settings()
        keep_freed_memory()
        if engine.device.type == "cuda":
            self_test(engine.device, tell, [torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32])
        with ranks.first_of_host_goes_before():  # the others find it in the cache
            self.corpus = load_corpus(engine.config, engine.tokenizer, tell=tell)
        self.names = [task.name for task in self.corpus.tasks]
        self.model = self._build()
        self.config = config = engine.config
        weights = [config.weights.get(name, 1.0) for name in self.names]
        self.weights = torch.tensor(weights, device=engine.device)  # (N,)
        self.mixer = make_mixer(config, self.corpus)
        learning = np.array([name not in config.optimizer.freeze for name in self.names])
        if not learning.all():
            self.mixer.change(0, learning.astype(float))
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.packer = Packer(self.corpus.train, config)
        sample = sample_of(config, self.mixer)
        self.compiled = to_be_compiled(engine, self.packer, sample)
        self.balancer = Balancer(config.balancing, self.model, config.seed, self.compiled, ranks.total)
        self.adaptive = Adaptive(config.mixing, self.corpus.tasks, self.model, self.mixer, config.batch.accumulate)
        self.fingerprint = fingerprint(config, self.corpus)
        ranks.check_same("data", self.fingerprint)
        self.progress = resume_run(self) if folder.resume else Progress()
        self.exchange = GradientExchange(self.model, ranks)
        self.began -= self.progress.wall_seconds
        shown = {task.name: metric_names(task)[0] for task in self.corpus.tasks}
        self.display = make_display(shown, config.steps, self.progress.step)
        audience.tell_user = self.display.tell
        self.parts = Parts(self.packer, self.corpus.tokenizer, self.progress, self.display.tell, self.compiled, sample)
        self.ran_uncompiled = self.progress.uncompiled  # before this process
        warm_up(self, sample[0])

        audience.start(config, self.folder)
        if ranks.first:
            folder.begin()
            save_config(config, self.folder / "config.yaml")
            self.corpus.tokenizer.save(self.folder)
        self.log = Log(self.folder, self.progress.step, tell, audience.hear) if ranks.first else NoLog()
        self.interruption = Interruption()
        self.profile = Profile(config.profile and ranks.first, self.folder, engine.device, self.display.tell)
        self.guard = Guard(self.optimizer, self.names, config.optimizer.give_up_after, self.progress)
        self.interval = Interval(self.names, engine.device)
        self.ready = self._batches_from(self.progress.step)
        self.stop: Signals | None = None  # whose asking ends the run after the step
        self.told = False  # that many batches go without the graph
        self.open = ExitStack()

    def _build(self) -> Model:
        """The engine's model, or a new one in the units of the labels."""
        engine, config = self.engine, self.engine.config
        is_new = engine._model is None
        self.starts = engine._trunk is not None or not is_new  # from weights that there were
        model = engine.build(self.corpus.tokenizer, in_slices=self.ranks.shards)
        if is_new or engine.added:
            prepare(engine, self.corpus, is_new)
        on_gpu = engine.device.type == "cuda" and torch.cuda.is_bf16_supported()
        freeze(model, config.optimizer.freeze, torch.bfloat16 if on_gpu else None)
        if self.ranks.shards:
            shard(model, self.ranks, engine.device)
        else:
            self.ranks.copy_of_first(model)
        return model

    def __enter__(self) -> "Run":
        for line in introduction(self) if self.ranks.first else ():
            self.display.tell(line)
        for part in (self.display, self.log, self.profile, self.exchange, self.interruption):
            self.open.enter_context(part)
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)

    # What is due

    @property
    def goes_on(self) -> bool:
        return self.progress.step < self.config.steps and not self.adaptive.all_stopped

    @property
    def evaluates_now(self) -> bool:
        return self.progress.step % self.config.evaluation.every == 0 or self.progress.step == self.config.steps

    @property
    def logs_now(self) -> bool:
        return self.progress.step % LOG_EVERY == 0 or self.evaluates_now or self.stop is not None

    # The parts of a step

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: sets its learning rate, counts its time, and says what it left out."""
        started = time.perf_counter()
        share = share_of_rate(self.config.optimizer, self.progress.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["rate"]
        yield
        self.progress.step += 1
        self.ranks.step = self.progress.step
        self.stop = self._asked()  # once a step, so that all of what follows agrees
        if self.logs_now or self.engine.device.type == "cpu":
            self._name_left_out()  # waits for the device
        self.profile.step()
        self.progress.seconds += time.perf_counter() - started
        self.interval.seconds += time.perf_counter() - started

    def _asked(self) -> Signals | None:
        """By which signal some rank was asked to stop; all do, after the same step."""
        if asked := int(self.ranks.largest(torch.tensor(self.interruption.asked or 0))):
            self.interruption.asked = Signals(asked)
        return Signals(asked) if asked else None

    def next_batches(self) -> tuple[tuple[Members, ...], tuple[PackedBatch, ...]]:
        """This rank's share of a step's batches."""
        with self.profile.part("batching"):
            members, batches = zip(*islice(self.ready, len(self.numbers(self.progress.step))), strict=True)
        return members, batches

    def gradients(self, members: Sequence[Members], batches: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
        """Gives every parameter the gradient of a step, of all ranks; so are the loss sums and row weights, (N,), that
        come back."""
        step, device = self.progress.step, self.engine.device
        own = torch.tensor([batch.examples for batch in batches]).sum(0)
        weights, examples = self.ranks.sum(torch.stack([weight_sums(batches, len(self.names)), own]).double())  # (N,)
        self.examples = examples.int().tolist()
        total_weight = weights.float().to(device, non_blocking=True)
        share = self._shares(examples.float()).to(device, non_blocking=True)
        work = partial(self._gradients, total_weight, share)
        with self.ranks.passes():
            loss, weight = self.parts.run(work, batches, members, self._together(step))
        if self.ranks.active:
            with self.profile.part("exchange"):
                self.exchange.finish()
                loss, weight = self.ranks.sum(torch.stack([loss, weight]))
        return loss, weight

    def _together(self, step: int) -> str:
        """Why a batch cannot be worked on in parts; empty: it can."""
        if self.ranks.shards:
            return "and the ranks that have the other slices of the model make no parts"
        return "which this balancing holds together until their weights are known" if self.balancer.holds(step) else ""

    def _shares(self, examples: Tensor) -> Tensor:
        """(N,) what each task's loss counts in a step, besides the weights of the config.

        `examples`: (N,) of each task in the step.
        """
        if self.config.counting == "tasks" or self.config.balancing.method != "fixed":
            return torch.ones(len(self.names))
        return examples / examples.sum()

    def _gradients(self, total_weight: Tensor, share: Tensor, batches: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
        step, device = self.progress.step, self.engine.device
        self.model.train()
        self._zero_grad()  # of an attempt that ran out of memory
        self.exchange.begin()
        self.balancer.start(step)
        numbers = self.numbers(step)
        # loss_t = sum w l / sum w over the whole step; a task that is absent contributes nothing
        factor = torch.where(total_weight > 0, share * self.weights / total_weight, 0.0)
        loss, weight = torch.zeros(2, len(self.names), device=device)
        for place, batch in enumerate(batches):  # which may be parts: more of them than there are numbers
            torch.manual_seed(self.config.seed * 1_000_003 + numbers.start + place * numbers.step)  # dropout
            with self.profile.part("forward"), self.engine.autocast():
                sums = self.balancer.forward(batch.to(device), factor, step)
            if place == len(batches) - 1 and not self.balancer.holds(step):
                self.exchange.last_pass()
            with self.profile.part("backward"):
                self.balancer.backward(sums.loss * factor, step)
            loss += sums.loss.detach()
            weight += sums.weight
        with self.profile.part("backward"):
            self.balancer.finish(total_weight, step)
        return loss, weight

    def update(self, loss: Tensor) -> Tensor:
        """Clips the gradient, whose norm comes back, and takes the step where both are finite."""
        with self.profile.part("optimizer"):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self.guard.judge(self.progress.step + 1, loss, norm)
            with untouched(self.optimizer, self.model, self.examples, self.config.optimizer.freeze):
                self.optimizer.step()  # a step that is not finite changes nothing
            self.adaptive.hold()
            self._zero_grad()
        return norm

    def count(self, batches: Sequence[PackedBatch], loss: Tensor, weight: Tensor) -> None:
        self.interval.add(batches, loss, weight)
        self.interval.flops += sum(training_flops(self.model, batch) for batch in batches)

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=not (self.compiled and self.compiled.cuda_graphs))

    def _batches_from(self, step: int) -> Iterator[tuple[Members, PackedBatch]]:
        numbers = (number for later in range(step, self.config.steps) for number in self.numbers(later))
        shapes = self.compiled.shapes if self.compiled and not self.progress.part_tokens else None
        return planned_and_packed(self.packer, self.mixer, numbers, self.engine.device, shapes=shapes)

    def numbers(self, step: int) -> range:
        """Of a step's batches, those that are this rank's; with one rank all of them."""
        accumulate = self.config.batch.accumulate
        return range(step * accumulate + self.ranks.rank, (step + 1) * accumulate, self.ranks.size)

    def _name_left_out(self) -> None:
        for step, tasks in self.guard.look():
            if not self.ranks.first:
                continue
            numbers = range((step - 1) * self.config.batch.accumulate, step * self.config.batch.accumulate)
            members = [member for number in numbers for member in self.mixer.batch(number)]
            examples = None  # of a model in slices no rank can look for them by itself
            if not self.ranks.shards:
                with self.engine.autocast():
                    examples = named_culprits(self.model, self.packer, self.corpus.tokenizer, members)
            self.log.write(event="left_out", step=step, tasks=tasks, examples=examples)
            self.display.tell(left_out_in_words(step, tasks, examples))
        self.guard.check()

    # Between steps

    def first_look(self) -> None:
        """Losses before the first step."""
        if self.progress.step == 0:
            before = self._evaluation(FIRST_LOOK, texts=0)
            self.progress.first_loss = {name: task.metrics["loss"] for name, task in before.items()}

    def write_log(self, norm: Tensor) -> None:
        """A line of metrics.jsonl, on what happened since the last one."""
        interval, progress = self.interval, self.progress
        uncompiled = self.compiled.uncompiled if self.compiled else 0
        progress.uncompiled = self.ran_uncompiled + interval.sum_over(self.ranks, uncompiled)
        losses = interval.losses()
        progress.add(interval)
        self.log.write(
            event="step",
            step=progress.step,
            seconds=progress.seconds,
            tokens=progress.tokens,
            real_tokens=progress.real_tokens,
            tokens_per_second=interval.tokens_per_second,
            padding_waste=interval.padding_waste,
            learning_rate=max(group["lr"] for group in self.optimizer.param_groups),
            gradient_norm=float(norm),
            left_out=progress.left_out,
            loss=losses,
            examples=interval.examples,
            **self.balancer.log(),
        )
        self.display.step(progress.step, losses, interval.tokens_per_second)
        tell_of_uncompiled(self)
        self.interval = Interval(self.names, self.engine.device)

    def evaluate(self) -> None:
        """Scores on a part of the validation splits; the best weights so far are kept."""
        scored = self._evaluation(self.config.evaluation.examples, self.config.evaluation.texts)
        progress, mean = self.progress, mean_score(self.corpus.tasks, scored)
        if mean > progress.best_score:
            progress.best_score, progress.best_step = mean, progress.step
            tensors = {"model": self._tensors()}
            if self.ranks.first:
                checkpoint.save(self.folder / "checkpoints", "best", tensors, {"step": progress.step})
        if self.config.mixing.reacts:  # what is packed already is of the mix before
            self.ready = self._batches_from(progress.step)

    def _evaluation(self, examples: int, texts: int) -> dict[str, Scored]:
        step, scored = self.progress.step, self._scores(examples, texts)
        scored = self.ranks.said_by_first(scored)  # machines that differ round differently, and all go by one
        metrics = {name: task.metrics for name, task in scored.items()}
        counts = {
            name: {"loss": task.counted, "scores": len(task.examples) or task.counted} for name, task in scored.items()
        }
        self.log.write(event="evaluation", step=step, seconds=self.progress.seconds, metrics=metrics, counts=counts)
        self.display.evaluation(step, metrics)
        if step < self.config.steps and (choice := self.adaptive.evaluated(step, metrics)):
            self.log.write(event="mix", step=step, **choice)
        return scored

    def _scores(self, examples: int, texts: int | None) -> dict[str, Scored]:
        with self.engine.autocast(), self.ranks.passes():
            return evaluate(
                self.model,
                self.corpus.tokenizer,
                self.corpus.validation,
                tokens=self.config.batch.tokens,
                search=self.config.search,
                examples=examples,
                texts=texts,
                ranks=self.ranks,
            )

    def _tensors(self) -> dict[str, Tensor]:
        """What is saved of the model, whole; on the first rank."""
        return whole(own_tensors(self.model, self.config), self.ranks.first)

    def save(self) -> None:
        self.saved = self.folder / "checkpoints" / f"step-{self.progress.step}"
        self.progress.wall_seconds = time.perf_counter() - self.began
        save_run(self, self.saved)
        if self.ranks.first:
            self.audience.tell("saved", self.progress.step, self.saved)

    def stop_if_asked(self) -> None:
        if self.stop:
            self.display.tell(f"{self.stop.name}: saved {self.saved}; go on with --resume")
            self.interruption.stop()

    def finish(self) -> dict[str, Any]:
        """Scores all validation examples and writes the model, the summary and the report.

        It takes the weights of the last step, where the learning rate has come down, and not those of the best one:
        that was chosen on few examples and fewer texts, and for its luck with them. It stays in checkpoints/best.
        """
        most = self.config.evaluation.last_examples
        self.display.tell(f"scoring on {most or 'all'} validation examples" + " of each task" * (most > 0))
        final = self._scores(most, texts=None)
        final, calibration = calibrate(heads_of(self.model), self.corpus.validation, final)
        tensors = self._tensors()
        return self.ranks.of_first(lambda: self._conclude(final, calibration, tensors))

    def _conclude(
        self, final: dict[str, Scored], calibration: dict[str, Calibration], tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        write_saved(self.folder / "model", tensors, self.config, self.corpus.tokenizer)
        self.progress.wall_seconds = time.perf_counter() - self.began
        summary = summarise(self.engine, self.corpus, self.progress, final, calibration)
        write_report(self.folder)
        self.audience.tell("finished", summary)
        return summary
