"""Next tokens and hidden ones, which are learnt from the text alone."""

from typing import TYPE_CHECKING
from zlib import crc32

from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row

if TYPE_CHECKING:
    import numpy as np

    from trunkline.engine.tasks.task import Task
    from trunkline.engine.text.layout import Layout

MASKED = 0.15  # of a text's tokens: Devlin et al., BERT, arXiv:1810.04805, section 3.1, without its random replacements


class LanguageModel(Head):
    """Every next token."""

    group = "vocabulary"
    metrics = ("perplexity",)
    labelled = False
    one_text = True
    offsets = False
    follows = True

    def columns(self, task: "Task") -> int:
        return 0

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """A text of any length, in as many pieces as it takes; nothing is cut off, and no piece has two texts."""
        import numpy as np

        begin, end = layout.tokenizer.prefix.ids or [layout.tokenizer.end], [layout.tokenizer.end]
        whole = np.concatenate([begin, row.encoded[0][0], end]).astype(np.int32)
        step = layout.max_length - 1  # the last token of a piece is the first of the next: each is predicted once
        return Made([Piece(whole[i : i + step + 1], [], None) for i in range(0, len(whole) - 1, step)], False)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: unused."""
        import numpy as np

        return Labels.of(np.arange(len(tokens) - 1), targets=tokens[1:])

    def reference(self, piece: Piece) -> int:
        """The number of predicted tokens."""
        return len(piece.tokens) - 1


class MaskedLanguageModel(Head):
    """The tokens that were masked, from what stands around them."""

    group = "vocabulary"
    metrics = ("perplexity",)
    labelled = False
    hides = True

    def columns(self, task: "Task") -> int:
        return 0

    def encode(self, layout: "Layout", task: "Task", row: Row) -> Made:
        """A part of the tokens is hidden, the same ones whenever the text is met."""
        import numpy as np

        laid = layout.lay(row.texts, row.encoded)
        tokens, random = laid.tokens.copy(), np.random.default_rng(crc32(laid.tokens.tobytes()))
        text = np.isin(tokens, [*layout.tokenizer.special], invert=True).nonzero()[0]
        hidden = random.choice(text, max(1, round(MASKED * len(text))), replace=False)
        of_token = np.full(len(tokens), -1.0)
        of_token[hidden] = tokens[hidden]
        tokens[hidden] = layout.tokenizer.mask()
        return Made([Piece(tokens, of_token, laid.types)], laid.cut)

    def label(self, tokens: "np.ndarray", label: "np.ndarray", causal: bool) -> Labels:
        """`label`: (L,), the token that was masked, -1 elsewhere."""
        return Labels.marked(label)

    def reference(self, piece: Piece) -> int:
        """The number of hidden tokens."""
        return sum(token >= 0 for token in piece.label)
