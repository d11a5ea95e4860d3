"""What runs have learnt, in Markdown: one function a kind of result."""

from collections.abc import Collection, Sequence
from statistics import fmean, stdev
from typing import Any

from trunkline.training.compare.comparison_tables import tables as comparison_tables
from trunkline.training.environment import described


def balancing_methods(found: dict[str, Any]) -> str:
    methods: dict[str, dict[str, Any]] = found["methods"]
    metrics, trivial = (next(iter(methods.values()))[key] for key in ("metric", "baseline"))
    cells = " | ".join(f"{trivial[task]:.3f}" for task in metrics)
    rows = [f"| trivial baseline | {cells} | {fmean(trivial.values()):.3f} | |"]
    for method, of in methods.items():
        scores = " | ".join(f"{of['tasks'][task]['metrics'][metric]:.3f}" for task, metric in metrics.items())
        rows.append(f"| {method} | {scores} | {of['mean_score']:.3f} | {of['seconds']:.0f} |")
    heads = " | ".join(f"{task} ({metric})" for task, metric in metrics.items())
    return f"""
**Balancing the demo's tasks**, on {described(found["environment"])} (`{found["command"]}`): scores of one run with
every method, and its seconds of training.

| method | {heads} | mean | seconds |
|---|{"---|" * (len(metrics) + 2)}
{chr(10).join(rows)}
"""


def learning(learning: dict[str, Any]) -> str:
    run, mean, rows = learning["run"], learning["mean"], []
    one_task = "" if learning["way"] == "packed" else ", of one task each"
    for name, task in run["tasks"].items():
        metric, baseline = task["metric"], task["baseline"]
        theirs = learning["hugging_face"][name][metric]
        trivial = f"{baseline['metrics'][metric]:.3f} ({baseline['name']})"
        losses = f"{task['first_loss']:.2f} → {task['last_loss']:.2f}"
        rows.append(f"| {name} | {metric} | {task['metrics'][metric]:.3f} | {trivial} | {theirs:.3f} | {losses} |")
    return f"""
**Learning** from scratch on {described(learning["environment"])}: `{run["command"]}`,
{run["wall_time_seconds"] / 60:.1f} minutes in all, {run["steps"]:,} steps, {run["real_tokens"] / 1e6:.1f} M tokens,
padding {run["padding_waste"]:.1%}, peak memory {run["peak_memory_bytes"] / 2**30:.1f} GiB. Scores on the whole
validation splits of the data at hand, in which QNLI, QQP and MNLI are subsets: none of this is a GLUE score. Beside it
a Hugging Face loop with the same data, mix, shape and learning rate: {learning["seconds"]:.0f} seconds of training
against {run["training_seconds"]:.0f} of ours (`{learning["command"]}`), {learning["steps"]:,} steps, batches
{learning["way"]}{one_task}. Its GPT-2 has learned positions and nothing like `exact_match`, which shows our trunk what
two texts have in common.

| task | metric | trunkline | trivial baseline | Hugging Face loop | loss |
|---|---|---|---|---|---|
{chr(10).join(rows)}
| mean | | {mean["trunkline"]:.3f} | | {mean["hugging_face"]:.3f} | |
"""


def comparison(comparison: dict[str, Any]) -> str:
    start = "scratch" if comparison.get("budget", "steps") == "steps" else "pretrained starts"
    return f"""
**Comparison** of systems from {start} on {described(comparison["environment"])}: `{comparison["command"]}`.
{comparison_tables(comparison)}"""


def what_helps(found: dict[str, Any]) -> str:
    return f"""
**What helps the multi-task system**, on {described(found["environment"])} (`{found["command"]}`): each change by
itself, mean ± standard deviation over the seeds. Only the pretrained trunk has seen more text than the others. As it
is, it differs from the comparison's `multitask` in its initial weights: the vocabulary there has bert's mask, too.

{_changes(found["changes"])}
"""


def fine_tuning(found: dict[str, Any]) -> str:
    first = next(iter(next(iter(found["changes"].values())).values()))
    return f"""
**What the defaults of fine-tuning are worth**, on {described(found["environment"])} (`{found["command"]}`):
each put back by itself, after {first["real_tokens"] / 1000:.0f} thousand tokens, on at most 800 examples of every
validation split; mean ± standard deviation over the seeds.

{_changes(found["changes"])}
"""


def from_checkpoint(found: dict[str, Any]) -> str:
    tokens = {name: fmean(of["real_tokens"] for of in seeds.values()) for name, seeds in found["changes"].items()}
    seen = ", ".join(f"{count / 1000:.0f} thousand ({name})" for name, count in tokens.items())
    return f"""
**From a pretrained encoder**, on {described(found["environment"])} (`{found["command"]}`): what ours learns with
`finetune-encoder.yaml`, and a plain Hugging Face loop from the same tokens; tokens seen: {seen}. Mean ± standard
deviation over the seeds.

{_changes(found["changes"], "system")}
"""


def recipes(found: dict[str, Any]) -> str:
    return "".join(
        _recipe(name, list(seeds.values()), found["environment"]) for name, seeds in found["recipes"].items()
    )


def _recipe(name: str, runs: list[dict[str, Any]], where: dict[str, Any]) -> str:
    rows = []
    for task, scores in runs[0]["scores"].items():
        for metric in scores:
            score = _spread([run["scores"][task][metric] for run in runs])
            examples = " to ".join(f"{count:,}" for count in sorted({run["examples"][task] for run in runs}))
            rows.append(f"| {task} | {metric} | {score} | {examples} |")
    tokens = fmean(run["real_tokens"] for run in runs)
    return f"""
**Whole runs** of `{name}.yaml` on {described(where)}: {runs[0]["steps"]:,} steps, {tokens / 1000:,.0f} thousand tokens.
Mean ± standard deviation over {len(runs)} seed(s).

| task | metric | score | validation examples |
|---|---|---|---|
{chr(10).join(rows)}
"""


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def answers(found: dict[str, Any]) -> str:
    ours = next(iter(found["changes"].values())).values()
    before, after = ([of[kind]["sst2"] for of in ours] for kind in ("uncalibrated", "calibration"))
    return f"""
**Several labels, and how far probabilities can be believed**, on {described(found["environment"])}
(`{found["command"]}`): a run on SST-2 and on STS-B's pairs with four labels each, and the Hugging Face loop on the same
tokens. Mean ± standard deviation over the seeds.

{_changes(found["changes"], "system")}

Expected calibration error of ours on SST-2, by seed: {_numbers(after)}, every half of the examples at the temperature
that the other half chose; without a temperature {_numbers(before)}.
"""


def _numbers(values: Collection[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _changes(changes: dict[str, dict[str, Any]], what: str = "change") -> str:
    """A table of the scores of every change over its seeds."""
    metrics = next(iter(next(iter(changes.values())).values()))["metrics"]
    rows = []
    for change, of_seeds in changes.items():
        cells = " | ".join(_spread([of["scores"][task] for of in of_seeds.values()]) for task in metrics)
        rows.append(f"| {change} | {cells} | {len(of_seeds)} |")
    heads = " | ".join(f"{task} ({metric})" for task, metric in metrics.items())
    return "\n".join([f"| {what} | {heads} | seeds |", f"|---|{'---|' * (len(metrics) + 1)}", *rows])
