"""Engines that earlier versions saved load and answer as they did.

tests/saved holds two of them, each with what it said when it was saved.
"""

import json
from pathlib import Path

import pytest

from trunkline import Engine

SAVED = Path(__file__).resolve().parents[1] / "saved"
TEXTS = ["the red dog is in the barn", "the white fox is in the garden", "the brown owl is in the forest"]


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_a_saved_engine_answers_as_it_did(name):
    engine = Engine.load(SAVED / name, device="cpu")
    answers = json.loads((SAVED / name / "answers.json").read_text())
    assert engine.predict(TEXTS, tasks=["colour", "parts"]) == answers["predict"]
    pairs = engine.predict([(a, b) for a in TEXTS for b in TEXTS], tasks=["closeness"])
    assert pairs["closeness"] == pytest.approx(answers["pairs"]["closeness"], abs=1e-5)
    assert (
        engine.predict([("where is the dog ?", text) for text in TEXTS], tasks=["where"])["where"] == answers["where"]
    )
    if "generate" in answers:
        assert engine.generate(TEXTS, "retell") == answers["generate"]
