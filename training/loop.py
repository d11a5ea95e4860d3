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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trunkline.engine import pretrained
from trunkline.engine.compiled import CompiledModel, FixedShapes
from trunkline.engine.memory import keep_freed_memory
from trunkline.engine.model import MultiTaskModel
from trunkline.engine.packing import PackedBatch, pack
from trunkline.training import checkpoint
from trunkline.training.adaptive import Adaptive
from trunkline.training.balancer import Balancer
from trunkline.training.config import Config, Optimizer, save_config
from trunkline.training.corpus import Corpus, load_corpus
from trunkline.training.data import Encoded
from trunkline.training.evaluation import Scored, evaluate
from trunkline.training.flops import training_flops
from trunkline.training.metrics import first_score, metric_names
from trunkline.training.mixing import Mixer
from trunkline.training.progress import Display, Interval, Log, Progress
from trunkline.training.report import write_report
from trunkline.training.summary import summarise

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

LOOKED_AT = 16  # batches at the beginning, in the middle and at the end of a run, to which a compiled graph is fitted
LOG_EVERY = 10  # steps between lines of metrics.jsonl
CHECKPOINTS = 2  # of the newest that are kept: one to fall back to
FIRST_LOOK = 64  # validation examples of each task before the first step: their loss is near that of a uniform guess


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
    compiled = _compiled(engine, corpus, mixer, config.steps * config.batch.accumulate)
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

    with display, log:
        if progress.step == 0:
            before = evaluation(FIRST_LOOK, texts=0)
            progress.first_loss = {name: task.metrics["loss"] for name, task in before.items()}
        interval = Interval(names, engine.device)
        while progress.step < config.steps and not adaptive.all_stopped:
            step = progress.step
            started = time.perf_counter()
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, config.steps)

            first = step * config.batch.accumulate
            micro_batches = [
                next_batch(corpus.train, mixer, number, config)
                for number in range(first, first + config.batch.accumulate)
            ]
            if compiled:
                micro_batches = [compiled.shapes.pad(batch) for batch in micro_batches]
            # loss_t = sum w l / sum w over the whole step; a task that is absent contributes nothing
            sums_of_weights = (weight_sums(batch, len(names)) for batch in micro_batches)
            total_weight = sum(sums_of_weights, torch.zeros(len(names))).to(engine.device, non_blocking=True)
            factor = torch.where(total_weight > 0, weights / total_weight, 0.0)
            for batch in micro_batches:
                with engine.autocast():
                    sums = balancer.forward(batch.to(engine.device), factor, step)
                balancer.backward(sums.loss * factor, step)
                interval.add(step + 1, batch, sums.loss, sums.weight)
                interval.flops += training_flops(model, batch)
            balancer.finish(total_weight, step)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            adaptive.hold()
            optimizer.zero_grad(set_to_none=not (compiled and compiled.cuda_graphs))

            progress.step = step = step + 1
            evaluate_now = step % config.evaluation.every == 0 or step == config.steps
            log_now = step % LOG_EVERY == 0 or evaluate_now
            if log_now:
                loss = interval.losses()  # waits for the device
                if not norm.isfinite():
                    raise FloatingPointError(f"the gradient is not finite at step {step}")
            progress.seconds += time.perf_counter() - started
            interval.seconds += time.perf_counter() - started
            if log_now:
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
                    loss=loss,
                    examples=interval.examples,
                    **balancer.log(),
                )
                display.step(step, loss, interval.tokens_per_second)
                interval = Interval(names, engine.device)
            if evaluate_now:
                scored = evaluation(config.evaluation.examples, config.evaluation.texts)
                mean = mean_score(corpus, scored)
                if mean > progress.best_score:
                    progress.best_score, progress.best_step = mean, step
                    checkpoint.save(run / "checkpoints", "best", {"model": model.state_dict()}, {"step": step})
                progress.wall_seconds = time.perf_counter() - began
                _save(run, model, optimizer, balancer, adaptive, progress, fingerprint)

        # The weights of the last step, where the learning rate has come down, and not those of the best one: that was
        # chosen on few examples and fewer texts, and for its luck with them. It stays in checkpoints/best.
        display.tell("scoring on all validation examples")
        final = scores(examples=0, texts=None)
    engine.save(run / "model")
    progress.wall_seconds = time.perf_counter() - began
    summary = summarise(engine, corpus, progress, final)
    write_report(run)
    return summary


def _compiled(engine: "Engine", corpus: Corpus, mixer: Mixer, batches: int) -> CompiledModel | None:
    """The engine's model, compiled for the batches of the run, `batches` in number; None where it stays as it is."""
    if not engine.compiles or not isinstance(engine.model, MultiTaskModel):  # a Bi-LSTM stays as it is
        return None
    starts = (0, batches // 2, max(0, batches - LOOKED_AT))
    numbers = sorted({number for start in starts for number in range(start, min(start + LOOKED_AT, batches))})
    examples = [next_batch(corpus.train, mixer, number, engine.config) for number in numbers]
    model = engine.model.train()
    compiled = CompiledModel(model, FixedShapes.of(examples, model.groups))
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


def next_batch(train: Sequence[Encoded], mixer: Mixer, number: int, config: Config) -> PackedBatch:
    """Batch `number` of the run, on the host."""
    examples = [
        train[task].example(i, task, config.prompt_weight, config.class_weights.get(train[task].task.name))
        for task, i in mixer.batch(number)
    ]
    return pack(examples, len(train), config.batch.tokens)


def weight_sums(batch: PackedBatch, num_tasks: int) -> Tensor:
    """(N,) sum of the row weights of every task."""
    return torch.zeros(num_tasks).index_add_(0, batch.rows.task, batch.rows.weight)


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
    for name in ("run", "base", "data", "device", "compile", "checkpointing", "tokenizer"):  # of that the digest counts
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
) -> None:
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
    checkpoint.save(run / "checkpoints", f"step-{progress.step}", tensors, state)
    checkpoint.prune(run / "checkpoints", CHECKPOINTS)


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
