"""A run folder as training leaves it, written without training."""

import json
import math
from pathlib import Path
from random import Random

HEADS = {
    "sst2": ("classify", "accuracy", "majority class", 0.509, 0.84),
    "mnli": ("classify", "accuracy", "majority class", 0.354, 0.61),
    "cola": ("classify", "matthews", "majority class", 0.0, 0.21),
    "rte": ("classify", "accuracy", "majority class", 0.527, 0.52),
    "stsb": ("regress", "pearson", "mean of the training labels", 0.0, 0.47),
    "dialogsum": ("generate", "rouge1", "first 3 lines of the document", 0.309, 0.335),
    "entities": ("tag", "tag_accuracy", "majority class", 0.81, 0.93),
    "answers": ("span", "span_exact", "most frequent training span", 0.02, 0.31),
    "books": ("language-model", "perplexity", None, None, 88.0),
}

CONFIG = """name: demo
model:
  width: 256
  layers: 6
  heads: 8
mixing:
  method: temperature   # <b>größer</b> is flatter
  temperature: 2.0
tasks: [sst2, mnli, cola, rte, stsb, dialogsum, entities, answers, books]
"""

TALK = """#Person1#: Hello, how are you doing today?
#Person2#: I've been having trouble breathing lately.
#Person1#: Have you had any type of cold lately?
#Person2#: No, I haven't had a cold. I just have a heavy feeling in my chest when I try to breathe.
#Person1#: I am going to send you to a pulmonary specialist who can run tests on you for asthma."""


CALIBRATION = {
    "temperature": 1.62,
    "fitted_on": 872,
    "judged_on": 872,
    "error": 0.018,
    "error_before": 0.071,
    "bins": [
        {"count": 72, "confidence": 0.56, "accuracy": 0.5},
        {"count": 200, "confidence": 0.76, "accuracy": 0.81},
        {"count": 600, "confidence": 0.97, "accuracy": 0.95},
    ],
    "thresholds": {},
}


def sample(text: str, reference: object, prediction: object) -> dict[str, object]:
    return {"input": text, "reference": reference, "prediction": prediction}


SAMPLES = {
    "classify": sample("a gorgeous, witty, seductive movie <script>alert(1)</script>", "positive", "positive"),
    "regress": sample("A plane is taking off. | An air plane is taking off.", 5.0, 4.618273),
    "generate": sample(
        TALK,
        "#Person2# has trouble breathing. The doctor asks #Person2# about it and will send #Person2# to a specialist.",
        "#Person1# asks #Person2# about a cold and will send #Person2# to a doctor.",
    ),
    "tag": sample("Angela Merkel besuchte gestern Zürich .", "B-PER I-PER O O B-LOC O", "B-PER I-PER O O O O"),
    "span": sample("Who wrote Faust? Faust is a play by Johann Wolfgang von Goethe.", "Goethe", "Goethe"),
    "language-model": sample("It was a bright cold day in April,", "and the clocks were striking thirteen.", "and the"),
}
OTHER_SAMPLES = SAMPLES | {
    "classify": sample("unflinchingly bleak and desperate; 一部沉闷的电影 &amp; more", "negative", "positive"),
    "regress": sample("The man is playing the flute. | The man is playing the guitar.", 1.6, 2.2),
}


def write_run(folder: Path, tasks: int = 9, steps: int = 2000, every: int = 10) -> Path:
    """A run folder as the training loop leaves it, with every head, noise, and text that HTML would misread."""
    random = Random(0)
    folder.mkdir()
    names = [name if round == 0 else f"{name}-{round}" for round in range(4) for name in HEADS][:tasks]
    heads = {name: HEADS[name.split("-")[0]] for name in names}
    about, events = {}, []
    for step in range(every, steps + 1, every):
        loss = {}
        for name in names:
            start, end = (9.0, 4.5) if heads[name][0] in ("generate", "language-model") else (1.1, 0.05)
            loss[name] = (end + (start - end) * math.exp(-4 * step / steps)) * math.exp(random.gauss(0, 0.12))
        examples = {name: random.randint(5, 60) + 3 * index for index, name in enumerate(names)}
        events.append(
            {
                "event": "step",
                "step": step,
                "seconds": step * 0.35,
                "tokens": step * 2048,
                "real_tokens": step * 2030,
                "tokens_per_second": 6100 + random.gauss(0, 150) - (900 if step == every else 0),
                "padding_waste": abs(random.gauss(0.01, 0.003)),
                "learning_rate": 3e-4,
                "gradient_norm": 1.2,
                "loss": loss,
                "examples": examples,
            }
        )
        if step % (steps // 10) == 0:
            metrics = {}
            for name in names:
                head, metric, _, baseline, final = heads[name]
                first = 900.0 if metric == "perplexity" else (baseline or 0.0) * 0.9
                value = final + (first - final) * math.exp(-5 * step / steps) + random.gauss(0, 0.004)
                metrics[name] = {"loss": loss[name] * 1.1, metric: value}
                if head == "generate":
                    metrics[name] |= {"rouge2": value / 3, "rougeL": value * 0.8, "rougeLsum": value * 0.85}
            events.append({"event": "evaluation", "step": step, "seconds": step * 0.36, "metrics": metrics})
    for name in names:
        head, metric, baseline, trivial, _ = heads[name]
        about[name] = {
            "head": head,
            "metric": metric,
            "metrics": events[-1]["metrics"][name],
            "baseline": {"name": baseline, "metrics": {metric: trivial}} if baseline else None,
            "first_loss": events[0]["loss"][name],
            "last_loss": events[-2]["loss"][name],
            "train_examples": 2000,
            "validation_examples": 872,
            "examples_seen": sum(event["examples"][name] for event in events if event["event"] == "step"),
            "dropped": {"empty": 2 if name == "sst2" else 0, "too_long": 0, "unlabelled": 0},
            "truncated": 1403 if head == "generate" else 0,
            "calibration": CALIBRATION if head in ("classify", "tag") else None,
        }
    summary = {
        "name": folder.name,
        "command": f"trunkline train --name {folder.name}",
        "device": "cpu",
        "steps": steps,
        "tokens": steps * 2048,
        "real_tokens": steps * 2030,
        "tokens_per_second": 6098.2,
        "padding_waste": 0.0112,
        "wall_time_seconds": 740.2,
        "peak_memory_bytes": 1_310_000_000,
        "parameters": 5_312_000,
        "best_step": steps,
        "tasks": about,
        "environment": {
            "trunkline": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "platform": "Linux-6.1-x86_64",
            "processor": "AMD EPYC",
            "cores": 2,
            "gpu": None,
        },
    }
    samples = {name: [SAMPLES[heads[name][0]]] * 3 + [OTHER_SAMPLES[heads[name][0]]] * 5 for name in names}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return folder
