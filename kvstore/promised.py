"""Waiting for blocks that another worker is making right now, for as long as that is sooner than making them here.

A promise comes with a job: who makes how many leading blocks of its prompt, and when they should be there. An
acquisition takes what is at hand, and instead of ending there it is kept: whenever the maker tells of more blocks, they
are hinted at as any others in tier `peer` are, and read as those. There is no other way in which blocks travel.

How long to wait. Say that computing the blocks that are missing would take C here. With the margin m that the router
grants (what computing here would cost others, or by how much the plan itself is later than computing here) and the
store's slack s, waiting ends as soon as one of these is true:

- nothing new came for C + m + s: whoever has waited in vain for as long as the work would have taken is at most twice
  as late (the ski-rental argument; Karlin et al. 1988);
- at the pace of what came, the rest would take longer than C + m + s;
- twice the planned time, m and s have passed since the start, whatever came meanwhile;
- the maker has ended, is not there any more, or what it said it has made could not be read.

Then the rest is computed: a promise that is broken is a miss. C is not known before a prefill was measured; then only
the last two count. Covers: which acquisitions wait, and until when. Does not cover: hearing of progress (`peer.watch`),
reading (`loading`). Owned by the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.acquisition import Acquisition, Promise
from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.tier import Clock, HintedTier

MAX_PROMISES = 256  # that jobs brought and no acquisition has taken up yet; the oldest are forgotten


@dataclass(slots=True, eq=False)
class _Wait:
    """An acquisition that waits for its promise.

    Attributes:
        told: leading blocks of which the maker has said that they are there. news_at, first_at, first: when it said so
        last, when first, and how many it were then.
        is_parked: nothing of it is on its way.
    """

    acquisition: Acquisition
    promise: Promise
    news_at: float
    told: int = 0
    first_at: float = 0.0
    first: int = 0
    is_parked: bool = False


class Promised:
    """The acquisitions of a store that wait for other workers' prefills."""

    def __init__(self, tier: HintedTier | None, *, clock: Clock, slack_s: float, on_news: Callable[[], None]) -> None:
        """`tier`: where what is made is read; None: nothing is ever waited for. `on_news`: wakes the engine."""
        self._tier, self._clock, self._slack_s = tier, clock, slack_s
        self._open: dict[BlockHash, Promise] = {}  # by ticket, as jobs brought them
        self._waits: dict[Acquisition, _Wait] = {}
        if tier is not None:
            tier.watch.on_news = on_news

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waits)

    def learn(self, promise: Promise) -> None:
        """A job came with this; who acquires its blocks from now on waits for it."""
        if self._tier is None or not self._tier.watch.begin(promise.address, promise.ticket, promise.longest_s):
            return
        self._open.pop(promise.ticket, None)
        self._open[promise.ticket] = promise
        while len(self._open) > MAX_PROMISES:
            ticket, old = next(iter(self._open.items()))
            del self._open[ticket]
            self._tier.watch.end(old.address, ticket)

    def begin(self, acquisition: Acquisition) -> None:
        """An acquisition has started: if its blocks are promised, it may wait for them."""
        if not self._open or not acquisition.wish.reads.allows(TierName.PEER):
            return
        promise = next((self._open[name] for name in reversed(acquisition.wish.hashes) if name in self._open), None)
        if promise is not None and acquisition.started < promise.learnt_at + promise.longest_s:
            self._waits[acquisition] = _Wait(acquisition, promise, max(promise.learnt_at, acquisition.started))

    def knows(self, acquisition: Acquisition) -> bool:
        """Whether blocks of it are promised."""
        return acquisition in self._waits

    def holds(self, acquisition: Acquisition) -> bool:
        """Whether it is to wait though nothing of it is on its way now."""
        wait = self._waits.get(acquisition)
        if wait is None:
            return False
        position = acquisition.position
        if acquisition.is_cut or position >= wait.promise.blocks or position < wait.told:
            self._end(wait)
            return False
        wait.is_parked = True
        return True

    def due(self) -> list[Acquisition]:
        """Those that are to go on now: more was made, or they have waited long enough."""
        if not self._waits or self._tier is None:
            return []
        now, ready = self._clock(), []
        for wait in list(self._waits.values()):
            if wait.acquisition.cancelled:
                self._end(wait)
                continue
            is_over = self._listen(wait, now, self._tier)
            if is_over and wait.is_parked:
                self._end(wait)
            if wait.is_parked and (is_over or wait.told > wait.acquisition.position):
                wait.is_parked = False
                ready.append(wait.acquisition)
        return ready

    def broken(self, address: str, ticket: BlockHash) -> None:
        """The maker has failed at these blocks: wait for no more of them. None promised there: nothing happens.

        Jobs of several prompts may wait for one ticket: they all compute, though another job may still be making it.
        """
        promise = self._open.get(ticket)
        if promise is None or promise.address != address or self._tier is None:
            return
        now = self._clock()
        for wait in self._waits.values():
            if wait.promise is promise:
                self._listen(wait, now, self._tier)  # what was heard of before is still read
        self._forget(ticket)

    def cut(self) -> None:
        """Blocks were cleared: wait for nothing that was promised before."""
        for wait in list(self._waits.values()):
            wait.acquisition.is_cut = True
        for ticket in list(self._open):
            self._forget(ticket)

    def close(self) -> list[Acquisition]:
        """Wait for nothing any more; those that nothing else is on its way for."""
        waits, self._waits = list(self._waits.values()), {}
        for ticket in list(self._open):
            self._forget(ticket)
        return [wait.acquisition for wait in waits if wait.is_parked and not wait.acquisition.cancelled]

    def _listen(self, wait: _Wait, now: float, tier: HintedTier) -> bool:
        """Take in what the maker has said; whether there is nothing more to wait for."""
        acquisition, promise = wait.acquisition, wait.promise
        progress = tier.watch.progress(promise.address, promise.ticket)
        if progress is None or acquisition.is_cut:
            return True
        made = min(progress.made, promise.blocks)
        if made > wait.told:
            first = min(acquisition.position, made)
            tier.hint(acquisition.wish.hashes[first:made], promise.address)
            if not wait.told:
                acquisition.promised_from, wait.first_at, wait.first = progress.found, now, made
            wait.told, wait.news_at = made, now
            return False
        return progress.is_over or self._is_too_long(wait, now)

    def _is_too_long(self, wait: _Wait, now: float) -> bool:
        promise, acquisition = wait.promise, wait.acquisition
        if now >= promise.learnt_at + promise.longest_s:
            return True
        left = promise.blocks - wait.told
        rest_ms = acquisition.wish.price(wait.told, left) if left else None
        if rest_ms is None:
            return False
        all_ms = acquisition.wish.price(0, promise.blocks) or 0.0
        later_ms = max(0.0, promise.ready_ms - all_ms)  # the plan itself is: it was found to be the better one
        return waits_too_long(
            silent_s=now - wait.news_at,
            pace_s=(wait.news_at - wait.first_at) / (wait.told - wait.first) if wait.told > wait.first else 0.0,
            left=left,
            most_s=(rest_ms + promise.margin_ms + later_ms) / 1e3 + self._slack_s,
        )

    def _end(self, wait: _Wait) -> None:
        del self._waits[wait.acquisition]
        if all(other.promise is not wait.promise for other in self._waits.values()):
            self._forget(wait.promise.ticket)

    def _forget(self, ticket: BlockHash) -> None:
        promise = self._open.pop(ticket, None)
        if promise is not None and self._tier is not None:
            self._tier.watch.end(promise.address, ticket)


def waits_too_long(*, silent_s: float, pace_s: float, left: int, most_s: float) -> bool:
    """Whether to wait no longer for `left` blocks that come at `pace_s` each (0: not known), the last news of which is
    `silent_s` old, when waiting for them is worth `most_s`."""
    return silent_s > most_s or pace_s * left > most_s


def promise_of(
    hashes: Sequence[BlockHash], address: str, blocks: int, *, ready_ms: float, margin_ms: float, now: float
) -> Promise | None:
    """A promise as a job tells it; None: it promises nothing, or what the prompt has not."""
    if not 0 < blocks <= len(hashes) or not address or min(ready_ms, margin_ms) < 0:
        return None
    return Promise(address, hashes[blocks - 1], blocks, ready_ms, margin_ms, now)
