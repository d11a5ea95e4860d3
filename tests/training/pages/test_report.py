import json
import math
import re
from html import escape
from itertools import pairwise
from pathlib import Path

import pytest

from trunkline.training.pages.report import write_report
from written_run import HEADS, write_run


def edit(path: Path, change) -> None:
    """Rewrite a JSON file through `change`, which alters what it is given."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def table_row(page: str, task: str) -> list[str]:
    """The cells of a task in the summary table, as text."""
    (row,) = re.findall(rf'<tr>\s*<td><span class="name">{task}</span>.*?</tr>', page, re.DOTALL)
    return [
        re.sub(r"<[^>]*>", " ", cell).strip().split(maxsplit=1) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)
    ]


def cards(page: str, section: str) -> list[str]:
    """The tasks that have a chart in a section."""
    start = page.index(f'<h2 id="{section}">')
    return re.findall(r'<section class="card"><header><b>(.*?)</b>', page[start : page.index("<h2", start + 1)])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", steps=200)


@pytest.fixture(scope="module")
def page(run) -> str:
    return page_of(run)


def test_sections_come_in_order(page):
    sections = [
        "summary",
        "loss",
        "scores",
        "reliability",
        "mix",
        "throughput",
        "samples",
        "configuration",
        "environment",
    ]
    assert re.findall(r'<h2 id="(.*?)">', page) == sections
    assert "<h1>demo</h1>" in page


def test_verdict_counts_tasks_above_their_baseline(page):
    assert (
        "7 of 8 tasks above the trivial baseline (1 more without a baseline)." in page
    )  # rte is below, books has none


def test_table_shows_scores_beside_the_baseline(run, page):
    evaluations = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "evaluation" in line
    ]
    scores = [event["metrics"]["dialogsum"]["rouge1"] for event in evaluations]
    row = table_row(page, "dialogsum")
    assert row[2] == ["0.309", "first 3 lines of the document"]
    assert row[3] == [f"{scores[0]:.3f}", "step 20"]
    assert row[4][0] == f"{max(scores):.3f}"
    assert row[5] == [f"{scores[-1]:.3f}", "above  all 872"]
    assert row[9] == ["1,403"]
    assert table_row(page, "rte")[5][1] == "not above  all 872"
    assert table_row(page, "sst2")[10] == ["2", "2 empty"]


def events_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def with_counts(run: Path) -> Path:
    """The run, with how many examples each evaluation was of; those of texts are few."""
    events = events_of(run)
    for event in events:
        if event["event"] == "evaluation":
            event["counts"] = {
                name: {"loss": 256, "scores": 16 if name == "dialogsum" else 256} for name in event["metrics"]
            }
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def test_every_column_says_which_split_and_how_many_examples(tmp_path):
    run = with_counts(write_run(tmp_path / "demo", steps=200))
    page = page_of(run)
    headings = [re.sub("<.*?>", " ", cell).split() for cell in re.findall("<th.*?</th>", page)]
    assert ["Training", "loss", "first", "→", "last"] in headings
    assert ["Validation", "loss", "first", "→", "last"] in headings
    row, summary = table_row(page, "dialogsum"), json.loads((run / "summary.json").read_text())["tasks"]["dialogsum"]
    assert row[3][1] == "step 20, of 16"
    assert re.fullmatch(r"step \d+, of 16", row[4][1])
    assert row[5][1] == "above  all 872"
    steps = [event["loss"]["dialogsum"] for event in events_of(run) if event["event"] == "step"]
    assert row[6] == [f"{steps[0]:.3f}", f"→ {steps[-1]:.3f}"]
    losses = f"→ {summary['last_loss']:.3f} of 256 → all 872"
    assert row[7] == [f"{summary['first_loss']:.3f}", losses]
    assert "The last is that of all of it." in page


def test_losses_of_an_unfinished_run_are_in_the_columns_of_a_finished_one(tmp_path):
    run = with_counts(write_run(tmp_path / "demo", steps=200))
    finished = page_of(run)
    (run / "summary.json").unlink()
    page = page_of(run)
    evaluations = [event["metrics"]["dialogsum"] for event in events_of(run) if event["event"] == "evaluation"]
    row = table_row(page, "dialogsum")
    assert row[6] == table_row(finished, "dialogsum")[6]  # of training
    first, last = evaluations[0]["loss"], evaluations[-1]["loss"]
    assert row[7] == [f"{first:.3f}", f"→ {last:.3f} of 256 → of 256"]
    assert row[5] == [f"{evaluations[-1]['rouge1']:.3f}", "step 200, of 16"]
    assert "The last is that of the newest evaluation." in page


def test_one_point_is_no_chart(tmp_path):
    run = write_run(tmp_path / "demo", steps=100)
    kept = [next(event for event in events_of(run) if event["event"] == kind) for kind in ("step", "evaluation")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    page = page_of(run)
    assert page.count("<svg") == 1 + 5  # the mix, which is a share, and the reliability of five tasks
    for words in ("one loss was logged", "one evaluation", "one value was logged"):
        assert words in page


def test_less_perplexity_is_better(tmp_path):
    run = write_run(tmp_path / "demo", steps=200)

    def worsen(summary):
        summary["tasks"]["books"]["metrics"]["perplexity"] = 120.0
        summary["tasks"]["books"]["baseline"] = {"name": "unigram", "metrics": {"perplexity": 100.0}}

    edit(run / "summary.json", worsen)
    row = table_row(page_of(run), "books")
    assert row[1] == ["perplexity", "↓"]
    assert row[5] == ["120.0", "not above  all 872"]
    assert float(row[4][0]) < 120.0 < float(row[3][0])  # the best is the least


def test_every_task_has_its_charts(page):
    assert cards(page, "loss") == list(HEADS)
    assert cards(page, "scores") == list(HEADS)


def test_baseline_is_drawn_where_there_is_one(page):
    dashed = [name for name in HEADS if "stroke-dasharray: 4" in chart(page, f"score-{name}")]
    assert dashed == [name for name in HEADS if name != "books"]


def test_reliability_of_tasks_with_probabilities(page):
    assert cards(page, "reliability") == [name for name, (head, *_) in HEADS.items() if head in ("classify", "tag")]
    assert "calibration error 0.018, 0.071 before; temperature 1.62" in page
    assert chart(page, "reliability-sst2").count("<use") >= 3  # a mark for each bin


def test_run_without_calibration_has_no_such_section(tmp_path):
    run = write_run(tmp_path / "demo", steps=20)
    summary = json.loads((run / "summary.json").read_text())
    for task in summary["tasks"].values():
        del task["calibration"]  # as runs of earlier releases
    (run / "summary.json").write_text(json.dumps(summary))
    assert 'id="reliability"' not in page_of(run)


def chart(page: str, name: str) -> str:
    (svg,) = (svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if f'id="{name}-figure_1"' in svg)
    return svg


def test_loss_axis_is_logarithmic_over_more_than_a_decade(page):
    def slopes(name: str, scale) -> list[float]:
        labels = re.findall(r'text-anchor: end[^>]* y="([\d.]+)"[^>]*>([\d.]+)</text>', chart(page, f"loss-{name}"))
        ticks = [(float(height), scale(float(value))) for height, value in labels]
        return [(low - high) / (more - less) for (low, less), (high, more) in pairwise(ticks)]

    for name, scale in (("sst2", math.log), ("books", float)):  # 1.1 to 0.07, and 9 to 4.5
        found = slopes(name, scale)
        assert len(found) > 1
        assert found == pytest.approx([found[0]] * len(found), rel=1e-3)


def test_samples_are_marked_and_escaped(page):
    assert "<script" not in page
    assert escape("a gorgeous, witty, seductive movie <script>alert(1)</script>") in page
    assert escape("一部沉闷的电影 &amp; more") in page
    assert escape("# <b>größer</b> is flatter") in page
    samples = page[page.index("<h3>sst2") : page.index("<h3>mnli")]
    assert re.findall("[✓✗]", samples) == ["✓"] * 3 + ["✗"] * 3  # of eight samples six are shown
    assert not re.findall("[✓✗]", page[page.index("<h3>stsb") : page.index("<h3>dialogsum")])


def test_page_loads_nothing(page):
    assert not re.findall(r"https?://|<script|<link|@import|\bsrc=", page)
    assert page.count("<style") == 1  # a chart's own would reach beyond the chart


def test_ids_are_unique_and_references_resolve(page):
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#(.*?)"', page) + re.findall(r"url\(#(.*?)\)", page)
    assert len(references) > 100
    assert set(references) <= set(ids)


def test_same_files_give_the_same_page(tmp_path, page):
    assert page_of(write_run(tmp_path / "demo", steps=200)) == page


def test_many_tasks_keep_their_charts_and_share_the_last_colour(tmp_path):
    page = page_of(write_run(tmp_path / "demo", tasks=30, steps=100))
    assert len(cards(page, "loss")) == 30
    assert len(re.findall(r'<i class="box"', page)) == 12
    assert re.search(r"19 others \(\d+%\)", page)


def test_unfinished_run_says_so(tmp_path):
    run = write_run(tmp_path / "demo", steps=200)
    (run / "summary.json").unlink()
    (run / "samples.json").unlink()
    log = (run / "metrics.jsonl").read_text()
    cut = log.index('{"event": "step", "step": 120')
    (run / "metrics.jsonl").write_text(log[: cut + 40])  # killed while writing a line
    page = page_of(run)
    assert "Unfinished run" in page
    assert "the state at step 110" in page
    assert cards(page, "scores") == list(HEADS)
    assert table_row(page, "books")[1] == ["perplexity", "↓"]
    assert "There is no samples.json yet." in page


def test_run_without_any_event(tmp_path):
    run = write_run(tmp_path / "demo", steps=100)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    page = page_of(run)
    assert "the state at step 0" in page
    assert "<svg" not in page


def test_run_without_evaluations(tmp_path):
    run = write_run(tmp_path / "demo", steps=100)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "evaluation" not in line))
    edit(run / "summary.json", lambda summary: [about["metrics"].clear() for about in summary["tasks"].values()])
    page = page_of(run)
    assert "No evaluation has run." in page
    assert cards(page, "loss") == list(HEADS)
    assert table_row(page, "sst2")[3:6] == [["–"]] * 3


@pytest.mark.parametrize(("step", "score"), [(0, 0.99), (10, math.nan)], ids=["untrained", "not finite"])
def test_scores_that_are_never_the_best(tmp_path, step, score):
    run = write_run(tmp_path / "demo", steps=100)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if "evaluation" in line)
    event = json.loads(lines[first]) | {"step": step}
    event["metrics"]["stsb"]["pearson"] = score
    lines[first] = json.dumps(event)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    row = table_row(page_of(run), "stsb")
    assert row[3] == [f"{score:.3f}", f"step {step}"]
    assert 0.4 < float(row[4][0]) < 0.99


def test_resumed_run_takes_the_later_of_repeated_steps(tmp_path):
    run = write_run(tmp_path / "demo", steps=100)
    page = page_of(run)
    log = run / "metrics.jsonl"
    event = json.loads(log.read_text().splitlines()[0]) | {"step": 50, "loss": {"sst2": 1e9}}
    log.write_text(json.dumps(event) + "\n" + log.read_text())
    assert page_of(run) == page


def test_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} is not the folder of a run.*metrics\.jsonl"):
        write_report(tmp_path)


def test_broken_line_is_named(tmp_path):
    run = write_run(tmp_path / "demo", steps=100)
    (run / "metrics.jsonl").write_text('{"event": "step",\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected a JSON object"):
        write_report(run)
