"""Measurements as JSON, one folder a device, and the tables and plots made from them.

    python -m trunkline.benchmarks.record

writes results/<device>/README.md, its plots, and the part of README.md between the two result marks anew.
"""

import json
import platform
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from trunkline.benchmarks.microbenchmarks.examples import shipped_kernels
from trunkline.benchmarks.plots import plot_roofline, plot_scaling, plot_step, plot_times
from trunkline.benchmarks.tables import kernel_table, tables
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
            text += kernel_table(kernel.name, content)
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
