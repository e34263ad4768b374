"""What operators ask of the cache: list, count, warm, pin, unpin, check.

Covers: turning their requests into orders for workers, and the workers' answers into theirs. Does not cover: clearing
(`operators`), which blocks a request means (`cache_scope`), pages of them (`cache_listing`), who may (`service`),
sending (`cache_orders`), what a worker does with an order (the worker).

A worker that cannot do its part is named in the answer with the reason; only where none could is the call an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from kvstore.blocks import BlockHash
from router import cache_orders
from router.audit import audited
from router.cache_listing import CacheListing
from router.cache_orders import MAX_BLOCKS
from router.cache_pages import page_size, place_of
from router.cache_scope import Scope, Scopes
from router.decide import Decider
from router.errors import InvalidRequest
from router.fleet import Fleet
from router.index import PrefixIndex
from router.link import WorkerLink
from router.prepare import Preparer
from router.protocol import Caller
from router.warming import Warming
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2

_MAX_PIN_S = 365 * 86_400
_Counts = list[admin_pb2.ClearCacheResponse.TierCount]


class CacheAdmin:
    """Satisfies `router.protocol.CacheApi`."""

    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        preparer: Preparer,
        decider: Decider,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._fleet = fleet
        self._scopes = Scopes(preparer)
        self._listing = CacheListing(fleet, index, preparer)
        self._warming = Warming(fleet, preparer, decider, wall_clock=wall_clock)

    async def list_blocks(
        self, request: admin_pb2.ListBlocksRequest, *, caller: Caller
    ) -> admin_pb2.ListBlocksResponse:
        """A page of blocks. Raises InvalidRequest, WorkerNotFound, NoWorkerAvailable, WorkerLost."""
        with audited("list_blocks", caller, of_tenant=request.tenant) as said:
            size, place = page_size(request), place_of(request)
            if request.tier not in common_pb2.Tier.values():
                raise InvalidRequest(f"There is no tier {request.tier}; name one of the contract's, or none.")
            scope = await self._scopes.of(request.tenant, request, caller)
            said["scope"] = str(scope)
            links = cache_orders.named(self._fleet, [request.worker] if request.worker else [])
            answer = await self._listing.page(request, scope, links, place, size)
            if scope.names:
                answer.prompt_held.CopyFrom(self._listing.held(scope.names, request.tenant or caller.tenant))
            return answer

    def stats(self, request: admin_pb2.GetCacheStatsRequest, *, caller: Caller) -> admin_pb2.GetCacheStatsResponse:
        """What workers reported last. Raises WorkerNotFound."""
        with audited("cache_stats", caller, of_worker=request.worker):
            if not request.worker:
                return self.tiers()
            return admin_pb2.GetCacheStatsResponse(workers=[self._worker_cache(self._fleet.link(request.worker))])

    def tiers(self) -> admin_pb2.GetCacheStatsResponse:
        """What all workers reported last. Not logged: pages ask for it every other second."""
        return admin_pb2.GetCacheStatsResponse(workers=[self._worker_cache(link) for link in self._fleet.links()])

    async def warm(self, request: admin_pb2.WarmRequest, *, caller: Caller) -> admin_pb2.WarmResponse:
        """See `Warming.warm`."""
        with audited("warm", caller, of_tenant=request.tenant, compute=request.compute) as said:
            answer = await self._warming.warm(request, caller=caller)
            said["blocks"], said["workers"] = answer.blocks, _outcomes(answer.workers)
            return answer

    async def pin(self, request: admin_pb2.PinRequest, *, caller: Caller) -> admin_pb2.PinResponse:
        """Forbid to drop blocks. Raises InvalidRequest, WorkerNotFound, NoWorkerAvailable, WorkerLost."""
        with audited("pin", caller, of_tenant=request.tenant) as said:
            if request.HasField("seconds") and not 1 <= request.seconds <= _MAX_PIN_S:
                raise InvalidRequest(
                    f"seconds is {request.seconds}; set 1 to {_MAX_PIN_S:,}, or leave it out to pin until Unpin.",
                    field="seconds",
                )
            for_ms = request.seconds * 1000 if request.HasField("seconds") else None
            scope = await self._scopes.narrow(request.tenant, request, caller)
            said["scope"], said["seconds"] = str(scope), request.seconds if for_ms else None
            links = cache_orders.named(self._fleet, request.workers)

            def order(hashes: bytes, after: bytes) -> worker_pb2.CacheCommand:
                pin = worker_pb2.CacheCommand.Pin(hashes=hashes, chain_root=scope.root or b"", after=after)
                if for_ms is not None:
                    pin.for_ms = for_ms
                return worker_pb2.CacheCommand(pin=pin)

            async def one(link: WorkerLink) -> admin_pb2.PinResponse.Pinned:
                counts, problem = await _in_pieces(link, scope, order)
                return admin_pb2.PinResponse.Pinned(worker=link.name, pinned=counts, problem=problem)

            answer = admin_pb2.PinResponse(workers=await cache_orders.each(self._fleet, links, one, _pinned_nothing))
            said["workers"] = _outcomes(answer.workers)
            return answer

    async def unpin(self, request: admin_pb2.UnpinRequest, *, caller: Caller) -> admin_pb2.UnpinResponse:
        """End pins. Raises InvalidRequest, WorkerNotFound, NoWorkerAvailable, WorkerLost."""
        with audited("unpin", caller, of_tenant=request.tenant) as said:
            scope = await self._scopes.narrow(request.tenant, request, caller)
            said["scope"] = str(scope)
            links = cache_orders.named(self._fleet, request.workers)

            def order(hashes: bytes, after: bytes) -> worker_pb2.CacheCommand:
                unpin = worker_pb2.CacheCommand.Unpin(hashes=hashes, chain_root=scope.root or b"", after=after)
                return worker_pb2.CacheCommand(unpin=unpin)

            async def one(link: WorkerLink) -> admin_pb2.UnpinResponse.Unpinned:
                counts, problem = await _in_pieces(link, scope, order)
                return admin_pb2.UnpinResponse.Unpinned(worker=link.name, unpinned=counts, problem=problem)

            told = await cache_orders.each(self._fleet, links, one, _unpinned_nothing)
            said["workers"] = _outcomes(told)
            return admin_pb2.UnpinResponse(workers=told)

    async def check(self, request: admin_pb2.CheckStoreRequest, *, caller: Caller) -> admin_pb2.CheckStoreResponse:
        """Audit stores. Raises WorkerNotFound, NoWorkerAvailable, WorkerLost."""
        with audited("check", caller) as said:
            links = cache_orders.named(self._fleet, request.workers)
            told = await cache_orders.each(self._fleet, links, _check, _not_checked)
            said["workers"] = {each.worker: each.problem or each.wrong or "OK" for each in told}
            return admin_pb2.CheckStoreResponse(workers=told)

    # Inside

    def _worker_cache(self, link: WorkerLink) -> admin_pb2.WorkerCache:
        cache = admin_pb2.WorkerCache(worker=link.name, state=self._fleet.state(link), problem=link.problem)
        if link.report is not None and link.connected:
            cache.tiers.extend(_tier_cache(tier) for tier in link.report.message.tiers)
        return cache


async def _in_pieces(
    link: WorkerLink, scope: Scope, order: Callable[[bytes, bytes], worker_pb2.CacheCommand]
) -> tuple[_Counts, str]:
    """Give an order for all blocks of a scope, piece by piece; blocks by tier, and what went wrong."""
    counts: dict[common_pb2.Tier.ValueType, int] = {}
    pieces, after = list(_pieces(scope.names)), b""
    while True:
        done = await cache_orders.ask(link, order(pieces.pop(0) if pieces else b"", after))
        for count in done.counts:
            counts[count.tier] = counts.get(count.tier, 0) + count.blocks
        after = done.next
        if done.error or not (pieces or after):
            break
    told = [admin_pb2.ClearCacheResponse.TierCount(tier=tier, blocks=n) for tier, n in sorted(counts.items())]
    return told, done.error


def _pieces(names: Sequence[BlockHash]) -> Iterator[bytes]:
    for start in range(0, len(names), MAX_BLOCKS):
        yield b"".join(names[start : start + MAX_BLOCKS])


async def _check(link: WorkerLink) -> admin_pb2.CheckStoreResponse.Checked:
    command = worker_pb2.CacheCommand(check=worker_pb2.CacheCommand.Check())
    done = await cache_orders.ask(link, command)
    return admin_pb2.CheckStoreResponse.Checked(worker=link.name, wrong=done.wrong, problem=done.error)


def _not_checked(worker: str, problem: str) -> admin_pb2.CheckStoreResponse.Checked:
    return admin_pb2.CheckStoreResponse.Checked(worker=worker, problem=problem)


def _pinned_nothing(worker: str, problem: str) -> admin_pb2.PinResponse.Pinned:
    return admin_pb2.PinResponse.Pinned(worker=worker, problem=problem)


def _unpinned_nothing(worker: str, problem: str) -> admin_pb2.UnpinResponse.Unpinned:
    return admin_pb2.UnpinResponse.Unpinned(worker=worker, problem=problem)


def _tier_cache(tier: worker_pb2.TierLoad) -> admin_pb2.TierCache:
    return admin_pb2.TierCache(
        tier=tier.tier,
        used_bytes=tier.used_bytes,
        capacity_bytes=tier.capacity_bytes,
        blocks=tier.blocks,
        pinned=tier.leased,
        hits=tier.hits,
        misses=tier.misses,
        stores=tier.stores,
        store_failures=tier.store_failures,
        removals=tier.removals,
        read_bytes=tier.read_bytes,
        written_bytes=tier.written_bytes,
        read_block_ms=tier.read_block_ms,
        healthy=tier.healthy,
        problem=tier.problem,
        loads=tier.loads,
        bad_hits=tier.bad_hits,
        load_ms=tier.load_ms,
        compute_ms=tier.compute_ms,
    )


def _outcomes(told: Sequence[cache_orders.Told]) -> dict[str, str]:
    return {each.worker: each.problem or "OK" for each in told}
