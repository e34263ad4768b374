"""Hearing how far others are with what they make for us: one thread for each peer that has promised something.

Covers: asking, again and again, until nobody waits any more. Does not cover: whether it is worth waiting
(`kvstore.promised`), reading what was made (`tier`).

A peer is asked about all of its promises in one question, which it answers when one of them changes, or after
`PATIENCE_S`: so a promise that is new waits no longer than that to be asked about, and a peer that makes nothing new
costs forty small frames a second. A connection that breaks, or an answer that is none, breaks the promises of that
peer: it has died, or does not know the question. One that is only silent is asked again: how long to bear with it is
decided by who waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvstore.blocks import BlockHash
from kvstore.errors import MissReason
from kvstore.peer.link import PeerUnavailableError
from kvstore.peer.promises import NOT_BEGUN, Progress, PromiseState

PATIENCE_S = 0.025
MAX_WATCHED = 64  # of one peer

Ask = Callable[[str, Sequence[BlockHash], Sequence[Progress]], list[Progress]]


class Watch:
    """Thread-safe. `ask` is called in the threads of this watch; it raises PeerUnavailableError."""

    def __init__(self, ask: Ask) -> None:
        """Watch nothing yet."""
        self._ask = ask
        self._lock = threading.Lock()
        self._watched: dict[str, dict[BlockHash, Progress]] = {}  # by address; each address has a thread
        self._until: dict[tuple[str, BlockHash], float] = {}  # on the monotonic clock
        self.on_news: Callable[[], None] = _nobody
        self._is_open = True

    def begin(self, address: str, ticket: BlockHash, for_s: float) -> bool:
        """Hear of this promise until `end`, or for so long; False: too many of that peer are heard of already."""
        with self._lock:
            watched = self._watched.get(address)
            if not self._is_open or (watched is not None and len(watched) >= MAX_WATCHED and ticket not in watched):
                return False
            self._until[(address, ticket)] = time.monotonic() + for_s
            if watched is not None:
                watched.setdefault(ticket, NOT_BEGUN)
                return True
            self._watched[address] = {ticket: NOT_BEGUN}
            threading.Thread(target=self._run, args=(address,), name="peer-watch", daemon=True).start()
            return True

    def progress(self, address: str, ticket: BlockHash) -> Progress | None:
        """What was last heard; None: nothing will be heard any more, and what was made before may be all."""
        with self._lock:
            return self._watched.get(address, {}).get(ticket)

    def end(self, address: str, ticket: BlockHash) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._drop(address, ticket)

    def close(self) -> None:
        """Hear of nothing any more; threads end with the questions that they are at."""
        with self._lock:
            self._is_open = False
            for watched in self._watched.values():
                watched.clear()
            self._until.clear()

    def _run(self, address: str) -> None:
        while (asked := self._next(address)) is not None:
            tickets, seen = asked
            try:
                self._heard(address, tickets, self._ask(address, tickets, seen))
            except PeerUnavailableError as fault:
                if fault.reason in (MissReason.DEADLINE, MissReason.BUSY, MissReason.BREAKER):
                    time.sleep(PATIENCE_S)
                else:
                    self._broken(address, tickets)

    def _next(self, address: str) -> tuple[list[BlockHash], list[Progress]] | None:
        """What to ask about; None: nothing, and the thread of that peer ends."""
        now = time.monotonic()
        with self._lock:
            watched = self._watched[address]
            for ticket in [ticket for ticket in watched if self._until[(address, ticket)] <= now]:
                self._drop(address, ticket)
            if not watched:
                del self._watched[address]
                return None
            return list(watched), list(watched.values())

    def _heard(self, address: str, tickets: Sequence[BlockHash], answers: Sequence[Progress]) -> None:
        is_news = False
        with self._lock:
            watched = self._watched[address]
            for ticket, progress in zip(tickets, answers, strict=True):
                if ticket in watched and watched[ticket] != progress:
                    watched[ticket], is_news = progress, True
        if is_news:
            self.on_news()

    def _broken(self, address: str, tickets: Sequence[BlockHash]) -> None:
        with self._lock:
            for ticket in tickets:
                self._drop(address, ticket)
        self.on_news()

    def _drop(self, address: str, ticket: BlockHash) -> None:
        self._watched.get(address, {}).pop(ticket, None)
        self._until.pop((address, ticket), None)


def parsed(answer: object, count: int) -> list[Progress] | None:
    """What a peer said of so many promises; None: it says something else."""
    if not isinstance(answer, list) or len(answer) != count:
        return None
    found: list[Progress] = []
    for each in answer:
        match each:
            case [int(state), int(made), int(before)] if state in (0, 1, 2) and made >= 0 and before >= 0:
                found.append(Progress(PromiseState(state), made, before))
            case _:
                return None
    return found


def _nobody() -> None:
    return
