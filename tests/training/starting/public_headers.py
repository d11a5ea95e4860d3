"""Tables with the headers of public data sets, their cells made up; and what is right for each.

A header stands here as the data set has it, with what a column holds: `words 3-12` of text, `of a b c` one of some,
`number`, and so on.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WORDS = (
    "the a of to and in we they it was is film order market team phone river city price game plan quite never very "
    "slowly good bad late early new old small large red green open close first last house school night"
).split()


@dataclass(frozen=True)
class Public:
    """A table as a public data set has it."""

    file: str
    columns: dict[str, str]
    head: str | None
    """None: init should say that it cannot be learnt, and why."""
    label: tuple[str, ...]
    text: tuple[str, ...]


def _one(kind: str, rng: random.Random, row: int) -> Any:
    name, *rest = kind.split(" ")
    match name:
        case "words":
            low, high = map(int, rest[0].split("-"))
            return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))) + rng.choice(
                ["", ".", ", yes", '!"']
            )
        case "of":
            return rng.choice(rest).replace("_", " ")
        case "int":
            low, high = map(int, rest[0].split("-"))
            return rng.randint(low, high)
        case "float":
            return round(rng.uniform(0, 5), 3)
        case "id":
            return 1000 + row
        case "code":
            return f"{rng.getrandbits(48):x}"
        case "date":
            return f"20{rng.randint(10, 24)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02} 10:15:00"
        case "url":
            return f"https://example.org/{rng.getrandbits(40):x}"
        case "user":
            return rng.choice(["ann", "bob", "kit", "zoe", "max"]) + str(rng.randint(0, 10**5))
        case "person":
            return f"{rng.choice(['Ann', 'Bob', 'Zoë'])} {rng.choice(['Lee', 'Diaz', 'Öz', 'Kim'])}{rng.randint(0, 99)}"
        case "rare":
            return _one(" ".join(rest), rng, row) if rng.random() < 0.02 else ""
        case "often":
            return _one(" ".join(rest), rng, row) if rng.random() < 0.7 else ""
        case "several":
            return "|".join(rng.sample(rest, rng.randint(1, 3)))
        case "list":
            return rng.sample([*map(int, rest)], rng.randint(1, 2))
        case "float_stars":
            return float(rng.randint(1, 5))
        case "empty":
            return ""
    raise AssertionError(kind)


def rows_of(table: Public, count: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """Rows; cells that depend on another of their row say so: `tags of COLUMN`, `part of COLUMN`."""
    rng, rows = random.Random(f"{table.file} {seed}"), []
    for row in range(count):
        made: dict[str, Any] = {}
        for column, kind in table.columns.items():
            made[column] = RELATED[kind](rng, made) if kind in RELATED else _one(kind, rng, row)
        rows.append(made)
    return rows


def _answer(rng: random.Random, made: dict[str, Any]) -> str:
    words = made["context"].split()
    first = rng.randrange(len(words) - 3)
    return " ".join(words[first : first + rng.randint(1, 3)])


RELATED: dict[str, Callable[[random.Random, dict[str, Any]], Any]] = {
    "tokens": lambda rng, made: [rng.choice(WORDS) for _ in range(rng.randint(4, 12))],
    "tags": lambda rng, made: [rng.randint(0, 8) for _ in made["tokens"]],
    "answer": _answer,
    "answers": lambda rng, made: {
        "text": [answer := _answer(rng, made)],
        "answer_start": [made["context"].index(answer)],
    },
}

BINARY = "of 0 1"
PUBLIC = [
    Public(
        "IMDB Dataset.csv",
        {"review": "words 40-120", "sentiment": "of positive negative"},
        "classify",
        ("sentiment",),
        ("review",),
    ),
    Public(
        "spam.csv",
        {"v1": "of ham spam", "v2": "words 5-25", "": "empty", " ": "empty", "  ": "empty"},
        "classify",
        ("v1",),
        ("v2",),
    ),
    Public(
        "ag_news.csv",
        {"Class Index": "int 1-4", "Title": "words 5-9", "Description": "words 20-40"},
        "classify",
        ("Class Index",),
        ("Title", "Description"),
    ),
    Public(
        "Reviews.csv",
        {
            "Id": "id",
            "ProductId": "code",
            "UserId": "code",
            "ProfileName": "person",
            "HelpfulnessNumerator": "int 0-9",
            "HelpfulnessDenominator": "int 0-9",
            "Score": "int 1-5",
            "Time": "int 1300000000-1350000000",
            "Summary": "words 2-6",
            "Text": "words 30-80",
        },
        "classify",
        ("Score",),
        ("Summary", "Text"),
    ),
    Public(
        "Tweets.csv",
        {
            "tweet_id": "id",
            "airline_sentiment": "of neutral positive negative",
            "airline_sentiment_confidence": "float",
            "negativereason": "often of Late_Flight Lost_Luggage Bad_Service",
            "negativereason_confidence": "float",
            "airline": "of United Delta Southwest",
            "airline_sentiment_gold": "rare of neutral positive",
            "name": "user",
            "negativereason_gold": "rare of Late_Flight",
            "retweet_count": "int 0-3",
            "text": "words 8-20",
            "tweet_coord": "empty",
            "tweet_created": "date",
            "tweet_location": "often words 1-3",
            "user_timezone": "of Eastern_Time Pacific_Time",
        },
        "classify",
        ("airline_sentiment",),
        ("text",),
    ),
    Public(
        "quora.csv",
        {
            "id": "id",
            "qid1": "code",
            "qid2": "code",
            "question1": "words 5-15",
            "question2": "words 5-15",
            "is_duplicate": BINARY,
        },
        "classify",
        ("is_duplicate",),
        ("question1", "question2"),
    ),
    Public(
        "snli.jsonl",
        {"hypothesis": "words 5-9", "premise": "words 9-20", "label": "int 0-2"},
        "classify",
        ("label",),
        ("premise", "hypothesis"),
    ),
    Public(
        "sts-train.tsv",
        {
            "genre": "of news forum captions",
            "filename": "of MSRvid images headlines",
            "year": "of 2012 2013 2014",
            "index": "id",
            "score": "float",
            "sentence1": "words 5-15",
            "sentence2": "words 5-15",
        },
        "regress",
        ("score",),
        ("sentence1", "sentence2"),
    ),
    Public(
        "toxic.csv",
        {
            "id": "code",
            "comment_text": "words 10-60",
            **dict.fromkeys("toxic severe_toxic obscene threat insult identity_hate".split(), BINARY),
        },
        "classify",
        ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"),
        ("comment_text",),
    ),
    Public(
        "cnn_dailymail.csv",
        {"id": "code", "article": "words 80-200", "highlights": "words 20-40"},
        "generate",
        ("highlights",),
        ("article",),
    ),
    Public(
        "dialogsum.csv",
        {"id": "id", "dialogue": "words 40-90", "summary": "words 10-25", "topic": "words 1-3"},
        "generate",
        ("summary",),
        ("dialogue",),
    ),
    Public(
        "yelp_review.jsonl",
        {
            "review_id": "code",
            "user_id": "code",
            "business_id": "code",
            "stars": "float_stars",
            "useful": "int 0-9",
            "funny": "int 0-9",
            "cool": "int 0-9",
            "text": "words 20-60",
            "date": "date",
        },
        "classify",
        ("stars",),
        ("text",),
    ),
    Public(
        "disaster-tweets.csv",
        {
            "id": "id",
            "keyword": "often of fire flood storm quake",
            "location": "often words 1-3",
            "text": "words 8-20",
            "target": BINARY,
        },
        "classify",
        ("target",),
        ("text",),
    ),
    Public(
        "conll2003.jsonl",
        {"id": "id", "tokens": "tokens", "pos_tags": "tags", "chunk_tags": "tags", "ner_tags": "tags"},
        "tag",
        ("pos_tags", "chunk_tags", "ner_tags"),
        ("tokens",),
    ),
    Public(
        "squad.jsonl",
        {"id": "code", "title": "words 1-2", "context": "words 40-90", "question": "words 6-12", "answers": "answers"},
        "span",
        ("answers",),
        ("question", "context"),
    ),
    Public("wikitext.jsonl", {"text": "words 40-90"}, "language-model", (), ("text",)),
    Public(
        "commonlit.csv",
        {
            "id": "code",
            "url_legal": "often url",
            "license": "often of CC_BY_4.0",
            "excerpt": "words 60-120",
            "target": "float",
            "standard_error": "float",
        },
        "regress",
        ("target",),
        ("excerpt",),
    ),
    Public(
        "winemag-data.csv",
        {
            "": "id",
            "country": "of Italy France US Spain",
            "description": "words 20-40",
            "designation": "words 1-2",
            "points": "int 80-100",
            "price": "int 5-300",
            "province": "of Etna Oregon Rioja",
            "region_1": "of Etna Willamette Navarra",
            "taster_name": "person",
            "title": "words 4-7",
            "variety": "of Merlot Pinot_Noir Riesling",
            "winery": "words 1-2",
        },
        "regress",
        ("points",),
        ("description", "title"),
    ),
    Public(
        "News_Category_Dataset.jsonl",
        {
            "link": "url",
            "headline": "words 6-12",
            "category": "of POLITICS SPORTS WELLNESS TRAVEL",
            "short_description": "words 12-25",
            "authors": "person",
            "date": "date",
        },
        "classify",
        ("category",),
        ("headline", "short_description"),
    ),
    Public(
        "complaints.csv",
        {
            "Date received": "date",
            "Product": "of Mortgage Credit_card Debt_collection",
            "Issue": "of Billing Fraud Fees",
            "Consumer complaint narrative": "words 40-90",
            "Company": "of ACME Globex",
            "State": "of CA NY TX",
            "Consumer disputed?": "of Yes No",
        },
        "classify",
        ("Product",),
        ("Consumer complaint narrative",),
    ),
]

# A label column with any number of labels in a row
SEVERAL = [
    Public(
        "goemotions.jsonl",
        {"text": "words 5-20", "labels": "list 0 4 7 9 27", "id": "code"},
        "multi-label",
        ("labels",),
        ("text",),
    ),
    Public(
        "movies.csv",
        {"plot": "words 30-60", "title": "words 2-4", "genres": "several Drama War Comedy Action"},
        "multi-label",
        ("genres",),
        ("title", "plot"),
    ),
]
