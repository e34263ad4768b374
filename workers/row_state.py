"""What an answer's own tokens do to its next logits: counts for penalties, a grammar's state, the bias.

Built from the parameters, the prompt and the tokens generated so far, and from nothing else: who takes a sequence over
builds the same state by replaying them. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.grammars import Grammar, Progress
from workers.protocol import SamplingParams


class SeenTokens:
    """The distinct tokens that penalties are about, and how often each was generated. Appending is O(1)."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._ids, self._counts = distinct, np.zeros(len(distinct), dtype=np.float32)
        self._size = len(distinct)
        self._place = {token: place for place, token in enumerate(distinct.tolist())}

    @property
    def ids(self) -> NDArray[np.int64]:
        """[n] distinct tokens. Valid until the next `append`."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """[n] how often each is in the answer; zero: it is in the prompt only. Valid until the next `append`."""
        return self._counts[: self._size]

    def append(self, token_id: int) -> None:
        """It was generated."""
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = self._size
            if place == len(self._ids):
                room = max(64, place)
                self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
            self._ids[place] = token_id
            self._size += 1
        self._counts[place] += 1


class RowState:
    """One answer's state.

    Attributes:
        params: as given. seen: None without penalties. grammar: None without a constraint.
        bias_ids, bias: [n] tokens and what is added to their logits.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        generated_ids: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """Replay an answer.

        Args:
            prompt_ids: what the caller sent. generated_ids: what was generated for it so far, here or elsewhere.
            grammar: of its constraint, compiled; None: it has none.
        """
        self.params = params
        self.bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self.bias = np.array([value for _, value in params.logit_bias], dtype=np.float32)
        self.seen: SeenTokens | None = None
        if params.penalizes:  # the prompt's tokens matter to one penalty only
            self.seen = SeenTokens(prompt_ids if params.repetition_penalty != 1 else ())
            for token in generated_ids:
                self.seen.append(token)
        self.grammar: Progress | None = None if grammar is None else grammar.begin(generated_ids)

    @property
    def complete(self) -> bool:
        """Whether the constraint allows nothing more."""
        return self.grammar is not None and self.grammar.complete

    def append(self, token_id: int) -> None:
        """A token was sampled and does not end the answer."""
        if self.seen is not None:
            self.seen.append(token_id)
        if self.grammar is not None:
            self.grammar.append(token_id)


def row_state(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int] = (),
    grammar: Grammar | None = None,
) -> RowState | None:
    """As RowState; None where the logits are sampled as they are, which costs nothing."""
    if not params.penalizes and not params.logit_bias and grammar is None:
        return None
    return RowState(params, prompt_ids, generated_ids, grammar)
