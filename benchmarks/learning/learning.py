"""What the ordinary Hugging Face loop learns in the time that a Trunkline run took.

    python benchmarks/learning/learning.py RUN [--way grouped] [--data DIR] [--seconds S]

RUN is a finished run. The loop gets its trunk's shape, data, tokenizer, mix, loss and class weights, learning rate,
dropout, search and seed, and as many seconds of training as the run spent on steps, or as it is told; then it is scored
on the same validation examples. Its learning rate follows the clock, since how many steps it will take is not known
before.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from trunkline.benchmarks.record import record
from trunkline.benchmarks.systems.hugging_face import WAYS, HuggingFaceModel, batches
from trunkline.engine.engine import Engine
from trunkline.training.data.corpus import Corpus, load_corpus
from trunkline.training.data.mixing import shares
from trunkline.training.run.optimizer import make_optimizer, share_of_rate
from trunkline.training.scoring.metrics import metric_names, score

CLOCK = 10_000  # parts that the time is divided into for the learning rate
AT_ONCE = 64  # validation examples in a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--way", choices=WAYS, default="grouped", help="the fastest of the three, see step.py")
    parser.add_argument("--data", help="default: as in the run")
    parser.add_argument("--seconds", type=float, help="of training; default: as many as the run's steps took")
    options = parser.parse_args()

    engine = Engine.load(options.run)
    summary = json.loads((options.run / "summary.json").read_text())
    config = replace(engine.config, data=options.data or engine.config.data)
    corpus = load_corpus(config, engine.tokenizer)
    torch.manual_seed(config.seed)
    model = HuggingFaceModel(config.trunk, corpus.train, config.class_weights)
    seconds = options.seconds or summary["training_seconds"]
    steps = train(model, corpus, config, options.way, seconds)
    scores = evaluate(model, corpus, config)

    names = {task.name: metric_names(task)[0] for task in corpus.tasks}
    ours = {name: summary["tasks"][name]["metrics"][metric] for name, metric in names.items()}
    theirs = {name: scores[name][metric] for name, metric in names.items()}
    mean = {"trunkline": fmean(ours.values()), "hugging_face": fmean(theirs.values())}
    print(f"{'task':12} {'metric':10} {'trunkline':>10} {options.way:>10}")
    for name, metric in names.items():
        print(f"{name:12} {metric:10} {ours[name]:10.3f} {theirs[name]:10.3f}")
    print(f"{'mean':23} {mean['trunkline']:10.3f} {mean['hugging_face']:10.3f}")
    print(f"{summary['steps']} steps in {summary['training_seconds']:.0f} seconds; {steps} in {seconds:.0f}")
    content = {
        "command": f"python benchmarks/learning/learning.py RUN --way {options.way} --seconds {seconds:.0f}",
        "way": options.way,
        "steps": steps,
        "seconds": seconds,
        "mean": mean,
        "hugging_face": scores,
        "run": {key: value for key, value in summary.items() if key != "environment"},
    }
    record("learning", content, summary["environment"])


def train(model: HuggingFaceModel, corpus: Corpus, config, way: str, seconds: float) -> int:
    """Trains until the time is up and returns how many steps that were."""
    names = [task.name for task in corpus.tasks]
    wanted = shares(
        config.mixing,
        [len(split) for split in corpus.train],
        [config.mixing.shares.get(name, 0.0) for name in names],
        progress=0.0,
    )
    stream = batches(way, corpus.train, wanted.tolist(), config.batch.tokens, config.seed)
    weights = torch.tensor([config.weights.get(name, 1.0) for name in names])
    optimizer = make_optimizer(model, config.optimizer)
    model.train()
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share_of_rate(config.optimizer, int(CLOCK * elapsed / seconds), CLOCK)
        model(next(stream), torch.device("cpu"), weights).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def evaluate(model: HuggingFaceModel, corpus: Corpus, config) -> dict[str, dict[str, float]]:
    """Metrics of every task on its whole validation split."""
    model.eval()
    scores = {}
    with torch.inference_mode():
        for task, split in enumerate(corpus.validation):
            order = sorted(range(len(split)), key=lambda i, split=split: len(split.prompt_of(i)))
            predictions = {}
            for first in range(0, len(order), AT_ONCE):
                members = order[first : first + AT_ONCE]
                made = model.predict(task, [split.prompt_of(i) for i in members], corpus.tokenizer.end, config.search)
                predictions |= zip(members, made, strict=True)
            if split.task.head == "generate":
                predictions = {i: corpus.tokenizer.decode(tokens) for i, tokens in predictions.items()}
            references = [split.reference(i) for i in range(len(split))]
            scores[split.task.name] = score(
                metric_names(split.task), [predictions[i] for i in range(len(split))], references
            )
    return scores


if __name__ == "__main__":
    main()
