"""Policy `tail_optimized`: first what a conversation can lose and still answer in time. O(log n).

The next turn of a conversation of `length` blocks meets its threshold (a time to first token) while at most `spare`
blocks of it must be computed again. So the last `spare` blocks of each conversation are evicted first, least recently
used first, and only then, in the same order, what would make a next turn late. Short conversations go whole, long ones
keep the part that would take long to compute. `spare_blocks` turns a threshold in seconds into blocks, and `Spare` does
so with what prefills are measured to cost while the process runs.

Source: W. Zhang et al., "Tail-Optimized Caching for LLM Inference", arXiv 2510.15152, 2025 (T-LRU).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator
from itertools import islice

from kvstore.eviction.order import Hint, Key, Ranked, name_of
from kvstore.tier import Clock

SpareBlocks = int | Callable[[], int]

DEFAULT_THRESHOLD_S = 0.25
DEFAULT_SPARE_BLOCKS = 128  # about 2,000 tokens: that threshold where 8,000 a second are prefilled
_LONGEST = 1 << 24  # tokens; no prompt is longer
_LEARN_EVERY_S = 1.0
_NOTICED = 8  # a change by less than this part of the spare is noise
_FOLLOW = 64  # entries that one eviction looks at anew after a change


class TailOrder(Ranked[Key]):
    """By whether a turn would be late without it, then by the last use.

    A spare that changes is heeded from the next eviction on; what had been offered before is looked at anew a few
    entries an eviction, those that would go first before the others.
    """

    def __init__(self, spare: SpareBlocks) -> None:
        """Take the spare, or what tells it now, which is asked at each eviction and must be cheap."""
        super().__init__()
        self._ask: Callable[[], int] = spare if callable(spare) else lambda: spare
        self._spare = self._ask()
        self._outdated: Iterator[Key] = iter(())  # offered when the spare was another one
        self._hints: dict[Key, tuple[Hashable, Hint]] = {}  # its name, and what was told
        self._positions: dict[Hashable, int] = {}  # by name, where told
        # By name: blocks from its end to that of the longest conversation through it since its last use. It counts from
        # there, not from the start: a tier adds a chain last block first, before it knows where that starts.
        self._behind: dict[Hashable, int] = {}

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        name = name_of(key, hint)
        self._hints[key] = name, hint
        if hint.position or hint.parent is None:
            self._positions[name] = hint.position
        self._used(key)

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`: a conversation that ends here now."""
        self._used(key)

    def offer(self, key: Key) -> None:
        """As `Order.offer`."""
        late = self._behind.get(self._hints[key][0], 0) >= self._spare
        self._ranks[key] = (float(late), self._ranks[key][1])
        super().offer(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`."""
        name, hint = self._hints.pop(key)
        behind = self._behind.pop(name, 0)
        position = self._positions.pop(name, None)
        if evicted and hint.parent in self._behind:
            before = self._positions.get(hint.parent)
            own = 1 if position is None or before is None else position - before
            self._behind[hint.parent] = max(behind + own, self._behind[hint.parent])
        super().remove(key, evicted=evicted)

    def first(self, kept: Container[Key], root: Hashable | None) -> Key | None:
        """As `Order.first`."""
        if (spare := self._ask()) != self._spare:
            self._spare = spare
            self._outdated = iter(self._offered.keys())
        for key in islice(self._outdated, _FOLLOW):
            if key in self:
                self.offer(key)
        return super().first(kept, root)

    def _used(self, key: Key) -> None:
        self._behind[self._hints[key][0]] = 0
        self._place(key, (float(self._spare < 1), self._tick()))


class Spare:
    """How many blocks a turn may compute again now: `DEFAULT_SPARE_BLOCKS` until a prefill was measured.

    One thread tells it, at the end of a step; calling it is O(1), and any thread may.
    """

    def __init__(self, threshold_s: float, block_size: int, clock: Clock) -> None:
        self._threshold_s, self._block_size, self._clock = threshold_s, block_size, clock
        self._blocks = DEFAULT_SPARE_BLOCKS
        self._due: float | None = None

    def __call__(self) -> int:
        """The spare, in blocks."""
        return self._blocks

    def learn(self, prefill_ms: Callable[[int], float]) -> None:
        """Prefills of so many tokens take that long now. Heeded once a second, and when it makes a difference."""
        is_first, now = self._due is None, self._clock()
        if self._due is not None and now < self._due:
            return
        self._due = now + _LEARN_EVERY_S
        blocks = spare_blocks(self._threshold_s, prefill_ms, self._block_size)
        if is_first or abs(blocks - self._blocks) * _NOTICED > self._blocks:
            self._blocks = blocks


def spare_blocks(
    threshold_s: float, prefill_ms: Callable[[int], float], block_size: int, *, next_turn_tokens: int = 0
) -> int:
    """How many blocks a turn may compute again within the threshold, beside its own `next_turn_tokens`.

    Args:
        threshold_s: the time to first token to keep.
        prefill_ms: predicted time to prefill so many tokens; must not fall.
        block_size: tokens a block.
        next_turn_tokens: what a turn usually adds.
    """
    fits, fails = 0, _LONGEST
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if prefill_ms(middle) <= threshold_s * 1e3 else (fits, middle)
    return max(0, fits - next_turn_tokens) // block_size
