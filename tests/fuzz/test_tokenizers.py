"""Any tokenizer, with gaps among its ids, without an unknown token, that leaves characters out: special tokens are
nobody's words, and a word has its own tag or a placeholder."""

import pytest

pytest.importorskip("hypothesis")

import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from encoded import TAG, rows_of
from fuzz.refusals import result_or_refusal
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.heads.tag import UNREAD, word_rows
from trunkline.engine.text.cells import text_of, word_bounds
from trunkline.engine.text.layout import Layout
from trunkline.engine.text.sentences import sentences_of
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoding import encode

PIECES = (
    "a",
    "b",
    "ab",
    "##a",
    "##b",
    ".",
    "é",
    "म",
    "[UNK]",
    "[SEP]",
    "[CLS]",
    "</s>",
    "<|end|>",
    "[MASK]",
    "<|summary|>",
)
texts = st.text(st.sampled_from("ab .\n\u00ad\u200b\u0301émें\t漢"), max_size=14)


@st.composite
def inner_tokenizers(draw: st.DrawFn) -> tokenizers.Tokenizer:
    pieces = draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=len(PIECES), unique=True))
    ids = draw(st.lists(st.integers(0, 40), min_size=len(pieces), max_size=len(pieces), unique=True))
    vocab = dict(zip(pieces, ids, strict=True))
    model = draw(st.sampled_from(("word", "pieces", "pairs")))
    inner = tokenizers.Tokenizer(
        models.WordLevel(vocab, "[UNK]")
        if model == "word"
        else models.WordPiece(vocab, unk_token="[UNK]")
        if model == "pieces"
        else models.BPE(vocab, [], unk_token="[UNK]" if "[UNK]" in vocab else None)
    )
    if draw(st.booleans()):
        inner.normalizer = normalizers.BertNormalizer()
    parts = (None, pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.BertPreTokenizer())
    if split := draw(st.sampled_from(parts)):
        inner.pre_tokenizer = split
    for more in draw(st.lists(st.sampled_from(("[SEP]", "<|end|>", "[MASK]", "new")), max_size=2, unique=True)):
        (inner.add_special_tokens if draw(st.booleans()) else inner.add_tokens)([more])  # by somebody else
    return inner


@st.composite
def usable_tokenizers(draw: st.DrawFn) -> Tokenizer:
    inner = draw(inner_tokenizers())
    assume(len(set(inner.get_vocab().values())) == inner.get_vocab_size())
    return Tokenizer(inner)


@given(inner=inner_tokenizers())
def test_special_tokens_are_nobody_elses(inner):
    before = dict(inner.get_vocab())
    tokenizer, refusal = result_or_refusal(Tokenizer, inner)
    if refusal:
        assert len(set(before.values())) < len(before)
        return
    special = [tokenizer.end, tokenizer.separator, tokenizer.summary, tokenizer.mask()]
    assert len(set(special)) == 4
    after = tokenizer.inner.get_vocab()
    assert {word: after[word] for word in before} == before
    assert len(set(after.values())) == len(after)
    assert max(after.values()) < tokenizer.vocab_size
    again = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.inner.to_str()))
    assert [again.end, again.separator, again.summary, again.mask()] == special


@given(
    tokenizer=usable_tokenizers(),
    text=st.one_of(texts, st.lists(texts, max_size=4)),
    length=st.integers(2, 16),
    causal=st.booleans(),
)
def test_every_word_has_its_own_tag_or_none(tokenizer, text, length, causal):
    text = text_of(text)
    words = word_bounds(text)
    laid, refusal = result_or_refusal(Layout(tokenizer, length, causal).lay, [text])
    if refusal:
        assert "the tokenizer cannot encode" in refusal
        return
    rows = word_rows(laid)
    assert len(rows) == len(words)
    read = [row for row in rows if row >= 0]
    assert read == sorted(set(read))
    assert all(laid.first <= row < laid.end for row in read)
    for row, (first, end) in zip(rows, words, strict=True):
        if row >= 0:
            start, stop = laid.offsets[row - laid.first]
            assert start < end
            assert stop > first
    said = HEADS["tag"].describe(TAG, [1] * len(read), laid)
    assert said == ["verb" if row >= 0 else UNREAD for row in rows]
    if words:
        row = rows_of(text=[text], label=[[1] * len(words)])
        encoded, refusal = result_or_refusal(encode, TAG, row, tokenizer, length, causal)
        if refusal:
            assert "none of the 1 rows" in refusal
            assert not read or not text.strip()
        else:
            assert encoded.example(0, 0).rows.tolist() == read


@given(tokenizer=usable_tokenizers(), text=texts, length=st.integers(2, 16))
def test_sentences_end_at_tokens_that_were_kept(tokenizer, text, length):
    laid, refusal = result_or_refusal(Layout(tokenizer, length, True).lay, [text])
    if refusal:
        return
    found = sentences_of(laid.text, laid.offsets, laid.kept)
    places = [token for _, token in found]
    assert places == sorted(set(places))
    assert all(0 <= place < laid.kept for place in places)
    assert bool(found) == (laid.kept > 0)
