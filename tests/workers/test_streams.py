"""The rules of the stream, over real gRPC on loopback."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import count

import grpc
import pytest

from kvstore.blocks import block_hashes
from tests.workers.serving import INFO, Gate, routers, serving, simulated
from tests.workers.stream_client import StreamClient, held, job
from warmkv.v1 import common_pb2, worker_pb2
from workers.outbox import OutboxLimits
from workers.simulated_sequence import Timing

SCHEME = INFO.scheme


def prompt(blocks: int, seed: int = 0, extra: int = 3) -> list[int]:
    """Full blocks and some tokens more; of one seed, shorter prompts are prefixes of longer ones."""
    return [(seed * 31 + at * 7) % 1000 for at in range(blocks * 16 + extra)]


# The handshake.


def refused(address: str, **settings: object) -> tuple[grpc.StatusCode, str]:
    client = StreamClient(address, **settings)  # type: ignore[arg-type]
    error = client.wait_ended()
    client.drop()
    assert error is not None
    assert client.messages == []
    return error.code(), error.details()


@pytest.mark.parametrize("secret", ["", "wrong", "fleet secret "])
def test_a_caller_without_the_fleet_secret_is_refused(secret: str) -> None:
    with serving() as (_, address):
        code, details = refused(address, secret=secret + "x")
        assert code == grpc.StatusCode.UNAUTHENTICATED
        assert "fleet_secret" in details


@pytest.mark.parametrize(("oldest", "newest"), [(99, 0), (1, 0), (0, 1), (4, 5)])
def test_another_protocol_version_is_refused_naming_the_field_and_the_remedy(oldest: int, newest: int) -> None:
    with serving() as (_, address):
        code, details = refused(address, protocol_version=oldest, newest_protocol_version=newest)
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert details.startswith("protocol_version:")
        assert "install warmkv of the same or the next minor version" in details


@pytest.mark.parametrize(
    ("oldest", "newest", "agreed"),
    [(2, 0, 2), (2, 2, 2), (1, 2, 2), (2, 3, 3), (3, 3, 3), (3, 4, 3), (2, 9, 3)],
)
def test_a_stream_has_the_newest_version_that_both_ends_speak(oldest: int, newest: int, agreed: int) -> None:
    with (
        serving() as (_, address),
        routers(address, protocol_version=oldest, newest_protocol_version=newest) as (router,),
    ):
        assert router.messages[0].hello.protocol_version == agreed


def test_a_stream_that_does_not_begin_with_a_hello_is_refused() -> None:
    with serving() as (_, address):
        first = worker_pb2.ConnectRequest(cancel=worker_pb2.Cancel(job_id=1))
        code, details = refused(address, first=first)
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "RouterHello" in details


def test_the_worker_answers_with_its_hello_and_a_snapshot() -> None:
    with serving() as (_, address), routers(address) as (router,):
        hello = router.messages[0].hello
        assert (hello.worker, hello.incarnation, hello.model) == ("w0", 7, INFO.model)
        assert hello.scheme.layout == SCHEME.layout
        assert router.mirror.blocks == set()


def test_the_hello_names_the_shared_tier_of_the_moment() -> None:
    engine = simulated()
    with serving(engine) as (_, address):
        engine.info = replace(engine.info, shared_tier_id="run 2")
        with routers(address) as (router,):
            assert router.messages[0].hello.shared_tier_id == "run 2"


# Jobs.


def test_a_job_runs_and_its_tokens_events_and_fates_come_in_numbered_messages() -> None:
    engine = simulated()
    with serving(engine) as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(3), max_tokens=5))
        router.wait_finished(1)
        last = router.outputs[1][-1]
        assert (last.finish_reason, last.completion_tokens) == (common_pb2.FINISH_REASON_LENGTH, 5)
        assert last.fates == common_pb2.TokensByFate(computed=51)
        assert len(router.tokens(1)) == 5
        assert [message.seq for message in router.messages] == list(range(1, len(router.messages) + 1))
        assert router.mirror.blocks == held(engine.snapshot())
        assert len(router.mirror.blocks) == 6


def test_blocks_are_announced_no_later_than_the_tokens_that_follow_from_them() -> None:
    with serving() as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(4), max_tokens=40))
        router.wait_finished(1)
        announced = 0
        for message in router.messages:
            announced += sum(len(e.stored.hashes) // 16 for e in message.step.events if e.stored.tier == 1)
            for output in message.step.outputs:
                # The K/V of all tokens before the newest is in the pool.
                assert announced >= (len(prompt(4)) + output.completion_tokens - 1) // 16


def test_each_router_gets_the_tokens_of_its_own_jobs_and_all_events() -> None:
    engine = simulated()
    with serving(engine) as (_, address), routers(address, 2) as (one, two):
        for number in range(10):
            one.send(submit=job(SCHEME, number, prompt(3, seed=number), max_tokens=8))
            two.send(submit=job(SCHEME, number, prompt(3, seed=100 + number), max_tokens=9))
        one.wait_finished(*range(10))
        two.wait_finished(*range(10))
        assert {len(one.tokens(number)) for number in range(10)} == {8}
        assert {len(two.tokens(number)) for number in range(10)} == {9}
        truth = held(engine.snapshot())
        assert len(truth) == 120
        for router in (one, two):
            router.wait_for(lambda router=router: router.mirror.blocks == truth)


def only_error(router: StreamClient, number: int) -> str:
    router.wait_finished(number)
    (output,) = router.outputs[number]
    assert output.finish_reason == common_pb2.FINISH_REASON_ERROR
    assert output.error.message
    return output.error.reason


def test_jobs_of_a_foreign_chain_are_refused_and_disturb_nothing_else() -> None:
    with serving() as (_, address), routers(address) as (router,):
        foreign = job(SCHEME, 1, prompt(3))
        foreign.chain_root = b"x" * 32
        garbled = job(SCHEME, 2, prompt(3))
        garbled.block_hashes = garbled.block_hashes[16:]
        for message in (foreign, garbled, job(SCHEME, 3, []), job(SCHEME, 4, [1000]), job(SCHEME, 5, prompt(3))):
            router.send(submit=message)
        assert [only_error(router, number) for number in (1, 2, 3, 4)] == [
            "CHAIN_ROOT_MISMATCH",
            "BLOCK_HASH_MISMATCH",
            "EMPTY_PROMPT",
            "TOKEN_OUT_OF_RANGE",
        ]
        router.wait_finished(5)
        assert len(router.tokens(5)) == 4


def test_what_the_engine_refuses_comes_back_with_its_reason() -> None:
    with serving() as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, [1] * 100_000))
        assert only_error(router, 1) == "CONTEXT_LENGTH_EXCEEDED"


def test_a_job_number_that_runs_already_ends_the_stream() -> None:
    gate = Gate()
    with serving(simulated(sleep=gate)) as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(3)))
        router.send(submit=job(SCHEME, 1, prompt(3)))
        error = router.wait_ended()
        gate.open()
        assert error is not None
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_deadline_ends_a_job() -> None:
    with serving(simulated(sleep=time.sleep)) as (_, address), routers(address) as (router,):
        late = job(SCHEME, 1, prompt(3), max_tokens=10_000)
        late.deadline_ms = 50
        router.send(submit=late)
        router.wait_finished(1)
        assert router.outputs[1][-1].finish_reason == common_pb2.FINISH_REASON_DEADLINE


def device_bytes(router: StreamClient) -> int:
    (tier,) = [tier for tier in router.loads()[-1].tiers if tier.tier == common_pb2.TIER_DEVICE]
    return int(tier.used_bytes)


def test_cancel_frees_the_blocks_within_one_engine_step() -> None:
    gate = Gate()
    engine = simulated(sleep=gate)
    with serving(engine) as (_, address), routers(address) as (router,):
        kept = job(SCHEME, 1, prompt(3), max_tokens=1000)
        kept.cache.no_store = True
        router.send(submit=kept)
        gate.wait_arrived()
        router.send(cancel=worker_pb2.Cancel(job_id=1))
        router.send(cancel=worker_pb2.Cancel(job_id=99))
        router.wait_handled()
        gate.let_pass()  # the step that was under way when the cancel came; no other may pass
        router.wait_finished(1)
        assert router.outputs[1][-1].finish_reason == common_pb2.FINISH_REASON_CANCELLED
        assert router.outputs[1][-1].completion_tokens == 1
        router.wait_for(lambda: router.loads()[-1].running == 0 and device_bytes(router) == 0)
        gate.open()


@pytest.mark.parametrize("end", ["leave", "drop"])
def test_a_router_that_is_lost_takes_its_jobs_with_it(end: str) -> None:
    engine = simulated(sleep=time.sleep, timing=Timing(decode_step_ms=2))
    with serving(engine) as (server, address), routers(address, 2) as (lost, other):
        for number in range(3):
            lost.send(submit=job(SCHEME, number, prompt(3, seed=number), max_tokens=90_000))
        other.send(submit=job(SCHEME, 1, prompt(3), max_tokens=90_000))
        other.wait_for(lambda: other.loads()[-1].running == 4)
        getattr(lost, end)()
        other.wait_for(lambda: other.loads()[-1].running == 1)
        other.send(cancel=worker_pb2.Cancel(job_id=1))
        other.wait_finished(1)
        lost.wait_ended()
        assert server.routers == ["r1"]


def test_a_router_that_says_goodbye_without_reading_loses_its_jobs_at_once() -> None:
    steps = count()  # the first ones are fast and fill what the router does not read; the rest takes minutes
    engine = simulated(host_blocks=0, sleep=lambda _: time.sleep(0.002) if next(steps) > 3000 else None)
    with serving(engine) as (_, address), routers(address, 2) as (lost, other):
        lost.reading.clear()
        for number in range(4):
            lost.send(submit=job(SCHEME, number, prompt(3, seed=number), max_tokens=90_000))
        other.wait_for(lambda: other.loads()[-1].running > 0)
        lost.leave()
        other.wait_for(lambda: other.loads()[-1].running == 0)


# Load.


def test_heartbeats_with_load_go_on_while_a_step_lasts() -> None:
    gate = Gate()
    with serving(simulated(sleep=gate)) as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(3)))
        gate.wait_arrived()
        before = len(router.loads())
        router.wait_for(lambda: len(router.loads()) >= before + 3)
        assert not router.outputs[1]
        gate.open()
        router.wait_finished(1)


def test_loads_are_coalesced_to_one_in_20_ms_however_many_steps_there_are() -> None:
    began = time.monotonic()
    engine = simulated(sleep=time.sleep, timing=Timing(decode_step_ms=1))
    with serving(engine) as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(3), max_tokens=300))
        router.wait_finished(1)
        loads = len(router.loads())
        assert 3 < loads <= (time.monotonic() - began) / 0.020 + 1


def test_the_load_of_an_idle_worker_says_so() -> None:
    with serving() as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(3), max_tokens=50))
        router.wait_finished(1)
        router.wait_for(lambda: router.loads()[-1].steps == 50 and router.loads()[-1].running == 0)


# Snapshots, clears, the fleet record.


def test_a_router_that_comes_later_gets_what_was_stored_before() -> None:
    with serving() as (_, address), routers(address) as (early,):
        early.send(submit=job(SCHEME, 1, prompt(200), max_tokens=1))
        early.wait_finished(1)
        with routers(address) as (late,):
            assert late.mirror.blocks == early.mirror.blocks
            assert len(late.mirror.blocks) == 400


def test_a_resync_brings_a_new_snapshot() -> None:
    with serving() as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(3)))
        router.wait_finished(1)
        known = set(router.mirror.blocks)
        router.mirror.blocks.clear()
        router.send(resync=worker_pb2.Resync())
        router.wait_for(lambda: router.mirror.snapshots == 2 and router.mirror.complete)
        assert router.mirror.blocks == known


def test_a_clear_is_answered_behind_its_events_and_every_router_hears_of_them() -> None:
    with serving() as (_, address), routers(address, 2) as (asker, other):
        asker.send(submit=job(SCHEME, 1, prompt(3)))
        asker.send(submit=job(SCHEME, 2, prompt(3), tenant=b"other"))
        asker.wait_finished(1, 2)
        asker.send(clear=worker_pb2.Clear(clear_id=5, chain_root=SCHEME.root(b"other")))
        asker.wait_for(lambda: "clear_done" in asker.kinds())
        at = asker.kinds().index("clear_done")
        assert asker.messages[at].clear_done == worker_pb2.ClearDone(clear_id=5, device=3, host=3)
        removed = [event.removed for message in asker.messages[:at] for event in message.step.events]
        assert sum(len(each.hashes) // 16 for each in removed) == 6
        other.wait_for(lambda: other.mirror.blocks == asker.mirror.blocks)
        assert len(other.mirror.blocks) == 6
        assert "clear_done" not in other.kinds()


def test_a_clear_of_a_prefix_drops_what_follows_it() -> None:
    with serving() as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(5)))
        router.wait_finished(1)
        root = SCHEME.root(b"tenant")
        third = block_hashes(prompt(5), root, 16)[2]
        router.send(clear=worker_pb2.Clear(clear_id=1, chain_root=root, prefix_hash=third))
        router.wait_for(lambda: "clear_done" in router.kinds())
        assert len(router.mirror.blocks) == 4


def test_a_clear_with_a_short_hash_is_answered_with_an_error_and_drops_nothing() -> None:
    with serving() as (_, address), routers(address) as (router,):
        router.send(submit=job(SCHEME, 1, prompt(3)))
        router.wait_finished(1)
        router.send(clear=worker_pb2.Clear(clear_id=1, prefix_hash=b"x" * 16))
        router.wait_for(lambda: "clear_done" in router.kinds())
        assert "prefix_hash" in router.messages[router.kinds().index("clear_done")].clear_done.error
        assert len(router.mirror.blocks) == 6


def asked(router: StreamClient, number: int, **kind: object) -> worker_pb2.CacheDone:
    """The answer to an order."""
    router.send(cache=worker_pb2.CacheCommand(command_id=number, **kind))  # type: ignore[arg-type]
    answers: list[worker_pb2.CacheDone] = []

    def answered() -> bool:
        found = [m.cache_done for m in list(router.messages) if m.HasField("cache_done")]
        answers[:] = [each for each in found if each.command_id == number]
        return bool(answers)

    router.wait_for(answered)
    return answers[0]


def test_operators_orders_are_answered_to_whoever_gave_them() -> None:
    command, root = worker_pb2.CacheCommand, SCHEME.root(b"tenant")
    with serving() as (_, address), routers(address, 2) as (asker, other):
        asker.send(submit=job(SCHEME, 1, prompt(5)))
        asker.send(submit=job(SCHEME, 2, prompt(2), tenant=b"other"))
        asker.wait_finished(1, 2)
        names = block_hashes(prompt(5), root, 16)
        first = asked(asker, 1, list=command.List(chain_root=root, limit=3))
        rest = asked(asker, 2, list=command.List(chain_root=root, limit=3, after=first.next))
        assert [block.hash for done in (first, rest) for block in done.blocks] == sorted(names)
        assert rest.next == b""
        assert {block.parent for block in first.blocks} <= {b"", *names}
        assert len(asked(asker, 3, list=command.List(tier=common_pb2.TIER_HOST, limit=99)).blocks) == 7
        assert len(asked(asker, 4, list=command.List(tier=common_pb2.TIER_DISK, limit=99)).blocks) == 0
        pinned = asked(asker, 5, pin=command.Pin(chain_root=root))
        tiers = {count.tier: count.blocks for count in pinned.counts}
        assert tiers == {common_pb2.TIER_HOST: 5}
        assert all(block.leased for block in asked(asker, 6, list=command.List(chain_root=root, limit=9)).blocks)
        assert [count.blocks for count in asked(asker, 7, unpin=command.Unpin(hashes=names[0])).counts] == [1]
        assert asked(asker, 8, warm=command.Warm(chain_root=root, hashes=b"".join(names))).started == 0
        assert asked(asker, 9, check=command.Check()) == worker_pb2.CacheDone(command_id=9)
        assert "neither" in asked(asker, 10, pin=command.Pin()).error
        assert "cache_done" not in other.kinds()


def fleet_versions(router: StreamClient) -> list[tuple[int, str]]:
    return [(m.fleet.version, m.fleet.author) for m in list(router.messages) if m.HasField("fleet")]


def record(version: int, author: str, *, reads: bool = True) -> worker_pb2.FleetRecord:
    return worker_pb2.FleetRecord(version=version, author=author, policy="p", shared_tier_reads=reads)


def test_a_fleet_record_reaches_the_other_router_at_once_and_a_later_one_with_its_hello() -> None:
    with serving() as (_, address), routers(address, 2) as (author, other):
        author.send(fleet=record(3, "r0"))
        other.wait_for(lambda: fleet_versions(other) == [(3, "r0")])
        with routers(address) as (late,):
            late.wait_for(lambda: "snapshot" in late.kinds())
            assert [kind for kind in late.kinds() if kind != "step"][:3] == ["hello", "fleet", "snapshot"]
            assert fleet_versions(late) == [(3, "r0")]
        assert fleet_versions(author) == []


def test_the_greatest_version_and_author_wins_and_who_is_behind_is_told() -> None:
    with serving() as (_, address), routers(address, 2) as (one, two):
        one.send(fleet=record(3, "b"))
        two.wait_for(lambda: fleet_versions(two) == [(3, "b")])
        two.send(fleet=record(3, "a"))
        two.wait_for(lambda: fleet_versions(two) == [(3, "b"), (3, "b")])
        two.send(fleet=record(3, "c"))
        one.wait_for(lambda: fleet_versions(one) == [(3, "c")])
        one.send(fleet=record(2, "z"))
        one.wait_for(lambda: fleet_versions(one) == [(3, "c"), (3, "c")])
        two.send(fleet=record(3, "c"))  # known: nobody needs to hear of it
        two.send(fleet=record(4, "c"))
        one.wait_for(lambda: fleet_versions(one)[2:] == [(4, "c")])


def test_clears_of_all_routers_are_carried_whatever_the_version_of_their_records() -> None:
    def heard(router: StreamClient) -> list[tuple[int, dict[int, list[str]]]]:
        records = [m.fleet for m in list(router.messages) if m.HasField("fleet")]
        return [(r.version, {c.number: list(c.confirmed) for c in r.clears}) for r in records]

    def with_clear(version: int, number: int, *confirmed: str) -> worker_pb2.FleetRecord:
        clear = worker_pb2.PastClear(number=number, author="r", chain_root=bytes([number]) * 32, confirmed=confirmed)
        whole = record(version, "a")
        whole.clears.append(clear)
        return whole

    with serving() as (_, address), routers(address, 2) as (one, two):
        one.send(fleet=with_clear(3, 1, "w0"))
        two.wait_for(lambda: heard(two) == [(3, {1: ["w0"]})])
        two.send(fleet=with_clear(2, 2))  # an older record, and a clear of its own
        both = (3, {1: ["w0"], 2: []})
        one.wait_for(lambda: heard(one) == [both])
        two.wait_for(lambda: heard(two)[1:] == [both])
        two.send(fleet=with_clear(3, 1, "w1"))
        one.wait_for(lambda: heard(one)[1:] == [(3, {1: ["w0", "w1"], 2: []})])


def test_the_fleet_record_decides_on_reads_of_the_shared_tier() -> None:
    engine = simulated()
    with serving(engine) as (_, address), routers(address) as (router,):
        assert engine.cache.shared_reads
        router.send(fleet=record(1, "r0", reads=False))
        router.send(submit=job(SCHEME, 1, prompt(3)))
        router.wait_finished(1)
        assert not engine.cache.shared_reads
        router.send(fleet=record(2, "r0", reads=True))
        router.send(submit=job(SCHEME, 2, prompt(3)))
        router.wait_finished(2)
        assert engine.cache.shared_reads


# Everything at once.

TIGHT = OutboxLimits(max_event_bytes=4000, message_bytes=1000, snapshot_bytes=600, snapshot_interval_s=0.01)


def test_a_router_that_reads_slowly_is_resynchronised_and_holds_nobody_up() -> None:
    engine = simulated(device_blocks=60, host_blocks=120)
    with serving(engine, limits=TIGHT) as (_, address), routers(address, 2) as (slow, quick):
        slow.send(submit=job(SCHEME, 1, prompt(3), max_tokens=900))
        slow.reading.clear()
        for number in range(300):
            quick.send(submit=job(SCHEME, number, prompt(20, seed=number), max_tokens=5))
        quick.wait_finished(*range(300))  # though `slow` reads nothing
        slow.reading.set()
        slow.wait_finished(1)
        slow.wait_for(lambda: slow.mirror.complete and slow.mirror.blocks == quick.mirror.blocks)
        assert slow.mirror.snapshots > 1
        assert len(slow.tokens(1)) == 900
        assert slow.mirror.blocks == held(engine.snapshot())


@pytest.mark.parametrize("seed", range(4))
def test_mirrors_equal_the_store_after_a_random_history(seed: int) -> None:
    dice = random.Random(seed)
    engine = simulated(device_blocks=40, host_blocks=70, default_ttl_s=0.2 if seed % 2 else None)
    with serving(engine, limits=TIGHT) as (_, address), routers(address, 3) as clients:
        for number in range(250):
            message = job(SCHEME, number, prompt(dice.randrange(1, 12), seed=dice.randrange(12)), max_tokens=30)
            message.cache.no_store = dice.random() < 0.1
            dice.choice(clients).send(submit=message)
            act_at_random(dice, clients, number)
        for client in clients:
            client.reading.set()
            # A job that stays, behind everything else.
            last = job(SCHEME, 1000, prompt(3, seed=77), max_tokens=1)
            last.cache.ttl_seconds = 1000
            client.send(submit=last)
            client.wait_finished(1000)
        clients[0].wait_for(lambda: clients[0].loads()[-1].running + clients[0].loads()[-1].waiting == 0)
        if seed % 2:  # until only the last one's blocks are left
            clients[0].wait_for(lambda: clients[0].mirror.complete and len(clients[0].mirror.blocks) == 6)
        truth = held(engine.snapshot())
        for client in clients:
            client.wait_for(lambda client=client: client.mirror.complete and client.mirror.blocks == truth)
            assert [message.seq for message in client.messages] == list(range(1, len(client.messages) + 1))


def act_at_random(dice: random.Random, clients: list[StreamClient], number: int) -> None:
    client = dice.choice(clients)
    match dice.randrange(12):
        case 0:
            client.send(resync=worker_pb2.Resync())
        case 1:
            client.reading.clear()
        case 2 | 3:
            client.reading.set()
        case 4:
            client.send(cancel=worker_pb2.Cancel(job_id=dice.randrange(number + 1)))
        case 5:
            client.send(clear=worker_pb2.Clear(clear_id=number, chain_root=SCHEME.root(b"tenant")))
        case 6:
            time.sleep(0.01)


def test_a_router_that_leaves_is_counted_out_at_once_even_while_a_step_lasts() -> None:
    """Quotas are divided by this number: one that is too high withholds a part of them."""
    gate = Gate()
    with serving(simulated(sleep=gate)) as (_, address), routers(address, 2) as (first, second):
        first.wait_for(lambda: first.loads()[-1].routers == 2)
        first.send(submit=job(SCHEME, 1, prompt(1), max_tokens=1))
        gate.wait_arrived()
        second.drop()
        first.wait_for(lambda: first.loads()[-1].routers == 1)
        gate.open()
