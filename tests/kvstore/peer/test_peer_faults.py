"""A peer that stalls, dies, lies or is spoken for by a stranger: always a miss with a reason, never wrong bytes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.codec import BlockCodec
from kvstore.crypto import Keyring, Protection
from kvstore.layout import KVLayout
from kvstore.peer.tier import PeerTier
from kvstore.peer.wire import BUSY, END, Channel, FleetKey, PeerProtocolError, PeerRefusedError
from kvstore.tier import BlockMeta, chain_metas
from tests.kvstore.blocks_for_tests import (
    LAYOUT,
    ROOT,
    ManualClock,
    buffers,
    chain,
    names,
    payloads,
    read_verified,
)
from tests.kvstore.peer.peers_for_tests import (
    CODEC,
    FLEET,
    NAMESPACE,
    Cut,
    Stranger,
    Worker,
    reader,
    stranger,
    wait_until,
    worker,
)

HELLO_NBYTES = 46
PROOF_NBYTES = 4 + 1 + 34 + 1
GREETING_NBYTES = HELLO_NBYTES + PROOF_NBYTES
KEYRING = Keyring({"a": bytes(range(32))})
METAS = chain(6)


@pytest.fixture
def owner() -> Iterator[Worker]:
    with worker() as running:
        assert running.host.write(METAS, payloads(METAS)) == len(METAS)
        yield running


@pytest.fixture
def between(owner: Worker) -> Iterator[Stranger]:
    with stranger(owner.server.address) as running:
        yield running


def read_back(tier: PeerTier, metas: list[BlockMeta], deadline_s: float | None = None) -> int:
    return read_verified(tier, names(metas), deadline_s=deadline_s)


class Silent:
    """Listens and takes connections, like a stopped process, and never says a word."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.close()


def test_a_peer_that_never_answers_costs_one_deadline_and_then_nothing(silent: Silent) -> None:
    clock = ManualClock()
    with reader(silent.address, timeout_s=0.05, clock=clock) as tier:
        for _ in range(3):
            assert tier.match(names(METAS)) == 0
        for _ in range(100):
            assert read_back(tier, METAS) == 0
        stats = tier.stats()
        assert stats.misses == {"deadline": 3, "breaker": 100}
        assert not stats.healthy
        assert "did not answer in time" in stats.problem
        clock.now += 1.1  # the probe
        assert tier.match(names(METAS)) == 0
        assert tier.stats().misses == {"deadline": 4, "breaker": 100}


def test_a_dead_peer_is_a_miss_and_is_found_again_without_a_restart(owner: Worker) -> None:
    clock = ManualClock()
    port = int(owner.server.address.rpartition(":")[2])
    with reader(owner.server.address, clock=clock) as tier:
        assert read_back(tier, METAS) == 6
        owner.server.close()
        for _ in range(4):
            assert read_back(tier, METAS) == 0
        assert tier.stats().misses == {"error": 3, "breaker": 1}
        assert "see whether it runs" in tier.stats().problem
        clock.now += 1.1
        with worker(port=port) as successor:
            successor.host.write(METAS, payloads(METAS))
            assert read_back(tier, METAS) == 6
            assert (tier.stats().healthy, tier.stats().problem) == (True, "")


def test_a_connection_that_ended_while_it_was_idle_costs_no_miss(owner: Worker) -> None:
    port = int(owner.server.address.rpartition(":")[2])
    with reader(owner.server.address) as tier:
        assert read_back(tier, METAS) == 6
        owner.server.close()
        with worker(port=port) as successor:
            successor.host.write(METAS, payloads(METAS))
            assert read_back(tier, METAS) == 6
    assert tier.stats().misses == {}


def test_a_deadline_that_has_passed_is_a_miss_and_no_fault_of_the_peer(owner: Worker) -> None:
    with reader(owner.server.address) as tier:
        for _ in range(5):
            assert tier.match(names(METAS), deadline_s=0.0) == 0
            assert read_back(tier, METAS, deadline_s=-1.0) == 0
        assert tier.stats().misses == {"deadline": 10}
        assert tier.stats().healthy
        assert read_back(tier, METAS) == 6
        assert owner.counts("connections") == 1


def test_what_has_arrived_before_the_deadline_is_used(owner: Worker, between: Stranger) -> None:
    """The peer talks, and stalls in the middle of the third block."""
    stall_at = GREETING_NBYTES + 2 * CODEC.value_nbytes + 100
    between.change = lambda at, data: data[: max(0, stall_at - at)]
    with reader(between.address) as tier:
        for _ in range(4):
            assert read_back(tier, METAS, deadline_s=0.5) in (0, 2)  # none if the greeting alone took so long
        assert tier.stats().misses == {"deadline": 4}
        assert tier.stats().healthy  # our hurry is not the peer's fault
        between.change = lambda at, data: data
        assert read_back(tier, METAS) == 6


@pytest.mark.parametrize("protection", [None, *Protection])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_bit_that_is_flipped_on_the_way_is_never_delivered(
    data: st.DataObject, protection: Protection | None
) -> None:
    codec = CODEC if protection is None else BlockCodec(LAYOUT, NAMESPACE, KEYRING, protection)
    length = GREETING_NBYTES + 6 * codec.value_nbytes + len(END)
    bit = data.draw(st.integers(0, 8 * length - 1))

    def change(at: int, said: bytes) -> bytes:
        if not at <= bit // 8 < at + len(said):
            return said
        broken = bytearray(said)
        broken[bit // 8 - at] ^= 1 << bit % 8
        return bytes(broken)

    with worker(codec=codec) as owner, stranger(owner.server.address) as between:
        owner.host.write(METAS, payloads(METAS))
        between.change = change
        # A longer length than was sent makes it wait, so its patience is short; a slow machine may time out instead.
        with reader(between.address, codec=codec, timeout_s=0.5) as tier:
            whole = (bit // 8 - GREETING_NBYTES) // codec.value_nbytes
            assert read_back(tier, METAS) <= max(0, whole)
            assert sum(tier.stats().misses.values()) == 1


@pytest.mark.parametrize("where", ["greeting", "header", "payload", "between blocks", "end"])
def test_a_stream_that_is_cut_is_a_miss_from_there_on(owner: Worker, between: Stranger, where: str) -> None:
    value = CODEC.value_nbytes
    cut_at, whole = {
        "greeting": (HELLO_NBYTES + 7, 0),
        "header": (GREETING_NBYTES + value + 100, 1),
        "payload": (GREETING_NBYTES + 2 * value - 1, 1),
        "between blocks": (GREETING_NBYTES + 3 * value, 3),
        "end": (GREETING_NBYTES + 6 * value + 10, 6),
    }[where]
    between.change = lambda at, data: data if at + len(data) < cut_at else Cut(data[: max(0, cut_at - at)])
    with reader(between.address) as tier:
        assert read_back(tier, METAS) == whole
        assert tier.stats().misses == {"error": 1}
        assert tier.stats().problem != ""


def test_values_of_two_blocks_that_are_swapped_are_foreign(owner: Worker, between: Stranger) -> None:
    value = CODEC.value_nbytes
    said = bytearray()

    def swap(at: int, data: bytes) -> bytes:
        said.extend(data)
        if len(said) <= GREETING_NBYTES:
            return data
        if len(said) < GREETING_NBYTES + 6 * value + len(END):
            return b""
        body = bytes(said[GREETING_NBYTES:])
        return body[value : 2 * value] + body[:value] + body[2 * value :]

    between.change = swap
    with reader(between.address) as tier:
        assert read_back(tier, METAS) == 0
        assert tier.stats().misses == {"foreign": 1}


def test_a_peer_that_sends_more_than_it_was_asked_for_is_hung_up_on(owner: Worker, between: Stranger) -> None:
    end = GREETING_NBYTES + 2 * CODEC.value_nbytes
    between.change = lambda at, data: data[:-1] + b"x" if at + len(data) == end + len(END) else data
    with reader(between.address) as tier:
        assert read_back(tier, METAS[:2]) == 2
        assert "more than it was asked for" in tier.stats().problem
        assert tier._link._pop() is None


def test_something_else_that_listens_there_is_named_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with sock:
                        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with reader(f"127.0.0.1:{listener.getsockname()[1]}") as tier:
            assert tier.match(names(METAS)) == 0
            assert "another program" in tier.stats().problem
            assert tier.stats().misses == {"error": 1}
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


class TestReplay:
    def test_a_recorded_client_is_turned_away(self, owner: Worker, between: Stranger) -> None:
        with reader(between.address) as tier:
            assert tier.match(names(METAS)) == 6
        host, _, port = owner.server.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20.0) as sock:
            sock.sendall(between.heard[0])
            heard = b""
            with suppress(ConnectionError):
                while data := sock.recv(1 << 12):
                    heard += data
        assert len(heard) <= HELLO_NBYTES
        wait_until(lambda: owner.counts("refused") == 1)

    def test_a_recorded_server_cannot_prove_itself(self, owner: Worker, between: Stranger) -> None:
        recorded = bytearray()
        between.change = lambda at, data: recorded.extend(data) or data
        with reader(between.address) as tier:
            assert tier.match(names(METAS)) == 6
        between.change = lambda at, data: bytes(recorded[at : at + len(data)])
        with reader(between.address) as tier:
            assert tier.match(names(METAS)) == 0
            assert "does not know our secret" in tier.stats().problem or "accept our secret" in tier.stats().problem

    def test_a_clients_own_proof_sent_back_to_it_proves_nothing(self) -> None:
        ours, theirs = socket.socketpair()
        client, liar = Channel(ours, time.monotonic() + 30), Channel(theirs, time.monotonic() + 30)

        def lie() -> None:
            liar.send_frame(b"WKVP", 1, b"n" * 32)
            _, _, proof = liar.receive_frame()
            liar.send_frame(proof, "")

        thread = threading.Thread(target=lie)
        thread.start()
        with pytest.raises(PeerRefusedError, match="does not know our secret"):
            FleetKey(FLEET).greet(client, CODEC)
        thread.join()
        client.close()
        liar.close()

    def test_another_protocol_version_is_named(self) -> None:
        ours, theirs = socket.socketpair()
        client, other = Channel(ours, time.monotonic() + 30), Channel(theirs, time.monotonic() + 30)
        other.send_frame(b"WKVP", 2, b"n" * 32)
        with pytest.raises(PeerRefusedError, match="upgrade"):
            FleetKey(FLEET).greet(client, CODEC)
        other.send_frame(b"ABCD", 1, b"n" * 32)
        with pytest.raises(PeerProtocolError):
            FleetKey(FLEET).greet(client, CODEC)
        client.close()
        other.close()

    def test_neither_the_secret_nor_its_key_travels(self, owner: Worker, between: Stranger) -> None:
        said = bytearray()
        between.change = lambda at, data: said.extend(data) or data
        with reader(between.address) as tier:
            assert tier.match(names(METAS)) == 6
            assert read_back(tier, METAS) == 6
            key = FleetKey(FLEET)._key
        everything = bytes(said) + bytes(between.heard[0])
        assert FLEET.encode() not in everything
        assert key not in everything


LARGE = KVLayout(layers=8, kv_heads=8, k_dim=64, v_dim=64, dtype="float32", block_size=16)  # 4 MiB: no buffer takes it


class TestStalledReader:
    """A reader that asks and does not take."""

    def ask(self, address: str, codec: BlockCodec, hashes: list[bytes]) -> Channel:
        host, _, port = address.rpartition(":")
        channel = Channel(socket.create_connection((host, int(port))), time.monotonic() + 30)
        FleetKey(FLEET).greet(channel, codec)
        channel.send_frame("read", hashes)
        return channel

    def big_worker(self, send_s: float, **settings: object) -> tuple[object, BlockCodec, list[BlockMeta]]:
        codec = BlockCodec(LARGE, NAMESPACE)
        metas = chain_metas(names(chain(2)), before=ROOT, root=ROOT, ttl_s=None)
        return worker(codec=codec, layout=LARGE, slots=4, send_s=send_s, **settings), codec, metas

    def test_it_is_hung_up_on_and_its_slots_are_free_again(self) -> None:
        made, codec, metas = self.big_worker(0.1)
        with made as owner:
            owner.host.write(metas, payloads(metas, LARGE))
            channel = self.ask(owner.server.address, codec, names(metas) * 8)
            wait_until(lambda: owner.counts("stalled") == 1)
            wait_until(lambda: owner.counts("open") == 0)
            owner.host.clear()
            assert owner.host.stats().used_bytes == 0
            channel.close()

    def test_a_reader_that_trickles_has_no_more_time_than_one_that_stalls(self) -> None:
        made, codec, metas = self.big_worker(0.2)
        with made as owner:
            owner.host.write(metas, payloads(metas, LARGE))
            channel = self.ask(owner.server.address, codec, names(metas) * 8)
            one = memoryview(bytearray(1))
            with suppress(PeerProtocolError, OSError):
                while owner.counts("stalled") == 0:
                    channel.receive_into(one)
            wait_until(lambda: owner.counts("stalled") == 1)
            channel.close()

    def test_others_are_told_that_it_is_busy_and_the_server_can_be_closed(self) -> None:
        made, codec, metas = self.big_worker(60.0, max_sends=1, queue_s=0.01)
        with made as owner:
            owner.host.write(metas, payloads(metas, LARGE))
            channel = self.ask(owner.server.address, codec, names(metas) * 8)
            head = memoryview(bytearray(512))
            channel.receive_into(head)
            with reader(owner.server.address, codec=codec) as tier:
                assert tier.match(names(metas)) == 2  # questions are answered all the same
                assert tier.read(names(metas), buffers(2, LARGE)).count == 0
                assert tier.stats().misses == {"busy": 1}
                assert "as much as it can" in tier.stats().problem
            assert owner.counts("busy") == 1
            owner.server.close()  # does not wait for the stalled reader's minute
            channel.close()


def test_the_marks_are_no_headers() -> None:
    for mark in (END, BUSY):
        with pytest.raises(Exception, match="not a block"):
            CODEC.parse(mark)


def test_host_blocks_are_never_sent_from_a_slot_that_was_given_away(owner: Worker) -> None:
    """A block is removed and its slot wanted again while a reader is slow: what arrives is the block, or nothing."""
    with stranger(owner.server.address) as between, reader(between.address) as tier:
        other = chain(64, first_token=5)

        def churn(at: int, data: bytes) -> bytes:
            owner.host.clear()
            owner.host.write(other, payloads(other))
            return data

        between.change = churn
        count = read_back(tier, METAS)
        assert count in range(7)
        between.change = lambda at, data: data
        assert tier.match(names(other)) == 64
