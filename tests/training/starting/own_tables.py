"""Tables as users have them, made up."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = "the red cat is in old barn with some more words than one can read at night".split()


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 12)))


def rows(count: int = 60, **columns: Callable[[int, random.Random], Any]) -> list[dict[str, Any]]:
    rng = random.Random(0)
    columns = {"text": lambda i, rng: f"{text(rng)} {i}", **columns}
    return [{name: cell(i, rng) for name, cell in columns.items()} for i in range(count)]


def table(name: str, records: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    path = Path(name)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding=encoding)
    else:
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, [*records[0]])
            writer.writeheader()
            writer.writerows(records)
    return path


def colour(i: int, rng: random.Random) -> str:
    return rng.choice(["red", "green", "blue"])
