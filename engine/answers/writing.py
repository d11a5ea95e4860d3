"""Texts that are written greedily, token by token, while others join and leave: what a server writes with.

`generate` continues all of its prompts together, and is done when the last of them is. Here every text has its own
length, and a prompt that comes while others are being written joins at the next token.

S texts, D width, V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trunkline.engine.network.generate import Cache, Search, check_room, closed_up, forbid, prefill

if TYPE_CHECKING:
    from trunkline.engine.network.model import MultiTaskModel


@dataclass(eq=False)
class Text:
    """A text that is being written."""

    prompt: np.ndarray
    """At least one token."""
    task: int
    most: int
    """Its longest length, in tokens."""
    tokens: list[int] = field(default_factory=list)
    """What is written so far, without the end token."""

    @property
    def slots(self) -> int:
        """Tokens of prompt and longest text."""
        return len(self.prompt) + self.most


class Writing:
    """The texts in work; where there are adapters, of tasks that have the same.

    Args:
        ends: tokens that end a text.
        search: of which beams are not used.
    """

    def __init__(self, model: "MultiTaskModel", ends: Sequence[int], search: Search):
        self.model, self.ends, self.search = model, list(ends), search
        self.texts: list[Text] = []
        self.x: Tensor  # (S, D) what the next tokens come from
        self.cache: Cache

    def join(self, texts: Sequence[Text]) -> None:
        """Begins to write these texts as well, whose prompts go through the trunk now.

        Raises:
            ValueError: prompt and longest text do not fit the trunk's positions.
        """
        for text in texts:
            check_room(self.model.trunk, len(text.prompt), text.most)
        with torch.inference_mode():
            prompts, slots = [text.prompt for text in texts], max(text.slots for text in texts)
            x, cache = prefill(self.model.trunk, prompts, slots, self.model.adapts(texts[0].task))
            if self.texts:
                self.cache.join(cache)
                self.x = torch.cat([self.x, x])
            else:
                self.x, self.cache = x, cache
        self.texts += texts

    def step(self) -> list[Text]:
        """Writes one token of every text; returns those that have ended, which leave."""
        with torch.inference_mode():
            tokens = self._choose()
            going, ended_texts = [], []
            for place, (text, token) in enumerate(zip(self.texts, tokens.tolist(), strict=True)):
                ended = token in self.ends
                if not ended:
                    text.tokens.append(token)
                if ended or len(text.tokens) >= text.most:
                    ended_texts.append(text)
                else:
                    going.append(place)
            places = closed_up(np.array(going, np.int64))
            self.texts = [self.texts[place] for place in places]
            if self.texts:
                self.cache.keep(places)
                last = tokens[torch.from_numpy(places).to(tokens.device)]
                at, adapts = self.cache.advance(), self.model.adapts(self.texts[0].task)
                own = adapts and adapts(len(at), len(at))
                self.x = self.model.trunk(last, at, self.cache.attend, repeated=self.cache.repeated(last), adapt=own)
        return ended_texts

    def _choose(self) -> Tensor:
        """(S,) the most likely token of every text."""
        chosen = torch.empty(len(self.texts), dtype=torch.int64, device=self.x.device)
        for task in {text.task for text in self.texts}:
            own = [place for place, text in enumerate(self.texts) if text.task == task]
            scores = self.model.logits(self.x[own], task).float()  # (texts of the task, V)
            if self.search.min_new_tokens or self.search.no_repeat_ngram:
                for place, row in zip(own, scores.split(1), strict=True):
                    so_far = torch.tensor([self.texts[place].tokens], dtype=torch.int64, device=row.device)
                    forbid(row, so_far, self.search, self.ends)
            chosen[own] = scores.argmax(-1)
        return chosen
