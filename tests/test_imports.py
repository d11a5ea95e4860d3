"""The layout: imports go one way, kernels <- engine <- serving <- training <- benchmarks, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["kernels", "engine", "serving", "training", "benchmarks"]  # each imports from itself and those before it
UPWARDS = {("trunkline.engine.engine", "fit"), ("trunkline.engine.engine", "evaluate")}  # the only functions that may
MOST_FILES = 12  # of one folder


class Import(NamedTuple):
    module: str  # that imports
    imported: str
    function: str  # in which it is imported; empty: when the module itself is
    checked_only: bool  # by type checkers: never executed


def modules() -> dict[str, ast.Module]:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    return {
        ".".join(["trunkline", *file.relative_to(ROOT).with_suffix("").parts]): ast.parse(file.read_text("utf-8"))
        for file in files
    }


def imports(known: dict[str, ast.Module]) -> list[Import]:
    """All imports from one module of the project to another."""

    def walk(module: str, node: ast.AST, function: str, checked_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                # a module of that name, or a name of that module
                inner = [f"{child.module}.{alias.name}" for alias in child.names]
                names = [name if name in known else str(child.module) for name in inner]
            else:
                inside = child.name if isinstance(child, ast.FunctionDef) else function
                only = checked_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
                yield from walk(module, child, inside, only)
                continue
            yield from (Import(module, name, function, checked_only) for name in names if name in known)

    return [found for module, tree in known.items() for found in walk(module, tree, "", False)]


KNOWN = modules()
IMPORTS = imports(KNOWN)


def room_of(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def test_the_walk_finds_imports_of_every_kind():
    """Of a module, of a name in one, inside a function, and for type checkers."""
    assert Import("trunkline.kernels.tasks.task_loss", "trunkline.kernels.tasks.task_loss_torch", "", False) in IMPORTS
    assert Import("trunkline.engine.network.model", "trunkline.kernels.tasks.task_loss", "", False) in IMPORTS
    assert Import("trunkline.engine.engine", "trunkline.training.run.loop", "fit", False) in IMPORTS
    assert Import("trunkline.training.run.loop", "trunkline.engine.engine", "", True) in IMPORTS


def test_no_import_goes_up():
    upwards = [found for found in IMPORTS if room_of(found.imported) > room_of(found.module)]
    assert [found for found in upwards if (found.module, found.function) not in UPWARDS] == []


def test_no_imports_go_in_a_circle():
    edges: dict[str, set[str]] = {module: set() for module in KNOWN}
    for found in IMPORTS:
        if not found.function and not found.checked_only:
            edges[found.module].add(found.imported)
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for imported in sorted(edges[module]):
                follow(imported, [*way, module])
            done.add(module)

    for module in sorted(edges):
        follow(module, [])


def test_no_folder_is_crowded():
    folders = {file.parent for room in (*ROOMS, "tests") for file in (ROOT / room).rglob("*.py")}
    crowded = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in crowded.items() if count > MOST_FILES} == {}
