"""What a run says before its first step is what it does."""

from trunkline.engine.engine import Engine
from trunkline.engine.text.template import Frame, Marks
from trunkline.training.config_file import load_config
from trunkline.training.run import introduction
from trunkline.training.run.introduction import _shown


def before_the_first_step(output: str) -> list[str]:
    lines = output.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("step "))
    start = next(place for place, line in enumerate(lines) if line.startswith("starts "))
    return lines[start:first]


def test_it_says_start_formats_rates_tasks_length_and_place(finished):
    said = before_the_first_step(finished.output)
    assert said[0].startswith("starts from scratch: 2 causal blocks of width 32, ")
    assert "a vocabulary of " in said[0]
    formats = dict(line.removeprefix("reads ").split(" as: ") for line in said if line.startswith("reads "))
    assert formats["colour, parts, prose"] == "{text} <|end|>"
    assert formats["where"] == "{question} <|separator|> {context} <|end|>"
    assert formats["retell"] == "{document} <|summary|> summary <|end|>"
    assert any(line.startswith("learns at 3.0e-03: ") for line in said)
    (colour,) = [line for line in said if line.startswith("colour: ")]
    assert colour.startswith("colour: classify, 60 examples of ")
    assert colour.endswith(" tokens to learn from, 20 to be scored on")
    assert [line for line in said if line.startswith("24 steps of 1,024 tokens, as many as ")]
    assert (
        said[-1] == f"writes {finished.run}, a checkpoint every 4 steps; Ctrl-C stops it, --resume goes on from there"
    )


def test_it_says_what_was_tuned(tiny_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(introduction, "use_tuned", lambda device: f"tuned for {device}")
    Engine.from_config(load_config(tiny_config, ["steps=1", f"run={tmp_path / 'run'}"])).fit()
    assert "tuned for cpu" in before_the_first_step(capsys.readouterr().out)


def test_marks_of_a_checkpoint_are_shown_by_their_names():
    class Inner:
        def id_to_token(self, token):
            return {1: "[CLS]", 2: "[SEP]"}[token]

    class Tokenizer:
        inner = Inner()

    frame = Frame((Marks.of(1), Marks.of(2), Marks.of(2)), (0, 1))
    assert _shown(frame, Tokenizer(), ("premise", "hypothesis")) == "[CLS] {premise} [SEP] {hypothesis} [SEP]"
