"""Any text comes back from its tokens; a tokenizer of the user's keeps its special tokens; files serve elsewhere."""

import re
from pathlib import Path

import pytest
import tokenizers

from trunkline.engine.text.tokenizer import Tokenizer, UntokenizedError

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog is not amused.",
    "Der schnelle braune Fuchs springt über den faulen Hund; 漢字かな交じり文 too.",
    "Numbers 1 23 456 7,890.5 and code: for i in range(10): print(i)",
] * 3
STRANGE = {
    "plain": "The dog is lazy.",
    "emoji": "👩‍👩‍👧‍👦 family, flag 🇩🇪, 🎉🎉",
    "line ends": "a\nb\r\n\n\tc\x0bd",
    "spaces": "a  b   c",
    "scripts": "漢字 한국어 العربية עברית ไทย हिन्दी",
    "control characters": "a\x00b\x01\x1b[0m\x7f\x85\u200b\u2028\ufeffz",
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎",
    "combining": "e\u0301 ä n\u0303",
    "separator of decoded parts": "a | b",
    "names of special tokens": "a <|end|> b <|separator|><|summary|> <|endoftext|> c",
    "empty": "",
}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 360)


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    folder = shared_data.parent / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip(f"needs the tokenizer of GPT-2 in {folder}")
    return Tokenizer.load(str(folder))


def word_level(*words: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return inner


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ((ids, _),) = tokenizer.encode([text])
    return ids.tolist()


# Texts


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("name", ["trained", "gpt2"])
def test_any_text_comes_back(name, text, request):
    tokenizer = request.getfixturevalue(name)
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids) == text.strip()
    assert tokenizer.inner.decode(ids) == text
    assert not {tokenizer.end, tokenizer.separator, tokenizer.summary} & set(ids)  # a text is never structure
    assert max(ids, default=0) < tokenizer.vocab_size


def test_offsets_are_characters_of_the_text(trained):
    text = "Fuchs über 漢字 🎉, too"
    ((ids, offsets),) = trained.encode([text])
    assert len(ids) == len(offsets)
    assert ids.dtype == "int32"
    assert (offsets[0][0], offsets[-1][1]) == (0, len(text))
    for (first, end), (later, later_end) in zip(offsets, offsets[1:], strict=False):
        assert first < end
        assert later == end or later < end <= later_end  # the next characters, or more bytes of the same
    for token, (first, end) in zip(ids, offsets, strict=True):
        assert not text[first:end].isascii() or trained.inner.decode([token]) == text[first:end]


def test_texts_are_encoded_side_by_side_as_alone(trained):
    texts = list(STRANGE.values())
    assert [ids.tolist() for ids, _ in trained.encode(texts)] == [ids_of(trained, text) for text in texts]


def test_decoding_leaves_special_tokens_out_and_marks_what_they_separate(trained):
    first, second = ids_of(trained, "the dog"), ids_of(trained, " is lazy ")
    tokens = [trained.end, *first, trained.separator, *second, trained.summary, trained.end]
    assert trained.decode(tokens) == "the dog | is lazy"
    assert trained.decode([trained.end]) == ""


# Training


def test_the_same_texts_give_the_same_tokenizer():
    digests = {Tokenizer.train(iter(TEXTS), 360).digest for _ in range(3)}
    assert len(digests) == 1
    assert Tokenizer.train(TEXTS, 361).digest not in digests
    assert Tokenizer.train([*TEXTS, "another fox, another dog"], 360).digest not in digests


def test_a_trained_tokenizer_has_the_wanted_size_and_merges(trained):
    assert trained.vocab_size == 360
    assert (trained.end, trained.separator, trained.summary) == (0, 1, 2)
    assert len(ids_of(trained, " the lazy dog")) < len(" the lazy dog") / 2
    assert Tokenizer.train([], 259).vocab_size == 259  # every byte, and the special tokens
    assert len(ids_of(Tokenizer.train([], 259), "abc")) == 3


def test_in_lower_case_a_word_is_the_same_wherever_it_stands():
    tokenizer = Tokenizer.train(TEXTS, 360, lowercase=True)
    assert ids_of(tokenizer, "The Dog and THE dog") == ids_of(tokenizer, "the dog and the dog")
    ids = ids_of(tokenizer, "Fox, fox")
    assert ids[: len(ids) // 2] == ids[len(ids) // 2 + 1 :]
    assert tokenizer.decode(ids) == "fox, fox"
    ((_, places),) = tokenizer.encode(["ÀB Dog"])
    assert "ÀB Dog"[slice(*places[-1])] == " Dog"  # places are those of the text as it was given


# Tokenizers that come from elsewhere


def test_gpt2_keeps_its_end_token_and_is_given_the_others(gpt2):
    assert (gpt2.end, gpt2.separator, gpt2.summary) == (50256, 50257, 50258)
    assert gpt2.vocab_size == 50259
    assert gpt2.decode([gpt2.end, gpt2.separator, *ids_of(gpt2, "Hello"), gpt2.summary]) == "Hello"
    assert ids_of(gpt2, "Hello world") == [15496, 995]


def test_the_tokens_that_bert_has_for_the_purpose_are_used():
    tokenizer = Tokenizer(word_level("[UNK]", "[SEP]", "[CLS]", "dog"))
    assert (tokenizer.end, tokenizer.separator, tokenizer.summary) == (2, 1, 4)
    assert tokenizer.vocab_size == 5


def test_the_first_of_several_candidates_is_the_end():
    assert Tokenizer(word_level("[UNK]", "</s>", "<|endoftext|>")).end == 2


def test_ids_stay_below_the_vocabulary_where_it_has_gaps():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "dog": 90}, "[UNK]"))
    tokenizer = Tokenizer(inner)
    assert ids_of(tokenizer, "dog") == [90]
    assert tokenizer.vocab_size == 91


def test_truncation_and_padding_of_a_loaded_tokenizer_are_off(tmp_path):
    inner = word_level("[UNK]", "a", "b")
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert [len(ids) for ids, _ in tokenizer.encode(["a b a b a b", "a"])] == [6, 1]


# Files


def test_saved_and_loaded_it_is_the_same(trained, tmp_path):
    trained.save(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(str(source))
        assert loaded.digest == trained.digest
        assert (loaded.end, loaded.separator, loaded.summary) == (trained.end, trained.separator, trained.summary)
        for text in STRANGE.values():
            assert ids_of(loaded, text) == ids_of(trained, text)


def test_tokens_that_were_added_are_saved(tmp_path):
    Tokenizer(word_level("[UNK]", "dog")).save(tmp_path)
    loaded = Tokenizer.load(str(tmp_path))
    assert (loaded.end, loaded.separator, loaded.summary, loaded.vocab_size) == (2, 3, 4, 5)


def test_transformers_reads_the_file(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(fast) == trained.vocab_size
    assert fast.convert_tokens_to_ids(["<|end|>", "<|separator|>", "<|summary|>"]) == [0, 1, 2]
    for name, text in STRANGE.items():
        if name != "names of special tokens":  # to transformers those are the tokens
            assert fast.encode(text, add_special_tokens=False) == ids_of(trained, text)
            assert fast.decode(ids_of(trained, text)) == text


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    for content in ("", "{}", "hello"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer: "):
            Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("source", ["no/such/folder", "missing.json/"])  # no names that the hub would be asked for
def test_a_name_that_stands_for_nothing_is_named(source):
    with pytest.raises(ValueError, match=f"tokenizer '{source}' is no file, no folder with a tokenizer.json"):
        Tokenizer.load(source)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}' is no file, no folder with a tokenizer.json"):
        Tokenizer.load(str(tmp_path))


# Vocabularies with gaps, and texts without tokens


def with_gaps(ids: dict[str, int]) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return inner


@pytest.mark.parametrize(
    "ids",
    [
        {"[UNK]": 0, "red": 1, "green": 2, "blue": 4, "mug": 5, "</s>": 6},
        {"[UNK]": 3, "red": 1, "green": 2, "blue": 40, "mug": 5},
        {"[UNK]": 10, "red": 11},
    ],
    ids=str,
)
def test_added_tokens_share_no_id_with_a_word(ids):
    tokenizer = Tokenizer(with_gaps(ids))
    special = [tokenizer.end, tokenizer.separator, tokenizer.summary, tokenizer.mask()]
    words = {id for word, id in ids.items() if word != "</s>"}
    assert len(set(special)) == 4
    assert not set(special) & words
    assert ids_of(tokenizer, "red red nothing") == [ids["red"], ids["red"], ids["[UNK]"]]
    assert ids_of(tokenizer, "red [SEP] <|summary|>").count(tokenizer.separator) == 0
    again = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.inner.to_str()))
    assert [again.end, again.separator, again.summary, again.mask()] == special


def test_a_token_that_somebody_added_keeps_its_id_if_it_is_nobody_elses():
    inner = with_gaps({"[UNK]": 10, "red": 11})
    inner.add_special_tokens(["[SEP]"])
    tokenizer = Tokenizer(inner)
    assert tokenizer.separator == inner.token_to_id("[SEP]") == 2
    again = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.inner.to_str()))
    assert [again.end, again.separator, again.summary] == [tokenizer.end, tokenizer.separator, tokenizer.summary]


@pytest.mark.parametrize(
    ("ids", "added", "both"),
    [
        ({"[UNK]": 0, "red": 1, "blue": 4, "mug": 5, "</s>": 5}, None, "'</s>' and 'mug' are both number 5"),
        ({"[UNK]": 0, "red": 1, "green": 2, "blue": 4}, "[SEP]", "'[SEP]' and 'blue' are both number 4"),
    ],
    ids=["in the vocabulary", "added by somebody"],
)
def test_two_tokens_with_one_id_are_an_error(tmp_path, ids, added, both):
    """A file keeps one of them, by chance, so the ids of a saved tokenizer would differ from run to run."""
    inner = with_gaps(ids)
    if added:
        inner.add_special_tokens([added])
    with pytest.raises(ValueError, match=re.escape(both)):
        Tokenizer(inner)
    if added:
        inner.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match=rf"tokenizer\.json: tokenizer: {re.escape(both)}"):
            Tokenizer.load(str(tmp_path))


def test_a_text_with_an_unknown_word_and_no_token_for_it_is_an_error():
    letters = {"a": 0, "##b": 1, "[SEP]": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(letters, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(inner)
    assert ids_of(tokenizer, "ab a") == [0, 1, 0]
    with pytest.raises(UntokenizedError, match=r"cannot encode 'a zoo': .*Missing \[UNK\] token") as caught:
        tokenizer.encode(["a", "ab a", "a zoo", "zoo"])
    assert caught.value.place == 2
