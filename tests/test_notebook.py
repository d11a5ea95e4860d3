"""docs/own_data.ipynb runs from top to bottom, on a trunk that is smaller than it says, and shows what it says."""

import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
ROOT = Path(__file__).resolve().parents[1]
COMMAND = """#!{python}
import sys
from trunkline.training.cli import main
sys.exit(main())
"""
SMALL = """
from trunkline.engine.network import trunk_config
trunk_config.PRESETS["tiny"].update(hidden_size=32, num_layers=1)
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run by a kernel of its own."""
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "own_data.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what it shows is what it shows now
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    folder, commands = tmp_path_factory.mktemp("notebook"), tmp_path_factory.mktemp("bin")
    (commands / "trunkline").write_text(COMMAND.format(python=sys.executable))
    (commands / "trunkline").chmod(0o755)
    environment = {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook, beginning: str) -> list:
    """What the first cell shows that begins so."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return next(cell.outputs for cell in cells if cell.source.startswith(beginning))


def text(shown: list) -> str:
    return "".join(output.get("text", "") for output in shown)


def tables(shown: list) -> list[list[list[str]]]:
    """The HTML tables, as rows of texts."""
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    parsed = [ElementTree.fromstring(page[page.index("<table>") :]) for page in pages]
    return [[["".join(cell.itertext()) for cell in row] for row in table.iter("tr")] for table in parsed]


def test_init_says_what_it_guessed(executed):
    told = text(outputs(executed, "!trunkline init"))
    assert "task queue: classify 'queue' from text" in told
    assert "task minutes: regress 'minutes' from text" in told
    assert "trunkline train tickets.yaml" in told


def test_training_shows_one_table_that_changes_in_place(executed):
    (table,) = tables(outputs(executed, "from trunkline import"))  # the last picture of it
    assert sorted(row[0] for row in table) == ["minutes", "queue", "task"]
    assert all(0 < float(row[1]) < 100 and row[4] for row in table[1:])
    assert "writes runs/tickets" in text(outputs(executed, "from trunkline import"))


def test_an_engine_shows_its_tasks_sizes_and_scores(executed):
    (table,) = tables(outputs(executed, "engine"))
    rows = {row[0]: row for row in table}
    assert rows["queue"][1:3] == ["classify: access, billing, bug", "text"]
    assert rows["queue"][3:5] == ["360", "40"]
    assert rows["queue"][5].startswith("accuracy ")


def test_scores_and_predictions_follow(executed):
    assert "queue: accuracy" in text(outputs(executed, "for name, task"))
    (answer,) = outputs(executed, "engine.predict")
    predicted = eval(answer["data"]["text/plain"])
    assert {*predicted["queue"]} <= {"access", "billing", "bug"}
    assert all(isinstance(minutes, float) for minutes in predicted["minutes"])
    (table,) = tables(outputs(executed, "import pandas"))
    assert table[1][0] == "queue"
