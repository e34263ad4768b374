"""The pool and the index over segments say what single blocks would say."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.events import BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from replay.pool import Pool
from replay.run_index import RunIndex, RunTraffic
from replay.workload import Chain, segment_key
from router.traffic import NOTHING_KNOWN, Traffic
from tests.replay.made import made_work

PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=25)


class BlockPool:
    """The oracle: one entry a block, a prompt's last block the first to go."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: OrderedDict[bytes, None] = OrderedDict()

    def take(self, blocks: Sequence[bytes]) -> None:
        for block in reversed(blocks):
            self.held[block] = None
            self.held.move_to_end(block)
        while len(self.held) > self.capacity:
            self.held.popitem(last=False)

    def leading(self, blocks: Sequence[bytes]) -> int:
        return next((n for n, block in enumerate(blocks) if block not in self.held), len(blocks))


def chains(prompts: list[list[int]]) -> tuple[list[Chain], list[int]]:
    work = made_work([(0.0, prompt) for prompt in prompts])
    return work.chains, work.lengths


@given(prompts=PROMPTS, capacity=st.integers(1, 20))
def test_a_pool_of_segments_holds_what_a_pool_of_blocks_holds(prompts: list[list[int]], capacity: int) -> None:
    known, lengths = chains(prompts)
    pool, oracle = Pool(capacity, lengths), BlockPool(capacity)
    for chain in known:
        pool.take(chain.segments)
        oracle.take(list(chain))
        assert pool.used == len(oracle.held)
        assert [pool.leading(c.segments) for c in known] == [oracle.leading(list(c)) for c in known]


@given(prompts=PROMPTS, capacity=st.integers(1, 20))
def test_the_index_knows_from_events_what_the_pool_holds(prompts: list[list[int]], capacity: int) -> None:
    known, lengths = chains(prompts)
    pool, index = Pool(capacity, lengths), RunIndex(lambda: 0.0)
    index.join("w", 1)
    index.begin_snapshot("w", 1)
    index.end_snapshot("w", 1)
    before = None
    for chain in known:
        change = pool.take(chain.segments)
        stored = tuple(segment_key(segment) for segment in change.stored)
        removed = tuple(segment_key(segment) for segment in change.removed)
        events: list[KvEvent] = [
            BlockStored(TierName.DEVICE, stored),
            BlockRemoved(TierName.DEVICE, removed, RemovalCause.EVICTED),
        ]
        index.apply("w", 1, events)
        index.set_partial("w", TierName.DEVICE, {} if before is None else {before.segment: 0})
        before = pool.partial()
        index.set_partial("w", TierName.DEVICE, {} if before is None else dict([before]))
        assert [index.match(c)["w"].device for c in known] == [pool.leading(c.segments) for c in known]
    index.check()


@given(
    prompts=PROMPTS,
    does=st.lists(st.tuples(st.sampled_from(["sent", "first", "ended"]), st.integers(0, 24), st.integers(0, 9))),
)
@example(prompts=[[0, 0, 0, 1, 1, 1], [0, 0, 0, 2, 2, 2]], does=[("sent", 0, 3), ("sent", 1, 4)])
def test_traffic_of_segments_is_traffic_of_blocks(prompts: list[list[int]], does: list[tuple[str, int, int]]) -> None:
    known, _ = chains(prompts)
    runs, blocks = RunTraffic(lambda: 0.0), Traffic(lambda: 0.0)
    sent: set[int] = set()
    for what, number, cached in does:
        chain = known[number % len(known)]
        if what == "sent" and number not in sent:
            sent.add(number)
            cached = chain.blocks(chain.whole_segments(min(cached, len(chain))))
            runs.sent(number, "w", chain, work_ms=1.0, cached_blocks=cached)
            blocks.sent(number, "w", list(chain), work_ms=1.0, cached_blocks=cached)
        elif what != "sent":
            for traffic in (runs, blocks):
                traffic.first_token(number) if what == "first" else traffic.ended(number)
        for c in known:
            assert runs.arriving_run("w", c) == blocks.arriving_run("w", list(c))
            assert runs.sharers(c) == blocks.sharers(list(c))
            assert runs.active_blocks(c, ["w"]) == blocks.active_blocks(list(c), ["w"])
        assert runs.unreported_blocks("w", NOTHING_KNOWN) == blocks.unreported_blocks("w", NOTHING_KNOWN)
