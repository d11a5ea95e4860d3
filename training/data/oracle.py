"""Summaries by extraction: which sentences of a document come nearest to a summary that somebody wrote.

Source: the greedy choice of Nallapati et al., SummaRuNNer, arXiv:1611.04230, section 3, with F1 of shared words and
word pairs in place of ROUGE, which would take minutes for a data set.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

LONGEST = 3  # sentences of a summary, as in lead-3


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
