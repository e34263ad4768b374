"""The outbox against a naive mirror: whatever happens in whatever order, a router ends up with the truth."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from kvstore.events import BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from tests.workers.stream_client import Mirror
from warmkv.v1 import common_pb2, worker_pb2
from workers.outbox import Outbox, OutboxLimits, WireEvents
from workers.wire import event_to_wire

HELLO = worker_pb2.WorkerHello(worker="w0")
LIMITS = OutboxLimits(max_event_bytes=600, message_bytes=200, snapshot_bytes=200, snapshot_interval_s=0.0)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def wire_events(*events: KvEvent) -> WireEvents:
    wire = [event_to_wire(event) for event in events]
    return WireEvents(wire, sum(event.ByteSize() for event in wire))


def stored(*numbers: int) -> WireEvents:
    return wire_events(BlockStored(TierName.DEVICE, tuple(map(name, numbers))))


def output(job: int, *tokens: int, finish: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED):
    text = "".join(f" {token}" for token in tokens)
    return worker_pb2.SequenceOutput(job_id=job, token_ids=tokens, text=text, finish_reason=finish)


def pop_all(outbox: Outbox, now: float = 0.0) -> list[worker_pb2.ConnectResponse]:
    messages = []
    while (message := outbox.pop(now)) is not None:
        messages.append(message)
    return messages


def live_outbox(limits: OutboxLimits = LIMITS) -> Outbox:
    outbox = Outbox(HELLO, limits)
    outbox.snapshot_asked(0.0)
    outbox.set_snapshot([])
    pop_all(outbox)
    return outbox


def kinds(messages: list[worker_pb2.ConnectResponse]) -> list[str | None]:
    return [message.WhichOneof("kind") for message in messages]


def test_first_come_hello_fleet_record_and_snapshot_numbered_from_one() -> None:
    outbox = Outbox(HELLO, LIMITS)
    outbox.set_fleet(worker_pb2.FleetRecord(version=3))
    outbox.snapshot_asked(0.0)
    outbox.set_snapshot([BlockStored(TierName.HOST, (name(1),))])
    messages = pop_all(outbox)
    assert kinds(messages) == ["hello", "fleet", "snapshot"]
    assert [message.seq for message in messages] == [1, 2, 3]


def test_events_before_the_snapshot_are_forgotten_and_those_after_it_wait_for_its_last_piece() -> None:
    outbox = Outbox(HELLO, LIMITS)
    pop_all(outbox)
    outbox.add_events(stored(1))
    outbox.snapshot_asked(0.0)
    outbox.add_events(stored(2))
    outbox.set_snapshot([BlockStored(TierName.DEVICE, tuple(map(name, range(1, 40))))])
    outbox.add_events(stored(77))
    messages = pop_all(outbox)
    assert kinds(messages)[:-1] == ["snapshot"] * (len(messages) - 1)
    assert len(messages) > 3
    assert [message.snapshot.last for message in messages[:-1]] == [False] * (len(messages) - 2) + [True]
    assert messages[-1].step.events[0].stored.hashes == name(77)


def test_tokens_flow_between_the_pieces_of_a_snapshot() -> None:
    outbox = Outbox(HELLO, LIMITS)
    pop_all(outbox)
    outbox.snapshot_asked(0.0)
    outbox.set_snapshot([BlockStored(TierName.DEVICE, tuple(map(name, range(60))))])
    seen = []
    for token in range(100):
        outbox.add_outputs([output(1, token)])
        message = outbox.pop(0.0)
        assert message is not None
        seen.append(message.WhichOneof("kind"))
        if message.snapshot.last:
            break
    assert seen[:4] == ["snapshot", "step", "snapshot", "step"]


def test_an_overflow_forgets_events_but_no_token_and_wants_a_snapshot() -> None:
    outbox = live_outbox()
    outbox.add_outputs([output(1, 5)])
    for number in range(100):
        outbox.add_events(stored(number))
        if outbox.wants_snapshot(2.0):
            break
    assert outbox.overflows == 1
    (message,) = pop_all(outbox)
    assert not message.step.events
    assert message.step.outputs[0].token_ids == [5]


def test_a_router_that_does_not_read_is_not_given_one_snapshot_after_the_other() -> None:
    outbox = live_outbox()
    for number in range(1000):
        outbox.add_events(stored(number))
    assert outbox.overflows == 1


def test_snapshots_are_wanted_no_more_often_than_allowed() -> None:
    outbox = Outbox(HELLO, OutboxLimits(snapshot_interval_s=1.0))
    pop_all(outbox)
    assert outbox.wants_snapshot(0.0)
    outbox.snapshot_asked(0.0)
    assert not outbox.wants_snapshot(5.0)
    outbox.set_snapshot([])
    outbox.resync()
    assert not outbox.wants_snapshot(0.9)
    assert outbox.wake_at() == 1.0
    assert outbox.wants_snapshot(1.0)


def test_steps_that_nobody_read_become_one_with_tokens_and_text_in_order() -> None:
    outbox = live_outbox()
    for token in range(5):
        outbox.add_outputs([output(1, token), output(2, 10 + token)])
        outbox.add_events(stored(token))
    outbox.add_outputs([output(1, 99, finish=common_pb2.FINISH_REASON_LENGTH)])
    (message,) = pop_all(outbox)
    first, second = message.step.outputs
    assert (list(first.token_ids), first.text) == ([0, 1, 2, 3, 4, 99], " 0 1 2 3 4 99")
    assert first.finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert list(second.token_ids) == [10, 11, 12, 13, 14]
    assert [event.stored.hashes for event in message.step.events] == [name(number) for number in range(5)]


def test_tokens_do_not_overtake_the_events_of_their_step() -> None:
    outbox = live_outbox()
    for number in range(12):
        outbox.add_events(stored(number))
    outbox.add_outputs([output(1, 5)])
    messages = pop_all(outbox)
    assert len(messages) > 1
    assert [bool(message.step.outputs) for message in messages] == [False] * (len(messages) - 1) + [True]


def test_a_long_backlog_of_tokens_is_cut_into_messages_of_bounded_size() -> None:
    limits = OutboxLimits(output_weight=10, message_weight=30)
    outbox = live_outbox(limits)
    for token in range(200):
        outbox.add_outputs([output(1, token)])
    messages = pop_all(outbox)
    assert max(len(o.token_ids) for m in messages for o in m.step.outputs) <= 10
    assert max(sum(len(o.token_ids) for o in m.step.outputs) for m in messages) <= 40
    assert [token for m in messages for o in m.step.outputs for token in o.token_ids] == list(range(200))


def test_the_answer_to_a_clear_follows_the_events_before_it() -> None:
    outbox = live_outbox()
    outbox.add_events(wire_events(BlockRemoved(TierName.DEVICE, (name(1),), RemovalCause.CLEARED)))
    outbox.add_answer(worker_pb2.ClearDone(clear_id=7))
    outbox.add_answer(worker_pb2.CacheDone(command_id=8))
    sent = pop_all(outbox)
    assert kinds(sent) == ["step", "clear_done", "cache_done"]
    assert (sent[1].clear_done.clear_id, sent[2].cache_done.command_id) == (7, 8)


def load(running: int) -> worker_pb2.Load:
    return worker_pb2.Load(running=running)


def sent_loads(outbox: Outbox, now: float) -> list[int]:
    return [m.step.load.running for m in pop_all(outbox, now) if m.step.HasField("load")]


def test_loads_are_at_least_20_ms_apart_and_the_newest_wins() -> None:
    outbox = live_outbox()
    outbox.set_load(load(1), 10.0)
    assert sent_loads(outbox, 10.000) == [1]
    outbox.set_load(load(2), 10.0)
    outbox.set_load(load(3), 10.0)
    assert outbox.wake_at() == pytest.approx(10.020)
    outbox.add_outputs([output(1, 5)])
    assert sent_loads(outbox, 10.010) == []
    assert sent_loads(outbox, 10.021) == [3]


def test_an_unchanged_load_is_repeated_as_a_heartbeat_within_500_ms() -> None:
    outbox = live_outbox()
    outbox.set_load(load(1), 10.0)
    assert sent_loads(outbox, 10.0) == [1]
    outbox.set_load(load(1), 10.0)
    wake_at = outbox.wake_at()
    assert wake_at is not None
    assert 10.3 < wake_at <= 10.5
    assert sent_loads(outbox, 10.1) == []
    assert sent_loads(outbox, wake_at) == [1]
    assert sent_loads(outbox, wake_at + 0.001) == []


def test_a_step_takes_a_newer_load_along_even_where_nothing_that_counts_changed() -> None:
    outbox = live_outbox()
    outbox.set_load(worker_pb2.Load(running=1, steps=1), 10.0)
    pop_all(outbox, 10.0)
    outbox.set_load(worker_pb2.Load(running=1, steps=9), 10.02)
    outbox.add_outputs([output(1, 5)])
    (message,) = pop_all(outbox, 10.03)
    assert message.step.load.steps == 9


def test_a_repeated_load_says_how_old_it_is_and_which_jobs_it_knows() -> None:
    outbox = live_outbox()
    outbox.last_job_id = 7
    outbox.set_load(load(1), 10.0)
    first, again = (pop_all(outbox, now)[0].step.load for now in (10.01, 10.6))
    assert (first.last_job_id, again.last_job_id) == (7, 7)
    assert first.age_ms == pytest.approx(10)
    assert again.age_ms == pytest.approx(600)


MOVES = [*["step"] * 6, *["pop"] * 6, *["ask"] * 3, *["answer"] * 3, "resync"]


class Scenario:
    """A worker that stores and removes at random, a router that reads at random, and what each believes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.outbox = Outbox(HELLO, LIMITS)
        self.truth: set[tuple[str, bytes]] = set()
        self.mirror = Mirror()
        self.made: dict[int, list[int]] = defaultdict(list)
        self.read: dict[int, list[int]] = defaultdict(list)
        self.seq = 0
        self.now = 0.0
        self.asked = False

    def step(self) -> None:
        events: list[KvEvent] = []
        for _ in range(self.random.randrange(4)):
            names = tuple({name(self.random.randrange(60)) for _ in range(3)})
            if self.random.random() < 0.6:
                events.append(BlockStored(TierName.DEVICE, names))
                self.truth |= {("device", each) for each in names}
            else:
                events.append(BlockRemoved(TierName.DEVICE, names, RemovalCause.EVICTED))
                self.truth -= {("device", each) for each in names}
        job, token = self.random.randrange(3), self.random.randrange(100)
        self.made[job].append(token)
        self.outbox.add_outputs([output(job, token)])
        self.outbox.add_events(wire_events(*events))

    def pop(self) -> bool:
        self.now += 0.001
        message = self.outbox.pop(self.now)
        if message is None:
            return False
        self.seq += 1
        assert message.seq == self.seq
        assert message.ByteSize() < 2000
        self.mirror.apply(message)
        for each in message.step.outputs:
            self.read[each.job_id] += each.token_ids
        return True

    def ask(self) -> None:
        if self.outbox.wants_snapshot(self.now):
            self.outbox.snapshot_asked(self.now)
            self.asked = True

    def answer(self) -> None:
        if self.asked:
            self.asked = False
            names = [each for _, each in sorted(self.truth)]
            self.outbox.set_snapshot([BlockStored(TierName.DEVICE, (each,)) for each in names])


@pytest.mark.parametrize("seed", range(60))
def test_a_mirror_built_from_the_stream_equals_the_store_after_any_history(seed: int) -> None:
    scenario = Scenario(seed)
    for move in scenario.random.choices(MOVES, k=150):
        if move == "resync":
            scenario.outbox.resync()
        else:
            getattr(scenario, move)()
    while scenario.pop() or scenario.outbox.wants_snapshot(scenario.now) or scenario.asked:
        scenario.ask()
        scenario.answer()
    assert scenario.mirror.complete
    assert scenario.mirror.blocks == scenario.truth
    assert scenario.read == scenario.made
