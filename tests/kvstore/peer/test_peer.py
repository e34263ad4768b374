"""Blocks read from another worker over a real socket: what arrives, who may ask, and what the server bears."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec import BlockCodec
from kvstore.crypto import Keyring, Protection
from kvstore.errors import LayoutError, TierError
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.layout import KVLayout
from kvstore.peer.server import VIEWS_AT_ONCE, PeerServer
from kvstore.peer.tier import PeerTier
from kvstore.peer.wire import MAX_HASHES
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, buffers, chain, names, payload, payloads, read_verified
from tests.kvstore.peer.peers_for_tests import CODEC, FLEET, NAMESPACE, Worker, reader, wait_until, worker

KEYRING = Keyring({"a": bytes(range(32))})


@pytest.fixture
def owner() -> Iterator[Worker]:
    with worker() as running:
        yield running


@pytest.fixture
def tier(owner: Worker) -> Iterator[PeerTier]:
    with reader(owner.server.address) as made:
        yield made


def hold(owner: Worker, metas: list[BlockMeta]) -> None:
    assert owner.host.write(metas, payloads(metas)) == len(metas)


def read_back(tier: PeerTier, metas: list[BlockMeta], deadline_s: float | None = None) -> int:
    return read_verified(tier, names(metas), deadline_s=deadline_s)


@pytest.mark.parametrize("length", [1, VIEWS_AT_ONCE, VIEWS_AT_ONCE + 1, 3 * VIEWS_AT_ONCE])
def test_blocks_of_another_worker_are_found_and_arrive(owner: Worker, tier: PeerTier, length: int) -> None:
    metas = chain(length)
    hold(owner, metas)
    assert tier.match(names(metas)) == length
    assert read_back(tier, metas) == length
    stats = tier.stats()
    assert (stats.hits, stats.read_bytes, stats.misses) == (length, length * LAYOUT.block_nbytes, {})
    assert owner.counts("blocks") == length
    assert owner.counts("connections") == 1


@pytest.mark.parametrize("protection", Protection)
def test_protected_blocks_arrive_too(protection: Protection) -> None:
    codec = BlockCodec(LAYOUT, NAMESPACE, KEYRING, protection)
    metas = chain(6)
    with worker(codec=codec) as owner, reader(owner.server.address, codec=codec) as tier:
        hold(owner, metas)
        assert read_back(tier, metas) == 6
        assert owner.host.read(names(metas), into := buffers(6)).count == 6  # what is served stays as it was
        assert [bytes(b) for b in into] == [bytes(p) for p in payloads(metas)]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 11)), st.integers(0, 12))
def test_a_read_delivers_the_leading_blocks_whatever_is_held(held: set[int], asked: int) -> None:
    metas = chain(12)
    leading = next((i for i in range(asked) if i not in held), asked)
    owner, tier = shared_pair()
    owner.host.clear()
    hold(owner, [meta for i, meta in enumerate(metas) if i in held])
    before = tier.stats().misses.get("absent", 0)
    assert tier.match(names(metas)[:asked]) == leading
    assert read_back(tier, metas[:asked]) == leading
    assert tier.stats().misses.get("absent", 0) - before == (leading < asked)
    assert tier.match(names(metas)[:1]) == (0 in held)  # the connection is still of use
    owner.host.check()


_pair: list[tuple[Worker, PeerTier]] = []


def shared_pair() -> tuple[Worker, PeerTier]:
    """One pair for all examples."""
    if not _pair:
        owner = Worker()
        _pair.append((owner, PeerTier(owner.server.address, codec=CODEC, secret=FLEET, timeout_s=20.0)))
    return _pair[0]


@pytest.fixture(scope="module", autouse=True)
def end_the_shared_pair() -> Iterator[None]:
    yield
    for owner, tier in _pair:
        tier.close()
        owner.server.close()
        owner.host.close()
    _pair.clear()


def test_a_block_that_is_evicted_between_look_up_and_load_is_absent(owner: Worker, tier: PeerTier) -> None:
    metas = chain(5)
    hold(owner, metas)
    assert tier.match(names(metas)) == 5
    owner.host.remove(names(metas)[3:], RemovalCause.EVICTED)
    assert read_back(tier, metas) == 3
    assert tier.stats().misses == {"absent": 1}
    assert tier.stats().healthy


def test_what_was_read_is_known_by_its_metadata(owner: Worker, tier: PeerTier) -> None:
    metas = chain(3, ttl_s=60.0)
    hold(owner, metas)
    assert tier.find(metas[0].hash) is None
    read_back(tier, metas[:2])
    assert [tier.find(meta.hash) for meta in metas] == [metas[0], metas[1], None]


@pytest.mark.parametrize("use", ["read", "touch"])
def test_a_use_by_a_peer_is_a_use_to_its_owner(owner: Worker, tier: PeerTier, use: str) -> None:
    metas = chain(3, ttl_s=10.0)
    hold(owner, metas)
    owner.clock.now += 6
    if use == "read":
        assert read_back(tier, metas[:2]) == 2
        assert tier.match(names(metas)[:2]) == 2  # the answer comes after the use
    else:
        tier.touch(names(metas)[:2])
    owner.clock.now += 6
    assert tier.match(names(metas)) == 2
    assert owner.host.stats().hits == 0


def test_it_writes_nothing_and_drops_nothing(owner: Worker, tier: PeerTier) -> None:
    metas = chain(2)
    hold(owner, metas)
    other = chain(2, first_token=9)
    assert tier.write(other, payloads(other)) == 0
    assert tier.remove(names(metas), RemovalCause.INVALID) == tier.clear() == tier.lease(names(metas), 5.0) == 0
    assert tier.match(names(metas)) == 2
    assert tier.match(names(other)) == 0
    assert (tier.name, tier.drain_events()) == (TierName.PEER, [])


def test_buffers_of_another_size_are_refused_before_anything_is_asked(owner: Worker, tier: PeerTier) -> None:
    with pytest.raises(LayoutError, match=str(LAYOUT.block_nbytes)):
        tier.read(names(chain(1)), [memoryview(bytearray(LAYOUT.block_nbytes - 1))])
    assert owner.counts("connections") == 0


def test_buffers_of_another_type_are_filled(owner: Worker, tier: PeerTier) -> None:
    metas = chain(1)
    hold(owner, metas)
    into = memoryview(bytearray(LAYOUT.block_nbytes)).cast("f")
    assert tier.read(names(metas), [into]).count == 1
    assert bytes(into) == bytes(payload(metas[0].hash))


def test_a_closed_tier_misses(owner: Worker, tier: PeerTier) -> None:
    metas = chain(1)
    hold(owner, metas)
    tier.close()
    assert tier.match(names(metas)) == 0
    assert read_back(tier, metas) == 0
    assert tier.stats().misses == {"error": 2}


def test_threads_share_a_tier_and_a_server(owner: Worker, tier: PeerTier) -> None:
    chains = [chain(6, first_token=token) for token in range(4)]
    for metas in chains:
        hold(owner, metas)
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(30):
            metas = chains[(number + turn) % 4]
            into = buffers(6)
            if tier.read(names(metas), into).count != 6 or [bytes(b) for b in into] != [
                bytes(p) for p in payloads(metas)
            ]:
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tier.stats().hits == 6 * 30 * 6


def test_blocks_come_and_go_while_they_are_read(owner: Worker, tier: PeerTier) -> None:
    metas, done, wrong = chain(8), threading.Event(), []

    def churn() -> None:
        for turn in range(150):
            hold(owner, metas)
            owner.host.remove(names(metas)[turn % 8 :], RemovalCause.EVICTED)
        done.set()

    thread = threading.Thread(target=churn)
    thread.start()
    while not done.is_set():
        into = buffers(8)
        count = tier.read(names(metas), into).count
        if any(bytes(b) != bytes(payload(n)) for n, b in zip(names(metas)[:count], into, strict=False)):
            wrong.append(count)
    thread.join()
    assert wrong == []
    assert set(tier.stats().misses) <= {"absent"}


class TestWhoMayAsk:
    def test_another_secret_gets_nothing_and_is_told_what_to_do(self, owner: Worker) -> None:
        metas = chain(1)
        hold(owner, metas)
        with reader(owner.server.address, secret="a guess") as tier:
            assert tier.match(names(metas)) == 0
            assert read_back(tier, metas) == 0
            assert tier.stats().misses == {"error": 2}
            assert "auth.fleet_secret" in tier.stats().problem
            assert "guess" not in tier.stats().problem + repr(tier._link._key)
        wait_until(lambda: owner.counts("refused") == 2)
        assert owner.counts("blocks") == 0

    @pytest.mark.parametrize(
        "codec",
        [BlockCodec(LAYOUT, b"m" * 32), BlockCodec(KVLayout(2, 1, 2, 4, "float32", 2), NAMESPACE)],
        ids=["another model", "another layout"],
    )
    def test_a_reader_of_other_blocks_is_told_so(self, owner: Worker, codec: BlockCodec) -> None:
        with reader(owner.server.address, codec=codec) as tier:
            assert tier.match(names(chain(1))) == 0
            assert "another model or layout" in tier.stats().problem

    def test_without_a_secret_nobody_serves_and_nobody_asks(self) -> None:
        host = HostTier(LAYOUT, LAYOUT.block_nbytes, clock=ManualClock())
        with pytest.raises(TierError, match=r"set auth\.fleet_secret"):
            PeerServer(host, codec=CODEC, secret="")
        with pytest.raises(TierError, match=r"set auth\.fleet_secret"):
            PeerTier("127.0.0.1:1", codec=CODEC, secret="")

    def test_a_value_without_the_keyrings_tag_is_a_miss(self) -> None:
        metas = chain(2)
        with worker() as owner, reader(owner.server.address, codec=BlockCodec(LAYOUT, NAMESPACE, KEYRING)) as tier:
            hold(owner, metas)
            assert read_back(tier, metas) == 0
            assert tier.stats().misses == {"foreign": 1}
            assert "keyring" in tier.stats().problem

    def test_only_this_machine_is_served_by_default(self, owner: Worker) -> None:
        assert owner.server.address.startswith("127.0.0.1:")

    def test_addresses_of_both_families_are_understood(self) -> None:
        metas = chain(1)
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 on this machine")
        with worker(host="::1") as owner, reader(owner.server.address) as tier:
            hold(owner, metas)
            assert owner.server.address.startswith("[::1]:")
            assert tier.match(names(metas)) == 1

    def test_whoever_knocks_again_and_again_does_not_fill_the_log(
        self, owner: Worker, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(5):
            with reader(owner.server.address, secret="a guess") as tier:
                assert tier.match(names(chain(1))) == 0
        wait_until(lambda: owner.counts("refused") == 5)
        assert [record.name for record in caplog.records].count("kvstore.peer.server") == 1

    def test_an_address_that_is_taken_is_an_error_with_a_remedy(self, owner: Worker) -> None:
        port = int(owner.server.address.rpartition(":")[2])
        with pytest.raises(TierError, match="free port"):
            PeerServer(owner.host, codec=CODEC, secret=FLEET, port=port)

    @pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:0", "host:70000", "host:-1"])
    def test_an_address_that_is_none_is_refused(self, address: str) -> None:
        with pytest.raises(TierError, match="host:port"):
            PeerTier(address, codec=CODEC, secret=FLEET)


def connect(owner: Worker) -> socket.socket:
    host, _, port = owner.server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20.0)


def says(sock: socket.socket) -> bytes:
    """All that comes until the end."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(1 << 16):
            said += data
    return said


class TestWhatItBears:
    @settings(max_examples=40, deadline=None)
    @given(st.binary(min_size=1, max_size=300))
    def test_arbitrary_bytes_end_the_connection_and_get_no_more_than_a_greeting(self, data: bytes) -> None:
        owner, _ = shared_pair()
        blocks = owner.counts("blocks")
        with connect(owner) as sock:
            with contextlib.suppress(OSError):  # it may have hung up by now
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            assert len(says(sock)) <= 46  # magic, version and nonce in a frame
        assert owner.counts("blocks") == blocks

    def test_a_frame_that_is_too_long_is_not_waited_for(self, owner: Worker) -> None:
        with connect(owner) as sock:
            sock.sendall(struct.pack("<I", 1 << 30))
            says(sock)
        wait_until(lambda: owner.counts("broken") == 1)

    @pytest.mark.parametrize(
        "question",
        [["erase", []], ["match"], ["match", [b"short"]], ["read", [7]], ["read", "x"], "read", 5, [None, [b"h" * 32]]],
        ids=repr,
    )
    def test_what_is_no_question_ends_the_connection(self, owner: Worker, tier: PeerTier, question: object) -> None:
        assert tier.match(names(chain(1))) == 0
        channel = tier._link._pop()
        assert channel is not None
        body = msgpack.packb(question)
        channel.send([len(body).to_bytes(4, "little") + body])
        wait_until(lambda: owner.counts("broken") == 1)
        channel.close()

    def test_longer_questions_than_the_protocol_allows_are_cut(self, owner: Worker, tier: PeerTier) -> None:
        metas = chain(1)
        hold(owner, metas)
        assert tier.match(names(metas) * (MAX_HASHES + 5)) == MAX_HASHES
        into = buffers(1) * (MAX_HASHES + 5)
        assert tier.read(names(metas) * (MAX_HASHES + 5), into).count == MAX_HASHES
        assert tier.stats().misses == {}
        assert owner.counts("broken") == 0

    def test_one_that_asks_takes_the_place_of_the_one_that_has_been_silent_for_longest(self) -> None:
        metas = chain(1)
        with worker(max_connections=2) as owner, contextlib.ExitStack() as stack:
            hold(owner, metas)
            first, second, third = (stack.enter_context(reader(owner.server.address)) for _ in range(3))
            waiting = owner.server._callers._waiting  # whoever has its answer is there a moment later
            for tier, there in ((first, 1), (second, 2), (first, 2)):
                assert tier.match(names(metas)) == 1
                wait_until(lambda there=there: len(waiting) == there)
            assert third.match(names(metas)) == 1
            wait_until(lambda: owner.counts("displaced") == 1)
            assert first.match(names(metas)) == 1  # over its old connection
            assert owner.counts("connections") == 3
            assert second.match(names(metas)) == 1
            assert owner.counts("connections") == 4
            assert second.stats().problem == ""

    def test_more_callers_than_places_are_all_answered_again_and_again(self) -> None:
        metas = chain(1)
        with worker(max_connections=8) as owner, contextlib.ExitStack() as stack:
            hold(owner, metas)
            tiers = [stack.enter_context(reader(owner.server.address)) for _ in range(20)]
            for _ in range(3):
                for tier in tiers:
                    wait_until(lambda: owner.counts("open") <= 8)  # a client knows then that it was hung up on
                    assert tier.match(names(metas)) == 1
            assert owner.counts("turned_away") == 0

    def test_a_fleet_of_seventy_idle_peers_is_answered(self) -> None:
        metas = chain(1)
        with worker() as owner, contextlib.ExitStack() as stack:
            hold(owner, metas)
            tiers = [stack.enter_context(reader(owner.server.address)) for _ in range(70)]
            for _ in range(2):
                assert [tier.match(names(metas)) for tier in tiers] == [1] * 70
            assert owner.counts("connections") == 70

    def test_when_all_are_being_answered_one_more_is_turned_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        metas, asked, go = chain(1), threading.Event(), threading.Event()
        with worker(max_connections=1, queue_s=0.01) as owner:
            hold(owner, metas)
            match = owner.host.match
            monkeypatch.setattr(owner.host, "match", lambda hashes: (asked.set(), go.wait(), match(hashes))[2])
            with reader(owner.server.address) as first, reader(owner.server.address) as second:
                busy = threading.Thread(target=first.match, args=(names(metas),))
                busy.start()
                asked.wait()
                assert second.match(names(metas)) == 0
                assert "too many connections" in second.stats().problem
                wait_until(lambda: owner.counts("turned_away") == 1)
                go.set()
                busy.join()
                assert first.stats().problem == ""
                wait_until(lambda: owner.counts("open") == 1)
                assert second.match(names(metas)) == 1

    def test_strangers_who_say_nothing_keep_nobody_out(self) -> None:
        metas = chain(1)
        with worker(greeting_s=600.0) as owner, contextlib.ExitStack() as stack:
            hold(owner, metas)
            before = stack.enter_context(reader(owner.server.address))
            assert before.match(names(metas)) == 1
            for _ in range(64):
                stack.enter_context(connect(owner))
            after = stack.enter_context(reader(owner.server.address))
            assert after.match(names(metas)) == before.match(names(metas)) == 1
            wait_until(lambda: owner.counts("connections") + owner.counts("turned_away") == 66)
            wait_until(lambda: owner.counts("open") <= 2 + 32)  # the oldest strangers have gone
            assert before.stats().misses == after.stats().misses == {}

    def test_a_caller_that_does_not_greet_is_hung_up_on(self) -> None:
        with worker(greeting_s=0.05) as owner, connect(owner) as sock:
            assert len(says(sock)) > 0
            wait_until(lambda: owner.counts("open") == 0)
            assert owner.counts("idle") == 1

    def test_an_idle_connection_is_closed_and_opened_again_when_it_is_wanted(self) -> None:
        metas = chain(1)
        with worker(idle_s=0.05) as owner, reader(owner.server.address) as tier:
            hold(owner, metas)
            wait_until(lambda: tier.match(names(metas)) == 1)  # a slow machine may be idle at the first try
            wait_until(lambda: owner.counts("open") == 0)
            assert owner.counts("idle") >= 1
            wait_until(lambda: tier.match(names(metas)) == 1)
            assert owner.counts("connections") >= 2

    def test_a_fault_of_the_source_ends_one_connection_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        metas = chain(1)
        with worker() as owner, reader(owner.server.address) as tier:
            hold(owner, metas)
            with monkeypatch.context() as patch:
                patch.setattr(owner.host, "match", lambda hashes: 1 // 0)
                assert tier.match(names(metas)) == 0
            assert tier.match(names(metas)) == 1
            assert owner.counts("broken") == 1
