"""What operators ask of the cache: list, count, warm, pin, unpin, check.

Covers: turning their requests into orders for workers, and the workers' answers into theirs. Does not cover: clearing
(`operators`), who may (`service`), sending (`cache_orders`), what a worker does with an order (the worker).

A worker that cannot do its part is named in the answer with the reason; only where none could is the call an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, short
from router import cache_orders
from router.audit import audited
from router.cache_orders import MAX_BLOCKS
from router.cache_pages import Place, page_size, place_of, shown, token_of
from router.decide import Decider
from router.errors import InvalidRequest
from router.fleet import Fleet
from router.index import PrefixIndex
from router.link import WorkerLink
from router.prepare import Preparer
from router.protocol import Caller
from router.warming import Warming
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2

_MAX_ROUNDS = 20  # questions for one page: few blocks may match, and a caller wants to hear something
_MAX_PIN_S = 365 * 86_400
_Counts = list[admin_pb2.ClearCacheResponse.TierCount]


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose blocks, and of which prompt. `root` None: everybody's. `names`: of the prompt's full blocks; none: any."""

    root: BlockHash | None
    names: Sequence[BlockHash] = ()

    def __str__(self) -> str:
        if self.names:
            return f"{len(self.names)} blocks up to {short(self.names[-1]).hex()}"
        return "all blocks" if self.root is None else "all blocks of the tenant"


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
        self._index = index
        self._preparer = preparer
        self._warming = Warming(fleet, preparer, decider, wall_clock=wall_clock)

    async def list_blocks(
        self, request: admin_pb2.ListBlocksRequest, *, caller: Caller
    ) -> admin_pb2.ListBlocksResponse:
        """A page of blocks. Raises InvalidRequest, WorkerNotFound, NoWorkerAvailable, WorkerLost."""
        with audited("list_blocks", caller, of_tenant=request.tenant) as said:
            size, place = page_size(request), place_of(request)
            if request.tier not in common_pb2.Tier.values():
                raise InvalidRequest(f"There is no tier {request.tier}; name one of the contract's, or none.")
            scope = await self._scope(request.tenant, request, caller)
            said["scope"] = str(scope)
            links = cache_orders.named(self._fleet, [request.worker] if request.worker else [])
            answer = await self._page(request, scope, links, place, size)
            if scope.names:
                answer.prompt_held.CopyFrom(self._held(scope.names, request.tenant or caller.tenant))
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
            scope = await self._narrow_scope(request.tenant, request, caller)
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
            scope = await self._narrow_scope(request.tenant, request, caller)
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

    async def _scope(
        self,
        tenant: str,
        request: admin_pb2.ListBlocksRequest | admin_pb2.PinRequest | admin_pb2.UnpinRequest,
        caller: Caller,
    ) -> Scope:
        if request.HasField("prompt"):
            whose = self._preparer.caller_for(tenant, caller)
            prepared = await self._preparer.prepare(request.prompt, whose, common_pb2.CacheDirectives(), deadline=None)
            return Scope(prepared.root, full_blocks(prepared.names, prepared.question.block_size))
        return Scope(self._preparer.root_of_tenant(tenant)[0] if tenant else None)

    async def _narrow_scope(
        self, tenant: str, request: admin_pb2.PinRequest | admin_pb2.UnpinRequest, caller: Caller
    ) -> Scope:
        if not tenant and not request.HasField("prompt"):
            raise InvalidRequest("Neither a tenant nor a prompt is given; set one of them, or both.")
        return await self._scope(tenant, request, caller)

    async def _page(
        self,
        request: admin_pb2.ListBlocksRequest,
        scope: Scope,
        links: Sequence[WorkerLink],
        place: Place,
        size: int,
    ) -> admin_pb2.ListBlocksResponse:
        answer = admin_pb2.ListBlocksResponse()
        rounds = 0
        answered = False
        for link in (link for link in links if link.name >= place.worker):
            after = place.after if link.name == place.worker else b""
            problem = cache_orders.absence(self._fleet, link)
            while not problem:
                if len(answer.blocks) >= size or rounds >= _MAX_ROUNDS:
                    answer.next_page_token = token_of(Place(link.name, after), request)
                    return answer
                rounds += 1
                done = await cache_orders.ask(link, _listing(scope, request.tier, after, size - len(answer.blocks)))
                problem = done.error
                if not problem:
                    answered = True
                    after = self._add(answer, link, done, scope, size)
                if not after:
                    break
            if problem:
                answer.problems.append(admin_pb2.WorkerProblem(worker=link.name, problem=problem))
        if answer.problems and not answered and not place.worker:
            raise cache_orders.nobody({each.worker: each.problem for each in answer.problems})
        return answer

    def _add(
        self,
        answer: admin_pb2.ListBlocksResponse,
        link: WorkerLink,
        done: worker_pb2.CacheDone,
        scope: Scope,
        size: int,
    ) -> bytes:
        """Append what fits of a worker's blocks; behind which one to go on, empty: there are no more."""
        room = size - len(answer.blocks)
        taken = done.blocks[:room]
        hello = link.hello or worker_pb2.WorkerHello()
        answer.blocks.extend(
            shown(
                link.name,
                taken,
                prompt=scope.names,
                owners=self._preparer.owners(),
                block_size=hello.scheme.block_size,
                block_nbytes=hello.block_nbytes,
            )
        )
        return taken[-1].hash if len(taken) < len(done.blocks) else done.next

    def _held(self, names: Sequence[BlockHash], tenant: str) -> admin_pb2.PrefixHolding:
        hashes = [short(name) for name in names]
        size = self._fleet.identity.scheme.block_size if self._fleet.identity else 0
        overlaps = self._index.match(hashes)
        return admin_pb2.PrefixHolding(
            label=hashes[-1].hex(),
            tenant=tenant,
            tokens=len(hashes) * size,
            held=[
                admin_pb2.PrefixHolding.Held(worker=name, device_tokens=o.device * size, host_tokens=o.host * size)
                for name, o in sorted(overlaps.items())
            ],
            redis_tokens=self._index.shared_run(hashes) * size,
        )

    def _worker_cache(self, link: WorkerLink) -> admin_pb2.WorkerCache:
        cache = admin_pb2.WorkerCache(worker=link.name, state=self._fleet.state(link), problem=link.problem)
        if link.report is not None and link.connected:
            cache.tiers.extend(_tier_cache(tier) for tier in link.report.message.tiers)
        return cache


def full_blocks(names: Sequence[BlockHash], block_size: int) -> Sequence[BlockHash]:
    """Raises InvalidRequest where there is none."""
    if not names:
        raise InvalidRequest(f"The prompt is shorter than a block; send at least {block_size} tokens.", field="prompt")
    return names


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


def _listing(scope: Scope, tier: common_pb2.Tier.ValueType, after: bytes, room: int) -> worker_pb2.CacheCommand:
    listing = worker_pb2.CacheCommand.List(
        chain_root=scope.root or b"",
        prefix_hash=scope.names[-1] if scope.names else b"",
        tier=tier,
        after=after,
        # A worker looks at so many, and few of them may lie in that tier.
        limit=MAX_BLOCKS if tier else room,
    )
    return worker_pb2.CacheCommand(list=listing)


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
