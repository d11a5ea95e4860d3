"""The `trunkline` command.

Commands import what they need themselves: `trunkline --help` answers at once.
"""

import argparse
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trunkline import __version__
from trunkline.engine.console import harmless, tell, warn
from trunkline.training.distributed.launch import USER_ERROR, check_shared
from trunkline.training.using import add_commands

INTERRUPTED = 130  # exit code that shells give Ctrl-C
UNREAD = 141  # and what ends because nobody reads its output


def main(arguments: Sequence[str] | None = None) -> int:
    # Threads of a step that wait for one another spin briefly and then sleep, unless the user wants otherwise: where
    # other programs use the cores as well, threads that spin keep those they wait for from running. What each way costs
    # was measured by benchmarks/systems/waiting.py. libgomp reads this when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    parser = _parser()
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    end = given.index("--") if "--" in given else len(given)
    options, late = parser.parse_known_args(given[:end])
    options.typed = given
    verbatim = given[end + 1 :]  # whatever they begin with
    if late or verbatim:  # before Python 3.13 argparse takes no values that stand after an option after the first ones
        if "values" not in options or any(value.startswith("-") for value in late):
            parser.error(harmless(f"unrecognized arguments: {' '.join(late or verbatim)}"))
        options.values = [*options.values, *late, *verbatim]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that cannot show a character shows its number
    try:
        check_shared(options.name_of_command)
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as in `trunkline predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        warn(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed once more while Python ends, it would end otherwise
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trunkline", description="Train one shared transformer trunk with many task heads."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, function: Callable[[argparse.Namespace], None], text: str, **settings: Any
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, **settings)
        sub.set_defaults(command=function, name_of_command=name)
        return sub

    init = command("init", _init, "look at tables of yours and write a config for them")
    init.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="a task each, or its train and validation rows"
    )
    init.add_argument(
        "--label", action="append", default=[], metavar="COLUMN", help="to be predicted; several: a task each"
    )
    init.add_argument("--text", action="append", default=[], metavar="COLUMN", help="to be read, in this order")
    init.add_argument("--head", default="", help="what is predicted: classify, regress, tag, span, generate ...")
    init.add_argument("--labels", default="", metavar="A,B", help="class names in the order of their ids")
    init.add_argument("--metric", action="append", default=[], help="systems are compared by the first")
    init.add_argument(
        "--validation", default="", metavar="FILE", help="or the share of the rows that is held out, as 0.1"
    )
    init.add_argument(
        "--unlabelled", choices=["drop", "error"], default="", help="what happens to rows without a label"
    )
    init.add_argument("--encoding", default="", help="of text files, as windows-1252")
    init.add_argument("--name", default="", help="of the task, and of the config")
    init.add_argument(
        "--init", default="", metavar="CHECKPOINT", help="folder or hub id to start from; default: from scratch"
    )
    init.add_argument("--trunk", default="", metavar="PRESET", help="from scratch: tiny, small, medium, bert-base")
    init.add_argument("--steps", type=int, help="of training")
    init.add_argument("--minutes", type=float, help="of training from scratch, on this machine; default: 2")
    init.add_argument("--out", type=Path, metavar="FILE.yaml", help="the config; default: named after the first file")
    init.add_argument("--overwrite", action="store_true", help="replace a config that is there")
    init.add_argument("--yes", action="store_true", help="ask nothing, in a terminal, too")

    train = command("train", _train, "train as a YAML file says; key=value changes its settings", add_help=False)
    train.add_argument("config", metavar="CONFIG.yaml", type=Path)
    train.add_argument("values", nargs="*", default=[], metavar="key=value")
    train.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    train.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    train.add_argument("--help", "-h", action=_SettingsHelp, help="show this and all settings, and stop")

    compare = command(
        "compare", _compare, "train several systems on the same data and budget, side by side", add_help=False
    )
    compare.add_argument("config", metavar="CONFIG.yaml", type=Path)
    compare.add_argument("values", nargs="*", default=[], metavar="key=value")
    compare.add_argument("--help", "-h", action=_SettingsHelp, help="show this and all settings, and stop")

    add_commands(command)

    tasks = command("tasks", _tasks, "list the embedded tasks")
    tasks.add_argument("--data", type=Path, help="folder laid out like the hub, to count examples in")

    doctor = command("doctor", _doctor, "check the installation and, with a config, all of its data")
    doctor.add_argument("config", nargs="?", metavar="CONFIG.yaml", type=Path)
    doctor.add_argument("values", nargs="*", default=[], metavar="key=value")

    estimate = command("estimate", _estimate, "print memory, arithmetic and time of a run, before it is started")
    estimate.add_argument("config", metavar="CONFIG.yaml", type=Path)
    estimate.add_argument(
        "values", nargs="*", default=[], metavar="key=value", help="also devices=64 nodes=8: of so many, on 8 machines"
    )

    tune = command("tune", _tune, "time the ways in which every op can go on this GPU, and keep the fastest")
    tune.add_argument("config", metavar="CONFIG.yaml", type=Path)
    tune.add_argument("values", nargs="*", default=[], metavar="key=value")

    card = command("card", _card, "print a model card of a finished run, in Markdown")
    card.add_argument("run", type=Path)
    card.add_argument("--repo", default="", metavar="USER/NAME", help="on the hub, that the card says to load")
    card.add_argument("--license", default="", help="of the model, as the hub names it: apache-2.0, cc-by-4.0 ...")

    push = command("push", _push, "put a finished run, with a model card, on the Hugging Face hub")
    push.add_argument("run", type=Path)
    push.add_argument("repo", metavar="USER/NAME", help="made where it is not there")
    push.add_argument("--private", action="store_true", help="make it private")
    push.add_argument("--license", default="", help="of the model, as the hub names it: apache-2.0, cc-by-4.0 ...")

    command("schema", _schema, "print the JSON schema of a config, by which editors complete and check it")

    report = command("report", _report, "write report.html of a run anew, also while the run goes on")
    report.add_argument("run", type=Path)
    return parser


class _SettingsHelp(argparse.Action):
    """The options, and every key of a config with its meaning and default."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        super().__init__(option_strings, dest, nargs=0, **settings)

    def __call__(self, parser, *_):
        from trunkline.training.config_file import settings_help

        print(parser.format_help())
        if parser.prog.endswith("compare"):
            from trunkline.training.compare.comparison import Comparison

            keys = settings_help(Comparison)
        else:
            keys = settings_help()
        print(f"settings, in CONFIG.yaml or as key=value:\n\n{keys}")
        parser.exit()


def _init(options: argparse.Namespace) -> None:
    from trunkline.engine.yaml_file import read_yaml
    from trunkline.training.starting.init import Answers, init
    from trunkline.training.starting.proposal import Asked

    classes = read_yaml(f"[{options.labels}]") if options.labels else []
    asked = Asked(
        tuple(options.label),
        tuple(options.text),
        options.head,
        tuple(map(str, classes)),
        tuple(options.metric),
        options.unlabelled,
    )
    of_all = {name: getattr(options, name) for name in ("name", "validation", "encoding", "init", "trunk")}
    answers = Answers(asked, **of_all, steps=options.steps, minutes=options.minutes)
    # the terminal that a notebook gives to a command has nobody before it
    asks = not options.yes and "JPY_PARENT_PID" not in os.environ and sys.stdin.isatty() and sys.stdout.isatty()
    typed = shlex.join(["trunkline", *options.typed])
    init(
        options.files,
        answers,
        out=options.out,
        overwrite=options.overwrite,
        command=typed,
        tell=print,
        ask=_ask if asks else None,
    )


def _ask(question: str, default: str) -> str:
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        return default


def _card(options: argparse.Namespace) -> None:
    from trunkline.training.sharing.card import card

    print(card(options.run, options.repo, options.license), end="")


def _push(options: argparse.Namespace) -> None:
    from trunkline.training.sharing.push import push

    print(push(options.run, options.repo, private=options.private, licence=options.license))


def _schema(options: argparse.Namespace) -> None:
    from trunkline.training.starting.schema import config_schema

    print(json.dumps(config_schema(), indent=1))


def _train(options: argparse.Namespace) -> None:
    from trunkline.training.config_file import load_config

    config = load_config(options.config, options.values)

    from trunkline.training.distributed.launch import is_first, is_rank, launch, number_of_ranks

    if not is_rank() and (ranks := number_of_ranks(config)) > 1:
        raise SystemExit(launch(ranks, options.typed))

    from trunkline.engine.engine import Engine
    from trunkline.engine.heads.registry import HEADS

    engine = Engine.from_config(config)
    summary = engine.fit(resume=options.resume, overwrite=options.overwrite)
    if not is_first():
        return
    _print_scores(summary["tasks"])
    print(f"{summary['wall_time_seconds'] / 60:.1f} minutes; report: {Path(config.run) / 'report.html'}")
    if any(HEADS[task.head].labelled for task in engine.tasks):
        print(f"ask it: trunkline predict {config.run} --file NEW.csv --out ANSWERS.csv")


def _compare(options: argparse.Namespace) -> None:
    from trunkline.training.compare.compare import compare
    from trunkline.training.compare.comparison import load_comparison

    comparison = load_comparison(options.config, options.values)
    compare(comparison)
    print(f"\n{(Path(comparison.run) / 'comparison.md').read_text(encoding='utf-8')}")
    print(f"page: {Path(comparison.run) / 'comparison.html'}")


def _print_scores(tasks: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "score", "trivial baseline", "validation loss", box=None, header_style="bold")
    for name, task in tasks.items():
        baseline = task["baseline"]
        trivial = f"{baseline['metrics'][task['metric']]:.3f} ({baseline['name']})" if baseline else "-"
        score, losses = f"{task['metrics'][task['metric']]:.3f}", f"{task['first_loss']:.3f} -> {task['last_loss']:.3f}"
        table.add_row(name, task["metric"], score, trivial, losses)
    Console().print(table)


def _tasks(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from trunkline.engine.tasks.builtin import BUILTIN
    from trunkline.training.data.sources import read_rows
    from trunkline.training.scoring.metrics import metric_names

    table = Table("task", "head", "metrics", "train", "validation", "from", box=None, header_style="bold")
    for task in BUILTIN.values():
        sizes = ["-", "-"]
        if task.generated or options.data:
            try:
                sizes = [f"{len(read_rows(task, split, options.data)):,}" for split in ("train", "validation")]
            except ValueError:
                sizes = ["not there"] * 2
        source = "generated" if task.generated else " ".join(filter(None, (task.hub, task.subset)))
        table.add_row(task.name, task.head, ", ".join(metric_names(task)), *sizes, source)
    Console().print(table)


def _doctor(options: argparse.Namespace) -> None:
    from trunkline.training.doctor import check_data, check_installation

    check_installation()
    if options.config:
        from trunkline.training.config_file import load_config

        check_data(load_config(options.config, options.values))


def _estimate(options: argparse.Namespace) -> None:
    from trunkline.training.config_file import load_config

    nodes = [value.removeprefix("nodes=") for value in options.values if value.startswith("nodes=")]
    if nodes and not nodes[-1].isdecimal():
        raise ValueError(f"estimate: nodes is a number of machines, got {nodes[-1]!r}")
    config = load_config(options.config, [value for value in options.values if not value.startswith("nodes=")])

    from trunkline.training.estimate import estimate

    estimate(config, tell=tell, machines=int(nodes[-1]) if nodes else 1)


def _tune(options: argparse.Namespace) -> None:
    from trunkline.training.config_file import load_config

    config = load_config(options.config, options.values)

    from trunkline.training.tuning.tune import tune

    tune(config, tell=tell)


def _report(options: argparse.Namespace) -> None:
    from trunkline.training.pages.report import write_report

    print(write_report(options.run))
