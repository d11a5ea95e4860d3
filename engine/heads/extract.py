"""The sentences of a document that make a summary.

Source: the greedy choice of Nallapati et al., SummaRuNNer, arXiv:1611.04230, section 3, with F1 of shared words and
word pairs in place of ROUGE, which would take minutes for a data set.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trunkline.engine.heads.generate import leads, no_reference, one_or_several
from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row
from trunkline.engine.text.cells import references_of
from trunkline.engine.text.sentences import sentences_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Laid, Layout
    from trunkline.engine.text.tokenizer import Tokenizer

LONGEST = 3  # sentences of a summary, as in lead-3


class Extract(Head):
    """The sentences of a document that make a summary, each from its last token."""

    metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    one_text = True
    reads_last = True
    learns_words = True

    def columns(self, task: "Task") -> int:
        return 2

    def unlabelled(self, task: "Task", label: Any) -> bool:
        return no_reference(label)

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """The label's cell is a summary; what is learnt is which sentences come nearest to it."""
        references = references_of(row.label)
        laid = layout.lay(row.texts, row.encoded)
        sentences = sentences_of(laid.text, laid.offsets, laid.kept)
        of_token = [-1] * len(laid.tokens)
        for _, token in sentences:
            of_token[laid.first + token] = 0
        for place in oracle([sentence for sentence, _ in sentences], references[0]):
            of_token[laid.first + sentences[place][1]] = 1
        return Made([Piece(laid.tokens, of_token, laid.types, one_or_several(references))], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: (L,), at the last token of every sentence whether it is chosen, -1 elsewhere."""
        return Labels.marked(label)

    def rows(self, laid: "Laid") -> Sequence[int]:
        return [laid.first + token for _, token in sentences_of(laid.text, laid.offsets, laid.kept)]

    def predict(self, logits: "Tensor") -> list[int]:
        """(sentences, 2) -> places of the likeliest sentences, as many as their probabilities add up to, at least one.

        The sum is how many sentences the model expects; of equals the first ones are taken.
        """
        p = logits.softmax(-1)[:, 1]
        count = max(1, round(float(p.sum())))
        return sorted(p.argsort(descending=True, stable=True)[:count].tolist())

    def describe(self, task: "Task", value: Sequence[int], laid: "Laid") -> str:
        sentences = sentences_of(laid.text, laid.offsets, laid.kept)
        return "\n".join(sentences[place][0] for place in value)

    def scores(self, task: "Task", value: Sequence[int], logits: "Tensor", laid: "Laid") -> dict[str, Any]:
        """'score': of every chosen sentence the probability that it belongs to a summary."""
        p = logits.softmax(-1)[:, 1].tolist()
        return {"score": [p[place] for place in value]}

    def choices(self, logits: "Tensor", piece: Piece) -> "tuple[Tensor, Tensor]":
        return logits, logits.new_tensor([int(chosen) for chosen in piece.label if chosen >= 0]).long()

    def reference(self, piece: Piece) -> str | list[str] | None:
        return piece.reference

    def answer(self, value: Sequence[int], piece: Piece, tokenizer: "Tokenizer") -> str:
        """The chosen sentences, a line each."""
        ends = [token + 1 for token, chosen in enumerate(piece.label) if chosen >= 0]
        starts = [0, *ends]
        return "\n".join(tokenizer.decode(piece.tokens[starts[place] : ends[place]]) for place in value)

    def trivial(
        self, train: Sequence[str | Sequence[str]], inputs: Sequence[str], references: Sequence[Any]
    ) -> dict[str, list[str]]:
        return leads(train, inputs)

    def in_words(self, task: "Task", value: str | list[str], piece: Piece, tokenizer: "Tokenizer") -> str:
        return value if isinstance(value, str) else " / ".join(value)


def oracle(sentences: Sequence[str], reference: str) -> list[int]:
    """Places of the sentences that match the reference best: one after the other, as long as each one helps.

    The first sentence where none shares a word with it.
    """
    wanted, grams = _grams(reference), [_grams(sentence) for sentence in sentences]
    chosen: list[int] = []
    best, together = 0.0, Counter[str | tuple[str, str]]()
    while len(chosen) < LONGEST:
        rest = [place for place in range(len(sentences)) if place not in chosen]
        scores = [_f1(together + grams[place], wanted) for place in rest]
        if max(scores, default=0.0) <= best:
            break
        best = max(scores)
        chosen.append(rest[scores.index(best)])
        together += grams[chosen[-1]]
    return sorted(chosen) or [0]


def _grams(text: str) -> Counter[str | tuple[str, str]]:
    words = text.lower().split()
    return Counter([*words, *pairwise(words)])


def _f1(made: Counter, wanted: Counter) -> float:
    return 2 * (made & wanted).total() / (made.total() + wanted.total())
