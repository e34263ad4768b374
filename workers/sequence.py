"""A request under way: its tokens, the names of its blocks, the blocks that it holds, how far it is. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.blocks import BlockHash, block_hashes
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta
from workers.conversations import Turn
from workers.detokenize import TextStream
from workers.protocol import Job
from workers.row_state import RowState

COMPUTED = "computed"
_OUTSIDE = (TierName.DISK, TierName.REDIS, TierName.PEER)  # others may have written what lies there

Rank = tuple[int, int]


class Acquisition(Protocol):
    """A cached prefix on its way to the device; see `kvstore.promotion.Acquisition`."""

    @property
    def done(self) -> bool:
        """Whether what follows is final."""
        ...

    @property
    def block_ids(self) -> list[int]:
        """Device blocks of the prefix, referenced for the caller."""
        ...

    @property
    def fates(self) -> list[TierName]:
        """The tier that each came from."""
        ...

    @property
    def made_elsewhere(self) -> int:
        """Blocks that another worker computed for this very request."""
        ...

    @property
    def load_ms(self) -> float:
        """How long it took."""
        ...

    @property
    def tail(self) -> Tail | None:
        """What comes from the back of the rest meanwhile; None: nothing."""
        ...

    def cancel(self) -> None:
        """Give all blocks back, the tail's too."""
        ...


class Tail(Protocol):
    """The back of a cached prefix on its way to the device; see `kvstore.tail.Tail`."""

    @property
    def stop(self) -> int:
        """The place behind its last block."""
        ...

    @property
    def block_ids(self) -> list[int]:
        """Device blocks that it references now."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to take, and nothing will come."""
        ...

    @property
    def expected(self) -> int:
        """Blocks that need not be computed, as it looks now."""
        ...

    def take(self, place: int) -> tuple[list[int], list[TierName]]:
        """The blocks that are there from `place` on, the caller's from now on, and their tiers."""
        ...

    def reach(self, place: int) -> int | None:
        """How many blocks to compute from `place` on before looking again; None: any number."""
        ...

    def passed(self, place: int) -> None:
        """What lies before this place need not come."""
        ...

    def cancel(self) -> None:
        """Give all blocks back; nothing comes any more."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One job's state.

    Attributes:
        job: as submitted. arrival: 1, 2, 3, ... submitted_at: on the engine's clock.
        token_ids: the prompt and what was generated. hashes: names of its leading full blocks, as far as known.
        text: its answer's text. turn: what it is in its conversation; None: nobody looked.
        acquisition: its cached prefix on the way; None before it was asked for and after it was taken over.
        tail: what comes from the back of its cached prefix while it computes the front; None: nothing.
        joined: places of blocks that were taken over behind others which are not committed yet; None: there are none.
        counts_tail: whether what the tail brings changes the fates: not when it came back from a preemption.
        awaited: a block that another sequence is making and that it waits for.
        ahead: tokens that it will have when the step in flight has ended, where it may go on before that.
        block_table: device blocks that it holds a reference of, in order.
        num_computed: leading tokens whose K/V lie in those blocks. num_committed: leading blocks that need no commit.
        num_cached_tokens: found at first admission. fates: of the prompt, set at first admission; what its
        tail brings then counts as found, and nothing changes them after the first token.
        resumed_fates: likewise of all tokens that a resumed job came with; None for others.
        first_outside: the first block that came from outside of this process; None: none did.
        num_proven: leading blocks over which finite logits were computed for it.
        expected_cached: tokens of the prompt that local tiers held when it came, or will when those before it are
        prefilled; what the load counts until admission.
        first_step_at, first_token_at: when it was first computed, and had its first token; None before.
        load_ms: how long its blocks took to come, the first time.
        row: what its own tokens do to its next logits; None: nothing. It outlives preemption.
    """

    job: Job
    arrival: int
    submitted_at: float
    token_ids: list[int]
    hashes: list[BlockHash]
    text: TextStream
    turn: Turn | None = None
    acquisition: Acquisition | None = None
    tail: Tail | None = None
    joined: tuple[int, int] | None = None
    counts_tail: bool = False
    awaited: BlockHash | None = None
    ahead: int = 0
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_committed: int = 0
    num_cached_tokens: int = 0
    fates: dict[str, int] | None = None
    resumed_fates: dict[str, int] | None = None
    first_outside: int | None = None
    num_proven: int = 0
    expected_cached: int = 0
    first_step_at: float | None = None
    first_token_at: float | None = None
    load_ms: float = 0.0
    row: RowState | None = None

    @property
    def prompt_ids(self) -> Items[int]:
        """What the caller sent; a copy."""
        return self.token_ids[: self.num_prompt]

    @property
    def needs_last_token(self) -> bool:
        """See `SamplingParams.needs_last_token`."""
        return self.job.sampling.needs_last_token

    @property
    def rank(self) -> Rank:
        """Smaller goes first: higher priority, then earlier arrival. No two are equal."""
        return (-self.job.priority, self.arrival)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return self.job.num_prompt

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, those before it was resumed included."""
        return len(self.token_ids) - self.num_prompt

    @property
    def generated_ids(self) -> list[int]:
        """The tokens generated so far; a copy. What follows from them (text, for one) is rebuilt by replay."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_tokens(self) -> int:
        """Tokens that it has, and one more if that is just being sampled and it may go on all the same."""
        return max(len(self.token_ids), self.ahead)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while it decodes, 0 while it awaits its token."""
        return self.num_tokens - self.num_computed

    def readable(self, block_size: int) -> list[BlockHash]:
        """Names of the blocks that it may take from the cache: at least one token stays to be computed."""
        if self.job.no_read:
            return []
        return self.names((len(self.token_ids) - 1) // block_size, block_size)

    def names(self, count: int, block_size: int) -> list[BlockHash]:
        """Names of the first `count` blocks, which must be full of known tokens."""
        if len(self.hashes) < count:
            parent = self.hashes[-1] if self.hashes else self.job.root
            fresh = self.token_ids[len(self.hashes) * block_size : count * block_size]
            self.hashes += block_hashes(fresh, parent, block_size)
        return self.hashes[:count]

    def metas(self, start: int, stop: int, block_size: int, lifetime: Lifetime) -> list[BlockMeta]:
        """What the store must know of blocks `start` to `stop`."""
        names = self.names(stop, block_size)
        parents = [self.job.root, *names]
        told = (self.job.root, lifetime.ttl_s, self.job.keep_priority, lifetime.until, self.job.turn)
        think_s, new_tokens = (None, None) if self.turn is None else (self.turn.think_s, self.turn.new_tokens)
        return [
            BlockMeta(names[i], parents[i], *told, think_s=think_s, new_tokens=new_tokens) for i in range(start, stop)
        ]

    def take(self, acquired: Acquisition, block_size: int) -> None:
        """Take over the blocks that arrived. The first time this settles the fate of every prompt token."""
        self.acquisition, self.tail, self.counts_tail = None, acquired.tail, self.fates is None
        self.block_table = list(acquired.block_ids)
        self.num_committed = len(self.block_table)
        self.num_computed = self.num_committed * block_size
        self.first_outside = next((place for place, tier in enumerate(acquired.fates) if tier in _OUTSIDE), None)
        if self.fates is None:
            self.load_ms = acquired.load_ms
            self.num_cached_tokens = self.num_computed
            self.fates = _fates(acquired.fates, self.num_prompt, block_size)
            # What another worker made for this request took this request's own forward.
            made = acquired.made_elsewhere * block_size
            self.fates = _as_computed(self.fates, made)
            if self.job.resumed:
                self.resumed_fates = _as_computed(_fates(acquired.fates, len(self.job.token_ids), block_size), made)

    def join(self, block_ids: Items[int], tiers: Items[TierName], block_size: int) -> None:
        """Take over blocks of its tail, which follow what is computed; its table ends there."""
        start = self.num_computed // block_size
        stop = start + len(block_ids)
        self.block_table += block_ids
        self.num_computed = stop * block_size
        if self.num_committed == start:
            self.num_committed = stop
        else:
            self.joined = start, stop
        if self.first_outside is None:
            self.first_outside = next((start + at for at, tier in enumerate(tiers) if tier in _OUTSIDE), None)
        if self.counts_tail:
            _found_later(self.fates, tiers, start, self.num_prompt, block_size)
            _found_later(self.resumed_fates, tiers, start, len(self.job.token_ids), block_size)

    def unjoin(self, block_size: int) -> list[int]:
        """What is computed ends before blocks that were taken over: those from there on are the caller's to give back.

        They were found all the same, and count as such.
        """
        if self.joined is None or self.joined[0] * block_size <= self.num_computed:
            return []
        start = self.joined[0]
        self.block_table, lost = self.block_table[:start], self.block_table[start:]
        self.joined = None
        return lost

    def committed(self, stop: int) -> None:
        """Its blocks up to `stop` are committed, and those that were taken over behind them."""
        self.num_committed = stop
        if self.joined is not None and self.joined[0] == stop:
            self.num_committed, self.joined = self.joined[1], None

    def reset(self) -> None:
        """Forget blocks and progress; the caller has given the blocks back."""
        self.acquisition = self.tail = self.joined = None
        self.block_table = []
        self.num_computed = self.num_committed = self.num_proven = self.ahead = 0


def _fates(tiers: list[TierName], tokens: int, block_size: int) -> dict[str, int]:
    """Of so many leading tokens, where blocks came from these tiers; the last block may reach behind them."""
    fates, left = {COMPUTED: 0}, tokens
    for tier in tiers:
        found = min(block_size, left)
        if found:
            fates[tier.value] = fates.get(tier.value, 0) + found
        left -= found
    fates[COMPUTED] = left
    return fates


def _found_later(fates: dict[str, int] | None, tiers: Items[TierName], start: int, tokens: int, size: int) -> None:
    """Of so many leading tokens, blocks from block `start` on were not computed but came from these tiers."""
    for place, tier in enumerate(tiers, start):
        found = min(size, tokens - place * size)
        if fates is not None and found > 0:
            fates[tier.value] = fates.get(tier.value, 0) + found
            fates[COMPUTED] -= found


def _as_computed(fates: dict[str, int], made: int) -> dict[str, int]:
    """The same, where so many of the tokens that came from a peer were computed there for this request."""
    made = min(made, fates.get(TierName.PEER.value, 0))
    if not made:
        return fates
    changed = {**fates, TierName.PEER.value: fates[TierName.PEER.value] - made, COMPUTED: fates[COMPUTED] + made}
    return {tier: tokens for tier, tokens in changed.items() if tokens or tier == COMPUTED}
