"""How many tokens a step may have: what the settings say, or less for a while after the device ran out of memory.

What a step needs besides the pool grows with its tokens, and what is left for it with what else uses the device. So a
step that did not fit is tried again at half its size, which costs its sequences time and not their answers.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

# Below this a step's memory hardly depends on its tokens.
LEAST_TOKENS = 16
# After so many steps that fitted, twice as many tokens are tried again.
STEPS_TO_GROW = 64


class StepBudget:
    """Tokens of the next step.

    Attributes:
        tokens: at most so many now. shrunk: how often there was too little memory.
    """

    def __init__(self, most: int) -> None:
        self.tokens = self._most = most
        self.shrunk = 0
        self._fitted = 0

    def out_of_memory(self, tokens: int) -> bool:
        """A step of so many tokens did not fit; whether a smaller one is worth a try."""
        self._fitted = 0
        smaller = tokens // 2
        if smaller < LEAST_TOKENS:
            return False
        self.tokens = smaller
        self.shrunk += 1
        log.warning(
            "the device is out of memory: steps are made smaller; lower workers.max_batch_tokens or store.device_bytes"
            " if this repeats",
            extra={"failed_tokens": tokens, "next_tokens": smaller},
        )
        return True

    def fitted(self) -> None:
        """A step was computed."""
        if self.tokens == self._most:
            return
        self._fitted += 1
        if self._fitted >= STEPS_TO_GROW:
            self._fitted, self.tokens = 0, min(self._most, self.tokens * 2)
