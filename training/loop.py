"""Training: one function, from a config to a run folder.

Every step is a pure function of the weights, the seed and the number of the step: what it sees comes from
(seed, step), and so does dropout. So a checkpoint holds no random state, and a resumed run repeats the bits of an
uninterrupted one.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trunkline.engine import pretrained
from trunkline.engine.compiled import CompiledModel, FixedShapes
from trunkline.engine.memory import keep_freed_memory
from trunkline.engine.model import MultiTaskModel
from trunkline.engine.packing import PackedBatch
from trunkline.training import checkpoint
from trunkline.training.adaptive import Adaptive
from trunkline.training.balancer import Balancer
from trunkline.training.batches import Members, Packer, planned_and_packed
from trunkline.training.config import Config, Optimizer, save_config
from trunkline.training.corpus import Corpus, load_corpus
from trunkline.training.evaluation import Scored, evaluate
from trunkline.training.faults import Guard, Parts, in_words, named_culprits
from trunkline.training.flops import training_flops
from trunkline.training.interruption import Interruption
from trunkline.training.metrics import first_score, metric_names
from trunkline.training.mixing import Mixer
from trunkline.training.profiling import Profile
from trunkline.training.progress import Display, Interval, Log, Progress
from trunkline.training.report import write_report
from trunkline.training.summary import summarise

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

LOOKED_AT = 16  # batches at the beginning, in the middle and at the end of a run, to which a compiled graph is fitted
LOG_EVERY = 10  # steps between lines of metrics.jsonl
CHECKPOINTS = 2  # of the newest that are kept: one to fall back to
FIRST_LOOK = 32  # validation examples of each task before the first step: their loss is near that of a uniform guess


def train(engine: "Engine", *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains an engine as its config says and writes the run folder. `Engine.fit` says what comes back."""
    began = time.perf_counter()
    config, run = engine.config, Path(engine.config.run)
    keep_freed_memory()
    _open_run(run, resume, overwrite)
    corpus = load_corpus(config, engine.tokenizer, tell=print)
    model = engine.build(corpus.tokenizer)
    config = engine.config

    names = [task.name for task in corpus.tasks]
    weights = torch.tensor([config.weights.get(name, 1.0) for name in names], device=engine.device)  # (N,)
    mixer = make_mixer(config, corpus)
    optimizer = make_optimizer(model, config.optimizer)
    packer = Packer(corpus.train, config)
    compiled = _compiled(engine, packer, mixer)
    zero_grad = partial(optimizer.zero_grad, set_to_none=not (compiled and compiled.cuda_graphs))
    balancer = Balancer(config.balancing, model, config.seed, compiled)
    adaptive = Adaptive(config.mixing, corpus.tasks, model, mixer, config.batch.accumulate)
    fingerprint = _fingerprint(config, corpus)
    progress = _resume(run, model, optimizer, balancer, adaptive, fingerprint) if resume else Progress()
    began -= progress.wall_seconds
    progress.compile_seconds += compiled.seconds if compiled else 0.0
    (run / "checkpoints").mkdir(exist_ok=True)  # from here on the folder holds a run
    save_config(config, run / "config.yaml")
    corpus.tokenizer.save(run)
    display = Display({task.name: metric_names(task)[0] for task in corpus.tasks}, config.steps, progress.step)
    log = Log(run, progress.step)
    interruption = Interruption()
    profile = Profile(config.profile, run, engine.device, display.tell)
    parts = Parts(packer, corpus.tokenizer, progress, display.tell)
    guard = Guard(optimizer, names, config.optimizer.give_up_after, progress)

    def scores(examples: int, texts: int | None) -> dict[str, Scored]:
        with engine.autocast():
            return evaluate(
                model,
                corpus.tokenizer,
                corpus.validation,
                tokens=config.batch.tokens,
                search=config.search,
                examples=examples,
                texts=texts,
            )

    def evaluation(examples: int, texts: int) -> dict[str, Scored]:
        scored = scores(examples, texts)
        metrics = {name: task.metrics for name, task in scored.items()}
        log.write(event="evaluation", step=progress.step, seconds=progress.seconds, metrics=metrics)
        display.evaluation(progress.step, metrics)
        if progress.step < config.steps and (choice := adaptive.evaluated(progress.step, metrics)):
            log.write(event="mix", step=progress.step, **choice)
        return scored

    def batches_from(step: int) -> Iterator[tuple[Members, PackedBatch]]:
        numbers = range(step * config.batch.accumulate, config.steps * config.batch.accumulate)
        return planned_and_packed(packer, mixer, numbers, engine.device)

    def gradients(step: int, total_weight: Tensor, batches: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
        """Gives every parameter the gradient of a step; the tasks' loss sums and row weights, (N,), come back."""
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout
        model.train()
        zero_grad()  # of an attempt that ran out of memory
        balancer.start(step)
        # loss_t = sum w l / sum w over the whole step; a task that is absent contributes nothing
        factor = torch.where(total_weight > 0, weights / total_weight, 0.0)
        loss, weight = torch.zeros(2, len(names), device=engine.device)
        for batch in batches:
            with profile.part("forward"), engine.autocast():
                sums = balancer.forward(batch.to(engine.device), factor, step)
            with profile.part("backward"):
                balancer.backward(sums.loss * factor, step)
            loss += sums.loss.detach()
            weight += sums.weight
        with profile.part("backward"):
            balancer.finish(total_weight, step)
        return loss, weight

    def name_left_out() -> None:
        for step, tasks in guard.look():
            numbers = range((step - 1) * config.batch.accumulate, step * config.batch.accumulate)
            members = [member for number in numbers for member in mixer.batch(number)]
            with engine.autocast():
                examples = named_culprits(model, packer, corpus.tokenizer, members)
            log.write(event="left_out", step=step, tasks=tasks, examples=examples)
            display.tell(in_words(step, tasks, examples))
        guard.check()

    with display, log, profile, interruption:
        if progress.step == 0:
            before = evaluation(FIRST_LOOK, texts=0)
            progress.first_loss = {name: task.metrics["loss"] for name, task in before.items()}
        interval = Interval(names, engine.device)
        ready = batches_from(progress.step)
        while progress.step < config.steps and not adaptive.all_stopped:
            step = progress.step
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, config.steps)

            with profile.part("batching"):
                members, batches = zip(*islice(ready, config.batch.accumulate), strict=True)
                if compiled:
                    batches = tuple(compiled.shapes.pad(batch) for batch in batches)
            total_weight = weight_sums(batches, len(names)).to(engine.device, non_blocking=True)
            loss, weight = parts.run(partial(gradients, step, total_weight), batches, members, balancer.holds(step))
            with profile.part("optimizer"):
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
                guard.judge(step + 1, loss, norm)
                optimizer.step()  # a step that is not finite changes nothing
                adaptive.hold()
                zero_grad()
            interval.add(batches, loss, weight)
            interval.flops += sum(training_flops(model, batch) for batch in batches)

            progress.step = step = step + 1
            stop = interruption.asked
            evaluate_now = step % config.evaluation.every == 0 or step == config.steps
            log_now = step % LOG_EVERY == 0 or evaluate_now or stop is not None
            if log_now or engine.device.type == "cpu":
                name_left_out()  # waits for the device
            profile.step()
            progress.seconds += time.perf_counter() - started
            interval.seconds += time.perf_counter() - started
            if log_now:
                losses = interval.losses()
                progress.add(interval)
                log.write(
                    event="step",
                    step=step,
                    seconds=progress.seconds,
                    tokens=progress.tokens,
                    real_tokens=progress.real_tokens,
                    tokens_per_second=interval.tokens_per_second,
                    padding_waste=interval.padding_waste,
                    learning_rate=optimizer.param_groups[0]["lr"],
                    gradient_norm=float(norm),
                    left_out=progress.left_out,
                    loss=losses,
                    examples=interval.examples,
                    **balancer.log(),
                )
                display.step(step, losses, interval.tokens_per_second)
                interval = Interval(names, engine.device)
            if evaluate_now:
                scored = evaluation(config.evaluation.examples, config.evaluation.texts)
                mean = mean_score(corpus, scored)
                if mean > progress.best_score:
                    progress.best_score, progress.best_step = mean, step
                    checkpoint.save(run / "checkpoints", "best", {"model": model.state_dict()}, {"step": step})
                if config.mixing.reacts:  # what is packed already is of the mix before
                    ready = batches_from(step)
            if evaluate_now or stop:
                progress.wall_seconds = time.perf_counter() - began
                saved = _save(run, model, optimizer, balancer, adaptive, progress, fingerprint)
            if stop:
                display.tell(f"{stop.name}: saved {saved}; go on with --resume")
                interruption.stop()

    # The weights of the last step, where the learning rate has come down, and not those of the best one: that was
    # chosen on few examples and fewer texts, and for its luck with them. It stays in checkpoints/best.
    display.tell("scoring on all validation examples")
    final = scores(examples=0, texts=None)
    engine.save(run / "model")
    progress.wall_seconds = time.perf_counter() - began
    summary = summarise(engine, corpus, progress, final)
    write_report(run)
    return summary


def _compiled(engine: "Engine", packer: Packer, mixer: Mixer) -> CompiledModel | None:
    """The engine's model, compiled for the batches of the run; None where it stays as it is."""
    if not engine.compiles or not isinstance(engine.model, MultiTaskModel):  # a Bi-LSTM stays as it is
        return None
    batches = engine.config.steps * engine.config.batch.accumulate
    starts = (0, batches // 2, max(0, batches - LOOKED_AT))
    numbers = sorted({number for start in starts for number in range(start, min(start + LOOKED_AT, batches))})
    examples = packer.batches(mixer, numbers)
    model, held = engine.model.train(), engine.config.balancing.method != "fixed" and engine.config.batch.accumulate > 1
    # a CUDA graph has memory for one batch; where weights come from losses, those of a step are held until the last
    cuda_graphs = False if held else None
    compiled = CompiledModel(model, FixedShapes.of(examples, model.groups), cuda_graphs)
    with engine.autocast():
        compiled.warm_up(examples[0].to(engine.device))
    print(f"compiled the model in {compiled.seconds:.0f} s")
    return compiled


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW; only matrices are decayed."""
    is_matrix = {p: p.ndim > 1 and not name.endswith("bias") for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if is_matrix[p]]
    others = [p for p in model.parameters() if not is_matrix[p]]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), fused=True)


def make_mixer(config: Config, corpus: Corpus) -> Mixer:
    """Which examples every batch of a run sees."""
    return Mixer(
        [split.lengths for split in corpus.train],
        config.mixing,
        [config.mixing.shares.get(task.name, 0.0) for task in corpus.tasks],
        config.batch.tokens,
        config.steps * config.batch.accumulate,
        config.seed,
        config.evaluation.every * config.batch.accumulate if config.mixing.reacts else None,
    )


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine that would reach 0 at the step after the last."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress))


def weight_sums(batches: Sequence[PackedBatch], num_tasks: int) -> Tensor:
    """(N,) sum of the row weights of every task."""
    total = torch.zeros(num_tasks)
    for batch in batches:
        total.index_add_(0, batch.rows.task, batch.rows.weight)
    return total


def mean_score(corpus: Corpus, scored: dict[str, Scored]) -> float:
    """What checkpoints are compared by: the mean of the tasks' first metrics, or less the loss where there is none."""
    return fmean(first_score(task, scored[task.name].metrics) for task in corpus.tasks)


def _open_run(run: Path, resume: bool, overwrite: bool) -> None:
    """Makes the run folder, or says why it cannot be used, before any work is done."""
    checkpoints = run / "checkpoints"
    if run.exists() and not run.is_dir():
        raise ValueError(f"run folder {run} is a file")
    if resume and not checkpoints.is_dir():
        raise ValueError(f"run folder {run} has no checkpoints to resume from")
    if checkpoints.exists() and not resume:
        if not overwrite:
            raise ValueError(
                f"run folder {run} holds a run: resume it (--resume), replace it (--overwrite), or name another"
            )
        shutil.rmtree(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise ValueError(f"run folder {run} cannot be written: {error}") from error


def _fingerprint(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a run to go on; where it lies and what it runs on may change."""
    settings = asdict(config)
    elsewhere = ("run", "base", "data", "tokenizer")  # of the tokenizer the digest counts
    for name in (*elsewhere, "device", "compile", "checkpointing", "profile"):
        del settings[name]
    settings["init"] = pretrained.digest(config.init) if config.init else ""
    settings["tasks"] = [task.name for task in corpus.tasks]  # in the order of the heads
    data = {
        split.task.name: asdict(split.task) | {"examples": len(split), "tokens": int(split.lengths.sum())}
        for split in corpus.train
    }
    return json.loads(json.dumps(settings | {"data": data, "tokenizer_digest": corpus.tokenizer.digest}))


def _save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    balancer: Balancer,
    adaptive: Adaptive,
    progress: Progress,
    fingerprint: dict,
) -> Path:
    tensors = {
        "model": model.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(optimizer, model.named_parameters()),
    }
    state = {
        "progress": asdict(progress),
        "balancing": balancer.state_dict(),
        "mixing": adaptive.state_dict(),
        "settings": fingerprint,
    }
    path = checkpoint.save(run / "checkpoints", f"step-{progress.step}", tensors, state)
    checkpoint.prune(run / "checkpoints", CHECKPOINTS)
    return path


def _resume(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    balancer: Balancer,
    adaptive: Adaptive,
    fingerprint: dict,
) -> Progress:
    """Puts the newest valid checkpoint into model, optimizer, balancer and mix.

    Raises:
        ValueError: there is none, or it belongs to a run with other settings or data.
    """
    path = checkpoint.newest(run / "checkpoints", warn=print)
    if path is None:
        raise ValueError(f"run folder {run} has no checkpoint to resume from")
    tensors, state = checkpoint.load(path)
    checkpoint.check_same(state["settings"], fingerprint)
    model.load_state_dict(tensors["model"])
    checkpoint.load_optimizer_tensors(optimizer, model.named_parameters(), tensors.get("optimizer", {}))
    balancer.load_state_dict(state["balancing"])
    adaptive.load_state_dict(state["mixing"])
    progress = Progress(**state["progress"])
    print(f"resuming at step {progress.step}")
    return progress
