"""Policy `tail_optimized`: first what a conversation can lose and still answer in time. O(log n).

The next turn of a conversation of `length` blocks meets its threshold (a time to first token) while at most `spare`
blocks of it must be computed again. So the last `spare` blocks of each conversation are evicted first, least recently
used first, and only then, in the same order, what would make a next turn late. Short conversations go whole, long ones
keep the part that would take long to compute. `spare_blocks` turns a threshold in seconds into blocks.

Source: W. Zhang et al., "Tail-Optimized Caching for LLM Inference", arXiv 2510.15152, 2025 (T-LRU).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from kvstore.eviction.order import Hint, Key, Ranked, name_of

DEFAULT_SPARE_BLOCKS = 128  # about 2,000 tokens: a quarter of a second where 8,000 a second are prefilled
_LONGEST = 1 << 24  # tokens; no prompt is longer


class TailOrder(Ranked[Key]):
    """By whether a turn would be late without it, then by the last use."""

    def __init__(self, spare: int) -> None:
        super().__init__()
        self._spare = spare
        self._hints: dict[Key, tuple[Hashable, Hint]] = {}  # its name, and what was told
        self._positions: dict[Hashable, int] = {}  # by name
        self._lengths: dict[Hashable, int] = {}  # by name: of the longest conversation through it since its last use

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        name = name_of(key, hint)
        before = self._positions.get(hint.parent, -1)
        hint = replace(hint, position=hint.position or before + 1)
        self._hints[key] = name, hint
        self._positions[name] = hint.position
        self._used(key)

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`: a conversation that ends here now."""
        self._used(key)

    def offer(self, key: Key) -> None:
        """As `Order.offer`."""
        name, hint = self._hints[key]
        late = self._lengths.get(name, 0) - hint.position > self._spare
        self._ranks[key] = (float(late), self._ranks[key][1])
        super().offer(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`."""
        name, hint = self._hints.pop(key)
        length = self._lengths.pop(name, 0)
        self._positions.pop(name, None)
        if evicted and hint.parent in self._lengths:
            self._lengths[hint.parent] = max(length, self._lengths[hint.parent])
        super().remove(key, evicted=evicted)

    def _used(self, key: Key) -> None:
        name, hint = self._hints[key]
        self._lengths[name] = hint.position + 1
        self._place(key, (float(self._spare < 1), self._tick()))


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
