"""The page in a real browser, which answers as the engine does; skipped where there is no Chromium."""

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
TEXT, SECOND = "who is <b>it</b> & why ?", "it is the fox"
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def seen(port: int, profile: Path, **asked: str) -> str:
    """The page behind a link, once it has its answers, as HTML."""
    link = f"http://127.0.0.1:{port}/?{urlencode(asked)}"
    browser = [BROWSER, *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", link]
    return subprocess.run(browser, capture_output=True, text=True, timeout=300, check=True).stdout


def test_every_task_answers_a_text_that_a_link_brings(served, tmp_path):
    page = seen(served.port, tmp_path, text=TEXT, second=SECOND)
    sections = dict(re.findall(r'<section data-task="(\w+)">(.*?)</section>', page, re.DOTALL))
    assert set(sections) == {task.name for task in served.engine.tasks}
    said = served.engine.predict([TEXT], ["polarity", "gist"], scores=True) | served.engine.predict(
        [(TEXT, SECOND)], ["where"]
    )
    assert f">{said['polarity'][0]['label']}</p>" in sections["polarity"]
    shown = dict(re.findall(r"<span>(\w+)</span><i.*?<span>([\d.]+) %</span>", sections["polarity"]))
    assert {name: float(share) for name, share in shown.items()} == pytest.approx(
        {name: 100 * p for name, p in said["polarity"][0]["scores"].items()}, abs=0.06
    )
    assert said["where"][0] in unescape(sections["where"])
    assert re.search(r'<p role="alert" id="error" hidden="">', page)


def test_a_refusal_is_shown(served, tmp_path):
    page = seen(served.port, tmp_path, text=" ")
    assert re.search(r'<p role="alert" id="error">the text is blank', page)
    assert "<section" not in page
