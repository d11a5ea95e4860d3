"""The package as a whole: its public names, its start-up time, and what an installation contains."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trunkline
from trunkline._moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["kernels", "engine", "serving", "training", "benchmarks"]


def python(*arguments: str, folder: Path, packages: Path) -> str:
    """What a fresh interpreter prints, started in `folder` and with `packages` on its import path."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a plain (not editable) installation."""
    folder, metadata = tmp_path_factory.mktemp("site-packages"), tmp_path_factory.mktemp("metadata")
    python("setup.py", "-q", "egg_info", "-e", str(metadata), "build_py", "-d", str(folder), folder=ROOT, packages=ROOT)
    return folder


@pytest.mark.parametrize("name", trunkline._MODULES)
def test_public_name_comes_from_its_module(name):
    assert getattr(trunkline, name).__name__ == name
    assert getattr(trunkline, name).__module__ == trunkline._MODULES[name]


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(trunkline.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == trunkline._MODULES


def test_dir_and_all_list_every_public_name():
    assert set(trunkline.__all__) == {"__version__", *trunkline._MODULES}
    assert set(trunkline.__all__) <= set(dir(trunkline))


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("task_los", "task_loss"), ("engine_", "Engine"), ("version", "__version__")]
)
def test_unknown_name_is_answered_with_the_nearest(wrong, nearest):
    with pytest.raises(AttributeError, match=f"trunkline has no '{wrong}'; the nearest public name is '{nearest}'"):
        getattr(trunkline, wrong)


def test_import_is_quick_and_leaves_torch_alone(tmp_path):
    code = "import sys; before = set(sys.modules); import trunkline; print(*set(sys.modules) - before)"
    loaded = python("-c", code, folder=tmp_path, packages=ROOT / "src").split()
    assert "trunkline" in loaded
    assert not {"torch", "numpy"} & set(loaded)
    assert len(loaded) < 100  # small ones of the standard library, a few hundredths of a second


def test_version_is_that_of_the_project():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == trunkline.__version__


def test_lock_has_an_exact_version_of_every_requirement():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "# " not in line]
    locked: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        assert [one.operator for one in requirement.specifier] == ["=="], requirement
        assert requirement.url is None
        locked.setdefault(requirement.name, []).append(requirement)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra for line in project["optional-dependencies"]["dev"] for extra in Requirement(line).extras}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted += [line for extra in extras for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, wanted):
        if requirement.name != "trunkline":
            versions = [next(iter(one.specifier)).version for one in locked[requirement.name]]
            assert all(map(requirement.specifier.contains, versions)), f"{requirement}: locked are {versions}"


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_linked_and_never_a_top_level_package(room):
    link = ROOT / "src" / "trunkline" / room
    assert link.readlink() == Path("..", "..", room)
    assert not (link / "__init__.py").exists()  # transformers would take kernels/ for Hugging Face's `kernels`


def test_installation_has_every_source_and_data_file(installed):
    expected = {Path("trunkline", name) for name in ["__init__.py", "__main__.py", "_moved.py", "py.typed"]}
    for room in ROOMS:
        kinds = ("**/*.py", "**/*.jinja", "**/*.html", "configs/*.*")
        files = [file for kind in kinds for file in (ROOT / room).glob(kind)]
        expected |= {Path("trunkline") / file.relative_to(ROOT) for file in files}
    assert {file.relative_to(installed) for file in installed.rglob("*") if file.is_file()} == expected


def test_installation_works_outside_the_repository(installed, tmp_path):
    code = "import trunkline; print(trunkline.Task.__module__, trunkline.__file__)"
    module, file = python("-c", code, folder=tmp_path, packages=installed).split()
    assert (module, Path(file)) == ("trunkline.engine.tasks.task", installed / "trunkline" / "__init__.py")


@pytest.mark.parametrize("name", MOVED)
def test_a_module_that_moved_is_found_under_its_old_name(name):
    module = import_module(f"trunkline.{name}")
    for place in MOVED[name]:
        new = import_module(f"trunkline.{place}")
        own = [key for key, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__]
        assert own
        assert all(getattr(module, key) is getattr(new, key) for key in own)
    with pytest.raises(ImportError, match="no_such_name"):
        exec(f"from trunkline.{name} import no_such_name")


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="trunkline.training.tokeniser"):
        import_module("trunkline.training.tokeniser")
