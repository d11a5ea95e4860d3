"""The commands that put a finished run to use: eval, predict, serve, export, submit."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from trunkline.engine.console import harmless, tell
from trunkline.engine.foreign.formats import Format

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine
    from trunkline.training.distributed.ranks import Ranks


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """
    Args:
        command: makes a parser of a name, the function that is called, and what it does.
    """
    evaluate = command("eval", _evaluate, "score a finished run or saved engine on the validation splits")
    _run_and_data(evaluate)
    evaluate.add_argument("--examples", type=int, default=0, help="of each task; default: all")

    predict = command("predict", _predict, "ask a finished run or saved engine about texts")
    _run_and_data(predict)
    predict.add_argument(
        "--task", action="append", default=[], help="may be given several times; default: all that fit"
    )
    predict.add_argument("--scores", action="store_true", help="also say how sure each answer is")
    predict.add_argument("--file", type=Path, help="with the text columns of the tasks: .csv, .tsv, .jsonl, .parquet")
    predict.add_argument("--encoding", default="", help="of the file, as windows-1252; default: as in training")
    predict.add_argument("--out", type=Path, metavar="FILE.csv", help="or .jsonl, for the answers; default: printed")
    predict.add_argument(
        "values",
        nargs="*",
        default=[],
        metavar="TEXT",
        help="default: the lines of standard input; a tab parts two texts of a pair",
    )

    serve = command("serve", _serve, "answer over HTTP for a finished run or saved engine; needs trunkline[serve]")
    serve.add_argument("run", type=Path, help="a run folder, or what Engine.save wrote")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, for this machine")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free; default: 8000")
    serve.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    serve.add_argument(
        "--max-batch-tokens", type=int, default=0, help="of a pass; default: 4,096 on a CPU, 16,384 on a GPU"
    )
    serve.add_argument(
        "--max-waiting-tokens", type=int, default=0, help="beyond which requests are refused; default: 16 passes"
    )
    serve.add_argument("--token-file", type=Path, help="whose first line requests need, as Authorization: Bearer ...")

    export = command("export", _export, "write tasks of a finished run or saved engine for other programs")
    export.add_argument("run", type=Path, help="a run folder, or what Engine.save wrote")
    export.add_argument(
        "--to", required=True, choices=get_args(Format), help="what reads it; onnx needs trunkline[onnx]"
    )
    export.add_argument(
        "--task", action="append", default=[], help="may be given several times; default: all that can be written so"
    )
    export.add_argument("--out", type=Path, default=Path("exported"), help="a new folder; default: exported")

    submit = command("submit", _submit, "predict GLUE's test splits, as a zip for its server")
    _run_and_data(submit)
    submit.add_argument("--out", type=Path, default=Path("glue.zip"), help="the zip to write; default: glue.zip")
    submit.add_argument(
        "--fill-missing", action="store_true", help="a constant for tasks that the run lacks; default: an error"
    )


def _run_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder, or what Engine.save wrote")
    parser.add_argument("--data", help="folder laid out like the hub; default: as in training")


def _load(options: argparse.Namespace) -> "Engine":
    from dataclasses import replace

    from trunkline.engine.engine import Engine
    from trunkline.engine.network.memory import keep_freed_memory

    keep_freed_memory()
    engine = Engine.load(options.run)
    if options.data:
        engine.config = replace(engine.config, data=options.data)
    return engine


def _evaluate(options: argparse.Namespace) -> None:
    from trunkline.training.distributed.ranks import Ranks
    from trunkline.training.scoring.evaluation import evaluate_engine

    with Ranks(None) as ranks:
        print(json.dumps(evaluate_engine(_load(options), options.examples, ranks), indent=1))


def _predict(options: argparse.Namespace) -> None:
    from trunkline.training.data.tables import check_encoding
    from trunkline.training.distributed.ranks import Ranks
    from trunkline.training.predict import as_json, check_out, write_answers

    check_encoding("predict", options.encoding)
    if options.out:
        check_out(options.out, options.file)
    with Ranks(None) as ranks:
        answers = _answers(options, ranks)
        if options.out and ranks.first:
            write_answers(answers, options.out)
            print(f"wrote {options.out}")
            return
        shown = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        for answer in answers:  # of the other ranks nobody sees what they print
            print(harmless(json.dumps(as_json(answer), ensure_ascii=not shown)))


def _answers(options: argparse.Namespace, ranks: "Ranks") -> Iterator[dict[str, Any]]:
    """To the rows of a file, to texts, or to the lines of standard input."""
    from trunkline.training.predict import of_file, of_lines

    if options.file:
        if options.values:
            raise ValueError(f"predict: a text {options.values[0]!r} and --file {options.file}: give one of them")
        return of_file(_load(options), options.file, options.task, options.encoding, options.scores, ranks)
    if ranks.size > 1:
        raise ValueError(f"predict: what {ranks.size} ranks share are the rows of a file: give --file FILE")
    if broken := [value for value in options.values if any("\udc80" <= character <= "\udcff" for character in value)]:
        raise ValueError(f"predict: a text has bytes that are no characters here: {os.fsencode(broken[0])!r:.60}")
    engine, lines = _load(options), options.values or _lines(sys.stdin.buffer.read())
    if not lines:
        raise ValueError("predict: no text, neither as an argument nor on standard input")
    return of_lines(engine, lines, options.task, "text" if options.values else "line", options.scores)


def _serve(options: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"serve needs trunkline[serve]: pip install 'trunkline[serve]' ({error})") from error
    from trunkline.serving.server import serve

    serve(
        options.run,
        options.host,
        options.port,
        device=options.device,
        batch_tokens=options.max_batch_tokens,
        waiting_tokens=options.max_waiting_tokens,
        token_file=options.token_file,
    )


def _export(options: argparse.Namespace) -> None:
    from trunkline.engine.engine import Engine

    for path in Engine.load(options.run, device="cpu").export(options.out, options.to, options.task):
        print(path)


def _lines(data: bytes) -> list[str]:
    """The lines of standard input, ended as on Unix or on Windows."""
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"predict: standard input is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; "
            f"'iconv -f LATIN1 -t UTF-8' converts what is Latin-1"
        ) from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _submit(options: argparse.Namespace) -> None:
    from trunkline.training.submit import submit

    print(submit(_load(options), options.out, options.fill_missing, tell=tell))
