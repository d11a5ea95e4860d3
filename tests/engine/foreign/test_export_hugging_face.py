"""Exported folders in transformers: the same logits, from the texts themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from answering import TRUNK, answering_engine
from trunkline import Engine, TrunkConfig
from trunkline.engine.answers.ask import question
from trunkline.engine.foreign.export_hugging_face import export_hugging_face
from trunkline.engine.network.packing import Example, pack

transformers = pytest.importorskip("transformers")

TEXTS = {1: ["One two three. And four five.", "a", "b c"], 2: [("who is it ?", "it is the fox"), ("a", "b c")]}
BERT = replace(TRUNK, causal=False, norm_position="post", embedding_norm=True, token_types=2, norm_eps=1e-12)
ROBERTA = replace(BERT, position_offset=2, token_types=1)
LLAMA = replace(TRUNK, positions="rotary", norm="rms", activation="swiglu", bias=False, num_kv_heads=2)
GPT2 = replace(TRUNK, activation="gelu_tanh")
KINDS = {"polarity": "SequenceClassification", "topics": "SequenceClassification", "stars": "SequenceClassification"}
KINDS |= {"follows": "SequenceClassification", "parts": "TokenClassification", "gist": "TokenClassification"}
KINDS |= {"where": "QuestionAnswering"}


def engine_of(trunk: TrunkConfig, projection: str = "") -> Engine:
    engine = answering_engine(trunk, projection=projection)
    with torch.no_grad():
        engine.model.bias.normal_()
        engine.model.center[2], engine.model.spread[2] = 3.0, 2.0
        if projection:
            engine.model.projection_bias.normal_()
    return engine


def expected(engine: Engine, task: str, text: tuple[str, ...]) -> torch.Tensor:
    """Logits of every token."""
    t = engine.place_of(task)
    laid = question(engine, text, [t]).laid
    types = laid.types if engine.config.trunk.token_types > 1 else None
    batch = pack([Example(t, laid.tokens, torch.arange(len(laid.tokens)).numpy(), types=types)], len(engine.tasks))
    with torch.inference_mode():
        return engine.model.logits(engine.model.eval().hidden(batch), t)


def logits_of(folder: Path, kind: str, text: tuple[str, ...]) -> torch.Tensor:
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    given = transformers.AutoTokenizer.from_pretrained(folder)(*text, return_tensors="pt")
    with torch.inference_mode():
        said = model(**given)
    if kind == "QuestionAnswering":
        return torch.stack([said.start_logits[0], said.end_logits[0]], 1)
    return said.logits[0]


@pytest.mark.parametrize(
    ("trunk", "projection", "tasks"),
    [
        (BERT, "pooler", ("polarity", "topics", "stars", "follows")),
        (BERT, "", ("parts", "gist", "where")),
        (ROBERTA, "pooler", ("polarity", "stars")),
        (ROBERTA, "", ("parts",)),
        (GPT2, "", ("polarity", "topics", "stars", "follows", "parts", "where")),
        (LLAMA, "", ("parts",)),
    ],
    ids=["bert, pooler", "bert", "roberta, pooler", "roberta", "gpt2", "llama"],
)
def test_logits_are_those_of_the_engine(tmp_path, trunk, projection, tasks):
    engine = engine_of(trunk, projection)
    for task in tasks:
        folder = export_hugging_face(engine, task, tmp_path / task)
        pools = KINDS[task] == "SequenceClassification"
        for text in TEXTS[len(engine.tasks[engine.place_of(task)].text)]:
            text = (text,) if isinstance(text, str) else text
            wanted = expected(engine, task, text)
            wanted = (wanted[-1] if trunk.causal else wanted[0]) if pools else wanted
            torch.testing.assert_close(logits_of(folder, KINDS[task], text), wanted, rtol=1e-5, atol=1e-5)


def test_texts_of_other_lengths_in_a_batch_are_padded(tmp_path):
    """The classes of causal models look for the last token that is no padding, which must not be END."""
    engine = engine_of(GPT2)
    folder = export_hugging_face(engine, "polarity", tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    given = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[1], return_tensors="pt", padding=True)
    with torch.inference_mode():
        got = model(**given).logits
    wanted = torch.stack([expected(engine, "polarity", (text,))[-1] for text in TEXTS[1]])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_classes_have_their_names(tmp_path):
    folder = export_hugging_face(engine_of(BERT, "pooler"), "topics", tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.id2label == {0: "billing", 1: "bug", 2: "urgent"}
    assert config.problem_type == "multi_label_classification"
    pipeline = transformers.pipeline("text-classification", model=str(folder), top_k=None, device="cpu")
    said = engine_of(BERT, "pooler").predict(["a b"], ["topics"], scores=True)["topics"][0]["scores"]
    assert {score["label"]: score["score"] for score in pipeline(["a b"])[0]} == pytest.approx(said, abs=1e-5)


@pytest.mark.parametrize("trunk", [GPT2, replace(LLAMA, tie_vocabulary=False)], ids=["gpt2", "llama, untied"])
def test_a_task_that_writes_writes_the_same(tmp_path, trunk):
    engine = engine_of(trunk)
    folder = export_hugging_face(engine, "retell", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[1]:
        given = tokenizer(text, return_tensors="pt")
        made = model.generate(**given)[0, given["input_ids"].shape[1] :]
        assert engine.tokenizer.decode(made.tolist()) == engine.generate([text], "retell")[0]


@pytest.mark.parametrize(
    ("trunk", "projection", "task", "message"),
    [
        (BERT, "", "polarity", "a pooler before its head, which projection: pooler trains; use --to onnx"),
        (BERT, "gelu", "parts", "a projection of the task's own stands before its head"),
        (BERT, "pooler", "parts", "a projection of the task's own stands before its head"),
        (LLAMA, "", "polarity", "Llama's class has no bias in its head, nor in the norm before it"),
        (LLAMA, "", "where", "Llama has no class for a span"),
        (ROBERTA, "", "where", "token 1, Roberta's padding, stands around the engine's texts"),
        (replace(TRUNK, positions="rotary"), "", "parts", "none of .* has this trunk's shape"),
        (replace(GPT2, exact_match=True), "", "retell", "exact_match"),
        (GPT2, "tanh", "retell", "a projection of the task's own"),
        (GPT2, "", "retel", "no task 'retel'"),
    ],
    ids=str,
)
def test_what_no_stock_class_computes_is_said(tmp_path, trunk, projection, task, message):
    engine = engine_of(trunk, projection)
    with pytest.raises(ValueError, match=message):
        export_hugging_face(engine, task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_without_bias_needs_no_norm_for_it(tmp_path):
    engine = engine_of(LLAMA)
    with torch.no_grad():
        engine.model.bias.zero_()
    folder = export_hugging_face(engine, "polarity", tmp_path)
    wanted = expected(engine, "polarity", ("a b",))[-1]
    torch.testing.assert_close(logits_of(folder, "SequenceClassification", ("a b",)), wanted, rtol=1e-5, atol=1e-5)
