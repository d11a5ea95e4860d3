"""What the name of a column says about it: words that people who publish data sets use."""

import re

LABEL = frozenset(
    "label labels target targets class classes category categories intent sentiment polarity stance emotion rating "
    "ratings stars score scores points grade priority queue toxicity similarity".split()
)
LABEL_ALONE = LABEL | frozenset("y gold answer answers tags topic type".split())  # as the whole name
NO_LABEL = frozenset(
    "id ids confidence error count counts votes weight source url split fold date time num number author user "
    "name year helpfulness numerator denominator annotator annotators".split()
)
TEXT = frozenset(
    "text texts sentence sentences review reviews comment comments tweet question questions body subject title "
    "headline description document article dialogue dialog content message utterance premise hypothesis abstract "
    "excerpt narrative passage context query post posts essay transcript story summary prompt input inputs "
    "instruction statement news email claim evidence phrase feedback tokens words plot synopsis v2".split()
)
NO_TEXT = frozenset(
    "id ids author authors user username name location city country state address url link profile handle timezone "
    "source company license coord created date time file path email phone region province winery publisher".split()
)
WRITTEN = frozenset(
    "summary summaries highlights abstract target response answer output completion translation tldr reply".split()
)
TAGS = frozenset("tags tag ner pos chunk bio".split())
PAIRS = (("premise", "hypothesis"), ("question", "context"), ("question", "sentence"), ("query", "passage"))


def words_of(name: str) -> list[str]:
    """'ner_tags', 'NerTags' and 'NER tags' as ['ner', 'tags']."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*|\d+|[^\W\d_]+", name)]


def hints_at_label(name: str) -> int:
    """How strongly a name says that this is what is to be predicted: from 0, not at all, to 3."""
    words = words_of(name)
    if len(words) == 1 and words[0] in LABEL_ALONE:
        return 3
    if NO_LABEL & {*words}:
        return 0
    return 2 if LABEL & {*words} or words[:1] in (["is"], ["has"]) else 0


def hints_at_text(name: str) -> bool:
    return not is_no_text(name) and any(word.rstrip("0123456789") in TEXT or word in TEXT for word in words_of(name))


def is_no_text(name: str) -> bool:
    return bool(NO_TEXT & {*words_of(name)})


def in_order(columns: list[str]) -> list[str]:
    """Texts in the order in which a pair is read: the premise before the hypothesis."""
    own = {word: name for name in columns for word in words_of(name)}
    for first, second in PAIRS:
        if len(columns) == 2 and first in own and second in own and own[first] != own[second]:
            return [own[first], own[second]]
    return columns
