"""How much a step may have: what the settings say, or less for a while after the device ran out of memory.

What a step needs besides the pool grows with its tokens and its sequences, and what is left for it with what else uses
the device. So a step that did not fit is tried again with half its tokens, and where they are few already, with one
sequence less: the last in rank waits. Both cost time and no answer. Only what does not fit alone does not fit at all.
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

# Below this a step's memory hardly depends on its tokens.
LEAST_TOKENS = 16
# After so many steps that fitted, twice as much is tried again.
STEPS_TO_GROW = 64


class StepBudget:
    """Size of the next step.

    Attributes:
        tokens: at most so many now. sequences: at most so many that hold blocks.
        shrunk: how often there was too little memory.
    """

    def __init__(self, most_tokens: int, most_sequences: int) -> None:
        self.tokens = self._most_tokens = most_tokens
        self.sequences = self._most_sequences = most_sequences
        self.shrunk = 0
        self._fitted = 0

    def out_of_memory(self, tokens: int, sequences: int) -> bool:
        """A step of that size did not fit; whether a smaller one is worth a try."""
        self._fitted = 0
        if tokens > LEAST_TOKENS:
            self.tokens = max(LEAST_TOKENS, tokens // 2)
        elif sequences > 1:
            self.sequences = sequences - 1
        else:
            return False
        self.shrunk += 1
        log.warning(
            "the device is out of memory: steps are made smaller; lower workers.max_batch_tokens or store.device_bytes"
            " if this repeats",
            extra={"failed_tokens": tokens, "failed_sequences": sequences, "next_tokens": self.tokens},
        )
        return True

    def fitted(self) -> None:
        """A step was computed."""
        if self.tokens == self._most_tokens and self.sequences == self._most_sequences:
            return
        self._fitted += 1
        if self._fitted >= STEPS_TO_GROW:
            self._fitted = 0
            self.tokens = min(self._most_tokens, self.tokens * 2)
            self.sequences = min(self._most_sequences, self.sequences * 2)
