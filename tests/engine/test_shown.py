"""How an engine shows itself in a notebook."""

from xml.etree import ElementTree

from trunkline import Engine, Task


def rows(engine: Engine) -> list[list[str]]:
    page = ElementTree.fromstring(f"<page>{engine._repr_html_()}</page>")  # it is well-formed
    return [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]


def test_before_training_it_shows_its_tasks():
    names = [f"class {number}" for number in range(9)]
    task = Task("odd", "classify", ["<text>", "b"], "label", labels=names)
    engine = Engine("tiny", ["stsb", task])
    assert "4 blocks of width 256, not trained yet: fit() trains it" in engine._repr_html_()
    assert rows(engine)[0] == ["task", "predicts", "from", "trained on", "scored on", "scores"]
    shown = {row[0]: row[1:] for row in rows(engine)}
    assert shown["odd"] == [f"classify: {', '.join(names[:6])} …", "<text> + b", "", "", ""]
    assert shown["stsb"] == ["regress", "sentence1 + sentence2", "", "", ""]


def test_of_a_finished_run_it_shows_sizes_and_scores(finished, tmp_path, one_thread):
    engine = Engine.load(finished.run, device="cpu")
    shown = {row[0]: row[1:] for row in rows(engine)}
    assert shown["colour"][:4] == ["classify: red, black, white, brown", "text", "60", "20"]
    accuracy = engine.summary["tasks"]["colour"]["metrics"]["accuracy"]
    assert shown["colour"][4] == f"accuracy {accuracy:.3f}"
    assert "M parameters, on cpu" in engine._repr_html_()
    alone = Engine.load(engine.save(tmp_path / "alone"), device="cpu")
    assert {row[0]: row[1:] for row in rows(alone)}["colour"][2:] == ["", "", ""]


def test_an_evaluation_changes_the_scores_that_it_shows(finished, one_thread):
    engine = Engine.load(finished.run, device="cpu")
    scores = engine.evaluate(examples=3)
    shown = {row[0]: row[1:] for row in rows(engine)}
    assert shown["colour"][2:] == ["60", "20", f"accuracy {scores['colour']['accuracy']:.3f}"]
