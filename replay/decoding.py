"""Many decode steps at once: sequences that gain a token a step, without touching each of them each step.

Covers: who decodes, when the next one ends, how many blocks any number of steps needs. Does not cover: time, the blocks
themselves. Sequences enter with their tokens at the present step; what they have later follows from the steps since.
A sequence needs a block at every `block_size`-th step, so what steps need are counts by step modulo block size.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from replay.batched_sequence import Sequence


class Decoding:
    """The sequences past their prefill.

    Attributes:
        steps: decode steps so far.
    """

    def __init__(self, block_size: int) -> None:
        self.steps = 0
        self._block_size = block_size
        self._entries: dict[Sequence, int] = {}  # numbers, as a sequence may come back
        self._count = 0
        self._due: list[tuple[int, int, Sequence]] = []  # last step, entry; entries that are gone are passed over
        self._needs = [0] * block_size
        self._offset = 0  # tokens of all, less the steps that each has seen
        self._tokenless: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._entries

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they came."""
        return iter(self._entries)

    @property
    def context(self) -> int:
        """Tokens of all together."""
        return self._offset + self.steps * len(self._entries)

    @property
    def answer_blocks(self) -> int:
        """Blocks that all need besides those of their prompts."""
        size, steps = self._block_size, self.steps
        tokens = ((each, *(each.decoding_since or (steps, each.tokens))) for each in self._entries)
        return sum(max(0, -(-(so_far + steps - since) // size) - each.base) for each, since, so_far in tokens)

    def add(self, sequence: Sequence) -> None:
        """It has one token to compute at the next step, and then one at each."""
        self._count += 1
        self._entries[sequence] = self._count
        sequence.decoding_since = (self.steps, sequence.tokens)
        left = sequence.output - sequence.generated
        if not sequence.generated:
            self._tokenless.append(sequence)
        heapq.heappush(self._due, (self.steps + left, self._count, sequence))
        self._needs[self._residue(sequence)] += 1
        self._offset += sequence.tokens - self.steps

    def remove(self, sequence: Sequence) -> int:
        """It decodes no more; its tokens are up to date now. Blocks that it took since it came."""
        del self._entries[sequence]
        since, tokens = sequence.decoding_since or (self.steps, sequence.tokens)
        self._needs[self._residue(sequence)] -= 1
        self._offset -= tokens - since
        sequence.decoding_since = None
        sequence.tokens = tokens + self.steps - since
        sequence.computed = sequence.tokens - 1
        return max(0, -(-sequence.computed // self._block_size) - sequence.table)

    def tokenless(self) -> list[Sequence]:
        """Those that get their first token at the next step."""
        return [sequence for sequence in self._tokenless if sequence in self._entries]

    def step(self, steps: int) -> None:
        """All gain so many tokens."""
        self.steps += steps
        self._tokenless.clear()

    def left(self) -> int:
        """Steps until the next one ends. Only with members."""
        while self._entries.get(self._due[0][2]) != self._due[0][1]:
            heapq.heappop(self._due)
        return self._due[0][0] - self.steps

    def ended(self) -> list[Sequence]:
        """Those that have all their tokens at this step, in the order in which they came."""
        found: list[tuple[int, Sequence]] = []
        while self._due and self._due[0][0] <= self.steps:
            _, entry, sequence = heapq.heappop(self._due)
            if self._entries.get(sequence) == entry:
                found.append((entry, sequence))
        return [sequence for _, sequence in sorted(found, key=lambda each: each[0])]

    def blocks_for(self, steps: int, *, after: int = 0) -> int:
        """Blocks that so many steps need, beginning `after` steps from now."""
        if not self._entries or steps <= 0:
            return 0
        size, needs = self._block_size, self._needs
        cycles, rest = divmod(steps, size)
        first = (self.steps + after) % size
        end = first + rest
        counted = sum(needs[first:end]) + (sum(needs[: end - size]) if end > size else 0)
        return cycles * len(self._entries) + counted

    def steps_within(self, blocks: int, most: int) -> int:
        """How many steps, at most `most`, need no more than so many blocks."""
        if self.blocks_for(most) <= blocks:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.blocks_for(middle) <= blocks else (low, middle)
        return low

    def _residue(self, sequence: Sequence) -> int:
        """The steps, modulo block size, at which the token to compute begins a block."""
        since, tokens = sequence.decoding_since or (self.steps, sequence.tokens)
        return (since + 1 - tokens) % self._block_size
