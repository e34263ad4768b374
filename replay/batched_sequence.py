"""A request inside a simulated engine, and the blocks that it holds of a pool.

Covers: finding, taking, filling, naming and giving back blocks, in segments. Does not cover: who may have them
(`batched_scheduler`), time (`batched_engine`). The rules are those of `workers.sequence` and `kvstore.pool`: full
blocks get their names as they are computed, a name that is held already leaves the copy without one, and the blocks of
an answer stay in the pool under names that nobody asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.events import TierName
from replay.batched_profile import BatchedProfile
from replay.segment_cache import SegmentCache
from replay.tiers import WorkerTiers
from replay.workload import Chain

Rank = tuple[int, int]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way.

    Attributes:
        chain: of the prompt; after a preemption with the answer's full blocks behind it. base: blocks of the prompt.
        tokens: prompt and answer so far. output: tokens that the answer will have. computed: tokens with K/V.
        committed: leading blocks with a name. table: blocks held. nameless: of them, those that are ours alone.
        pinned: leading segments in use by it. making: segments that others may wait for.
        expected_cached: tokens that were in reach when it came, or were to be computed by those before it.
        cached: tokens by tier, at the first admission.
        only_prefill: it ends with its prompt. delivered: leading blocks that another worker has made for it; of them
        `delivered_found` were there before.
        ready_at: when its reads are done. counted: segments that others count on, while it waits or computes.
    """

    number: int
    rank: Rank
    chain: Chain
    prompt: int
    output: int
    base: int
    tokens: int
    computed: int = 0
    committed: int = 0
    table: int = 0
    nameless: int = 0
    pinned: int = 0
    making: list[int] = field(default_factory=list)
    awaited: int | None = None
    expected_cached: int = 0
    cached: Mapping[TierName, int] | None = None
    ready_at: float = 0.0
    counted: tuple[int, ...] = ()
    loaded: int = 0
    decoding_since: tuple[int, int] | None = None  # step and tokens then
    first_token_at: float | None = None
    only_prefill: bool = False
    delivered: int = 0
    delivered_found: int = 0

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1: it decodes."""
        return self.tokens - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return self.tokens - self.prompt

    @property
    def pending(self) -> int:
        """What a report counts of it before it runs."""
        return max(1, self.remaining - self.expected_cached)


class SequenceBlocks:
    """The pool of one worker and what lies below it, as its sequences use them."""

    def __init__(
        self, profile: BatchedProfile, block_size: int, pool: SegmentCache, tiers: WorkerTiers, *, answers_from: int
    ) -> None:
        """`answers_from`: the first number of a segment that is no prompt's."""
        self.pool = pool
        self.tiers = tiers
        self._profile = profile
        self._block_size = block_size
        self._capacity = profile.pool_tokens // block_size
        self._answers_from = answers_from
        self.making: dict[int, Sequence] = {}  # segments that somebody computes now
        self._expected: dict[int, int] = {}  # segments of those that wait or compute

    def readable(self, sequence: Sequence) -> int:
        """Blocks that it may find in a cache."""
        known = sequence.tokens if self._profile.reserves_prompt else sequence.tokens - 1
        return min(known // self._block_size, len(sequence.chain))

    def in_reach(self, sequence: Sequence) -> int:
        """Tokens that pool and host give it now, or will when those before it are computed."""
        chain, most = sequence.chain, self.readable(sequence)
        blocks = min(most, max(self.tiers.near(chain, self.pool.leading(chain)), self._coming(chain)))
        return min(blocks * self._block_size, sequence.tokens - 1)

    def expect(self, sequence: Sequence) -> None:
        """It is to be computed: those that come after it may count on it."""
        self.settle(sequence)
        expected, sequence.counted = self._expected, sequence.chain.segments
        for segment in sequence.counted:
            expected[segment] = expected.get(segment, 0) + 1

    def settle(self, sequence: Sequence) -> None:
        """It is computed, or never will be."""
        expected = self._expected
        for segment in sequence.counted:
            if expected[segment] == 1:
                del expected[segment]
            else:
                expected[segment] -= 1
        sequence.counted = ()

    def _coming(self, chain: Chain) -> int:
        leading = 0
        for segment, end in zip(chain.segments, chain.ends, strict=True):
            if segment not in self._expected:
                break
            leading = end
        return leading

    def take(self, sequence: Sequence, now: float) -> bool:
        """Use the cached prefix, and start the reads of what lower tiers hold sooner than it could be computed.

        False, and nothing taken, when there must be room for the whole prompt and is not.
        """
        chain, most = sequence.chain, self.readable(sequence)
        found = min(self.pool.leading(chain), most)
        sequence.pinned = chain.whole_segments(found)
        sequence.pinned += chain.blocks(sequence.pinned) < found
        for segment in chain.segments[: sequence.pinned]:
            self.pool.pin(segment)
        room = self.pool.available
        if self._profile.reserves_prompt:
            extra = self.blocks_for(sequence.tokens) - found
            if extra > room:
                self.pool.unpin(chain.segments[: sequence.pinned], now)
                sequence.pinned = 0
                return False
            most, reserved = min(most, found + extra), extra
        else:
            most = min(most, found + max(0, room - self._capacity // 64))
            reserved = 0
        came = max(found, min(most, sequence.delivered))
        reads = self.tiers.plan(chain, came, most, self._profile.prefill, now)
        end = reads[-1].end if reads else came
        self.pool.reserve(max(reserved, end - found))
        sequence.nameless = max(reserved, end - found)
        sequence.table = found + sequence.nameless
        sequence.committed, sequence.loaded = found, end
        sequence.ready_at = now + self.tiers.start(reads, now) / 1e3
        self._use(sequence, now)
        if sequence.cached is None:
            hits = max(found, min(came, sequence.delivered_found))  # what was made for it is computed, not cached
            spans = [(TierName.DEVICE, found), *([(TierName.PEER, hits)] if hits > found else [])]
            sequence.cached = self._tokens(sequence, [*spans, *((read.tier, read.end) for read in reads)])
        return True

    def enter(self, sequence: Sequence, now: float) -> None:
        """What was read is in the pool; it computes the rest."""
        self.commit(sequence, sequence.loaded, now)
        sequence.computed = min(sequence.loaded * self._block_size, sequence.tokens - 1)

    def announce(self, sequence: Sequence) -> None:
        """It will compute what it lacks: others may wait for that."""
        chain, making = sequence.chain, self.making
        for segment in chain.segments[chain.whole_segments(sequence.committed) :]:
            if segment not in making:
                making[segment] = sequence
                sequence.making.append(segment)

    def awaits_another(self, sequence: Sequence) -> bool:
        """Whether its next block that is not in reach is being made by a sequence before it."""
        if sequence.awaited is None or sequence.awaited not in self.making:
            sequence.awaited = self._awaited(sequence)
        if sequence.awaited is None:
            return False
        maker = self.making[sequence.awaited]
        at = max(maker.committed, sequence.chain.start_of(sequence.awaited))
        return maker.rank < sequence.rank and at < min(self.readable(sequence), self.readable(maker))

    def _awaited(self, sequence: Sequence) -> int | None:
        """The first of its segments that is being made, if all before it are in reach."""
        chain, start = sequence.chain, 0
        for segment, end in zip(chain.segments, chain.ends, strict=True):
            if segment in self.making:
                return segment
            if self.pool.held(segment) < end - start and self.tiers.near(chain, start) < end:
                return None
            start = end
        return None

    def extra(self, sequence: Sequence, length: int) -> int:
        """Blocks that it lacks for so many more tokens."""
        return max(0, self.blocks_for(sequence.computed + length) - sequence.table)

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Give it that many blocks; False: there is no room."""
        if count and not self.pool.reserve(count):
            return False
        sequence.table += count
        sequence.nameless += count
        return True

    def blocks_for(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self._block_size)

    def full(self, sequence: Sequence) -> int:
        """Blocks full of computed tokens; a prompt's last block that its trace names counts with the prompt."""
        blocks = sequence.computed // self._block_size
        return max(blocks, sequence.base) if sequence.computed >= sequence.prompt else blocks

    def commit(self, sequence: Sequence, blocks: int, now: float) -> None:
        """Its first so many blocks are full: those of the prompt get their names, and go to the tiers below."""
        chain, blocks = sequence.chain, min(blocks, len(sequence.chain))
        first = at = chain.whole_segments(sequence.committed)
        lengths: list[int] = []
        while sequence.committed < blocks:
            start, end = chain.blocks(at), min(blocks, chain.ends[at])
            if at >= sequence.pinned:
                self.pool.pin(chain.segments[at])
                sequence.pinned = at + 1
            sequence.nameless -= self.pool.name(chain.segments[at], end - start)
            sequence.committed = end
            lengths.append(end - start)
            if end == chain.ends[at] and self.making.get(chain.segments[at]) is sequence:
                del self.making[chain.segments[at]]
            at += 1
        if lengths:
            self.tiers.computed(chain.segments[:at], [0] * first + lengths, first, now)

    def give_back(self, sequence: Sequence, now: float) -> None:
        """Take all from it; what has a name stays findable, the full blocks of its answer included."""
        self._name_answer(sequence, now)
        segments = sequence.chain.segments[: sequence.pinned]
        self.pool.unpin(segments, now)
        self.pool.free(sequence.nameless)
        self.tiers.touch(segments, now)
        for segment in sequence.making:
            if self.making.get(segment) is sequence:
                del self.making[segment]
        sequence.making, sequence.awaited = [], None
        sequence.computed = sequence.committed = sequence.table = sequence.nameless = sequence.pinned = 0

    def lose(self) -> None:
        """The worker's process died."""
        self.pool.clear()
        self.tiers.lose()
        self.making.clear()
        self._expected.clear()

    def _name_answer(self, sequence: Sequence, now: float) -> None:
        answer = self.full(sequence) - sequence.base
        if answer <= 0 or sequence.committed < sequence.base:
            return
        segment = self._answers_from + sequence.number
        prompt = sequence.chain if sequence.chain.segments[-1:] != (segment,) else sequence.chain.without_last()
        sequence.chain = prompt.followed_by(segment, answer)
        self.commit(sequence, sequence.base + answer, now)

    def _use(self, sequence: Sequence, now: float) -> None:
        chain, lengths, start = sequence.chain, [], 0
        for segment, end in zip(chain.segments[: sequence.pinned], chain.ends, strict=False):
            lengths.append(min(self.pool.held(segment), end - start))
            start = end
        self.tiers.used(chain.segments[: sequence.pinned], lengths, now)

    def _tokens(self, sequence: Sequence, ends: list[tuple[TierName, int]]) -> dict[TierName, int]:
        """Prompt tokens by tier, of runs of blocks that end there. At least one token is always computed."""
        tokens: dict[TierName, int] = {}
        before = 0
        for tier, end in ends:
            until = min(end * self._block_size, sequence.prompt - 1)
            tokens[tier] = tokens.get(tier, 0) + until - before
            before = until
        return tokens
