"""A YAML file is read as its writer meant it, or refused with the line; it is never too much for this machine."""

from pathlib import Path

import pytest

from trunkline.engine.yaml_file import flow, read_yaml, write_yaml
from trunkline.training.config_file import load_config


def error_of(text: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        read_yaml(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_values_are_as_yaml_has_them():
    text = "a: [1, 2.5, yes, null, 'no', text]\nb: {c: 0x10, d: 1_000}\n"
    assert read_yaml(text) == {"a": [1, 2.5, True, None, "no", "text"], "b": {"c": 16, "d": 1000}}
    assert read_yaml("") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("5E4", 5e4), ("-2.e+1", -20.0), ("1.5e-7", 1.5e-7), (".5e1", 5.0), ("+3e2", 300.0)],
)
def test_a_number_with_an_exponent_is_a_number(text, number):
    assert read_yaml(text) == number
    assert isinstance(read_yaml(text), float)
    assert read_yaml(f"'{text}'") == text


@pytest.mark.parametrize("text", ["e3", "1e", "1e-", "1-3", "a1e3", "1e3x", "0,1", "1e-3-4"])
def test_what_only_looks_like_one_is_text(text):
    assert read_yaml(text) == text


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", (1, 3)),
        ("x:\n  steps: 1\n  steps: 1\n", "steps", (2, 3)),
        ("- {name: a, name: b}\n", "name", (1, 1)),
        ("tasks:\n- name: a\n  head: x\n\n  name: b\n  head: y\n", "name", (2, 5)),  # a dash is lost
        ("a: &x {b: 1}\nc: {<<: *x, d: 1, d: 2}\n", "d", (2, 2)),
        ("1: a\n1: b\n", "1", (1, 2)),
    ],
)
def test_a_key_that_stands_twice_is_an_error_with_both_lines(text, key, lines):
    assert error_of(text).startswith(
        f"'{key}' stands twice in the same place, in line {lines[0]} and in line {lines[1]}"
    )


def test_what_is_merged_may_be_given_anew():
    assert read_yaml("a: &x {n: 1, m: 2}\nb: {<<: *x, n: 3}\n")["b"] == {"n": 3, "m": 2}


def bomb(item: str, depth: int = 9) -> str:
    lists = [f"&a0 [{item}]", *(f"&a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth))]
    return "data: [" + ", ".join(lists) + "]\n"


@pytest.mark.parametrize(
    "text",
    [
        bomb("x"),
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "".join(
            f"m{i}: &m{i} {{{', '.join(f'k{i}{j}: *m{i - 1}' for j in range(9)) if i else 'x: 1'}}}\n" for i in range(9)
        ),
        "[" * 5000,
        "- " * 5000 + "x",
        "{a: " * 3000,
    ],
    ids=["lists", "itself", "itself in a mapping", "mappings", "brackets", "dashes", "braces"],
)
def test_what_would_be_too_much_is_refused_at_once(text, effort):
    assert effort(lambda: error_of(text)) < 400
    assert len(error_of(text)) < 500


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: 'x", "a: \x01", "a: !!python/object/apply:os.system ['x']", "? [a]\n: b",
     "a: !!int x", "a: !!int", "!!bool x", "!!timestamp x",
     "!!float", "!!set 1", "!!omap {a: b}", "!!pairs 1",
     "a: 2024-99-99", "a: b: c", "*nothing", "a: &x 1\n&x", "%YAML 9", "--- a\n--- b",
     "a: !!binary x", "{? !!set {a} : b}", "<<: 1"],
)  # fmt: skip
def test_what_is_not_yaml_is_an_error_in_one_line(text):
    error_of(text)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ("[yes, no]", "true or false"),
        ("[NO, SE]", "true or false"),
        ("[1, 2]", "a number"),
        ("[2024-01-01, b]", "a date"),
    ],
)
def test_labels_that_yaml_takes_for_something_else_are_to_be_quoted(labels, kind, tmp_path):
    task = f"{{name: spam, head: classify, text: [a], label: b, labels: {labels}, train: a.csv, validation: a.csv}}"
    (tmp_path / "c.yaml").write_text(f"tasks: [{task}]\n")
    with pytest.raises(
        ValueError, match=rf"tasks\[0\].labels\[0\]: expected text, but this is {kind} .*: quote it.*spam"
    ):
        load_config(tmp_path / "c.yaml")


def test_a_fault_among_many_tasks_is_named_by_its_task(tmp_path: Path):
    task = "- {{name: t{0}, head: {1}, text: [a], label: b, labels: [x, y], train: a.csv, validation: a.csv}}\n"
    path = tmp_path / "c.yaml"
    path.write_text("tasks:\n" + "".join(task.format(i, "classify") for i in range(200)))
    assert len(load_config(path).tasks) == 200
    path.write_text("tasks:\n" + "".join(task.format(i, "clasify" if i == 123 else "classify") for i in range(200)))
    with pytest.raises(ValueError, match=r"^config: task 't123': there is no head 'clasify'; did you mean 'classify'"):
        load_config(path)


def test_files_beside_the_yaml_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "words.json").write_text("{}")
    (tmp_path / "project" / "c.yaml").write_text("tasks: [sst2]\ntokenizer: words.json\nrun: ~/made\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_config(Path("project/c.yaml"))
    assert config.tokenizer == str(tmp_path / "project" / "words.json")
    assert config.base == str(tmp_path / "project")
    assert config.run == str(tmp_path / "home" / "made")
    (tmp_path / "project" / "c.yaml").write_text("tasks: [sst2]\ntokenizer: some/where\n")
    assert load_config(Path("project/c.yaml")).tokenizer == "some/where"  # of the hub


@pytest.mark.parametrize("text", ['a: !!int ""', 'a: !!float ""', "a: !!bool maybe", "a: !!timestamp x"])
def test_a_tag_that_does_not_fit_is_refused(text):
    with pytest.raises(ValueError, match="not of the type that its tag names|could not convert"):
        read_yaml(text)


ODD = [
    "1e5",
    "5E-3",
    "yes",
    "null",
    "~",
    "",
    " ",
    "#x",
    "a: b",
    "a #b",
    "- a",
    "'",
    '"',
    "a\nb",
    "a\n",
    "\u2028",
    "\x85",
    "é",
    "😀",
]


@pytest.mark.parametrize("value", [*ODD, ODD, dict.fromkeys(ODD, 1e-3), 0.1, 1e-7, [True, None, 3]], ids=repr)
def test_what_is_written_is_read_back(value):
    line = flow(value)
    assert len(line.splitlines()) == 1
    assert read_yaml(f"key: {line}  # a comment")["key"] == value
    assert read_yaml(write_yaml({"key": value})) == {"key": value}
