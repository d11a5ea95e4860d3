"""What a task is: where its rows are, how a row becomes text, what its label means, how it is scored.

Adding a task is one `Task(...)`, in Python or as ten lines of YAML.
"""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from trunkline.engine.checks import at_least, check
from trunkline.engine.heads.registry import head_of
from trunkline.engine.tasks.stored_table import stored_table
from trunkline.engine.text.class_names import ClassNames

References = Literal["best", "average"]


@dataclass(frozen=True)
class Task:
    """One task of a multi-task run.

    Its rows come from one of three places: `train`/`validation` files of the user, a dataset on the Hugging Face hub
    (or a folder laid out like it, `data=DIR`), or, for `generated` tasks, a seeded generator.

    Args:
        name: Unique in a run; lower case letters, digits, '-' and '_'.
        head: What is predicted. classify: a class; multi-label: any number of classes; regress: a number; tag: a class
            per word; span: a stretch of the text; generate: a text; extract: the sentences of the text that come
            nearest to one; language-model: the next token; masked-language-model: the tokens that were masked.
        text: Columns with the input text, joined by the separator token. 'a|b' takes the first of both that the file
            has.
        label: Column with the label: a class id or name; a list of classes, or a text with '|' between them
            (multi-label); a number; the target text; one tag per word; the answer's text. A multi-label task without it
            has a column of 0 and 1 under the name of every class.
        labels: Class names in the order of their ids (classify, multi-label, tag).
        metrics: Names from `trunkline.training.scoring.metrics.METRICS`; systems are compared by the first. Empty:
            those of the head.
        train: Split name on the hub, or a file: .csv, .tsv, .jsonl, .json, their .gz, or .parquet ('*' for several), or
            a folder that `save_to_disk` of Hugging Face datasets wrote. From Python also a table: a pandas or polars
            frame, a `datasets.Dataset`, a pyarrow table, a dict of columns or a list of rows.
        validation: As `train`; or the fraction of the training rows that is held out, such as 0.1, with every text on
            one side.
        encoding: Of text files, such as windows-1252.
        hub: Dataset id on the Hugging Face hub, such as 'nyu-mll/glue'.
        subset: Configuration of the hub dataset, such as 'sst2'.
        generated: Rows are made by trunkline.training.data.generated instead of read.
        threshold: Multi-label only: the probability above which a class is predicted; 'fit': of every class the one
            with the best F1 on the validation examples that calibration takes.
        start: Span only: column with the place of the answer in the last text column, in characters; empty: its first.
        empty: What happens to a row without any text: dropped and counted, or an error.
        too_long: What happens to a row longer than the sequence limit; dropped and truncated rows are counted.
        unlabelled: What happens to a row without a label (empty, null, -1 or -100).
        max_target_tokens: Generate only: longest target text, in tokens; longer ones are cut and counted as truncated.
        references: Generate only: of several references for a document, whether the best ROUGE counts or the average
            over all.

    Raises:
        ValueError: the fields contradict one another (a class task without class names, say).
    """

    name: str
    head: str
    text: tuple[str, ...]
    label: str = ""
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    train: str | Any = "train"
    validation: str | float | Any = "validation"
    encoding: str = "utf-8"
    hub: str = ""
    subset: str = ""
    generated: bool = False
    threshold: float | Literal["fit"] = 0.5
    start: str = ""
    empty: Literal["drop", "error"] = "drop"
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    unlabelled: Literal["drop", "error"] = "error"
    max_target_tokens: int = 100
    references: References = "best"

    @cached_property
    def class_names(self) -> ClassNames:
        """The labels, for cells to be looked up in."""
        return ClassNames(self.labels)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that a label is read from."""
        if not self.label and head_of(self.head).several:
            return self.labels
        return (self.label,) if self.label else ()

    def __post_init__(self):
        for split, plain in (("train", str | os.PathLike), ("validation", str | os.PathLike | int | float)):
            given = getattr(self, split)
            if not isinstance(given, plain):
                object.__setattr__(self, split, stored_table(given, f"task '{self.name}': {split}"))
        check(self, f"task {self.name!r}: ", max_target_tokens=at_least(1, 1_000_000))

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"task '{self.name}': {message}")

        characters = set(self.name) - set("abcdefghijklmnopqrstuvwxyz0123456789-_")
        require(bool(self.name) and not characters, "name must be made of a-z, 0-9, '-' and '_'")
        for field in ("text", "labels", "metrics"):
            given = getattr(self, field)
            require(not isinstance(given, str), f"{field} must be a list, got one string: write [{given!r}]")
        require(len(self.text) > 0, "text names no column")
        try:
            head_of(self.head).check(self)
        except ValueError as error:
            raise ValueError(f"task '{self.name}': {error}") from error
        possible = self.threshold == "fit" or (isinstance(self.threshold, float) and 0 < self.threshold < 1)
        require(possible, f"threshold must be 'fit' or a probability between 0 and 1, got {self.threshold!r}")
        own = head_of(self.head).several or self.threshold == 0.5
        require(own, f"threshold belongs to multi-label, not to '{self.head}'")
        require(len(set(self.labels)) == len(self.labels), f"labels name a class twice: {list(self.labels)}")
        if isinstance(self.validation, str) and re.fullmatch(r"\d*\.\d+", self.validation):
            object.__setattr__(self, "validation", float(self.validation))
        if not isinstance(self.validation, str):
            possible = isinstance(self.validation, float) and 0 < self.validation < 1
            require(possible, f"validation must be a file, a split, or a fraction below 1, got {self.validation!r}")
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError):
            require(False, f"encoding '{self.encoding}' is unknown; windows-1252, utf-16 or latin-1 are some there are")
