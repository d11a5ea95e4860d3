"""The embedded tasks: rows made by a seeded generator, so that a first run needs no download.

Each task is a small language with rules to learn. Validation is built from templates that training never has, and
half of its rows hold one word that training never has; the rest of the row still decides the label.
"""

from collections.abc import Callable, Iterable
from random import Random
from typing import NamedTuple

from trunkline.engine.tasks.builtin import PARAPHRASES, SENTIMENTS

Row = dict[str, str | int | float]


class Choices(NamedTuple):
    """What can fill a place in a text. Nothing of `validation` ever stands in a training row."""

    train: list[str]
    validation: list[str]


def words(train: str, validation: str) -> Choices:
    """Words separated by ', '; those with the same meaning are written 'car/automobile'."""
    return Choices(train.split(", "), validation.split(", "))


# sentiment: a review is two clauses, each an aspect and an adjective that may be negated

ASPECTS = [
    words("soup, bread, menu, waiter, kitchen, dessert, coffee, service", "gravy"),
    words("plot, acting, music, ending, script, camera, hero, dialogue", "soundtrack"),
    words("room, bed, lobby, breakfast, pool, staff, view, bathroom", "balcony"),
]
ADJECTIVES = [  # in the order of SENTIMENTS
    words("bad, poor, awful, terrible, boring, horrible, annoying, weak, dull, ugly", "dreadful, mediocre"),
    words("good, great, excellent, lovely, charming, brilliant, pleasant, fantastic, amazing", "superb, splendid"),
]
INTENSIFIERS = ["", "", "very ", "really ", "truly ", "quite "]
NEGATIONS = ["not ", "hardly ", "never "]
CLAUSES = Choices(
    train=["the {aspect} was {judgement}", "the {aspect} seemed {judgement}", "I found the {aspect} {judgement}"],
    validation=["I found that the {aspect} was {judgement}", "the {aspect}, I found, was {judgement}"],
)
AGREEMENTS = Choices(
    train=["{first} and {second}", "{first}, also {second}", "{first}. In the end {second}"],
    validation=["{first} and in the end {second}", "also {first} and {second}"],
)
CONTRASTS = Choices(  # the second clause decides, wherever it stands
    train=["{first}, but {second}", "although {first}, {second}", "{second}, although {first}"],
    validation=["{first}, but in the end {second}", "in the end {second}, although {first}"],
)
OPENINGS = ["", "", "We came on a Monday. ", "My sister came along. ", "This was our second visit. "]

# paraphrase: a transfer is a meaning for each slot; only four a slot, so that a short run sees every pair of them often

PEOPLE = words("doctor/physician, lawyer/attorney, teacher/instructor, child/kid", "plumber, violinist")
THINGS = words("car/automobile, sofa/couch, picture/photo, present/gift", "guitar, statue")
TIMES = "at two o'clock, at six o'clock, at noon/at midday, at night/after dark"
TRANSFER = {
    "agent": PEOPLE,
    "receiver": PEOPLE,
    "verb": words("sold, sent/mailed, lent/loaned, handed/passed", "promised"),
    "thing": THINGS,
    "time": words(TIMES, "in April"),
}
TRANSFERS = Choices(
    train=[
        "the {agent} {verb} the {thing} to the {receiver} {time}",
        "{time} the {agent} {verb} the {thing} to the {receiver}",
        "the {thing} was {verb} to the {receiver} by the {agent} {time}",
        "{time} the {thing} was {verb} by the {agent} to the {receiver}",
        "it was {time} that the {agent} {verb} the {thing} to the {receiver}",
    ],
    validation=[
        "{time} the {thing} was {verb} to the {receiver} by the {agent}",
        "it was {time} that the {thing} was {verb} by the {agent} to the {receiver}",
    ],
)

# similarity: a scene is the place of a theme, and one of the two meanings that the theme has for each other slot

SCENE = {  # the words of three themes, and one of validation
    "agent": (["sailor/seaman, captain/skipper", "chef/cook, guest/visitor", "tutor/mentor, student/pupil"], "tailor"),
    "verb": (["spotted/saw, repaired/fixed", "ate/devoured, cut/sliced", "read/studied, wrote/composed"], "painted"),
    "thing": (["ship/vessel, boat/dinghy", "bread/loaf, cake/tart", "story/tale, poem/verse"], "trumpet"),
    "place": (["harbour", "kitchen", "school"], "museum"),
    "time": ([TIMES] * 3, "in April"),
}
THEMES = [{slot: words(themes[theme], new) for slot, (themes, new) in SCENE.items()} for theme in range(3)]
WORTH = {"agent": 1.0, "verb": 1.0, "thing": 1.5, "place": 1.0, "time": 0.5}  # points for the same meaning; sum 5
SCENES = Choices(
    train=[
        "the {agent} {verb} the {thing} near the {place} {time}",
        "{time} the {agent} {verb} the {thing} near the {place}",
    ],
    validation=["near the {place} the {agent} {verb} the {thing} {time}"],
)

# dialogue: one speaker asks for something by some day; the other accepts, moves the day, or refuses

NAMES = words(
    "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Iris, Jack, Kate, Leo, Maria, Noah, Olga, Paul, Rosa, Sam, "
    "Tina, Victor, Wendy, Adam, Bella, Carl, Diana, Eric",
    "Nadia, Oscar, Phoebe, Hugo",
)
ERRANDS = {  # the summary's verb: what a speaker may call it, why it is needed, the things
    "repair": ("repair/fix", "broke down again", words("bike, car, roof, heater, laptop, printer, fence", "kettle")),
    "order": ("order/buy", "is still missing", words("cake, pizza, wine, cheese, carpet, desk, lamp", "salad")),
    "book": ("book/reserve", "is almost full", words("hotel, flight, cabin, ferry, concert, tour, bus", "yacht")),
    "prepare": ("prepare/write", "is not ready", words("budget, report, speech, letter, menu, plan, offer", "essay")),
    "collect": ("collect/fetch", "has arrived", words("parcel, suitcase, medicine, key, coat, mirror, box", "trophy")),
}
DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, tonight, tomorrow, noon, next week".split(", ")
GREETINGS = [[], ["Hi {helper}, how are you?", "Very well, thank you."], ["Hello {asker}, what is new?"]]
REQUESTS = Choices(
    train=[
        "The {thing} {reason} and I am far too busy. Could you {verb} it by {day}?",
        "Can you please {verb} the {thing} by {day}? It {reason} and I need your help.",
    ],
    validation=["I need your help, the {thing} {reason}. Can you please {verb} the {thing}? By {day}, if you could."],
)
ANSWERS = {
    "accept": Choices(
        train=["Sure, {day} is fine with me.", "Yes, I can do it, {day} is no problem at all."],
        validation=["Yes, sure, that is no problem, {day} is fine."],
    ),
    "move": Choices(
        train=["{day} is too early for me, but {later} is fine.", "Sorry, not by {day}. I can do it by {later}."],
        validation=["Sorry, {day} is too early. It is no problem by {later}."],
    ),
    "refuse": Choices(
        train=["Sorry, I have no time for that, not by {day}.", "No, please ask somebody else this time."],
        validation=["Sorry, but no. I have no time for the {thing}, please ask somebody else."],
    ),
}
REACTIONS = {
    "accept": ["Great, thank you so much, {helper}!", "Thank you for your help, {helper}."],
    "move": ["Good, {later} will do, thank you.", "That is fine too, thank you."],
    "refuse": ["What a pity, but thank you.", "Then I will ask somebody else."],
}
GOODBYES = [[], ["See you soon, {asker}."]]
SUMMARIES = {
    "accept": "{asker} asks {helper} to {errand} the {thing} by {day}.",
    "move": "{asker} asks {helper} to {errand} the {thing} by {later}.",
    "refuse": "{helper} refuses to {errand} the {thing} for {asker}.",
}


def _new_word(rng: Random, split: str, places: Iterable[str]) -> str:
    """The one place of a row that gets a word training never has: in half of the validation rows, else none."""
    return rng.choice(list(places)) if split == "validation" and rng.random() < 0.5 else ""


def _draw(rng: Random, choices: Choices, new: bool = False, other_than: Iterable[str] = ()) -> str:
    """One of the choices; a `new` one is one that training never has."""
    options = choices.validation if new else choices.train
    return rng.choice([option for option in options if option not in other_than])


def _fill(rng: Random, slots: dict[str, Choices], new: str) -> dict[str, str]:
    """A different word for every slot; the slot `new` gets one that training never has."""
    filled: dict[str, str] = {}
    for slot, choices in slots.items():
        filled[slot] = _draw(rng, choices, slot == new, filled.values())
    return filled


def _say(rng: Random, template: str, slots: dict[str, str]) -> str:
    """The template as a text, with any of the synonyms in each slot."""
    text = template.format(**{slot: rng.choice(word.split("/")) for slot, word in slots.items()})
    return text[0].upper() + text[1:]


def _say_both(rng: Random, templates: Choices, split: str, first: dict[str, str], second: dict[str, str]) -> Row:
    """The two events, each in another word order; in validation one of the two orders is new."""
    pair = rng.sample(templates.train, 2)
    if split == "validation":
        pair[rng.randrange(2)] = _draw(rng, templates, new=True)
    return {"sentence1": _say(rng, pair[0], first) + ".", "sentence2": _say(rng, pair[1], second) + "."}


def _clause(rng: Random, split: str, aspect: str, polarity: int, new: bool) -> str:
    """A judgement of the polarity: an adjective of that polarity, or a negated one of the other."""
    if rng.random() < 0.25:
        judgement = rng.choice(NEGATIONS) + _draw(rng, ADJECTIVES[1 - polarity], new)
    else:
        judgement = rng.choice(INTENSIFIERS) + _draw(rng, ADJECTIVES[polarity], new)
    return _draw(rng, CLAUSES, split == "validation").format(aspect=aspect, judgement=judgement)


def sentiment(rng: Random, index: int, split: str) -> Row:
    """A review of two clauses that agree, or that stand in contrast, where the second decides."""
    polarity = index % 2
    contrast = rng.random() < 0.3
    new = _new_word(rng, split, ["aspect", "first"] if contrast else ["aspect", "first", "second"])
    aspects = rng.choice(ASPECTS)
    aspect = _fill(rng, {"first": aspects, "second": aspects}, "first" if new == "aspect" else "")
    clauses = {
        "first": _clause(rng, split, aspect["first"], polarity ^ contrast, new == "first"),
        "second": _clause(rng, split, aspect["second"], polarity, new == "second"),
    }
    frame = _draw(rng, CONTRASTS if contrast else AGREEMENTS, split == "validation")
    return {"text": rng.choice(OPENINGS) + _say(rng, frame, clauses) + ".", "label": SENTIMENTS[polarity]}


def paraphrase(rng: Random, index: int, split: str) -> Row:
    """Two sentences on one event, or on two that differ in who gave to whom, in the thing or in the time."""
    event = _fill(rng, TRANSFER, _new_word(rng, split, TRANSFER))
    other = dict(event)
    if PARAPHRASES[index % 2] == "different":
        for change in rng.sample(["roles", "thing", "time"], rng.choice([1, 2, 3])):
            if change == "roles":
                other["agent"], other["receiver"] = event["receiver"], event["agent"]
            else:
                other[change] = _draw(rng, TRANSFER[change], other_than=[event[change]])
    return _say_both(rng, TRANSFERS, split, event, other) | {"label": PARAPHRASES[index % 2]}


def similarity(rng: Random, index: int, split: str) -> Row:
    """Two scenes; the score is what the slots that mean the same are worth.

    Half of the pairs have different themes and share the time at most; the others share the place and any other slots.
    """
    theme, other_theme = rng.sample(THEMES, 2)
    if index % 2 == 0:
        same = rng.sample(["time"], rng.randint(0, 1))
    else:
        other_theme, same = theme, ["place", *rng.sample(["agent", "verb", "thing", "time"], rng.randint(0, 4))]
    scene = _fill(rng, theme, _new_word(rng, split, SCENE))
    other = {
        slot: scene[slot] if slot in same else _draw(rng, choices, other_than=[scene[slot]])
        for slot, choices in other_theme.items()
    }
    return _say_both(rng, SCENES, split, scene, other) | {"score": sum((WORTH[slot] for slot in same), 0.0)}


def dialogue(rng: Random, index: int, split: str) -> Row:
    """A request, its answer and the reaction; the summary says who asks whom for what, and what was agreed at last."""
    outcome = list(ANSWERS)[index % 3]
    errand = rng.choice(list(ERRANDS))
    verb, reason, things = ERRANDS[errand]
    new = _new_word(rng, split, ["asker", "helper", "thing"])
    slots = _fill(rng, {"asker": NAMES, "helper": NAMES, "thing": things}, new)
    slots["day"], slots["later"] = rng.sample(DAYS, 2)
    slots |= {"errand": errand, "verb": verb, "reason": reason}
    greeting = rng.choice(GREETINGS)
    turns = [
        *greeting,
        _draw(rng, REQUESTS, split == "validation"),
        _draw(rng, ANSWERS[outcome], split == "validation"),
        rng.choice(REACTIONS[outcome]),
        *rng.choice(GOODBYES),
    ]
    lines = []
    for place, turn in enumerate(turns):
        speaker = ("asker", "helper")[(place - len(greeting)) % 2]  # they take turns; the asker makes the request
        lines.append(f"{slots[speaker]}: {_say(rng, turn, slots)}")
    return {"document": "\n".join(lines), "summary": _say(rng, SUMMARIES[outcome], slots)}


GENERATED: dict[str, Callable[[Random, int, str], Row]] = {
    task.__name__: task for task in (sentiment, paraphrase, similarity, dialogue)
}
SIZES = {"train": 4000, "validation": 300}


def generate(task: str, split: str, size: int, seed: int) -> list[Row]:
    """The first `size` rows of one split, the same in every process. Labels take turns: every prefix is balanced.

    Args:
        task: a name in `GENERATED`.
        split: 'train' or 'validation'; `SIZES` has their default sizes.
        size: number of rows.
        seed: any integer; another seed gives other rows of the same language.

    Raises:
        ValueError: there is no such task or split.
    """
    if task not in GENERATED:
        raise ValueError(f"generated task must be one of {', '.join(GENERATED)}, got '{task}'")
    if split not in SIZES:
        raise ValueError(f"task '{task}': generated split must be one of {', '.join(SIZES)}, got '{split}'")
    rng = Random(f"{task} {split} {seed}")  # a text seeds by its SHA-512, not by hash()
    return [GENERATED[task](rng, index, split) for index in range(size)]
