"""The ONNX graph in onnxruntime: logits of all tasks are those of the engine, for texts of any lengths."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_export_hugging_face import BERT, LLAMA, expected

from answering import TRUNK, answering_engine

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from trunkline.engine.answers.ask import question  # noqa: E402
from trunkline.engine.foreign.export_onnx import export_onnx  # noqa: E402

SHAPES = {
    "bert, pooler": (BERT, "pooler"),
    "rotary, gelu": (replace(TRUNK, positions="rotary", exact_match=True), "gelu"),
    "llama, local layers": (replace(LLAMA, window=4, global_every=2, causal=False), ""),
}


@pytest.mark.parametrize(("trunk", "projection"), SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_engine(tmp_path, trunk, projection):
    engine = answering_engine(trunk, projection=projection)
    path = export_onnx(engine, [], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert (
        names
        == [task.name for task in engine.tasks if task.head != "generate"]
        == list(json.loads((tmp_path / "model.json").read_text()))
    )
    texts = ["One two three. And four five.", "a", "b c", "many words " * 5]
    laid = [question(engine, (text,), [0]).laid for text in texts]
    ids = np.zeros((len(texts), max(len(one.tokens) for one in laid)), np.int64)
    mask = np.zeros_like(ids)
    for row, one in enumerate(laid):
        ids[row, : len(one.tokens)], mask[row, : len(one.tokens)] = one.tokens, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if trunk.token_types > 1:
        inputs["token_type_ids"] = np.zeros_like(ids)
    found = dict(zip(names, session.run(None, inputs), strict=True))
    for name in ("polarity", "topics", "stars", "parts", "gist"):
        for row, text in enumerate(texts):
            wanted = expected(engine, name, (text,)).numpy()
            got = found[name][row]
            wanted = wanted[-1 if trunk.causal else 0] if got.ndim == 1 else wanted
            np.testing.assert_allclose(got[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_said(tmp_path):
    engine = answering_engine()
    with pytest.raises(ValueError, match="task 'retell' writes text: use --to hugging-face"):
        export_onnx(engine, ["retell"], tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="no task 'retel'"):
        export_onnx(engine, ["retel"], tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="a Bi-LSTM"):
        export_onnx(answering_engine(replace(TRUNK, causal=False), architecture="bilstm"), [], tmp_path / "model.onnx")


def test_a_graph_that_answers_otherwise_is_refused(tmp_path, monkeypatch):
    from trunkline.engine.foreign import export_onnx as module

    inner = module.Padded._logits
    monkeypatch.setattr(module.Padded, "_logits", lambda self, x, t: inner(self, x, t) + 0.01 * (t == 2))
    with pytest.raises(ValueError, match="answers otherwise than the engine: 'stars' is off by"):
        export_onnx(answering_engine(), ["polarity", "stars"], tmp_path / "model.onnx")


def test_the_engine_is_as_before(tmp_path):
    engine = answering_engine()
    before = engine.predict(["a b"], ["polarity"], scores=True)
    export_onnx(engine, ["polarity"], tmp_path / "model.onnx")
    assert engine.predict(["a b"], ["polarity"], scores=True) == before
    assert all(parameter.device == torch.device("cpu") for parameter in engine.model.parameters())
