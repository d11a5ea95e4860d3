"""A run goes to the hub and comes back the same; what goes wrong there is said, and the run stays as it is."""

import sys
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, Hub, hub_stand_in

from trunkline import Engine
from trunkline.training.cli import main

constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning"
    ),  # sockets of huggingface_hub, which it closes with the process
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The only hub there is, with somebody logged in."""
    with hub_stand_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
        yield hub


def push(run: Path, *flags: str, repo: str = "user/farm") -> int:
    return main(["push", str(run), repo, *flags])


def test_what_is_pushed_comes_back_and_answers_the_same(finished, hub: Hub, capsys):
    assert push(finished.run, "--private", "--license", "apache-2.0") == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == f"{hub.url}/user/farm"
    assert hub.private == {"user/farm": True}
    files = hub.files["user/farm"]
    assert set(files) == {"README.md", "config.yaml", "engine.json", "model.safetensors", "tokenizer.json"}
    assert b'Engine.load("user/farm")' in files["README.md"]
    assert sum("commit" in path for path in hub.asked) == 1
    texts = ["the red cat is in the barn", "the white owl is in the house"]
    here, there = Engine.load(finished.run, device="cpu"), Engine.load("user/farm", device="cpu")
    tasks = ["colour", "parts"]
    assert there.predict(texts, tasks=tasks) == here.predict(texts, tasks=tasks)


def test_a_repository_that_is_there_is_used_again(finished, hub: Hub, capsys):
    assert push(finished.run) == push(finished.run) == 0
    assert hub.private == {"user/farm": False}


def test_who_is_not_logged_in_is_told_how(finished, hub: Hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert push(finished.run) == 2
    said = capsys.readouterr().err
    assert said.startswith("trunkline: push: user/farm is not written: ")
    assert "log in with a token that may write (hf auth login, or HF_TOKEN)" in said
    assert hub.files == {}


@pytest.mark.parametrize(("fault", "said"), [(500, "500"), (403, "log in with a token"), (413, "413"), ("cut", "")])
def test_a_hub_that_fails_leaves_the_run_as_it_was(finished, hub: Hub, capsys, fault, said):
    before = {path: path.stat().st_mtime_ns for path in finished.run.rglob("*")}
    hub.fault = fault
    assert push(finished.run) == 2
    told = capsys.readouterr().err
    assert "push: user/farm is not written" in told
    assert said in told
    assert ("give the same command once the hub is reached" in told) == (fault in (500, "cut"))
    assert hub.files["user/farm"] == {}
    assert {path: path.stat().st_mtime_ns for path in finished.run.rglob("*")} == before
    hub.fault = ""
    assert push(finished.run) == 0


def test_only_a_finished_run_is_pushed(tmp_path, hub: Hub, capsys):
    assert push(tmp_path / "no") == 2
    assert "is no folder of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("tasks: [sst2]")
    assert push(tmp_path) == 2
    assert "is not finished" in capsys.readouterr().err
    assert hub.asked == []


@pytest.mark.parametrize("repo", ["farm", "user/farm/more", "https://huggingface.co/user/farm", ""])
def test_what_is_no_repository_is_refused(finished, capsys, repo):
    assert push(finished.run, repo=repo) == 2
    assert "expected a repository such as user/name" in capsys.readouterr().err


def test_without_the_package_it_says_what_is_missing(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert push(finished.run) == 2
    assert "needs trunkline[hub], which is not installed" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"user/farm is no folder, and the hub needs trunkline\[hub\]"):
        Engine.load("user/farm")


def test_what_the_hub_does_not_have_is_said(hub: Hub, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="user/nothing is no folder, and not to be had from the hub"):
        Engine.load("user/nothing")
    hub.files["user/other"] = {"config.json": b"{}"}
    with pytest.raises(ValueError, match="has no engine.json: it is neither a saved engine nor a run"):
        Engine.load("user/other")
    hub.asked.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="engine: runs/tickets is no folder"):  # a slip, for which nobody is asked
        Engine.load("runs/tickets")
    assert hub.asked == []


def test_offline_it_takes_what_was_downloaded(finished, hub: Hub, monkeypatch, capsys):
    assert push(finished.run) == 0
    Engine.load("user/farm", device="cpu")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Engine.load("user/farm", device="cpu").tasks
    assert hub.asked == []
