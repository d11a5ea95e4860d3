"""The folder that `save_to_disk` of Hugging Face datasets writes: Arrow files, which are read without that package."""

import json
from pathlib import Path
from typing import Any

from trunkline.training.data.tables import Columns, Wanted, choose_columns

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_dataset_folder(path: Path) -> bool:
    """
    Raises:
        ValueError: it is one of several splits, of which one has to be named.
    """
    if splits := splits_of(path):
        raise ValueError(f"{path} is a folder of several splits: name one of them, as {path.name}/{splits[0]}")
    return (path / STATE).is_file()


def splits_of(path: Path) -> list[str]:
    """The splits in the folder of a DatasetDict; none: it is no such folder."""
    if not (path / SPLITS).is_file():
        return []
    splits = _json(path / SPLITS).get("splits")
    return [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []


def files_of(path: Path) -> list[Path]:
    """The files that a folder's rows are in; of a file, itself."""
    if not (path / STATE).is_file():
        return [path]
    named = _json(path / STATE).get("_data_files")
    given = [file.get("filename") for file in named if isinstance(file, dict)] if isinstance(named, list) else []
    names = [name for name in given if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(given):
        raise ValueError(f"{path / STATE} names no files of the folder it is in: is it what save_to_disk wrote?")
    return [path / name for name in names]


def read_dataset_folder(path: Path, name: str, wanted: Wanted) -> Columns:
    """Columns of all rows.

    Args:
        name: what messages call it.

    Raises:
        MissingColumnError: it has not all of them.
        ValueError: a file that is missing or damaged.
    """
    import pyarrow

    tables = []
    for file in files_of(path):
        try:
            with pyarrow.memory_map(str(file)) as content:
                tables.append(pyarrow.ipc.open_stream(content).read_all())
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} is missing or damaged: {error}") from error
    table = pyarrow.concat_tables(tables)
    chosen = choose_columns(table.column_names, name, wanted)
    return {column: table[own].to_pylist() for column, own in chosen.items()}


def class_names_in(path: Path) -> dict[str, list[str]]:
    """Names of classes by column, where the folder says them (datasets.ClassLabel, or a list of it)."""
    names = {}
    features = _json(path / INFO).get("features") if (path / INFO).is_file() else {}
    for column, feature in (features or {}).items():
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, dict) and isinstance(feature.get("names"), list):
            names[column] = [*map(str, feature["names"])]
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    return content if isinstance(content, dict) else {}
