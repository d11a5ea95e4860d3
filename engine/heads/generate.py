"""A text that follows the prompt."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row
from trunkline.engine.text.cells import references_of
from trunkline.engine.text.sentences import units

if TYPE_CHECKING:
    import numpy as np

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Layout
    from trunkline.engine.text.tokenizer import Tokenizer


class Generate(Head):
    """A text that follows the prompt: every token of the target is predicted from the one before it."""

    group = "vocabulary"
    metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    one_text = True
    learns_words = True
    follows = True
    writes = True

    def columns(self, task: "Task") -> int:
        return 0

    def room(self, task: "Task") -> int:
        return task.max_target_tokens + 2

    def unlabelled(self, task: "Task", label: Any) -> bool:
        return no_reference(label)

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """The label's cell is the text to be generated; of several references the first is learnt."""
        import numpy as np

        references = references_of(row.label)
        ((target, _),) = layout.tokenizer.encode([" " + references[0].strip()])
        kept = target[: task.max_target_tokens]
        prompt = layout.prompt(row.texts[0], task.max_target_tokens, row.encoded[0])
        tokens = np.concatenate([prompt.tokens, kept, [layout.tokenizer.end]])
        piece = Piece(tokens, [len(prompt.tokens)], None, one_or_several(references))
        return Made([piece], prompt.cut or len(kept) < len(target))

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: the length of the prompt, (1,)."""
        import numpy as np

        prompt = int(label[0])
        return Labels.of(np.arange(prompt - 1, len(tokens) - 1), targets=tokens[prompt:])

    def label_with_prompt(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool, weight: float) -> Labels:
        import numpy as np

        rows = np.arange(len(tokens) - 1)
        return Labels.of(rows, targets=tokens[1:], weights=np.where(rows < label[0] - 1, weight, 1))

    def reference(self, piece: Piece) -> str | list[str] | None:
        return piece.reference

    def prompt(self, piece: Piece) -> "np.ndarray":
        return piece.tokens[: int(piece.label[0])]

    def trivial(
        self, train: Sequence[str | Sequence[str]], inputs: Sequence[str], references: Sequence[Any]
    ) -> dict[str, list[str]]:
        return leads(train, inputs)

    def in_words(self, task: "Task", value: str | list[str], piece: Piece, tokenizer: "Tokenizer") -> str:
        return value if isinstance(value, str) else " / ".join(value)


def no_reference(label: Any) -> bool:
    """Whether a cell has not a single text."""
    missing = label is None or (isinstance(label, float) and label != label)
    return missing or not references_of(label)


def one_or_several(references: list[str]) -> str | list[str]:
    return references[0] if len(references) == 1 else references


def leads(train: Sequence[str | Sequence[str]], documents: Sequence[str]) -> dict[str, list[str]]:
    """Lead-1 and lead-3, first the one that is nearer to the training texts in mean length."""
    wanted = fmean(len(label if isinstance(label, str) else label[0]) for label in train)
    parts = [units(document) for document in documents]
    leads = {count: ["\n".join(part[:count]) for part in parts] for count in (1, 3)}
    unit = "line" if 2 * sum("\n" in document.strip() for document in documents) > len(documents) else "sentence"
    names = {1: f"first {unit} of the document", 3: f"first 3 {unit}s of the document"}
    nearest = sorted(leads, key=lambda count: abs(fmean(map(len, leads[count])) - wanted))
    return {names[count]: leads[count] for count in nearest}
