"""The tables of a comparison in Markdown, and what stands in their cells."""

from typing import Any

from trunkline.training.compare.systems import FIRST
from trunkline.training.pages.units import duration, quantity
from trunkline.training.scoring.metrics import higher_is_better

GAIN = "Multi-task gain Δm over single-task models, per cent of their score, and its mean over the tasks"


def tables(results: dict[str, Any]) -> str:
    """Scores, multi-task gain and costs in Markdown; also for benchmarks/results."""
    tasks = results["tasks"]
    heads = [f"{name} ({metric_label(about['metric'])})" for name, about in tasks.items()]
    rows = [f"| {name} | {' | '.join(_marked(results, task, name) for task in tasks)} |" for name in rows_of(results)]
    gains = [percent(results["gain"][name]) for name in (*tasks, "mean")]
    costs = ["parameters", "tokens", "FLOPs", "FLOPs/token", "training", "wall time", "seeds"]
    cost_rows = [f"| {name} | {' | '.join(costs_of(results, name).values())} |" for name in systems(results)]
    failed = [f"- {name}, seed {seed}: {error}" for name, seed, error in failures(results)]
    started = results.get("budget", "steps") != "steps"
    starts = [f"- {name}: {about['about']}" for name, about in results["systems"].items()] if started else []
    return f"""{chr(10) + chr(10).join(starts) + chr(10) if starts else ""}
Scores on the {results.get("split", "validation")} splits, {over(results)}.

| system | {" | ".join(heads)} |
|---|{"---|" * len(heads)}
{chr(10).join(rows)}

{_ahead_table(results)}{GAIN}{_brackets(results)}.

| | {" | ".join(tasks)} | mean |
|---|{"---|" * (len(tasks) + 1)}
| Δm | {" | ".join(gains)} |
{_forgetting_table(results)}
Costs{", means over the seeds" if len(results["seeds"]) > 1 else ""}; {_matched(results)}.

| system | {" | ".join(costs)} |
|---|{"---|" * len(costs)}
{chr(10).join(cost_rows)}
{chr(10) + "Failed:" + chr(10) + chr(10) + chr(10).join(failed) + chr(10) if failed else ""}"""


def _matched(results: dict[str, Any]) -> str:
    """What the systems have in common."""
    budget = results.get("budget", "steps")
    return f"sizes matched by {results['match']}" if budget == "steps" else f"budgets matched by {budget}"


def _brackets(results: dict[str, Any]) -> str:
    said = any(gain and "low" in gain for gain in results["gain"].values())
    return "; in brackets 95 % of a paired bootstrap over examples" if said else ""


def _ahead_table(results: dict[str, Any]) -> str:
    """How far the first system is ahead of the others, where their predictions are kept."""
    rows, tasks = ahead_of(results), results["tasks"]
    if not rows:
        return ""
    lines = [f"| {name} | {' | '.join(of.get(task, '–') for task in tasks)} |" for name, of in rows.items()]
    return f"""{ahead_note(results)}

| ahead of | {" | ".join(tasks)} |
|---|{"---|" * len(tasks)}
{chr(10).join(lines)}

"""


def ahead_note(results: dict[str, Any]) -> str:
    bold = "; bold where it leaves 0 out" if len(results["seeds"]) > 1 else ""
    return f"How far {FIRST} is ahead of each, and in brackets 95 % of a paired bootstrap over examples{bold}."


def _forgetting_table(results: dict[str, Any]) -> str:
    """What causal trunks forget."""
    if not (rows := forgotten(results)):
        return ""
    lines = [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
    return f"""
Forgetting: loss of the next token of held-out books, in nats, before and after; of several models their mean.

| system | before | after | difference |
|---|---|---|---|
{chr(10).join(lines)}
"""


def over(results: dict[str, Any]) -> str:
    """What the scores are means of, and what bold says."""
    seeds = results["seeds"]
    if len(seeds) == 1:
        return f"of the one seed {seeds[0]}; no score is bold, for how far scores spread over seeds is not known"
    return (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; bold where the best is ahead of the "
        f"next by more than the larger of their standard deviations"
        + (", and by a paired bootstrap over examples" if ahead_of(results) else "")
    )


def systems(results: dict[str, Any]) -> list[str]:
    return list(results["systems"])


def rows_of(results: dict[str, Any]) -> list[str]:
    """The rows of the table."""
    return [*results["systems"], *results["trivial"]]


def metric_label(metric: str) -> str:
    return metric + ("" if higher_is_better(metric) else " ↓")


def cell(results: dict[str, Any], task: str, system: str) -> str:
    """A score as text."""
    score = results["table"][task]["scores"].get(system)
    if score is None:
        states = {result["state"] for result in results["systems"].get(system, {"seeds": {}})["seeds"].values()}
        states |= {"failed"} if task in results.get("failed", {}).get(system, {}) else set()
        return "failed" if "failed" in states else "unfinished" if states else "–"
    if system in results["trivial"]:
        return f"{score['mean']:.3f}"
    deviation = "" if score["deviation"] is None else f" ± {score['deviation']:.3f}"
    missing = "" if score["runs"] == len(results["seeds"]) else f" ({score['runs']} of {len(results['seeds'])} seeds)"
    return f"{score['mean']:.3f}{deviation}{missing}"


def _marked(results: dict[str, Any], task: str, system: str) -> str:
    text = cell(results, task, system)
    return f"**{text}**" if results["table"][task]["best"] == system else text


def percent(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "–"
    spread = "" if gain["deviation"] is None else f" ± {gain['deviation']:.1f}"
    return f"{gain['mean']:+.1f} %{spread}" + (f" [{gain['low']:+.1f}, {gain['high']:+.1f}]" if "low" in gain else "")


def ahead_of(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By system and task, how far the first system is ahead, with the 95 % interval; bold where it leaves 0 out, if
    there are seeds enough to say it of a system and not of a single model."""
    made: dict[str, dict[str, str]] = {}
    several = len(results["seeds"]) > 1
    for task, row in results["table"].items():
        for name, by in row.get("ahead", {}).items():
            text = f"{by['mean']:+.3f} [{by['low']:+.3f}, {by['high']:+.3f}]"
            made.setdefault(name, {})[task] = f"**{text}**" if several and not by["low"] <= 0 <= by["high"] else text
    return {name: made[name] for name in rows_of(results) if name in made}


def forgotten(results: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """By system, the loss of the next token of held-out books before, after, and the difference."""
    made = {}
    for name, loss in results.get("forgetting", {}).items():
        if (after := loss["after"]) is None:
            made[name] = (f"{loss['before']:.3f}", "–", "–")
            continue
        spread = "" if after["deviation"] is None else f" ± {after['deviation']:.3f}"
        difference = f"{after['mean'] - loss['before']:+.3f}"
        made[name] = (f"{loss['before']:.3f}", f"{after['mean']:.3f}{spread}", difference)
    return made


def costs_of(results: dict[str, Any], system: str) -> dict[str, str]:
    """What a system takes, in words; means over the seeds that finished."""
    seeds = results["systems"][system]["seeds"].values()
    finished = [result for result in seeds if result["state"] == "finished"]
    count = f"{len(finished)} of {len(seeds)}"
    if not finished:
        return dict.fromkeys(("parameters", "tokens", "FLOPs", "per_token", "training", "wall"), "–") | {"seeds": count}

    def mean(key: str) -> float:
        return sum(result[key] for result in finished) / len(finished)

    models = finished[0]["models"]
    return {
        "parameters": (f"{models} × " if models > 1 else "") + quantity(finished[0]["parameters"]),
        "tokens": quantity(mean("real_tokens")),
        "FLOPs": quantity(mean("training_flops")),
        "per_token": quantity(mean("training_flops") / mean("real_tokens")),
        "training": duration(mean("training_seconds")),
        "wall": duration(mean("wall_time_seconds")),
        "seeds": count,
    }


def failures(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """System, seed and error of what failed."""
    return [
        (system, seed, f"{failure['error']} (in part '{failure['part']}')")
        for system, about in results["systems"].items()
        for seed, result in about["seeds"].items()
        for failure in failures_of(result)
    ] + [
        (name, "any", f"{error} (task '{task}')")
        for name, of_tasks in results.get("failed", {}).items()
        for task, error in of_tasks.items()
    ]


def failures_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The failed parts of a system with a seed."""
    return result.get("failures", [result] if result["state"] == "failed" else [])
