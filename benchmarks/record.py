"""Measurements as JSON, one folder a device, and the README's tables made from them.

python benchmarks/record.py        # rewrites the part of README.md between the two result marks
"""

import json
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def record(name: str, content: dict[str, Any], environment: dict[str, Any]) -> Path:
    """Writes results/<device>/<name>.json."""
    device = environment["gpu"] or f"{platform.machine()} {environment['processor']} {environment['cores']} cores"
    path = RESULTS / device.lower().replace(" ", "-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "environment": environment}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")
    return path


def tables(folder: Path) -> str:
    """What was measured on one device, in Markdown: the parts whose JSON is there."""
    makers = {"step": _speed, "learning": _learning}
    found = {name: folder / f"{name}.json" for name in makers if (folder / f"{name}.json").exists()}
    return "".join(makers[name](json.loads(path.read_text(encoding="utf-8"))) for name, path in found.items())


def _measured_on(where: dict[str, Any]) -> str:
    device = where["gpu"] or f"{where['processor']}, {where['cores']} cores, float32"
    return f"{device}, Python {where['python']}, torch {where['torch']}"


def _speed(step: dict[str, Any]) -> str:
    rates, waste = step["tokens_per_second"], step["padding"]
    rows = [
        f"| {system} | {rates[system]:,.0f} | {rates[system] / step['best_peer']:.2f}x | {waste[system]:.1%} |"
        for system in ("trunkline", "padded", "grouped", "packed")
    ]
    return f"""
**Speed** on {_measured_on(step["environment"])}: real tokens per second of a whole training step
(`{step["command"]}`). Eight GLUE tasks and DialogSum, the GPT-2 shape at width 256 and 4 layers, about 2,048 tokens a
step; the other three are ways of making batches for a Hugging Face model. Each in a process of its own, taking turns;
median of {len(step["turns"]["trunkline"])} turns.

| system | real tokens/s | of the best peer | padding |
|---|---|---|---|
{chr(10).join(rows)}

300 classification heads take {step["time_300_heads_over_9"]:.2f}x the time of 9 on the same tokens.
"""


def _learning(learning: dict[str, Any]) -> str:
    run, mean, rows = learning["run"], learning["mean"], []
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
a Hugging Face loop with the same data, mix, shape and learning rate and as many seconds of training
(`{learning["command"]}`): {learning["steps"]:,} steps, batches {learning["way"]}.

| task | metric | trunkline | trivial baseline | Hugging Face loop | loss |
|---|---|---|---|---|---|
{chr(10).join(rows)}
| mean | | {mean["trunkline"]:.3f} | | {mean["hugging_face"]:.3f} | |
"""


def main() -> None:
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    made = "".join(tables(folder) for folder in sorted(RESULTS.iterdir()))
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
