"""What was measured, in Markdown: one function a kind of result."""

import json
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Any

from trunkline.benchmarks.learning import tables as learning_tables
from trunkline.training.environment import described


def tables(folder: Path, parts: Collection[str] = ()) -> str:
    """What was measured on one device, in Markdown: these parts, or all whose JSON is there."""
    makers = {
        "step": _speed,
        "step-small": _speed,
        "step-llama-1b": _speed,
        "scaling": _scaling,
        "losses": _losses,
        "products": _products,
        "balancing": _balancing,
        "balancing_methods": learning_tables.balancing_methods,
        "generation": _generation,
        "adapters": _adapters,
        "learning": learning_tables.learning,
        "comparison": learning_tables.comparison,
        "comparison_pretrained": learning_tables.comparison,
        "what_helps": learning_tables.what_helps,
        "from_checkpoint": learning_tables.from_checkpoint,
        "recipes": learning_tables.recipes,
        "fine_tuning_pace": _fine_tuning_pace,
        "answers": learning_tables.answers,
        "fine_tuning": learning_tables.fine_tuning,
        "waiting": _waiting,
        "serving": _serving,
    }
    chosen = [name for name in makers if name in (parts or makers)]
    found = {name: path for name in chosen if (path := folder / f"{name}.json").exists()}
    return "".join(makers[name](json.loads(path.read_text(encoding="utf-8"))) for name, path in found.items())


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
    rows += [f"| {system} | left out: {reason} | | | | | |" for system, reason in step.get("missing", {}).items()]
    heads = (
        f"\n300 classification heads take {step['time_300_heads_over_9']:.2f}x the time of 9 on the same tokens.\n"
        if "time_300_heads_over_9" in step
        else ""
    )
    data = {"llama-1b": "random texts of 4,096 tokens"}.get(step.get("shape", ""), "eight GLUE tasks and DialogSum")
    return f"""
**Speed** on {described(step["environment"])}: real tokens per second of a whole training step
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
**Scaling** on {described(scaling["environment"])} (`{scaling["command"]}`): time per token of a training step of the
shape `tiny`, or of making a batch, and memory, from the smallest to the largest of what is varied; all points are in
`scaling.png`.

| what is varied | from … to | µs a token | MiB |
|---|---|---|---|
{chr(10).join(rows)}
"""


def _balancing(balancing: dict[str, Any]) -> str:
    times = balancing["time_over_fixed"]
    return f"""
**Balancing** on {described(balancing["environment"])}, {balancing["threads"]} thread: with task weights from every
task's exact gradient a step of nine tasks takes {times["weights from gradients"]:.3f}x the time of one with fixed
weights; with one backward pass per task it takes {times["a backward pass per task"]:.1f}x (`{balancing["command"]}`,
median of {len(balancing["seconds"]["fixed weights"])} turns).
"""


def _adapters(adapters: dict[str, Any]) -> str:
    rows = [
        f"| {system} | {1000 * median(times):,.0f} | {adapters['tokens_per_second'][system]:,.0f} |"
        for system, times in adapters["seconds"].items()
    ]
    ratios = [f"| {name} | {ratio:.3f} |" for name, ratio in adapters["ratios"].items()]
    return f"""
**Adapters** of rank 16 on all linear layers, on {described(adapters["environment"])}, {adapters["threads"]} thread
(`{adapters["command"]}`): training steps of the shape of SmolLM2-135M, {adapters["tokens"]:,} tokens of eight tasks,
and of a hundred in the rows of 1 and of 100 adapters. PEFT's batches are grouped by length.

| system | ms a step | real tokens/s |
|---|---|---|
{chr(10).join(rows)}

| | |
|---|---|
{chr(10).join(ratios)}
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
**Losses** of the heads, forward and backward, on {described(losses["environment"])}
(`{losses["command"]}`).

| what | times |
|---|---|
{chr(10).join(rows)}
"""


def _products(products: dict[str, Any]) -> str:
    rows = [
        f"| {shape} | {rates['MKL']:,.0f} | {rates['oneDNN']:,.0f} | {rates['oneDNN'] / rates['MKL']:.2f}x |"
        for shape, rates in products["rates"].items()
    ]
    return f"""
**Linear layers** on {described(products["environment"])}, one thread: GFLOP/s of forward and
backward, by the library that torch takes and by the one that ours take on AMD's processors (`{products["command"]}`).

| rows x width x columns | MKL | oneDNN | times |
|---|---|---|---|
{chr(10).join(rows)}
"""


def _generation(generation: dict[str, Any]) -> str:
    rows, documents = [], generation["document_tokens"]
    for name, found in generation["settings"].items():
        ours, theirs = (found["tokens_per_second"][system] for system in ("trunkline", "hugging_face"))
        rows.append(f"| {name} | {found['tokens']:,} | {ours:,.0f} | {theirs:,.0f} | {found['faster']:.2f}x |")
    longest, rounds = generation["longest_text"], len(found["seconds"]["trunkline"])
    return f"""
**Writing** on {described(generation["environment"])}: tokens per second of greedy summaries of {generation["texts"]}
DialogSum documents (`{generation["command"]}`), which have {documents["mean"]:.0f}
tokens on average and {documents["longest"]} at most, with at most {longest} new ones. Beside it Hugging Face `generate`
with the same weights; both write the same tokens. In turns; median of {rounds}.

| texts | new tokens | trunkline | Hugging Face | faster |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _fine_tuning_pace(found: dict[str, Any]) -> str:
    memory = {name: held / 2**20 for name, held in found["memory"].items()}
    rows = [
        f"| {name} | {median(pace):,.0f} | {min(pace):,.0f} to {max(pace):,.0f} | {memory[name]:,.0f} |"
        for name, pace in found["tokens_per_second"].items()
    ]
    return f"""
**The pace of fine-tuning** with `finetune-encoder.yaml` and of that loop, in turns, on
{described(found["environment"])}, one thread (`{found["command"]}`): ours {found["faster"]:.2f}x.

| system | real tokens a second | from, to | most memory, MiB |
|---|---|---|---|
{chr(10).join(rows)}
"""


def _serving(found: dict[str, Any]) -> str:
    where, http, many = found["environment"], found["http"], found["many"]
    eight = ", ".join(f"{own['faster']:.1f}x ({tokens} tokens)" for tokens, own in found["eight_tasks"].items())
    loads = [
        f"| {system} | {clients} | {own['rate']:,.1f} | {1000 * own['p50']:,.0f} | {1000 * own['p99']:,.0f} |"
        for system, by_clients in found["mixed"].items()
        for clients, own in by_clients.items()
    ]
    wheres = {"shared": "server and clients on the same cores", "one core": "the server on one core"}
    costs = [
        f"{of}: {median(http[name]['requests_per_second']):,.0f} requests a second over HTTP, "
        f"{median(http[name]['texts_per_second_without']):,.0f} texts a second without, "
        f"{http[name]['fewer']:.1%} fewer; "
        f"a single one takes {1000 * http[name]['idle_seconds_more']:.2f} ms more than "
        f"{1000 * http[name]['idle_seconds']['without']:.1f} ms."
        for name, of in wheres.items()
    ]
    before, after = (size / 2**20 for size in many["memory"])
    return f"""
**Serving** on {described(where)}, one thread (`{found["command"]}`). Eight tasks on one text in one pass; the eight
exported models one after the other take {eight} as long.

| server, texts of 8 to 512 tokens | clients | answers a second | median ms | 99th percentile, ms |
|---|---|---|---|---|
{chr(10).join(loads)}

Texts of 64 tokens, {costs[0]}
And {costs[1]}
From the command to ready {median(found["start"]):.1f} s.
{many["clients"]} clients: {many["rate"]:,.0f} answers a second, {many["failed"]} failed; memory {before:,.0f} MiB, and
{after:,.0f} MiB at the end.
"""


def _waiting(found: dict[str, Any]) -> str:
    rows = [
        f"| {row['system']} | {row['waiting']} | {row['quiet']:,.0f} | {row['busy']:,.0f} |"
        for row in found["tokens_per_second"]
    ]
    return f"""
**How threads wait for one another**, on {described(found["environment"])} (`{found["command"]}`): real tokens a
second of `tiny` on a quiet machine, and beside a process that keeps one core busy. The command lets them spin briefly.

| system | waiting | quiet | one core busy |
|---|---|---|---|
{chr(10).join(rows)}
"""


def kernel_table(name: str, content: dict[str, Any]) -> str:
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
On {described(content["environment"])}, {cases[0]["dtype"]}: {commands}. Milliseconds a call, median of
the rounds; then how many times faster than the fastest other, the share of the floor, and TFLOP/s.

| shape | direction | {" | ".join(systems)} | faster | of the floor | TFLOP/s |
|---|---|{"---|" * (len(systems) + 3)}
{chr(10).join(rows)}

![times]({name}.png)
"""
