"""What a server answers: the engine's own answers, or which field is wrong."""

import json
from pathlib import Path

import pytest

from answering import TASKS
from serving.http_server import ask, running
from trunkline.serving.app import make_app
from trunkline.serving.limits import LARGEST_BODY

SCHEMA = Path(__file__).parent / "openapi.json"
TEXT, PAIR = "One two three. And four five.", ["who is it ?", "it is the fox"]
ONE, TWO = ("polarity", "topics", "stars", "parts", "gist"), ("follows", "where")


def test_every_text_is_answered_by_the_tasks_that_take_it(served):
    answered = ask(served.port, "/v1/predict", {"texts": [TEXT, PAIR]})
    assert answered.status == 200
    expected = [
        {name: said for name, (said,) in served.engine.predict([text], tasks, scores=True).items()}
        for text, tasks in ((TEXT, ONE), (PAIR, TWO))
    ]
    assert answered.content["truncated"] == []
    for got, wanted in zip(answered.content["predictions"], expected, strict=True):
        assert list(got) == list(wanted)
        for name, said in wanted.items():
            assert got[name]["label"] == (pytest.approx(said["label"]) if name == "stars" else said["label"])
            assert got[name].get("score") == pytest.approx(said.get("score"), abs=1e-5)
            assert got[name].get("scores") == pytest.approx(said.get("scores"), abs=1e-5)


def test_some_tasks_can_be_asked_in_their_order(served):
    said = ask(served.port, "/v1/predict", {"texts": [PAIR, TEXT], "tasks": ["where", "topics", "polarity"]})
    assert [list(answers) for answers in said.content["predictions"]] == [["where"], ["topics", "polarity"]]


def test_texts_are_written(served):
    texts = ["One two", "a", "One two"]
    said = ask(served.port, "/v1/generate", {"texts": texts, "task": "retell"})
    assert said.content == {"texts": served.engine.generate(texts, "retell"), "truncated": []}
    assert ask(served.port, "/v1/generate", {"texts": texts}).content == said.content
    short = ask(served.port, "/v1/generate", {"texts": ["a"], "max_new_tokens": 2}).content["texts"][0]
    assert short.encode()[:2] == said.content["texts"][1].encode()[: len(short.encode())][:2]


def test_long_texts_are_cut_and_named_or_refused(served):
    texts = ["short", "long " * 40]
    assert ask(served.port, "/v1/predict", {"texts": texts}).content["truncated"] == [1]
    refused = ask(served.port, "/v1/predict", {"texts": texts, "truncate": False})
    assert (refused.status, refused.fault[0]) == (413, ["body", "texts", 1])
    assert "longer than the 80 tokens of a sequence" in refused.fault[1]
    assert ask(served.port, "/v1/generate", {"texts": texts}).content["truncated"] == [1]
    assert ask(served.port, "/v1/generate", {"texts": texts, "truncate": False}).status == 413


def test_one_task_answers_as_text_embeddings_inference(served):
    (said,) = served.engine.predict([TEXT], ["polarity"], scores=True)["polarity"]
    got = ask(served.port, "/tasks/polarity/predict", {"inputs": TEXT}).content
    assert {score["label"]: score["score"] for score in got} == pytest.approx(said["scores"], abs=1e-5)
    assert got[0]["score"] >= got[1]["score"]
    both = ask(served.port, "/tasks/polarity/predict", {"inputs": [[TEXT], ["b"]]}).content
    assert [score["label"] for score in both[0]] == [score["label"] for score in got]
    assert [score["score"] for score in both[0]] == pytest.approx([score["score"] for score in got], abs=1e-5)
    pair = ask(served.port, "/tasks/follows/predict", {"inputs": PAIR}).content
    assert {score["label"] for score in pair} == {"no", "maybe", "yes"}
    assert ask(served.port, "/tasks/polarity/predict", {"inputs": "long " * 40}).status == 413
    assert ask(served.port, "/tasks/stars/predict", {"inputs": TEXT}).status == 422
    assert ask(served.port, "/tasks/parts/predict", {"inputs": TEXT}).status == 422


def test_info_names_tasks_and_limits(served):
    info = ask(served.port, "/info").content
    assert (info["name"], info["max_length"], info["max_batch_tokens"]) == ("farm", 80, 512)
    assert [task["name"] for task in info["tasks"]] == [task.name for task in TASKS]
    assert info["tasks"][1]["labels"] == ["billing", "bug", "urgent"]
    assert info["tasks"][-1]["writes"]
    assert len(info["digest"]) == 64


def test_metrics_count_requests_passes_and_answers(served):
    def count(line: str) -> float:
        page = ask(served.port, "/metrics").content.split("\n")
        return sum(float(found.split()[-1]) for found in page if found.startswith(line))

    asked, answers = 'trunkline_requests_total{path="/v1/predict",status="200"}', 'answer_seconds_count{task="stars"}'
    before = count(asked), count(f"trunkline_{answers}"), count("trunkline_pass_texts_sum")
    ask(served.port, "/v1/predict", {"texts": [TEXT] * 3})
    after = count(asked), count(f"trunkline_{answers}"), count("trunkline_pass_texts_sum")
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 3, 3]
    for _ in range(3):
        ask(served.port, f"/no/{_}")
    assert count('trunkline_requests_total{path="other"') >= 3  # however many different ones there are
    assert count("trunkline_waiting_tokens") == 0


def test_the_page_loads_nothing_from_elsewhere(served):
    page = ask(served.port, "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.content.replace("http-equiv", "")
    assert 'call("/v1/predict"' in page.content


def test_the_schema_changes_only_on_purpose(served):
    """To accept a change: write what `/openapi.json` answers into the file, with `json.dumps(..., indent=1)`."""
    assert ask(served.port, "/openapi.json").content == json.loads(SCHEMA.read_text())


NO_TEXT, NO_TASK = {"texts": [""]}, {"texts": ["a"], "tasks": ["polarty"]}


@pytest.mark.parametrize(
    ("path", "body", "status", "where", "message"),
    [
        ("/v1/predict", b'{"texts": ["a"', 422, ["body"], "JSON decode error"),
        ("/v1/predict", b"\xff\xfe", 422, ["body"], ""),
        ("/v1/predict", b"", 422, ["body"], "required"),
        ("/v1/predict", ["a"], 422, ["body"], "valid dictionary"),
        ("/v1/predict", {}, 422, ["body", "texts"], "required"),
        ("/v1/predict", {"texts": "a"}, 422, ["body", "texts"], "valid list"),
        ("/v1/predict", {"texts": []}, 422, ["body", "texts"], "at least 1"),
        ("/v1/predict", {"texts": [1]}, 422, ["body", "texts", 0, "str"], "valid string"),
        ("/v1/predict", {"texts": [[]]}, 422, ["body", "texts", 0, "str"], "valid string"),
        ("/v1/predict", {"texts": ["a"], "task": "polarity"}, 422, ["body", "task"], "not permitted"),
        ("/v1/predict", {"texts": ["a", " \t"]}, 422, ["body", "texts", 1], "the text is blank"),
        ("/v1/predict", NO_TEXT, 422, ["body", "texts", 0], "the text is blank"),
        ("/v1/predict", NO_TASK, 422, ["body", "tasks", 0], "no task 'polarty'; did you mean 'polarity'?"),
        ("/v1/predict", {"texts": ["a"], "tasks": ["retell"]}, 422, ["body", "tasks", 0], "use /v1/generate"),
        ("/v1/predict", {"texts": ["a"], "tasks": ["where"]}, 422, ["body", "texts", 0], "'where' takes 2: question"),
        ("/v1/predict", {"texts": [["a", " "]], "tasks": ["where"]}, 422, ["body", "texts", 0], "blank"),
        ("/v1/predict", {"texts": [["a", "b", "c"]]}, 422, ["body", "texts", 0], "no task takes 3 text(s)"),
        ("/v1/predict", b'{"texts": ["a\\ud800"]}', 422, ["body", "texts", 0], "half a character"),
        ("/v1/generate", {"texts": ["a"], "task": "retel"}, 422, ["body", "task"], "did you mean 'retell'?"),
        ("/v1/generate", {"texts": ["a"], "task": "polarity"}, 422, ["body", "task"], "use /v1/predict"),
        ("/v1/generate", {"texts": ["a", ""]}, 422, ["body", "texts", 1], "the text is blank"),
        ("/v1/generate", {"texts": ["a"], "max_new_tokens": 7}, 422, ["body", "max_new_tokens"], "at most 6, got 7"),
        ("/v1/generate", {"texts": ["a"], "max_new_tokens": 0}, 422, ["body", "max_new_tokens"], "greater than or"),
        ("/tasks/polarty/predict", {"inputs": "a"}, 404, ["path", "task"], "did you mean 'polarity'?"),
        ("/tasks/polarity/predict", {"inputs": ["a", "b"]}, 422, ["body", "inputs", 0], "no task takes 2"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(served, path, body, status, where, message):
    refused = ask(served.port, path, body, method="POST")
    assert refused.status == status
    assert refused.fault[0][: len(where)] == where
    assert message in refused.fault[1]
    assert set(refused.content["detail"][0]) == {"loc", "msg", "type"}


@pytest.mark.parametrize(
    "text",
    ["\0", "a\0b", "\u202e", "a" * 100_000, "👩\u200d👩\u200d👧", "\r\n x \x85"],
    ids=["NUL", "NUL inside", "right to left", "long", "family", "line breaks"],
)
def test_odd_texts_are_answered(served, text):
    answered = ask(served.port, "/v1/predict", {"texts": [text]})
    assert answered.status == (422 if not text.strip() else 200)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_every_encoding_of_json_is_read(served, encoding):
    """FastAPI reads those that pydantic does not."""
    answered = ask(served.port, "/v1/predict", json.dumps({"texts": ["Ä"]}, ensure_ascii=False).encode(encoding))
    assert answered.content == ask(served.port, "/v1/predict", {"texts": ["Ä"]}).content
    assert answered.status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes_are_refused(served, chunked):
    """Announced, or only found on the way."""
    body = b'{"texts": ["' + b"a" * 10 * 2**20 + b'"]}'
    parts = (body[i : i + 2**16] for i in range(0, len(body), 2**16))
    try:
        refused = ask(served.port, "/v1/predict", parts if chunked else body)
    except (BrokenPipeError, ConnectionResetError):  # the server has answered and gone before all was sent
        pass
    else:
        assert refused.status == 413
        assert f"{LARGEST_BODY:,} bytes" in refused.fault[1]
    assert ask(served.port, "/v1/predict", {"texts": ["a"]}).status == 200


def test_a_body_that_is_not_said_to_be_json_is_refused(served):
    refused = ask(served.port, "/v1/predict", {"texts": ["a"]}, content_type="text/plain")
    assert refused.status == 415
    assert "curl --json" in refused.fault[1]


def test_unknown_paths_and_methods(served):
    assert ask(served.port, "/v1/predictions", {}).status == 404
    assert ask(served.port, "/v1/predict").status == 405


def test_a_token_is_asked_for(engine):
    with running(make_app(engine, "secret", token="abc")) as port:
        for path in ("/v1/predict", "/v1/generate", "/tasks/polarity/predict"):
            body = {"texts": ["a"]} if path.startswith("/v1") else {"inputs": "a"}
            for given in ("", "Bearer ab", "Bearer abcd", "abc", "bearer abc"):
                assert ask(port, path, body, authorization=given).status == 401
            assert ask(port, path, body, authorization="Bearer abc").status == 200
        assert [ask(port, path).status for path in ("/info", "/metrics", "/docs", "/openapi.json")] == [401] * 4
        assert [ask(port, path).status for path in ("/", "/health", "/ready")] == [200] * 3
