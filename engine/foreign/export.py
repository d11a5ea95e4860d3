"""Tasks of an engine for other programs: which formats there are, and where they are written."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from trunkline.engine.console import tell
from trunkline.engine.foreign.export_hugging_face import export_hugging_face
from trunkline.engine.foreign.export_onnx import export_onnx
from trunkline.engine.foreign.formats import Format

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

MODEL = "model.onnx"


def export(engine: "Engine", folder: Path, to: Format, tasks: Sequence[str] = ()) -> list[Path]:
    """See `Engine.export`."""
    if to not in get_args(Format):
        raise ValueError(f"export: '{to}' is no format; there are {', '.join(get_args(Format))}")
    for name in tasks:
        engine.place_of(name)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"export: {folder} is there and not empty: name another folder")
    if to == "peft":
        engine.save_adapters(folder, tasks)
        return sorted(folder.iterdir())
    if to == "onnx":
        return [export_onnx(engine, tasks, folder / MODEL)]
    if tasks:
        return [export_hugging_face(engine, name, folder / name) for name in dict.fromkeys(tasks)]
    written, refused = [], []
    for task in engine.tasks:
        try:
            written.append(export_hugging_face(engine, task.name, folder / task.name))
        except ValueError as error:
            refused.append(str(error))
    if not written:
        raise ValueError("\n".join(refused))
    for reason in refused:
        tell(reason)
    return written
