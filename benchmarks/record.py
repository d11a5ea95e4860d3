"""Measurements as JSON, one folder a device, and the tables and plots made from them.

    python -m trunkline.benchmarks.record

writes results/<device>/README.md, its plots, and the part of README.md between the two result marks anew.
"""

import json
import platform
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from trunkline.benchmarks.microbenchmarks.examples import shipped_kernels
from trunkline.benchmarks.plots import plot_roofline, plot_scaling, plot_step, plot_times
from trunkline.training.compare.comparison_page import tables as comparison_tables
from trunkline.training.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
IN_README = ("step", "step-small", "step-llama-1b")


def results_folder(environment: dict[str, Any]) -> Path:
    """results/<device>"""
    device = environment["gpu"] or f"{platform.machine()} {environment['processor']} {environment['cores']} cores"
    return RESULTS / device.lower().replace(" ", "-")


def record(name: str, content: dict[str, Any], environment: dict[str, Any]) -> Path:
    """Writes results/<device>/<name>.json."""
    path = results_folder(environment) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "environment": environment}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return path


def recorded(name: str, environment: dict[str, Any]) -> dict[str, Any]:
    """What was written before to results/<device>/<name>.json; nothing where there is no such file."""
    path = results_folder(environment) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record_kernels(measured: dict[tuple[str, str, str], dict[str, Any]], command: str) -> None:
    """Writes results/<device>/<kernel>.json for every kernel that was measured.

    Cases of an earlier session stay where they were measured in the same environment and are not among these.

    Args:
        measured: (kernel, shape, direction) -> dtype, sizes, work, floor and, by system, seconds a call in every round
            or the exception that kept it out.
        command: that measured it.
    """
    around = environment()
    for kernel in dict.fromkeys(kernel for kernel, _, _ in measured):
        before = recorded(kernel, around)
        kept = before["cases"] if before.get("environment") == around else []
        cases = {(case["shape"], case["direction"]): case for case in kept}
        for (of, shape, direction), case in measured.items():
            if of == kernel:
                cases[shape, direction] = {
                    "shape": shape,
                    "direction": direction,
                    **case,
                    "sizes": {name: _brief(size) for name, size in case["sizes"].items()},
                    "systems": {name: _times(outcome) for name, outcome in case["systems"].items()},
                    "command": command,
                }
        record(kernel, {"unit": "seconds a call", "cases": list(cases.values())}, around)


def _brief(size: Any) -> Any:
    """[48, 48, 768] -> '2 x 48 + 1 x 768'"""
    return " + ".join(f"{n} x {item}" for item, n in Counter(size).items()) if isinstance(size, list) else size


def _times(outcome: list[float] | Exception) -> dict[str, Any]:
    if isinstance(outcome, Exception):
        return {"missing": f"{type(outcome).__name__}: {outcome}"}
    return {"median": median(outcome), "rounds": outcome}


def tables(folder: Path, parts: Collection[str] = ()) -> str:
    """What was measured on one device, in Markdown: these parts, or all whose JSON is there."""
    makers = {
        "step": _speed,
        "step-small": _speed,
        "step-llama-1b": _speed,
        "scaling": _scaling,
        "losses": _losses,
        "balancing": _balancing,
        "balancing_methods": _balancing_methods,
        "generation": _generation,
        "learning": _learning,
        "comparison": _comparison,
        "what_helps": _what_helps,
        "fine_tuning": _fine_tuning,
    }
    chosen = [name for name in makers if name in (parts or makers)]
    found = {name: path for name in chosen if (path := folder / f"{name}.json").exists()}
    return "".join(makers[name](json.loads(path.read_text(encoding="utf-8"))) for name, path in found.items())


def _measured_on(where: dict[str, Any]) -> str:
    device = where["gpu"] or f"{where['processor']}, {where['cores']} cores, float32"
    return f"{device}, Python {where['python']}, torch {where['torch']}"


def _speed(step: dict[str, Any]) -> str:
    rates, waste, details = step["tokens_per_second"], step["padding"], step.get("systems", {})
    rows = []
    for system, rate in rates.items():
        if "heads" not in system:
            own = details.get(system)  # older results have none
            measured = (
                f"{1000 * own['seconds_per_step']:,.0f} | {own['memory'] / 2**20:,.0f} | {own['utilisation']:.0%}"
                if own
                else "- | - | -"
            )
            rows.append(
                f"| {system} | {rate:,.0f} | {rate / step['best_peer']:.2f}x | {waste[system]:.1%} | {measured} |"
            )
    heads = (
        f"\n300 classification heads take {step['time_300_heads_over_9']:.2f}x the time of 9 on the same tokens.\n"
        if "time_300_heads_over_9" in step
        else ""
    )
    data = {"llama-1b": "random texts of 4,096 tokens"}.get(step.get("shape", ""), "eight GLUE tasks and DialogSum")
    return f"""
**Speed** on {_measured_on(step["environment"])}: real tokens per second of a whole training step
(`{step["command"]}`), on {data}, in the shape `{step.get("shape", "tiny")}`, about {step.get("tokens", 2048):,} tokens
a step. Below ours the same model of Hugging Face with batches made in other ways. Each in a process of its own, taking
{len(next(iter(step["turns"].values())))} turns, which count together. Utilisation is of what the machine does in its
best product.

| system | real tokens/s | of the best peer | padding | ms a step | MiB | utilisation |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
{heads}"""


def _scaling(scaling: dict[str, Any]) -> str:
    rows = [
        f"| {curve} | {points[0]['x']:,} … {points[-1]['x']:,} | "
        f"{_microseconds(points[0]['seconds'])} … {_microseconds(points[-1]['seconds'])} | "
        f"{points[0]['memory'] / 2**20:,.0f} … {points[-1]['memory'] / 2**20:,.0f} |"
        for curve, points in scaling["curves"].items()
    ]
    return f"""
**Scaling** on {_measured_on(scaling["environment"])} (`{scaling["command"]}`): time per token of a training step of the
shape `tiny`, or of making a batch, and memory, from the smallest to the largest of what is varied; all points are in
`scaling.png`.

| what is varied | from … to | µs a token | MiB |
|---|---|---|---|
{chr(10).join(rows)}
"""


def _balancing(balancing: dict[str, Any]) -> str:
    times = balancing["time_over_fixed"]
    return f"""
**Balancing** on {_measured_on(balancing["environment"])}, {balancing["threads"]} thread: with task weights from every
task's exact gradient a step of nine tasks takes {times["weights from gradients"]:.3f}x the time of one with fixed
weights; with one backward pass per task it takes {times["a backward pass per task"]:.1f}x (`{balancing["command"]}`,
median of {len(balancing["seconds"]["fixed weights"])} turns).
"""


def _balancing_methods(found: dict[str, Any]) -> str:
    methods: dict[str, dict[str, Any]] = found["methods"]
    metrics, trivial = (next(iter(methods.values()))[key] for key in ("metric", "baseline"))
    cells = " | ".join(f"{trivial[task]:.3f}" for task in metrics)
    rows = [f"| trivial baseline | {cells} | {fmean(trivial.values()):.3f} | |"]
    for method, of in methods.items():
        scores = " | ".join(f"{of['tasks'][task]['metrics'][metric]:.3f}" for task, metric in metrics.items())
        rows.append(f"| {method} | {scores} | {of['mean_score']:.3f} | {of['seconds']:.0f} |")
    heads = " | ".join(f"{task} ({metric})" for task, metric in metrics.items())
    return f"""
**Balancing the demo's tasks**, on {_measured_on(found["environment"])} (`{found["command"]}`): scores of one run with
every method, and its seconds of training.

| method | {heads} | mean | seconds |
|---|{"---|" * (len(metrics) + 2)}
{chr(10).join(rows)}
"""


def _microseconds(seconds: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.3g}"


def _losses(losses: dict[str, Any]) -> str:
    meanings = {
        "loop over 9 tasks / task_loss": "512 rows of nine tasks, width 768: a loop over the tasks, against one call",
        "256 classes, loop over tasks / task_loss": "the same of four tasks with up to 256 classes",
        "1000 tasks / 10 tasks, 512 x 256": "512 rows, width 256: 1,000 tasks, against 10",
        "1000 tasks / 10 tasks, 512 x 768": "512 rows, width 768: 1,000 tasks, against 10",
        "1000 tasks / 10 tasks, 4096 x 768": "4,096 rows, width 768: 1,000 tasks, against 10",
        "eager / linear_cross_entropy": "1,024 rows, 8,192 words: `F.cross_entropy(F.linear())`, against ours",
        "memory, linear_cross_entropy / eager": "the same: our memory, against its",
    }
    rows = [f"| {meaning} | {losses['ratios'][name]:.2f}x |" for name, meaning in meanings.items()]
    return f"""
**Losses** of the heads, forward and backward, on {_measured_on(losses["environment"])}
(`{losses["command"]}`).

| what | times |
|---|---|
{chr(10).join(rows)}
"""


def _generation(generation: dict[str, Any]) -> str:
    rows, documents = [], generation["document_tokens"]
    for name, found in generation["settings"].items():
        ours, theirs = (found["tokens_per_second"][system] for system in ("trunkline", "hugging_face"))
        rows.append(f"| {name} | {found['tokens']:,} | {ours:,.0f} | {theirs:,.0f} | {found['faster']:.2f}x |")
    longest, rounds = generation["longest_text"], len(found["seconds"]["trunkline"])
    return f"""
**Writing** on {_measured_on(generation["environment"])}: tokens per second of greedy summaries of {generation["texts"]}
DialogSum documents (`{generation["command"]}`), which have {documents["mean"]:.0f}
tokens on average and {documents["longest"]} at most, with at most {longest} new ones. Beside it Hugging Face `generate`
with the same weights; both write the same tokens. In turns; median of {rounds}.

| texts | new tokens | trunkline | Hugging Face | faster |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _learning(learning: dict[str, Any]) -> str:
    run, mean, rows = learning["run"], learning["mean"], []
    one_task = "" if learning["way"] == "packed" else ", of one task each"
    for name, task in run["tasks"].items():
        metric, baseline = task["metric"], task["baseline"]
        theirs = learning["hugging_face"][name][metric]
        trivial = f"{baseline['metrics'][metric]:.3f} ({baseline['name']})"
        losses = f"{task['first_loss']:.2f} → {task['last_loss']:.2f}"
        rows.append(f"| {name} | {metric} | {task['metrics'][metric]:.3f} | {trivial} | {theirs:.3f} | {losses} |")
    return f"""
**Learning** from scratch on {_measured_on(learning["environment"])}: `{run["command"]}`,
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


def _comparison(comparison: dict[str, Any]) -> str:
    return f"""
**Comparison** of systems from scratch on {_measured_on(comparison["environment"])}: `{comparison["command"]}`.
{comparison_tables(comparison)}"""


def _what_helps(found: dict[str, Any]) -> str:
    return f"""
**What helps the multi-task system**, on {_measured_on(found["environment"])} (`{found["command"]}`): each change by
itself, mean ± standard deviation over the seeds. Only the pretrained trunk has seen more text than the others. As it
is, it differs from the comparison's `multitask` in its initial weights: the vocabulary there has bert's mask, too.

{_changes(found["changes"])}
"""


def _fine_tuning(found: dict[str, Any]) -> str:
    first = next(iter(next(iter(found["changes"].values())).values()))
    return f"""
**What the defaults of fine-tuning are worth**, on {_measured_on(found["environment"])} (`{found["command"]}`):
each put back by itself, after {first["real_tokens"] / 1000:.0f} thousand tokens, on at most 800 examples of every
validation split; mean ± standard deviation over the seeds.

{_changes(found["changes"])}
"""


def _changes(changes: dict[str, dict[str, Any]]) -> str:
    """A table of the scores of every change over its seeds."""
    metrics = next(iter(next(iter(changes.values())).values()))["metrics"]
    rows = []
    for change, of_seeds in changes.items():
        scores = [[of["scores"][task] for of in of_seeds.values()] for task in metrics]
        spread = [f" ± {stdev(of_task):.3f}" if len(of_task) > 1 else "" for of_task in scores]
        cells = " | ".join(f"{fmean(of_task):.3f}{of}" for of_task, of in zip(scores, spread, strict=True))
        rows.append(f"| {change} | {cells} | {len(of_seeds)} |")
    heads = " | ".join(f"{task} ({metric})" for task, metric in metrics.items())
    return "\n".join([f"| change | {heads} | seeds |", f"|---|{'---|' * (len(metrics) + 1)}", *rows])


def _kernel(name: str, content: dict[str, Any]) -> str:
    """One row a shape and direction; milliseconds, and what they are beside the best peer and the floor."""
    cases = content["cases"]
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(case["command"] for case in cases))
    systems = list(dict.fromkeys(system for case in cases for system in case["systems"]))
    rows = []
    for case in cases:
        times = {system: outcome["median"] for system, outcome in case["systems"].items() if "median" in outcome}
        ours = times.get("trunkline")
        peers = {system: time for system, time in times.items() if system != "trunkline"}
        ratio = f"{min(peers.values()) / ours:.2f}x" if ours and peers else "-"
        reached = f"{case['floor'] / ours:.0%}" if ours and case["floor"] else "-"
        rate = f"{case['work']['operations'] / ours / 1e12:.3g}" if ours else "-"
        cells = [f"{times[system] * 1000:,.3g}" if system in times else "-" for system in systems]
        rows.append(f"| {case['shape']} | {case['direction']} | {' | '.join(cells)} | {ratio} | {reached} | {rate} |")
    return f"""
## {name}
On {_measured_on(content["environment"])}, {cases[0]["dtype"]}: {commands}. Milliseconds a call, median of
the rounds; then how many times faster than the fastest other, the share of the floor, and TFLOP/s.

| shape | direction | {" | ".join(systems)} | faster | of the floor | TFLOP/s |
|---|---|{"---|" * (len(systems) + 3)}
{chr(10).join(rows)}

![times]({name}.png)
"""


def report_device(folder: Path) -> None:
    """Writes <folder>/README.md, with plots, from the JSON in it."""
    text = f"# {folder.name}\n{tables(folder)}"
    for path in (*sorted(folder.glob("step*.json")), *folder.glob("scaling.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.stem != "scaling" and "systems" not in content:  # older results are not in parts
            continue
        (plot_scaling if path.stem == "scaling" else plot_step)(content, path.with_suffix(".png"))
        text += f"\n![{path.stem}]({path.stem}.png)\n"
    for kernel in shipped_kernels():
        if (path := folder / f"{kernel.name}.json").exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            text += _kernel(kernel.name, content)
            plot_times(content["cases"], kernel.name, folder / f"{kernel.name}.png")
            if plot_roofline(content["cases"], content["environment"]["gpu"], folder / f"{kernel.name}-roofline.png"):
                text += f"![roofline]({kernel.name}-roofline.png)\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"written to {folder / 'README.md'}")


def _chart(plot: Path, seen_from: Path) -> str:
    """The one that the README shows, of training steps."""
    return f"\n![training steps beside Hugging Face]({plot.relative_to(seen_from)})\n" if plot.exists() else ""


def report(results: Path = RESULTS, readme: Path = ROOT / "README.md") -> None:
    """Tables and plots of every device, and the README's part between the marks: the speed of a step."""
    folders = sorted(folder for folder in results.iterdir() if folder.is_dir())
    for folder in folders:
        report_device(folder)
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    made = "".join(_chart(folder / "step.png", readme.parent) + tables(folder, IN_README) for folder in folders)
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    report()
