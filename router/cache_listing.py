"""A page of the blocks that workers hold, gathered from one worker after the other.

Covers: whom to ask, for how many, and where the next page goes on. Does not cover: how a block and a page's token look
(`cache_pages`), whose blocks (`cache_scope`), sending (`cache_orders`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.blocks import BlockHash, short
from router import cache_orders
from router.cache_orders import MAX_BLOCKS
from router.cache_pages import Place, shown, token_of
from router.cache_scope import Scope
from router.fleet import Fleet
from router.index import PrefixIndex
from router.link import WorkerLink
from router.prepare import Preparer
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2

_MAX_ROUNDS = 20  # questions for one page: few blocks may match, and a caller wants to hear something


class CacheListing:
    """Asks a fleet's workers for their blocks; the index, where a prompt's lie."""

    def __init__(self, fleet: Fleet, index: PrefixIndex, preparer: Preparer) -> None:
        self._fleet, self._index, self._preparer = fleet, index, preparer

    async def page(
        self,
        request: admin_pb2.ListBlocksRequest,
        scope: Scope,
        links: Sequence[WorkerLink],
        place: Place,
        size: int,
    ) -> admin_pb2.ListBlocksResponse:
        """At most `size` blocks of these workers, from `place` on. Raises NoWorkerAvailable: none could tell."""
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

    def held(self, names: Sequence[BlockHash], tenant: str) -> admin_pb2.PrefixHolding:
        """Where these blocks of a prompt lie, as far as the index knows."""
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
