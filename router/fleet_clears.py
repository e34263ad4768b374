"""Clearing blocks on a whole fleet, and what of it is still owed when a worker could not be asked.

Covers: the rounds of a clear, its mark in the fleet record, the shared tier's part, holds of peers. Does not cover: who
owes which past clear (`owed_clears`), which are worth remembering (`kvstore.past_clears`), the stream (`link`). Owned
by the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Protocol

from kvstore.past_clears import PastClear, merged
from router.errors import NoWorkerAvailable, WorkerLost
from router.fleet_record import FleetRecord
from router.link import WorkerLink
from router.owed_clears import OwedClears
from warmkv.v1 import worker_pb2

CLEAR_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class Clearable(Protocol):
    """The fleet that is cleared."""

    record: FleetRecord

    def links(self) -> list[WorkerLink]:
        """All of them, sorted by name."""
        ...

    def listed(self) -> list[WorkerLink]:
        """Those that discovery names; of one that it does not nobody can say when it is back."""
        ...

    def tell(self, record: FleetRecord) -> None:
        """Put it in force and tell every worker."""
        ...


class FleetClears:
    """The clears of one fleet."""

    def __init__(self, fleet: Clearable, router: str, wall_clock: Callable[[], float]) -> None:
        """`router`: the name under which this one's clears are remembered. `wall_clock`: seconds since the epoch."""
        self._fleet, self._router, self._wall_clock = fleet, router, wall_clock
        self._owed = OwedClears(self._confirmed_late)
        self._shared_debts: list[worker_pb2.Clear] = []
        self._paying: set[tuple[str, bytes]] = set()  # worker, debt
        self._holds = count(1)

    @property
    def shared_debts(self) -> int:
        """Clears of the shared tier that no worker has confirmed."""
        return len(self._shared_debts)

    async def clear(self, request: worker_pb2.Clear, *, shared_tier: bool) -> dict[str, worker_pb2.ClearDone]:
        """Drop blocks on every worker, and on one of them those of the shared tier; what each dropped.

        The fleet remembers it: a worker that did not confirm, or that no router knows yet, is cleared before its first
        job when it is heard of, whichever router that is; the shared tier by the first worker that can.

        Raises:
            NoWorkerAvailable: none is connected. WorkerLost: some did not confirm; names them. Clearing again is safe.
        """
        links = self._fleet.links()
        up = [link for link in links if link.connected]
        away = {link.name for link in links if link.was_up and not link.connected}
        clear = self._remember(request)
        self._owed.leave(clear, [link.name for link in up])
        self.ask(link for link in links if not link.connected)
        if shared_tier:
            self._owe_shared(request)
        if not up:
            raise NoWorkerAvailable(
                "No worker is connected, so nothing was cleared yet; clear again when one is.", retry_after_s=1.0
            )
        answers: dict[str, worker_pb2.ClearDone] = {}
        try:
            answers = await self._clear_all(up, request, shared_tier=shared_tier, hold=self._hold(clear, up))
        finally:
            self._owed.take(clear, [link.name for link in up])
            self._confirmed(clear, [name for name, answer in answers.items() if not answer.error])
        problems = {link.name: "it is lost" for link in self._fleet.listed() if link.name in away}
        problems |= {name: answer.error for name, answer in answers.items() if answer.error}
        if problems:
            raise _not_confirmed(problems)
        return answers

    def ask(self, links: Iterable[WorkerLink]) -> None:
        """Ask each of these workers for the past clears that it owes."""
        for link in links:
            self._owed.ask(link, self._fleet.record.clears)

    def joined(self, link: WorkerLink) -> None:
        """A worker has connected: it is told what is owed."""
        self.ask([link])
        self.found_shared_tier(link)

    def found_shared_tier(self, link: WorkerLink) -> None:
        """Have a worker clear the shared tier where that is owed, if it has one."""
        if link.has_shared_tier:
            for debt in self._shared_debts:
                self._pay(link, debt)

    def release_peers(self) -> None:
        """End the holds of clears that all have confirmed who may be asked for blocks."""
        listed = [link.name for link in self._fleet.listed() if link.was_up]
        for hold in self._owed.settled_holds(self._fleet.record.clears, listed):
            for link in self._fleet.links():
                link.release_peers(hold)

    def forget(self, worker: str) -> None:
        """Its link is gone, and with it what that was asked."""
        self._owed.forget(worker)
        self._paying = {paying for paying in self._paying if paying[0] != worker}

    # The rounds

    async def _clear_all(
        self, up: Sequence[WorkerLink], request: worker_pb2.Clear, *, shared_tier: bool, hold: int
    ) -> dict[str, worker_pb2.ClearDone]:
        """What each worker dropped, with `error` where it did not confirm."""
        # First everybody drops what it was about to write there; only then can the shared tier be emptied for good.
        local = _clear_request(request, shared=False)
        local.peers_hold = hold
        done = await asyncio.gather(*(self._clear_one(link, local) for link in up))
        answers = {link.name: answer for link, answer in zip(up, done, strict=True)}
        shared_by = next((link for link in up if shared_tier and link.has_shared_tier), None)
        if shared_by is not None:
            answer = answers[shared_by.name]
            answer.MergeFrom(_shared_part(await self._clear_one(shared_by, _clear_request(request, shared=True))))
            # What somebody read from there between the two has gone up again.
            again = await asyncio.gather(*(self._clear_one(link, local) for link in up))
            for link, more in zip(up, again, strict=True):
                _add_dropped(answers[link.name], more)
        return answers

    async def _clear_one(self, link: WorkerLink, request: worker_pb2.Clear) -> worker_pb2.ClearDone:
        """Its answer, with `error` set where it gave none in time."""
        try:
            async with asyncio.timeout(CLEAR_TIMEOUT_S):
                done = await link.clear(request)
        except TimeoutError:
            return worker_pb2.ClearDone(error=f"no answer within {CLEAR_TIMEOUT_S:.0f} s")
        if request.shared_tier and not done.error:
            self._paid(request)
        return done

    def _hold(self, clear: PastClear, up: Sequence[WorkerLink]) -> int:
        """The number of a new hold; zero: nobody reads from others.

        Until the last worker is cleared its blocks could be read by those that were cleared before it.
        """
        if not any(link.hello and link.hello.peer_address for link in up):
            return 0
        hold = next(self._holds)
        self._owed.hold(hold, clear)
        return hold

    # Its mark in the record

    def _remember(self, request: worker_pb2.Clear) -> PastClear:
        """Note a clear that begins; the others hear of it when this router knows who has carried it out."""
        record = self._fleet.record
        last = max((clear.number for clear in record.clears), default=0)
        number = max(last + 1, int(self._wall_clock() * 1000))
        clear = PastClear(number, self._router, request.chain_root, request.prefix_hash)
        self._fleet.record = record.with_clears(merged(record.clears, [clear]))
        return clear

    def _confirmed_late(self, clear: PastClear, worker: str) -> None:
        log.info("a worker that was away is cleared", extra={"worker": worker, "author": clear.author})
        self._confirmed(clear, [worker])

    def _confirmed(self, clear: PastClear, workers: Iterable[str]) -> None:
        """Tell the fleet who has carried out a clear, unless a younger one has taken its place."""
        record = self._fleet.record
        clears = [one.confirmed_by(workers) if one.key == clear.key else one for one in record.clears]
        self._fleet.tell(record.with_clears(clears))

    # The shared tier

    def _owe_shared(self, request: worker_pb2.Clear) -> None:
        """Keep it until a worker confirmed that the shared tier is clear; no fleet without one owes it."""
        debt = _clear_request(request, shared=True)
        known = any(link.has_shared_tier for link in self._fleet.links())
        if known and debt not in self._shared_debts:
            self._shared_debts.append(debt)

    def _pay(self, link: WorkerLink, debt: worker_pb2.Clear) -> None:
        """Once: the link asks each incarnation for it until one answers."""
        paying = (link.name, debt.SerializeToString(deterministic=True))
        if paying in self._paying:
            return
        self._paying.add(paying)

        def answered(done: asyncio.Future[worker_pb2.ClearDone]) -> None:
            self._paying.discard(paying)
            if not done.cancelled() and not done.result().error:
                self._paid(debt)

        link.owe_clear(debt).add_done_callback(answered)

    def _paid(self, debt: worker_pb2.Clear) -> None:
        if debt in self._shared_debts:
            self._shared_debts.remove(debt)


def confirmed_since(before: FleetRecord, after: FleetRecord) -> set[str]:
    """Workers that have carried out a clear, as the later record tells and the earlier one did not."""
    known = {(clear.key, worker) for clear in before.clears for worker in clear.confirmed}
    told = {(clear.key, worker) for clear in after.clears for worker in clear.confirmed}
    return {worker for _, worker in told - known}


def _add_dropped(total: worker_pb2.ClearDone, more: worker_pb2.ClearDone) -> None:
    total.device += more.device
    total.host += more.host
    total.disk += more.disk
    total.error = total.error or more.error


def _shared_part(done: worker_pb2.ClearDone) -> worker_pb2.ClearDone:
    """What a second clear of the same worker adds to the answer of the first."""
    return worker_pb2.ClearDone(redis=done.redis, error=done.error)


def _clear_request(request: worker_pb2.Clear, *, shared: bool) -> worker_pb2.Clear:
    one = worker_pb2.Clear()
    one.CopyFrom(request)
    one.shared_tier = shared
    return one


def _not_confirmed(problems: Mapping[str, str]) -> WorkerLost:
    """`problems`: by worker, why it did not confirm a clear."""
    told = "; ".join(f"{name}: {why}" for name, why in sorted(problems.items()))
    return WorkerLost(
        f"Not every worker confirmed that it cleared everything ({told}); clear again when they are back.",
        workers=",".join(sorted(problems)),
    )
