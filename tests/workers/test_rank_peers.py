"""Two workers of two ranks each: a rank reads its share from the same rank of the other worker, and from no other."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvstore.errors import MissReason
from kvstore.events import RemovalCause, TierName
from kvstore.peer.hints import Holder
from tests.workers.engine_rig import BLOCK_SIZE, Answer, near_ties, oracle, prompts
from tests.workers.ranks_rig import SIZE, RanksRig, end_rigs, make_ranks_rig
from workers.peers import Peers, address_of
from workers.protocol import Job, PeerHint, Promised

PROMPT = prompts(5)[4]  # eight full blocks
LONG = prompts(2, lengths=(500, 500))[1]  # 31


@pytest.fixture
def two() -> Iterator[list[RanksRig]]:
    rigs = [make_ranks_rig(host_blocks=100, serves_peers=True, max_batch_tokens=64) for _ in range(2)]
    yield rigs
    for rig in rigs:
        if rig.follower.is_alive():
            rig.use_models()
            rig.close()
    end_rigs()


def _warm(rig: RanksRig, prompt: list[int]) -> None:
    rig.use_models()
    rig.run(rig.job("warm", prompt, max_tokens=1))


def _ask(rig: RanksRig, prompt: list[int], *hints: PeerHint, **options: object) -> Answer:
    rig.use_models()
    (answer,) = rig.run(replace(rig.job("asked", prompt, max_tokens=12), peers=hints, **options))
    return answer


def _hint(rig: RanksRig, blocks: int = 8) -> PeerHint:
    return PeerHint(rig.engine.info.peer_address, blocks)


def test_each_rank_reads_its_own_share_from_the_same_rank_elsewhere(two: list[RanksRig]):
    one, other = two
    _warm(one, PROMPT)
    answer = _ask(other, PROMPT, _hint(one))
    assert near_ties([answer], oracle().generate([PROMPT], 12)) == 0
    assert answer.fates == {"computed": len(PROMPT) - 128, "peer": 128}
    for rank in range(SIZE):
        assert one.peers[rank]._server.counts()["blocks"] == 8
        assert other.stores[rank].stats()[TierName.PEER].hits == 8
    shares = [[_payload(rig, rank, other) for rig in two] for rank in range(SIZE)]
    assert shares[0][0] == shares[0][1]
    assert shares[1][0] == shares[1][1]
    assert shares[0][0] != shares[1][0], "ranks hold other bytes under one name"


def _payload(rig: RanksRig, rank: int, other: RanksRig) -> bytes:
    name = other.job("x", PROMPT).block_hashes[3]
    (view,) = rig.stores[rank].host.view([name], owner="test")
    payload = bytes(view.payload)
    rig.stores[rank].host.end_view(view)
    return payload


@pytest.mark.parametrize("loser", [0, 1])
def test_what_one_rank_elsewhere_has_lost_ends_the_prefix_on_both(two: list[RanksRig], loser: int):
    one, other = two
    _warm(one, PROMPT)
    names = one.job("x", PROMPT).block_hashes
    one.stores[loser].host.remove(names[5:], RemovalCause.EVICTED)
    answer = _ask(other, PROMPT, _hint(one))
    assert answer.fates == {"computed": len(PROMPT) - 80, "peer": 80}
    assert near_ties([answer], oracle().generate([PROMPT], 12)) == 0


def test_a_rank_elsewhere_that_serves_no_more_costs_a_miss(two: list[RanksRig]):
    one, other = two
    _warm(one, PROMPT)
    one.peers[1]._server.close()
    answer = _ask(other, PROMPT, _hint(one))
    assert answer.fates == {"computed": len(PROMPT)}
    assert near_ties([answer], oracle().generate([PROMPT], 12)) == 0


def test_another_rank_is_refused_though_its_blocks_have_the_same_names(two: list[RanksRig]):
    one, other = two
    _warm(one, PROMPT)
    names = one.job("x", PROMPT).block_hashes
    tier = other.peers[0].tier
    tier.learn(names, [Holder(one.peers[1].address, 8)])
    delivery = tier.read(
        names, [memoryview(bytearray(other.stores[0].layout.block_nbytes)) for _ in names], deadline_s=30.0
    )
    assert (delivery.count, delivery.ended) == (0, MissReason.ERROR)
    until = time.monotonic() + 30
    while not one.peers[1]._server.counts().get("refused"):  # its thread counts after it has answered
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_prefill_on_two_ranks_is_read_by_two_others_while_it_goes_on(two: list[RanksRig]):
    maker, answerer = two
    promise = Promised(maker.engine.info.peer_address, 31, ready_ms=60_000.0, margin_ms=60_000.0)
    answerer.use_models()
    answerer.engine.submit(replace(answerer.job("asked", LONG, max_tokens=12), promise=promise))
    answerer.engine.step()
    assert answerer.engine.load().pending_prefill_tokens == 4
    maker.use_models()
    maker.engine.submit(_prefill_only(maker.job("made", LONG[: 31 * BLOCK_SIZE], max_tokens=1)))
    while maker.engine.has_work():
        maker.engine.step()
    maker.settle()
    assert maker.engine.cache.owes_peers()
    answerer.use_models()
    answer = answerer.collect()["asked"]
    assert near_ties([answer], oracle().generate([LONG], 12)) == 0
    assert answer.fates == {"computed": 500}, "another worker's forward for this very request"
    assert [store.stats()[TierName.PEER].hits for store in answerer.stores] == [31, 31]


def test_a_prefill_elsewhere_that_has_failed_is_waited_for_on_no_rank(two: list[RanksRig]):
    maker, answerer = two
    address = maker.engine.info.peer_address
    promise = Promised(address, 31, ready_ms=600_000.0, margin_ms=600_000.0)
    answerer.use_models()
    job = replace(answerer.job("asked", LONG, max_tokens=12), promise=promise)
    answerer.engine.submit(job)
    for _ in range(3):
        assert answerer.engine.step().outputs == []
    answerer.engine.cache.promise_broken(address, job.block_hashes[30])
    answer = answerer.collect()["asked"]
    assert near_ties([answer], oracle().generate([LONG], 12)) == 0
    assert answer.fates == {"computed": 500}
    assert [store.stats()[TierName.PEER].hits for store in answerer.stores] == [0, 0]


def _prefill_only(job: Job) -> Job:
    return replace(job, prefill_only=True)


def test_while_a_fleet_is_cleared_no_rank_reads(two: list[RanksRig]):
    one, other = two
    _warm(one, PROMPT)
    other.engine.cache.hold_peers(("router", 7), 100.0)
    assert _ask(other, PROMPT, _hint(one)).fates == {"computed": len(PROMPT)}
    assert [store.stats()[TierName.PEER].hits for store in other.stores] == [0, 0]
    other.engine.cache.clear()
    other.engine.cache.release_peers(("router", 7))
    assert _ask(other, PROMPT, _hint(one)).fates == {"computed": len(PROMPT) - 128, "peer": 128}


def test_addresses_of_ranks_are_one_and_who_has_another_number_of_them_is_not_asked():
    assert address_of(["a:1", "a:2"]) == "a:1,a:2"
    assert address_of(["a:1", ""]) == "", "a prefix counts only where every rank can read it"
    asked: list[list[Holder]] = []

    class Tier:
        def learn(self, hashes: object, holders: list[Holder]) -> None:
            asked.append(holders)

    peers = Peers(Tier(), rank=1, size=2)  # type: ignore[arg-type]
    hints = (PeerHint("a:1,a:2", 3), PeerHint("b:1", 4), PeerHint("c:1,c:2,c:3", 5))
    rig_job = Job("x", PROMPT, b"r" * 32, [b"n" * 32] * 8, None, peers=hints)  # type: ignore[arg-type]
    peers.learn(rig_job)
    assert asked == [[Holder("a:2", 3)]]
    for address in ("b:1", ""):
        promise = replace(rig_job, promise=Promised(address, 8, ready_ms=1.0, margin_ms=math.pi))
        assert peers.promise(promise, 0.0) is None
