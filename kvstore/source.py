"""A tier below the device as loads see it: what it may deliver, how long that takes, and whether it was worth it.

Covers: live estimates with the queue included, names that are known to be missing, the score of loading against
computing. Does not cover: I/O (`promotion`). Owned by the engine's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash
from kvstore.estimate import TransferEstimate, worth_loading
from kvstore.events import TierName
from kvstore.tier import Clock, Tier

PROBE_AFTER_S = 10.0  # an estimate this old is measured again, even if it speaks against the tier ...
PROBE_BLOCKS = 4  # ... by a load of this many blocks
MUCH = 4.0  # a read so many times faster than expected is followed by another measurement at once
ABSENT_S = 1.0  # a look-up that found nothing is believed for so long
MAX_ABSENT = 1 << 16


@dataclass(slots=True)
class LoadScore:
    """Loads of one tier against what computing would have cost.

    Attributes:
        loads: that delivered something. bad_hits: of them, those that took longer than computing.
        load_ms: they took. compute_ms: computing was predicted to take.
    """

    loads: int = 0
    bad_hits: int = 0
    load_ms: float = 0.0
    compute_ms: float = 0.0

    def add(self, load_ms: float, compute_ms: float) -> None:
        """A load delivered blocks that would have taken `compute_ms` to compute."""
        self.loads += 1
        self.bad_hits += load_ms > compute_ms
        self.load_ms += load_ms
        self.compute_ms += compute_ms


class Absent:
    """Names that a look-up did not find a moment ago, or that must not be read. Bounded; O(1)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: OrderedDict[BlockHash, float] = OrderedDict()  # by time: every entry lives equally long
        self.barred: set[BlockHash] = set()  # what is there is wrong, and about to be removed

    def add(self, name: BlockHash) -> None:
        """It was not found just now."""
        self._until[name] = self._clock() + ABSENT_S
        self._until.move_to_end(name)
        if len(self._until) > MAX_ABSENT:
            self._until.popitem(last=False)

    def discard(self, name: BlockHash) -> None:
        """It is there now."""
        self._until.pop(name, None)

    def forget(self) -> None:
        """Nothing is known of what was looked for; what is barred stays so."""
        self._until.clear()

    def __contains__(self, name: BlockHash) -> bool:
        until = self._until.get(name)
        return until is not None and until > self._clock()


class Source:
    """One tier.

    Attributes:
        tier: the tier. estimate: its measured reads. score: of its loads. absent: what it does not hold.
        pending_blocks: asked for, not yet arrived. stuck: reads that run on though their deadline has long passed.
    """

    def __init__(self, tier: Tier, block_nbytes: int, *, clock: Clock, believed: Callable[[BlockHash], bool] | None):
        """`believed` says what a tier probably holds that cannot be asked cheaply; None: `tier.match` is cheap."""
        self.tier = tier
        self.estimate = TransferEstimate()
        self.score = LoadScore()
        self.absent = Absent(clock)
        self.pending_blocks = 0
        self.stuck = 0
        self._nbytes = block_nbytes
        self._clock = clock
        self._believed = believed
        self._measured_at = 0.0

    @property
    def name(self) -> TierName:
        """The tier's."""
        return self.tier.name

    def reach(self, names: Sequence[BlockHash]) -> int:
        """How many leading blocks it may deliver: those that it holds, or of which nobody knows that it does not."""
        believed = self._believed
        if self.absent.barred:
            names = names[: next((i for i, name in enumerate(names) if name in self.absent.barred), len(names))]
        if believed is None:
            return self.tier.match(names)
        gaps = (i for i, name in enumerate(names) if name in self.absent and not believed(name))
        return next(gaps, len(names))

    def known(self, names: Sequence[BlockHash]) -> int:
        """How many leading blocks it holds, as far as is known without asking."""
        believed = self._believed
        if believed is None:
            return self.tier.match(names)
        return next((i for i, name in enumerate(names) if not believed(name)), len(names))

    def predict_ms(self, count: int) -> float | None:
        """Time to read `count` blocks behind those that were asked for before; None: nothing was measured yet."""
        return self.estimate.predict_ms((self.pending_blocks + count) * self._nbytes)

    def affordable(self, count: int, compute_ms: float | None) -> int:
        """How many of `count` blocks to load: all, a few to measure again, or none."""
        if self.stuck:
            return 0
        if count == 0 or worth_loading(self.predict_ms(count), compute_ms):
            return count
        is_stale = self._clock() - self._measured_at >= PROBE_AFTER_S
        return min(count, PROBE_BLOCKS) if is_stale and self.pending_blocks == 0 else 0

    def gave_up(self, count: int, ms: float, compute_ms: float | None) -> None:
        """A read of `count` blocks did not end in that time; when it does, one shall look again at once."""
        self.estimate.observe(count * self._nbytes, ms)
        self._measured_at = float("-inf")
        if compute_ms is not None:
            self.score.add(ms, compute_ms)

    def observe(self, count: int, ms: float) -> None:
        """A read delivered `count` blocks in that time."""
        expected = self.estimate.predict_ms(count * self._nbytes)
        self.estimate.observe(count * self._nbytes, ms)
        has_changed = expected is not None and ms * MUCH < expected
        self._measured_at = float("-inf") if has_changed else self._clock()
