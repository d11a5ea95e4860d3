"""The embedded tasks, by name: GLUE, other public data sets, language modelling, and the four generated ones.

Class names and their order are those of the data sets on the hub.
"""

from difflib import get_close_matches

from trunkline.engine.tasks.task import Task

_ENTAILMENT = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SENTIMENTS = ("negative", "positive")
PARAPHRASES = ("different", "paraphrase")
# Their rows are made by a seeded generator (trunkline.training.data.generated), so that a first run needs no download.
GENERATED = (
    Task("sentiment", "classify", ("text",), "label", labels=SENTIMENTS, metrics=("accuracy",), generated=True),
    Task("paraphrase", "classify", _PAIR, "label", labels=PARAPHRASES, metrics=("accuracy", "f1"), generated=True),
    Task("similarity", "regress", _PAIR, "score", metrics=("pearson", "spearman"), generated=True),
    Task("dialogue", "generate", ("document",), "summary", metrics=_ROUGE, generated=True),
)


def _glue(
    name: str,
    text: tuple[str, ...],
    metrics: tuple[str, ...],
    labels: tuple[str, ...] = (),
    head: str = "classify",
    validation: str = "validation",
) -> Task:
    return Task(name, head, text, "label", labels, metrics, validation=validation, hub="nyu-mll/glue", subset=name)


def _summary(name: str, document: str, summary: str, hub: str, subset: str = "") -> Task:
    return Task(name, "generate", (document,), summary, hub=hub, subset=subset)


BUILTIN: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), ("matthews", "accuracy"), ("unacceptable", "acceptable")),
        _glue("sst2", ("sentence",), ("accuracy",), ("negative", "positive")),
        _glue("mrpc", _PAIR, ("accuracy", "f1"), ("not_equivalent", "equivalent")),
        _glue("stsb", _PAIR, ("pearson", "spearman"), head="regress"),  # scores from 0 to 5
        _glue("qqp", ("question1", "question2"), ("f1", "accuracy"), ("not_duplicate", "duplicate")),
        _glue("mnli", ("premise", "hypothesis"), ("accuracy",), _ENTAILMENT, validation="validation_matched"),
        _glue("qnli", ("question", "sentence"), ("accuracy",), ("entailment", "not_entailment")),
        _glue("rte", _PAIR, ("accuracy",), ("entailment", "not_entailment")),
        _glue("wnli", _PAIR, ("accuracy",), ("not_entailment", "entailment")),
        Task(
            "snli",
            "classify",
            text=("premise", "hypothesis"),
            label="label",
            labels=_ENTAILMENT,
            metrics=("accuracy",),
            hub="stanfordnlp/snli",
            unlabelled="drop",  # -1: the annotators did not agree
        ),
        _summary("dialogsum", "document|dialogue", "summary", "knkarthick/dialogsum"),
        _summary("scitldr", "document|source", "summary|target", "allenai/scitldr", "Abstract"),
        _summary("cnn_dailymail", "article", "highlights", "abisee/cnn_dailymail", "3.0.0"),
        _summary("xsum", "document", "summary", "EdinburghNLP/xsum"),
        _summary("samsum", "dialogue", "summary", "knkarthick/samsum"),
        Task("text", "language-model", text=("text",), hub="Salesforce/wikitext", subset="wikitext-2-raw-v1"),
        *GENERATED,
    )
}


def get_task(name: str) -> Task:
    """The embedded task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BUILTIN:
        (nearest,) = get_close_matches(name, BUILTIN, n=1, cutoff=0.0)
        raise ValueError(f"unknown task '{name}'; did you mean '{nearest}'? Known: {', '.join(BUILTIN)}")
    return BUILTIN[name]
