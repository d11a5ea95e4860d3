"""What stands around texts is what transformers puts there, for every kind of post-processor and at every length."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Tokenizer as Inner
from tokenizers import processors

from encoded import CLASSIFY, GENERATE, PAIR, changed, made
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.template import Frame, Marks
from trunkline.engine.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<|endoftext|>", "\n", "Summary:"]


def word_level(post: object | None = None, lacks: str = "") -> Inner:
    vocabulary = {word if word != lacks else "another": i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Inner(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    split = tokenizers.pre_tokenizers.Split
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split(" ", "removed"), split("\n", "isolated")])
    inner.add_special_tokens([token for token in SPECIAL[:7] if token != lacks])
    if post is not None:
        inner.post_processor = post
    return inner


def template(one: str, two: str, *special: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(one, two, [(token, SPECIAL.index(token)) for token in special])


POSTS = {
    "bert": lambda: processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
    "roberta": lambda: processors.RobertaProcessing(("</s>", 5), ("<s>", 4)),
    "modernbert": lambda: template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]", "[SEP]"),
    "llama": lambda: processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template("<s> $A", "<s> $A <s>:1 $B:1", "<s>")]
    ),
    "xlnet": lambda: template("$A [SEP] [CLS]:2", "$A [SEP] $B:1 [SEP]:1 [CLS]:2", "[SEP]", "[CLS]"),
}
CASES = {"even": (7, 7), "first longer": (12, 5), "second longer": (2, 15), "short": (1, 1)}


def text_of(count: int, first: int = 0) -> str:
    return " ".join(WORDS[first : first + count])


def assert_theirs(laid, inner: Inner, *texts: str, max_length: int = 100) -> None:
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    theirs = fast(*texts, truncation=True, max_length=max_length, return_token_type_ids=True)
    inner.no_truncation()
    assert laid.tokens.tolist() == theirs["input_ids"]
    assert laid.types.tolist() == theirs["token_type_ids"]


@pytest.mark.parametrize("max_length", [*range(4, 21), 100])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", POSTS)
def test_ids_and_types_are_those_of_transformers(name, case, max_length):
    inner = word_level(POSTS[name]())
    tokenizer = Tokenizer(inner)
    first, second = text_of(CASES[case][0]), text_of(CASES[case][1], 40)
    layout = Layout(tokenizer, max_length, causal=False)
    one = layout.lay([first])
    assert_theirs(one, inner, first, max_length=max_length)
    assert tokenizer.inner.decode(one.tokens[one.first : one.end].tolist()) == text_of(one.end - one.first)
    if tokenizer.frame(2, False).size >= max_length:
        with pytest.raises(ValueError, match=f"{max_length} tokens leave no room for 2 text"):
            layout.lay([first, second])
        return
    two = layout.lay([first, second])
    assert_theirs(two, inner, first, second, max_length=max_length)
    assert tokenizer.inner.decode(two.tokens[two.first : two.end].tolist()) == text_of(two.end - two.first, 40)


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_template_the_layout_is_that_of_before(causal):
    for post in (None, processors.ByteLevel(trim_offsets=True)):
        tokenizer = Tokenizer(word_level(post))
        assert tokenizer.template is None
        laid = Layout(tokenizer, 100, causal).lay(["w0 w1", "w2"])
        a, b, c = (len(SPECIAL) + i for i in range(3))
        expected = [a, b, tokenizer.separator, c]
        assert laid.tokens.tolist() == ([*expected, tokenizer.end] if causal else [tokenizer.end, *expected])
        assert laid.types.tolist() == [0] * 5


def test_the_first_layout_does_not_ask_the_tokenizer():
    inner = word_level(POSTS["bert"]())
    laid = Layout(Tokenizer(inner, layout=1), 100, causal=False).lay(["w0", "w1"])
    tokenizer = Tokenizer(inner, layout=1)
    assert laid.tokens.tolist() == [tokenizer.end, 9, tokenizer.separator, 10]
    assert not laid.types.any()


def test_of_more_than_two_texts_the_middle_is_repeated():
    laid = Layout(Tokenizer(word_level(POSTS["bert"]())), 100, causal=False).lay(["w0", "w1", "w2"])
    assert laid.tokens.tolist() == [1, 9, 2, 10, 2, 11, 2]
    assert laid.types.tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert (laid.first, laid.end) == (5, 6)


def test_a_frame_says_where_each_text_begins():
    frame = Frame((Marks((1, 2), (0, 3)), Marks.of(4), Marks()), (5, 6))
    tokens, types, starts = frame.fill([np.array([7, 8]), np.array([], np.int32)])
    assert (tokens.tolist(), types.tolist(), starts) == ([1, 2, 7, 8, 4], [0, 3, 5, 5, 0], [2, 5])
    assert (tokens.dtype, types.dtype, frame.size) == ("int64", "uint8", 3)


# A vocabulary that may not grow


def test_a_checkpoint_is_given_no_token_that_it_has_not_learnt():
    """A line break separates, and a summary begins as a text would announce it."""
    tokenizer = Tokenizer(word_level(lacks="[SEP]"), grows=False)
    assert (tokenizer.vocab_size, tokenizer.added) == (99, 0)
    laid = Layout(tokenizer, 100, causal=True).lay(["w0", "w1"])
    newline, end = SPECIAL.index("\n"), SPECIAL.index("<|endoftext|>")
    assert laid.tokens.tolist() == [9, newline, 10, end]
    prompt = Layout(tokenizer, 100, causal=True).prompt("w0 w1", 20)
    assert prompt.tokens.tolist() == [9, 10, newline, SPECIAL.index("Summary:")]
    short = Layout(tokenizer, 24, causal=True).prompt("w0 w1", 20)
    assert (short.tokens.tolist(), short.cut) == ([9, newline, SPECIAL.index("Summary:")], True)
    with pytest.raises(ValueError, match="22 tokens leave no room for 1 .* 2 stand around them, and 21 are kept"):
        Layout(tokenizer, 22, causal=True).prompt("w0 w1", 20)


def test_what_is_written_begins_as_the_template_says():
    tokenizer = Tokenizer(word_level(POSTS["llama"]()), grows=False)
    assert made(GENERATE, tokenizer=tokenizer, text=["w0"], label=["w1"]).tokens_of(0).tolist() == [
        *[SPECIAL.index("<s>"), 9, SPECIAL.index("\n"), SPECIAL.index("Summary:")],
        *[10, tokenizer.end],
    ]
    prose = made(changed(CLASSIFY, head="language-model", label="", labels=()), tokenizer=tokenizer, text=["w0 w1"])
    assert prose.tokens_of(0).tolist() == [SPECIAL.index("<s>"), 9, 10, tokenizer.end]


def test_a_vocabulary_without_an_end_is_an_error():
    inner = Inner(tokenizers.models.WordLevel({"[UNK]": 0, "dog": 1}, "[UNK]"))
    with pytest.raises(ValueError, match=r"no token that ends a text, none of <\|end\|>"):
        Tokenizer(inner, grows=False)
    assert Tokenizer(inner, grows=False, ends=[1]).end == 1


# What ends a text


def saved(folder: Path, **files: dict) -> Path:
    word_level().save(str(folder / "tokenizer.json"))
    for name, settings in files.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (6,)),  # <|endoftext|>, the first of the names
        ({"generation_config": {"eos_token_id": [5, 2]}, "config": {"eos_token_id": 2}}, (5, 2)),
        ({"config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "</s>"}}, (2, 5)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, (5,)),
        ({"generation_config": {"eos_token_id": None}, "config": {"model_type": "gpt2"}}, (6,)),
    ],
)
def test_what_ends_a_text_is_what_the_checkpoint_says(files, ends, tmp_path):
    tokenizer = Tokenizer.load(str(saved(tmp_path, **files)), grows=False)
    assert (tokenizer.end, tokenizer.ends) == (ends[0], ends)
    again = tmp_path / "again"
    again.mkdir()
    tokenizer.save(again)
    assert Tokenizer.load(str(again), grows=False).ends == ends
    assert Tokenizer.load(str(tmp_path), layout=1).ends == (6,)


def test_an_end_that_the_tokenizer_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"generation_config.json says that 999 ends a text, which .* does not have"):
        Tokenizer.load(str(saved(tmp_path, generation_config={"eos_token_id": 999})))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not JSON"):
        Tokenizer.load(str(tmp_path))


# What is made once


def test_the_digest_tells_frames_apart():
    """It keys what is encoded; of a tokenizer that both layouts frame alike it is that of before."""
    plain = {Tokenizer(word_level(), layout=layout).digest for layout in (1, 2)}
    assert len(plain) == 1
    framed = [Tokenizer(word_level(POSTS["bert"]()), layout=layout) for layout in (1, 2)]
    assert [tokenizer.is_plain for tokenizer in framed] == [True, False]
    assert framed[0].digest != framed[1].digest
    others = (
        Tokenizer(word_level(), ends=[5]),
        Tokenizer(word_level(), ends=[5, 6]),
        Tokenizer(word_level(), grows=False),
    )
    assert len({tokenizer.digest for tokenizer in (*framed, *others)} | plain) == 6


def test_types_are_of_every_example_of_a_trunk_that_has_them():
    tokenizer = Tokenizer(word_level(POSTS["bert"]()))
    columns = {"first": ["w0 w1", "w2"], "second": ["w3", "w4 w5"], "label": ["no", "yes"]}
    encoded = made(PAIR, causal=False, tokenizer=tokenizer, typed=True, **columns)
    assert encoded.example(0, 0).types.tolist() == [0, 0, 0, 0, 1, 1]
    assert encoded.example(1, 0).types.tolist() == [0, 0, 0, 1, 1, 1]
    assert made(PAIR, causal=False, tokenizer=tokenizer, **columns).example(0, 0).types is None
