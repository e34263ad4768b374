"""Which tokens the next step computes: continuous batching with chunked prefill, over a store that can run out.

A step has a budget of tokens. Sequences that decode come first, one token each, so that a long prompt delays nobody's
next token by more than one step; prefills share the rest in chunks (Sarathi, Agrawal et al. 2023; paged K/V with
preemption by recomputation: vLLM, Kwon et al. 2023). Of the budget one token is kept for the first in rank: where as
many decode as it has tokens, they would else compute for ever while it waits.

Rank is priority, then arrival, and one rule keeps it live: a sequence may take blocks from any that ranks below it and
waits for all others. The first in rank can therefore always go on, so all end; what was preempted finds its committed
blocks in the cache when it comes back, and it comes back only when another ended (else it would take the same blocks
again, compute nothing and lose them again).

A prompt whose next uncached block is just being computed by a sequence before it waits for that block: a burst of
requests over one new document computes it once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from kvstore.store import ComputeMs, ReadTiers
from workers.sequence import Acquisition, Rank, Sequence
from workers.tails import Tails


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `length` tokens of a sequence, to be computed in this step."""

    sequence: Sequence
    length: int


class BlockStore(Protocol):
    """What the scheduler asks of a store; `kvstore.store.TieredStore` says what it means."""

    def match(self, hashes: Items[BlockHash], reads: ReadTiers = ...) -> list[TierName]:
        """The fastest local tier of each leading block."""
        ...

    def acquire(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """Start to bring a cached prefix to the device."""
        ...

    def acquire_from_both_ends(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """The same, for who can compute its front while its back comes."""
        ...

    def prefetch(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers = ...,
        compute_ms: ComputeMs | None = None,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> int:
        """Start to bring a cached prefix nearer."""
        ...

    def allocate(self, count: int) -> list[int] | None:
        """Empty device blocks, all or none."""
        ...

    def release(self, block_ids: Items[int]) -> None:
        """Drop one reference of each."""
        ...


class Scheduler:
    """Owns the sequences from `add` to `remove`, and the blocks that they hold.

    A sequence is waiting (holds nothing), loading (its cached prefix is on its way) or running.

    Attributes:
        reads: the tiers that may be read. preemptions: so far. max_batch_tokens: of the next step; may be changed.
        max_running: sequences that hold blocks; changed by `hold_fewer`, or upwards.
        is_ahead: whether a step is still running. What is given back then is not free yet, so nobody is preempted.
        is_starved: whether somebody got no blocks at the last call of `schedule` because of that.
    """

    def __init__(
        self,
        store: BlockStore,
        *,
        block_size: int,
        max_batch_tokens: int,
        max_running: int,
        compute_ms: ComputeMs,
        lifetime: Callable[[Sequence], Lifetime],
    ) -> None:
        """Start with no sequence.

        Args:
            store: where blocks come from. block_size: tokens a block.
            max_batch_tokens: tokens a step. max_running: sequences that hold blocks.
            compute_ms: see `TieredStore.acquire`. lifetime: of a sequence's blocks.

        Raises:
            ValueError: a limit is not positive.
        """
        if min(block_size, max_batch_tokens, max_running) < 1:
            raise ValueError("block_size, max_batch_tokens and max_running must be at least 1; raise them")
        self._store, self._block_size = store, block_size
        self.max_batch_tokens, self.max_running = max_batch_tokens, max_running
        self._compute_ms, self._lifetime = compute_ms, lifetime
        self._waiting: list[Sequence] = []  # each of the three sorted by rank
        self._loading: list[Sequence] = []
        self._running: list[Sequence] = []
        self._in_the_making: dict[BlockHash, Sequence] = {}
        self._tails = Tails(block_size, store.release, self.made)
        self._short_of_blocks = False  # since a preemption, until a sequence ended
        self.reads = ReadTiers()
        self.preemptions = 0
        self.is_ahead = self.is_starved = False

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences."""
        yield from (*self._running, *self._loading, *self._waiting)

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self._running) + len(self._loading) + len(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """Those that compute; not to be changed."""
        return self._running

    @property
    def waiting(self) -> list[Sequence]:
        """Those that do not compute yet, for want of room or of blocks on their way."""
        return [*self._loading, *self._waiting]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that holds nothing; while others are before it, what slow tiers hold of it comes nearer."""
        if self._waiting or len(self._running) + len(self._loading) >= self.max_running:
            self._store.prefetch(
                sequence.readable(self._block_size),
                reads=self.reads,
                compute_ms=self._compute_ms,
                root=sequence.job.root,
                lifetime=self._lifetime(sequence),
            )
        insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give its blocks back at once."""
        self._give_back(sequence)
        for group in (self._running, self._loading, self._waiting):
            if sequence in group:
                group.remove(sequence)
        self._short_of_blocks = False

    def hold_fewer(self, most: int) -> None:
        """Let no more than so many go on: the last in rank give their blocks back and wait for others to end."""
        self.max_running = most
        while len(holders := [*self._running, *self._loading]) > most:
            self._preempt(max(holders, key=_rank))

    def schedule(self) -> list[Chunk]:
        """The work of the next step, decodes first; empty when all sequences wait. Every chunk has its blocks."""
        self.is_starved = False
        self._admit()
        self._tails.meet(self._running)
        lengths: dict[Sequence, int] = {}
        decoding = [sequence for sequence in self._running if sequence.remaining == 1]
        prefilling = [sequence for sequence in self._running if sequence.remaining > 1]
        kept = self._kept_for_first()
        for sequence in (*decoding, *prefilling):
            left = self.max_batch_tokens - sum(lengths.values())
            length = min(self._tails.reach(sequence), left - kept if sequence.remaining == 1 else left)
            if length > 0 and sequence in self._running and self._grow(sequence, length, lengths):
                lengths[sequence] = length
                self._tails.going(sequence, length)
        return [Chunk(sequence, length) for sequence, length in lengths.items()]

    def _kept_for_first(self) -> int:
        """Tokens that decodes may not use up: one if the first in rank of those with work has a prompt to compute."""
        first = next((sequence for sequence in self._running if sequence.remaining > 0), None)
        return int(first is not None and first.remaining > 1)

    def _admit(self) -> None:
        """Start loads while there is room, and let those run whose blocks have come."""
        if not self._running and not self._loading:
            self._short_of_blocks = False
        for sequence in list(self._waiting):
            if len(self._running) + len(self._loading) >= self.max_running or not self._may_enter(sequence.rank):
                break
            if not self._awaits_another(sequence):
                self._start(sequence)
        for sequence in [each for each in self._loading if each.acquisition is not None and each.acquisition.done]:
            self._enter(sequence)

    def _may_enter(self, rank: Rank) -> bool:
        """While short of blocks only those may enter that outrank one that holds some."""
        holders = (*self._running, *self._loading)
        return not self._short_of_blocks or any(rank < holder.rank for holder in holders)

    def _awaits_another(self, sequence: Sequence) -> bool:
        """Whether its next block that is not in reach is being made by a sequence before it."""
        if sequence.awaited is None or sequence.awaited not in self._in_the_making:
            sequence.awaited = self._awaited_block(sequence)
        maker = None if sequence.awaited is None else self._in_the_making[sequence.awaited]
        return maker is not None and maker.rank < sequence.rank

    def _awaited_block(self, sequence: Sequence) -> BlockHash | None:
        """The first of its blocks that is being made, if all before it are in reach."""
        if not self._in_the_making:
            return None
        names = sequence.readable(self._block_size)
        for place, name in enumerate(names):
            if name in self._in_the_making:
                return name if len(self._store.match(names[:place], self.reads)) == place else None
        return None

    def _start(self, sequence: Sequence) -> None:
        names = sequence.readable(self._block_size)
        # A front that is not kept has no names by which what follows it could be told apart from another one's.
        from_front = sequence.job.no_store or sequence.job.prefill_only
        acquire = self._store.acquire if from_front else self._store.acquire_from_both_ends
        sequence.acquisition = acquire(
            names,
            reads=self.reads,
            compute_ms=self._compute_ms,
            root=sequence.job.root,
            lifetime=self._lifetime(sequence),
        )
        self._waiting.remove(sequence)
        insort(self._loading, sequence, key=_rank)
        if not sequence.job.no_store:
            # What it has already nobody need wait for: those that waited for one maker all begin in the step after it.
            for name in names[len(sequence.acquisition.block_ids) :]:
                self._in_the_making.setdefault(name, sequence)

    def _enter(self, sequence: Sequence) -> None:
        if sequence.acquisition is None:
            return
        sequence.take(sequence.acquisition, self._block_size)
        self.made(sequence, 0, sequence.num_committed)
        self._loading.remove(sequence)
        insort(self._running, sequence, key=_rank)

    def made(self, sequence: Sequence, start: int, stop: int) -> None:
        """Blocks `start` to `stop` of a sequence are findable now: nobody need wait for them any more."""
        for name in sequence.hashes[start:stop]:
            if self._in_the_making.get(name) is sequence:
                del self._in_the_making[name]

    def _grow(self, sequence: Sequence, length: int, lengths: dict[Sequence, int]) -> bool:
        """Give it blocks for that many more tokens, from those below it if need be; False when it must wait."""
        tokens = sequence.num_computed + length
        count = -(-tokens // self._block_size) - len(sequence.block_table)
        if count <= 0:
            return True
        while (blocks := self._store.allocate(count)) is None:
            if self._tails.give_up_one(self._running, sequence.rank):
                continue
            if self.is_ahead:
                self.is_starved = True
                return False
            victim = self._last_holder()
            if victim is None or victim.rank <= sequence.rank:
                return False
            self._preempt(victim)
            lengths.pop(victim, None)
        sequence.block_table += blocks
        return True

    def _last_holder(self) -> Sequence | None:
        """The lowest in rank among those that hold blocks."""
        loading = (each for each in self._loading if each.acquisition is not None and each.acquisition.block_ids)
        holders = [*loading, *(sequence for sequence in self._running if sequence.block_table)]
        return max(holders, key=_rank, default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        group = self._running if sequence in self._running else self._loading
        group.remove(sequence)
        insort(self._waiting, sequence, key=_rank)
        self._short_of_blocks = True
        self.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.acquisition is not None:
            sequence.acquisition.cancel()
        if sequence.tail is not None:
            sequence.tail.cancel()
        self._store.release(sequence.block_table)
        self.made(sequence, 0, len(sequence.hashes))
        sequence.reset()


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
