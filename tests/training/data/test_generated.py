"""Every label is checked by a reader that parses the text, and the reader itself by sentences written by hand."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from trunkline.engine.tasks.builtin import GENERATED as TASKS
from trunkline.training.data import generated
from trunkline.training.data.generated import GENERATED, SIZES, Choices, generate

ROWS = {(task, split): generate(task, split, size, 0) for task in GENERATED for split, size in SIZES.items()}
COLUMNS = {task.name: task.text for task in TASKS}


def input_text(task: str, row: dict) -> str:
    return "\n".join(row[column] for column in COLUMNS[task])


def word_tables() -> list[Choices]:
    pairs = [slots[slot] for slots in (generated.TRANSFER, *generated.THEMES) for slot in slots]
    things = [things for _, _, things in generated.ERRANDS.values()]
    return [*generated.ASPECTS, *generated.ADJECTIVES, *pairs, *things, generated.NAMES]


def has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


# readers: the label that a text deserves


def read_sentiment(text: str) -> str:
    text = text.lower()
    negative, positive = (table.train + table.validation for table in generated.ADJECTIVES)
    polarity = dict.fromkeys(negative, -1) | dict.fromkeys(positive, 1)
    found = [match for match in re.finditer(r"\w+", text) if match.group() in polarity]
    first, second = (
        polarity[match.group()] * (-1 if text[: match.start()].split()[-1] in ("not", "hardly", "never") else 1)
        for match in found
    )
    concession_last = "although" in text[found[0].end() :]
    assert (first != second) == (" but " in text or "although" in text)
    return "positive" if (first if concession_last else second) > 0 else "negative"


def read_event(sentence: str, tables: list[dict[str, Choices]]) -> dict[str, str]:
    """The meaning in each slot, whichever of its synonyms is written."""
    event = {}
    for slot, choices in ((slot, choices) for slots in tables for slot, choices in slots.items()):
        for meaning in choices.train + choices.validation:
            for word in meaning.split("/"):
                if slot == "receiver" and not has_word(sentence, f"to the {word}"):
                    continue
                if slot == "agent" and has_word(sentence, f"to the {word}"):
                    continue
                if has_word(sentence, word):
                    event[slot] = meaning
    return event


def read_paraphrase(sentence1: str, sentence2: str) -> str:
    same = read_event(sentence1, [generated.TRANSFER]) == read_event(sentence2, [generated.TRANSFER])
    return "paraphrase" if same else "different"


def read_similarity(sentence1: str, sentence2: str) -> float:
    first, second = (read_event(sentence, generated.THEMES) for sentence in (sentence1, sentence2))
    points = {"agent": 1.0, "verb": 1.0, "thing": 1.5, "place": 1.0, "time": 0.5}
    return sum((points[slot] for slot in points if first[slot] == second[slot]), 0.0)


def read_dialogue(document: str) -> str:
    turns = [line.split(": ", 1) for line in document.split("\n")]
    request = next(place for place, (_, turn) in enumerate(turns) if re.search(r"C(ould|an) you", turn))
    (asker, wish), (helper, answer) = turns[request], turns[request + 1]
    errand, thing = next(
        (errand, thing)
        for errand, (_, _, things) in generated.ERRANDS.items()
        for thing in things.train + things.validation
        if has_word(wish, f"the {thing}")
    )
    if "somebody else" in answer or "no time" in answer:
        return f"{helper} refuses to {errand} the {thing} for {asker}."
    day = max(generated.DAYS, key=lambda day: answer.lower().rfind(day.lower()))  # the day named last
    return f"{asker} asks {helper} to {errand} the {thing} by {day}."


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The soup was good and the menu was very lovely.", "positive"),
        ("The soup was not good and the menu was awful.", "negative"),
        ("The plot was bad, but the music was never dull.", "positive"),
        ("Although I found the bed lovely, the view was hardly great.", "negative"),
        ("The bed was lovely, although the view was ugly.", "positive"),
    ],
)
def test_sentiment_reader(text, label):
    assert read_sentiment(text) == label


@pytest.mark.parametrize(
    ("sentence2", "label"),
    [
        ("The automobile was lent to the attorney by the physician at midday.", "paraphrase"),
        ("The doctor lent the car to the lawyer at noon.", "paraphrase"),
        ("The lawyer lent the car to the doctor at noon.", "different"),
        ("The doctor lent the car to the lawyer at two o'clock.", "different"),
        ("The doctor lent the sofa to the lawyer at noon.", "different"),
    ],
)
def test_paraphrase_reader(sentence2, label):
    assert read_paraphrase("At noon the physician loaned the car to the lawyer.", sentence2) == label


@pytest.mark.parametrize(
    ("sentence2", "score"),
    [
        ("At noon the sailor spotted the vessel near the harbour.", 5.0),
        ("The seaman saw the boat near the harbour at midday.", 3.5),
        ("The captain fixed the boat near the harbour at night.", 1.0),
        ("The cook ate the loaf near the kitchen at midday.", 0.5),
        ("The cook ate the loaf near the kitchen after dark.", 0.0),
    ],
)
def test_similarity_reader(sentence2, score):
    assert read_similarity("The sailor saw the ship near the harbour at noon.", sentence2) == score


@pytest.mark.parametrize(
    ("answer", "summary"),
    [
        ("Sure, Friday is fine with me.", "Anna asks Ben to repair the bike by Friday."),
        ("Friday is too early for me, but next week is fine.", "Anna asks Ben to repair the bike by next week."),
        ("No, please ask somebody else this time.", "Ben refuses to repair the bike for Anna."),
    ],
)
def test_dialogue_reader(answer, summary):
    wish = "Anna: Can you please fix the bike by Friday? It broke down again."
    assert read_dialogue(f"Ben: Hello Anna, what is new?\n{wish}\nBen: {answer}\nAnna: Thank you.") == summary


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_labels_are_what_the_text_says(task, split):
    reader = globals()[f"read_{task.name}"]
    for row in ROWS[task.name, split][:1000]:
        assert row[task.label] == reader(*(row[column] for column in task.text)), row


# what the splits hold


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("task", [task for task in TASKS if task.labels], ids=lambda task: task.name)
def test_every_prefix_has_balanced_classes(task, split):
    for size in (2, 100, SIZES[split]):
        counts = Counter(row["label"] for row in ROWS[task.name, split][:size])
        assert counts == dict.fromkeys(task.labels, size // 2)


@pytest.mark.parametrize("split", SIZES)
def test_scores_cover_the_scale_and_summaries_the_outcomes(split):
    scores = Counter(row["score"] for row in ROWS["similarity", split])
    assert (min(scores), max(scores)) == (0.0, 5.0)
    assert len(scores) > 8
    assert all(isinstance(score, float) for score in scores)
    refused = sum("refuses" in row["summary"] for row in ROWS["dialogue", split])
    assert refused == SIZES[split] // 3


@pytest.mark.parametrize("task", GENERATED)
def test_no_validation_row_is_in_training(task):
    training = {input_text(task, row) for row in ROWS[task, "train"]}
    assert not training & {input_text(task, row) for row in ROWS[task, "validation"]}
    assert len(training) > 0.99 * SIZES["train"]


@pytest.mark.parametrize(
    ("task", "tables"),
    [
        ("sentiment", [generated.CLAUSES]),
        ("sentiment", [generated.AGREEMENTS, generated.CONTRASTS]),
        ("paraphrase", [generated.TRANSFERS]),
        ("similarity", [generated.SCENES]),
        ("dialogue", [generated.REQUESTS]),
        ("dialogue", list(generated.ANSWERS.values())),
    ],
)
def test_every_validation_row_is_made_of_templates_that_training_never_has(task, tables):
    templates = [re.escape(template) for table in tables for template in table.validation]
    new = re.compile("|".join(re.sub(r"\\{\w+\\}", "(.+)", template) for template in templates), re.IGNORECASE)
    assert not [row for row in ROWS[task, "train"] if new.search(input_text(task, row))]
    assert not [row for row in ROWS[task, "validation"] if not new.search(input_text(task, row))]


def test_held_out_words_are_in_no_training_row_of_any_task():
    held_out = {word for table in word_tables() for word in table.validation}
    training, validation = (
        "\n".join(input_text(task, row) for task in GENERATED for row in ROWS[task, split]) for split in SIZES
    )
    assert not [word for word in held_out if has_word(training, word)]
    assert not [word for word in held_out if not has_word(validation, word)]


@pytest.mark.parametrize("task", GENERATED)
def test_half_of_the_validation_rows_hold_one_new_word_beside_known_ones(task):
    held_out = {word for table in word_tables() for word in table.validation}
    counts = [sum(has_word(input_text(task, row), word) for word in held_out) for row in ROWS[task, "validation"]]
    assert max(counts) == 1
    assert 0.4 < sum(counts) / len(counts) < 0.6


@pytest.mark.parametrize(
    ("task", "column", "shortest", "longest"),
    [("sentiment", "text", 8, 25), ("dialogue", "document", 30, 80), ("dialogue", "summary", 6, 14)],
)
def test_lengths_in_words(task, column, shortest, longest):
    lengths = [len(row[column].split()) for split in SIZES for row in ROWS[task, split]]
    assert shortest <= min(lengths) <= max(lengths) <= longest


def test_dialogues_have_three_to_six_turns_by_two_speakers_in_turn():
    for row in ROWS["dialogue", "train"]:
        speakers = [line.split(": ")[0] for line in row["document"].split("\n")]
        assert 3 <= len(speakers) <= 6
        assert len(set(speakers[::2])) == len(set(speakers[1::2])) == 1
        assert speakers[0] != speakers[1]


# generate


def test_rows_are_the_same_in_every_process():
    program = "import sys; from trunkline.training.data.generated import *; "
    program += "sys.stdout.write(repr([generate(t, s, 50, 7) for t in GENERATED for s in SIZES]))"
    here = repr([generate(task, split, 50, 7) for task in GENERATED for split in SIZES])
    for hash_seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert process.stdout == here, process.stderr


@pytest.mark.parametrize("task", GENERATED)
def test_rows_depend_on_the_arguments_alone(task):
    assert generate(task, "train", 30, 0) == ROWS[task, "train"][:30]
    assert generate(task, "train", 30, 1) != ROWS[task, "train"][:30]
    assert generate(task, "train", 0, 0) == []


def test_generating_everything_is_fast(effort):
    assert effort(lambda: [generate(task, split, SIZES[split], 1) for task, split in ROWS]) < 150


def test_unknown_names_are_errors_that_list_the_known_ones():
    with pytest.raises(ValueError, match="one of sentiment, paraphrase, similarity, dialogue, got 'sentiments'"):
        generate("sentiments", "train", 1, 0)
    with pytest.raises(ValueError, match="'dialogue': generated split must be one of train, validation, got 'test'"):
        generate("dialogue", "test", 1, 0)


def test_tasks_name_the_generated_rows():
    assert [task.name for task in TASKS] == list(GENERATED)
    assert all(task.generated for task in TASKS)
    for task in TASKS:
        assert all(list(row) == [*task.text, task.label] for split in SIZES for row in ROWS[task.name, split])


@pytest.mark.parametrize("task", ["sentiment", "paraphrase"])
def test_a_bag_of_words_is_better_than_chance_but_not_enough(task):
    numpy = pytest.importorskip("numpy")
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    hashing = text.HashingVectorizer(n_features=512, alternate_sign=False, norm=None)

    def features(split: str):
        columns = [[row[column] for row in ROWS[task, split]] for column in COLUMNS[task]]
        bags = [hashing.transform(column).toarray() for column in columns]
        overlap = numpy.minimum(bags[0], bags[-1]).sum(1, keepdims=True)
        return numpy.concatenate([*bags, overlap], axis=1)

    train, validation = ([row["label"] for row in ROWS[task, split]] for split in SIZES)
    model = linear.LogisticRegression(C=0.1, max_iter=500).fit(features("train"), train)
    assert 0.55 < model.score(features("validation"), validation) < 0.8
