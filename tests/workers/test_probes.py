"""Where blocks lie, told at its place in the stream; workers that tell nothing; how far behind a router is."""

from __future__ import annotations

import pytest

from kvstore.blocks import block_hashes
from kvstore.events import TierName
from tests.workers.engine_rig import make_rig
from tests.workers.serving import INFO, config, routers, serving, simulated
from tests.workers.stream_client import job
from tests.workers.test_outbox import kinds, live_outbox, pop_all, stored
from warmkv.v1 import worker_pb2
from workers.outbox import OutboxLimits
from workers.protocol import Load
from workers.server import WorkerServer
from workers.wire import load_to_wire

ROOT = INFO.scheme.root(b"tenant")


def names(ids: list[int]) -> list[bytes]:
    return [bytes(each) for each in block_hashes(ids, ROOT, 16)]


def probed(client) -> list[worker_pb2.Probed]:
    return [message.probed for message in client.messages if message.HasField("probed")]


def test_a_probe_tells_which_tiers_hold_each_block() -> None:
    ids = list(range(64))
    with serving() as (_, address), routers(address) as (client,):
        client.send(submit=job(INFO.scheme, 1, ids))
        client.wait_finished(1)
        asked = [*names(ids), b"\7" * 32]
        client.send(probe=worker_pb2.Probe(probe_id=5, hashes=b"".join(asked)))
        client.wait_for(lambda: probed(client))
        (answer,) = probed(client)
        assert (answer.probe_id, answer.error) == (5, "")
        assert answer.tiers == b"\3\3\3\3\0"  # device and host
        assert client.mirror.blocks >= {(tier, each[:16]) for each in asked[:4] for tier in ("device", "host")}


@pytest.mark.parametrize("count", [257, 0.5])
def test_a_probe_that_makes_no_sense_is_refused_in_words(count: float) -> None:
    with serving() as (_, address), routers(address) as (client,):
        client.send(probe=worker_pb2.Probe(probe_id=1, hashes=b"x" * int(32 * count)))
        client.wait_for(lambda: probed(client))
        assert "send 32 for each of at most 256" in probed(client)[0].error


def test_answers_are_true_of_their_place_in_the_stream() -> None:
    """Blocks come and go with every step while probes are asked: each answer equals what the events before it say."""
    engine = simulated(device_blocks=12, host_blocks=0)
    prompts = [list(range(n, n + 64)) for n in range(0, 640, 64)]
    asked = [name for ids in prompts for name in names(ids)]
    with serving(engine) as (_, address), routers(address) as (client,):
        truths: list[bytes] = []
        apply = client.mirror.apply

        def watched(message: worker_pb2.ConnectResponse) -> None:
            if message.HasField("probed"):
                truths.append(bytes(int(("device", name[:16]) in client.mirror.blocks) for name in asked))
            apply(message)

        client.mirror.apply = watched
        for number, ids in enumerate(prompts * 6, start=1):
            client.send(submit=job(INFO.scheme, number, ids, max_tokens=2))
            client.send(probe=worker_pb2.Probe(probe_id=number, hashes=b"".join(asked)))
        client.wait_finished(*range(1, 61))
        client.wait_for(lambda: len(probed(client)) == 60)
        assert [answer.tiers for answer in probed(client)] == truths
        assert len(set(truths)) > 5


def test_the_torch_engine_tells_it_of_device_and_host() -> None:
    rig = make_rig(host_blocks=100)
    asked = rig.job("a", [7 + n % 50 for n in range(70)], max_tokens=1)
    rig.run(asked)
    where = rig.engine.cache.where([*asked.block_hashes, b"\7" * 32])
    assert where == [(TierName.DEVICE, TierName.HOST)] * 4 + [()]
    rig.close()


def test_a_worker_without_events_says_so_and_tells_of_no_block() -> None:
    ids = list(range(64))
    with serving(kv_events="off") as (_, address), routers(address) as (client,):
        assert client.messages[0].hello.kv_events_off
        client.send(submit=job(INFO.scheme, 1, ids))
        client.wait_finished(1)
        client.send(resync=worker_pb2.Resync())
        client.wait_for(lambda: client.mirror.snapshots == 2 and client.mirror.complete)
        assert not any(message.step.events or message.snapshot.blocks for message in client.messages)
        client.send(probe=worker_pb2.Probe(probe_id=5, hashes=names(ids)[0]))
        client.wait_for(lambda: probed(client))
        assert probed(client)[0].tiers == b"\3"


def test_another_word_than_on_or_off_is_refused() -> None:
    with pytest.raises(ValueError, match="set it to on or off"):
        WorkerServer(config(kv_events="sometimes"), simulated())


# The outbox


def behind(outbox, now: float) -> float:
    outbox.set_load(load_to_wire(Load(running=round(now * 1000) % 97)), now)
    loads = [message.step.load for message in pop_all(outbox, now) if message.step.HasField("load")]
    return loads[-1].events_behind_ms


def at(events, moment: float):
    from dataclasses import replace

    return replace(events, at=moment)


def test_a_router_that_has_all_events_is_not_behind() -> None:
    outbox = live_outbox(OutboxLimits(snapshot_interval_s=0.0))
    outbox.add_events(at(stored(1), 9.0))
    assert behind(outbox, 10.0) == 0


def test_a_router_that_was_not_sent_events_is_behind_until_its_snapshot_is_complete() -> None:
    outbox = live_outbox()
    outbox.add_events(at(stored(*range(10)), 4.0))
    outbox.add_events(at(stored(*range(10, 50)), 6.0))  # too many: forgotten, and a snapshot is wanted
    assert outbox.overflows == 1
    assert behind(outbox, 7.0) == pytest.approx(3000)
    outbox.snapshot_asked(7.0)
    assert behind(outbox, 8.0) == pytest.approx(4000)
    outbox.set_snapshot([])
    pop_all(outbox, 8.0)
    assert behind(outbox, 9.0) == 0


def test_an_answer_whose_events_were_forgotten_is_not_sent() -> None:
    outbox = live_outbox()
    outbox.add_events(stored(*range(10)))
    outbox.add_probed(worker_pb2.Probed(probe_id=1))
    outbox.add_answer(worker_pb2.ClearDone(clear_id=1))
    outbox.add_events(stored(*range(10, 50)))
    outbox.add_probed(worker_pb2.Probed(probe_id=2))
    assert kinds(pop_all(outbox)) == ["clear_done"]
    outbox.snapshot_asked(1.0)
    outbox.set_snapshot([])
    for number in range(5):
        outbox.add_events(stored(number))
    assert set(kinds(pop_all(outbox, 1.0))) == {"snapshot", "step"}
