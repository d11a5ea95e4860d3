"""The heads there are, by the name that tasks use."""

from difflib import get_close_matches

from trunkline.engine.heads.classify import Classify
from trunkline.engine.heads.extract import Extract
from trunkline.engine.heads.generate import Generate
from trunkline.engine.heads.head import Head
from trunkline.engine.heads.language_model import LanguageModel, MaskedLanguageModel
from trunkline.engine.heads.multi_label import MultiLabel
from trunkline.engine.heads.regress import Regress
from trunkline.engine.heads.span import Span
from trunkline.engine.heads.tag import Tag

HEADS: dict[str, Head] = {
    "classify": Classify(),
    "multi-label": MultiLabel(),
    "regress": Regress(),
    "tag": Tag(),
    "span": Span(),
    "generate": Generate(),
    "extract": Extract(),
    "language-model": LanguageModel(),
    "masked-language-model": MaskedLanguageModel(),
}


def head_of(name: str) -> Head:
    """The head of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in HEADS:
        (nearest,) = get_close_matches(str(name), HEADS, n=1, cutoff=0.0)
        raise ValueError(f"there is no head '{name}'; did you mean '{nearest}'? Known: {', '.join(HEADS)}")
    return HEADS[name]
