"""Summaries by extraction: which sentences of a document come nearest to a summary that somebody wrote.

Source: the greedy choice of Nallapati et al., SummaRuNNer, arXiv:1611.04230, section 3, with F1 of shared words and
word pairs in place of ROUGE, which would take minutes for a data set.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from trunkline.training.metrics import units

LONGEST = 3  # sentences of a summary, as in lead-3


def sentences_of(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """The sentences of a document (its lines, if it has several), each with its last token.

    Args:
        offsets: characters that each token covers; what stands beyond them was cut off.
    """
    starts, place = [start for start, _ in offsets], 0
    found: list[tuple[str, int]] = []
    for sentence in units(text):
        end = text.index(sentence, place) + len(sentence)
        place = end
        token = bisect_left(starts, end) - 1
        if offsets[token][1] < end:  # its end was cut off, or is a character that the tokenizer leaves out
            break
        if not found or token > found[-1][1]:
            found.append((sentence, token))
    return found or [(text[: offsets[-1][1]], len(offsets) - 1)]


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
