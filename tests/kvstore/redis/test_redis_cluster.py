"""Blocks in a Redis Cluster: the leading prefix over all nodes, whatever becomes of one of them."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from kvstore.blocks import BlockHash, short
from kvstore.codec import BlockCodec
from kvstore.errors import TierError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause
from kvstore.redis.cluster import RedisClusterTier
from kvstore.redis.node import ElsewhereError
from kvstore.redis.watch import Watching
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, buffers, chain, names, payload, payloads, read_verified
from tests.kvstore.redis.redis_fleets_for_tests import Cluster, Process, clustered, free_ports, system_redis, until
from tests.kvstore.redis.redis_for_tests import NAMESPACE, PATIENT_S, key, make_tier

LENGTH = 24  # blocks of a chain: every node has some


@pytest.fixture(scope="module")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with clustered(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def cluster(_servers: Cluster) -> Cluster:
    """Empty. Must be left whole."""
    for node in _servers.nodes:
        with node.client() as client:
            client.flushall()
    return _servers


@pytest.fixture
def breakable(tmp_path: Path) -> Iterator[Cluster]:
    with clustered(tmp_path) as made:
        yield made


@pytest.fixture
def tier(cluster: Cluster) -> Iterator[RedisClusterTier]:
    made = make(cluster.url)
    yield made
    made.check()
    made.close()


def make(url: str, **settings: Any) -> RedisClusterTier:
    settings = {"timeout_s": PATIENT_S, "write_timeout_s": PATIENT_S, **settings}
    return RedisClusterTier(url, codec=BlockCodec(LAYOUT, NAMESPACE), **settings)


def read_back(tier: RedisClusterTier, hashes: Sequence[BlockHash]) -> int:
    return read_verified(tier, hashes)


def on(cluster: Cluster, node: Process, metas: Sequence[BlockMeta]) -> list[int]:
    """Positions of the blocks that this node serves."""
    return [i for i, meta in enumerate(metas) if cluster.node_of(key(meta.hash)) is node]


def drop(cluster: Cluster, name: BlockHash) -> None:
    with cluster.node_of(key(name)).client() as client:
        assert client.delete(key(name)) == 1


def test_every_block_lies_on_the_node_that_serves_its_slot(cluster: Cluster, tier: RedisClusterTier) -> None:
    metas = chain(LENGTH)
    assert tier.write(metas, payloads(metas)) == LENGTH
    where = [on(cluster, node, metas) for node in cluster.nodes]
    assert all(where)
    for node, part in zip(cluster.nodes, where, strict=True):
        with node.client() as client:
            assert {k.decode() for k in client.keys("*")} == {key(metas[i].hash) for i in part}
    assert read_back(tier, names(metas)) == LENGTH


def test_the_prefix_ends_at_the_first_gap_wherever_it_is(cluster: Cluster, tier: RedisClusterTier) -> None:
    metas, choose = chain(LENGTH), random.Random(7)
    for _ in range(25):
        tier.write(metas, payloads(metas))
        gaps = choose.sample(range(LENGTH), choose.randrange(4))
        for gap in gaps:
            drop(cluster, metas[gap].hash)
        before = tier.stats()
        leading = min(gaps, default=LENGTH)
        assert tier.match(names(metas)) == leading
        assert read_back(tier, names(metas)) == leading
        after = tier.stats()
        assert after.hits - before.hits == leading
        assert sum(after.misses.values()) - sum(before.misses.values()) == (1 if gaps else 0)


def test_only_what_is_readable_is_sent(cluster: Cluster, tier: RedisClusterTier) -> None:
    """Values from behind a gap would be sent for nothing."""
    metas = chain(LENGTH)
    tier.write(metas, payloads(metas))
    drop(cluster, metas[1].hash)
    sent = _bytes_sent(cluster)
    assert read_back(tier, names(metas)) == 1
    assert _bytes_sent(cluster) - sent < 3 * 2000  # of 23 values with 600 bytes each and the INFOs of the question


def test_a_wrong_value_ends_the_prefix_and_is_dropped(cluster: Cluster, tier: RedisClusterTier) -> None:
    metas = chain(LENGTH)
    tier.write(metas, payloads(metas))
    tier.drain_events()
    with cluster.node_of(key(metas[5].hash)).client() as client:
        client.delete(key(metas[5].hash))
        client.set(key(metas[5].hash), b"somebody else's")
    assert read_back(tier, names(metas)) == 5
    assert tier.stats().misses == {"foreign": 1}
    assert BlockRemoved(tier.name, (short(metas[5].hash),), RemovalCause.INVALID) in tier.drain_events()
    assert tier.match(names(metas)[5:6]) == 0
    assert tier.write(metas, payloads(metas)) == LENGTH
    assert read_back(tier, names(metas)) == LENGTH


def test_refresh_tells_what_is_missing_on_any_node(cluster: Cluster, tier: RedisClusterTier) -> None:
    metas = chain(LENGTH, ttl_s=500.0)
    tier.write(metas, payloads(metas))
    for gap in (2, 11, 17):
        drop(cluster, metas[gap].hash)
    with cluster.node_of(key(metas[0].hash)).client() as client:
        client.pexpire(key(metas[0].hash), 1000_00)
        assert tier.refresh(metas) == [metas[i].hash for i in (2, 11, 17)]
        assert client.pttl(key(metas[0].hash)) > 400_000


def test_a_clear_of_a_prefix_follows_its_chain_over_all_nodes(cluster: Cluster, tier: RedisClusterTier) -> None:
    trunk, other, theirs = chain(LENGTH), chain(LENGTH, first_token=9), chain(LENGTH, root=OTHER_ROOT)
    tier.write([*trunk, *other, *theirs], payloads([*trunk, *other, *theirs]))
    assert make(cluster.url).clear(prefix=trunk[10].hash) == LENGTH - 10  # by one that remembers nothing
    assert [tier.match(names(metas)) for metas in (trunk, other, theirs)] == [10, LENGTH, LENGTH]
    assert tier.clear(root=OTHER_ROOT) == LENGTH
    assert tier.clear() == LENGTH + 10
    assert tier.stats().blocks == 0


def test_figures_are_summed_over_the_nodes(cluster: Cluster, tier: RedisClusterTier) -> None:
    stats = tier.stats()
    assert stats.capacity_bytes == 3 * (64 << 20)
    assert stats.used_bytes > 3 * (1 << 20)
    assert (stats.healthy, stats.problem) == (True, "")


def test_workers_agree_on_the_clusters_name(cluster: Cluster, tier: RedisClusterTier) -> None:
    other = make(f"redis+cluster://127.0.0.1:{cluster.nodes[2].port}")
    assert other.run_id() == tier.run_id() != ""
    other.close()


def test_one_seed_is_enough_and_a_dead_one_does_no_harm(cluster: Cluster) -> None:
    metas = chain(LENGTH)
    dead = free_ports(1)[0]
    other = make(f"redis+cluster://127.0.0.1:{dead},127.0.0.1:{cluster.nodes[1].port}")
    assert other.write(metas, payloads(metas)) == LENGTH
    assert other.stats().problem == ""
    other.close()


def test_a_killed_node_shortens_prefixes_and_nothing_else(breakable: Cluster) -> None:
    metas = chain(LENGTH)
    tier = make(breakable.url, timeout_s=5.0)
    assert tier.write(metas, payloads(metas)) == LENGTH
    name, victim = tier.run_id(), breakable.node_of(key(metas[3].hash))
    lost = on(breakable, victim, metas)
    others = [meta for i, meta in enumerate(metas) if i not in lost]
    victim.kill()
    for _ in range(5):
        assert tier.match(names(metas)) == lost[0]
        assert read_back(tier, names(metas)) == lost[0]
    assert read_back(tier, names(others)) == len(others)
    assert tier.write(metas, payloads(metas)) == len(others)
    assert tier.refresh(metas) == [metas[i].hash for i in lost]
    stats = tier.stats()
    assert stats.healthy
    assert f"127.0.0.1:{victim.port}" in stats.problem
    assert "start the server" in stats.problem
    with pytest.raises(TierError, match="then clear again"):
        tier.clear()
    victim.start()
    until(breakable.is_whole, "the node is back")
    until(lambda: tier.write(metas, payloads(metas)) == LENGTH, "it is written to again")
    assert read_back(tier, names(metas)) == LENGTH
    assert tier.run_id() not in ("", name)
    until(lambda: tier.stats().problem == "", "nothing is wrong any more")
    tier.close()


def test_what_a_restarted_node_held_is_told_as_gone(breakable: Cluster) -> None:
    metas = chain(LENGTH)
    tier = make(breakable.url)
    tier.write(metas, payloads(metas))
    tier.drain_events()
    victim = breakable.nodes[1]
    lost = {short(metas[i].hash) for i in on(breakable, victim, metas)}
    victim.kill()
    victim.start()
    until(breakable.is_whole, "the node is back")
    told: set[bytes] = set()

    def hears() -> bool:
        tier.probe()
        told.update(name for e in tier.drain_events() if isinstance(e, BlockRemoved) for name in e.hashes)
        return told == lost

    until(hears, "its blocks are told as gone, and no others")
    tier.close()


def test_a_moving_slot_is_a_miss_at_worst_and_never_a_wrong_byte(cluster: Cluster, tier: RedisClusterTier) -> None:
    metas = chain(LENGTH)
    tier.write(metas, payloads(metas))
    name = metas[4].hash
    slot = key_slot(key(name).encode())
    source = cluster.node_of(key(name))
    target = next(node for node in cluster.nodes if node is not source)
    try:
        cluster.begin_move(slot, source, target)
        assert read_back(tier, names(metas)) == LENGTH  # it lies there still
        assert cluster.move_keys(slot, source, target) == 1
        assert read_back(tier, names(metas)) <= 4  # ASK: neither here nor there
        assert tier.stats().healthy
    finally:
        cluster.end_move(slot, source, target)
    until(lambda: read_back(tier, names(metas)) == LENGTH, "the map has been asked for again")
    assert tier.stats().problem == ""
    assert cluster.node_of(key(name)) is target
    tier.remove([name], RemovalCause.CLEARED)
    assert tier.write(metas, payloads(metas)) == LENGTH
    with target.client() as client:
        assert client.exists(key(name))
    cluster.begin_move(slot, target, source)
    cluster.move_keys(slot, target, source)
    cluster.end_move(slot, target, source)


def test_writes_of_a_tier_with_an_old_map_go_astray_once(cluster: Cluster, tier: RedisClusterTier) -> None:
    metas = chain(LENGTH)
    slot = key_slot(key(metas[7].hash).encode())
    source = cluster.node_of(key(metas[7].hash))
    target = next(node for node in cluster.nodes if node is not source)
    for old, new in ((source, target), (target, source)):
        cluster.begin_move(slot, old, new)
        cluster.move_keys(slot, old, new)
        cluster.end_move(slot, old, new)
        until(lambda: tier.write(metas, payloads(metas)) == LENGTH, "the map has been asked for again")
        assert read_back(tier, names(metas)) == LENGTH


def test_a_stalled_node_costs_one_deadline_and_then_nothing(breakable: Cluster) -> None:
    metas = chain(LENGTH)
    tier = make(breakable.url, write_timeout_s=1.0)
    until(lambda: tier.write(metas, payloads(metas)) == LENGTH, "all is written")
    victim = breakable.node_of(key(metas[0].hash))
    assert victim.process is not None
    victim.process.send_signal(signal.SIGSTOP)
    reasons = []
    for _ in range(100):  # callers in a hurry: each counts for a quarter of a failure, and late ones for none
        assert tier.match(names(metas), deadline_s=0.05) == 0
        reasons = list(tier.stats().misses)
        if "breaker" in reasons:
            break
    assert reasons == ["deadline", "breaker"]
    assert tier.stats().misses["deadline"] >= 12
    others = [meta for i, meta in enumerate(metas) if i not in on(breakable, victim, metas)]
    until(lambda: read_back(tier, names(others)) == len(others), "the other nodes answer")
    victim.process.send_signal(signal.SIGCONT)
    until(lambda: tier.match(names(metas)) == LENGTH, "it is asked again")
    tier.close()


def test_a_cluster_that_gave_up_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    metas = chain(LENGTH)
    with clustered(tmp_path, "cluster-require-full-coverage yes") as strict:
        tier = make(strict.url, timeout_s=5.0)
        tier.write(metas, payloads(metas))
        victim = strict.nodes[0]
        others = [metas[i] for node in strict.nodes[1:] for i in on(strict, node, metas)]
        victim.kill()
        until(lambda: read_back(tier, names(others)) == 0, "the cluster gives up")
        until(lambda: "cluster-require-full-coverage no" in tier.stats().problem, "the remedy is told")
        victim.start()
        until(lambda: read_back(tier, names(others)) == len(others), "it serves again")
        until(lambda: tier.probe() and tier.stats().problem == "", "nothing is wrong any more")
        tier.close()


def test_one_password_opens_all_nodes(cluster: Cluster) -> None:
    metas = chain(LENGTH)
    for node in cluster.nodes:
        with node.client() as client:
            client.execute_command("ACL", "SETUSER", "blocks", "on", ">s3cret", "~warmkv:*", "+@all")
    tier = make(cluster.url.replace("://", "://blocks:s3cret@"))
    assert tier.write(metas, payloads(metas)) == LENGTH
    tier.close()
    tier = make(cluster.url.replace("://", "://blocks:wr0ng@"))
    assert tier.write(metas, payloads(metas)) == 0
    assert "put the right user and password" in tier.stats().problem
    assert "wr0ng" not in tier.stats().problem
    assert not tier.stats().healthy
    tier.close()


def test_a_server_that_is_no_cluster_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    alone = Process(system_redis(), tmp_path / "alone", free_ports(1)[0], ['save ""', "maxmemory 64mb"])
    try:
        alone.start()
        tier = make(f"redis+cluster://127.0.0.1:{alone.port}")
        assert tier.match(names(chain(3))) == 0
        assert "write redis:// instead of redis+cluster://" in tier.stats().problem
        assert tier.run_id() == ""
        with pytest.raises(TierError, match="then clear again"):
            tier.clear()
        tier.close()
    finally:
        alone.kill()


def test_a_plain_url_of_a_cluster_is_a_problem_with_a_remedy(cluster: Cluster) -> None:
    tier = make_tier(f"redis://127.0.0.1:{cluster.nodes[0].port}")
    assert "write redis+cluster:// instead of redis://" in tier.stats().problem
    tier.close()


def test_a_cluster_that_is_down_at_the_start_is_used_once_it_is_up(tmp_path: Path) -> None:
    metas = chain(LENGTH)
    with clustered(tmp_path) as late:
        for node in late.nodes:
            node.kill()
        tier = make(late.url)
        assert tier.write(metas, payloads(metas)) == 0
        assert tier.stats().store_failures == {"error": LENGTH}
        assert "start the server" in tier.stats().problem
        for node in late.nodes:
            node.start()
        until(lambda: tier.write(metas, payloads(metas)) == LENGTH, "the cluster is found")
        tier.close()


def test_an_answer_to_an_earlier_question_is_never_taken_for_a_block(cluster: Cluster, tier: RedisClusterTier) -> None:
    """A slot moves while values are under way: what comes behind the refusal belongs to nobody."""
    metas = chain(LENGTH)
    tier.write(metas, payloads(metas))
    primary, node = next(iter(tier._topology.nodes().items()))
    process = next(one for one in cluster.nodes if one.port == primary.port)
    mine = [metas[i].hash for i in on(cluster, process, metas)]
    strange = [meta.hash for meta in metas if meta.hash not in mine]
    for _ in range(30):
        reading = node.read([strange[0], *mine], buffers(len(mine) + 1), float("inf"))
        assert isinstance(reading.fault, ElsewhereError)
        assert reading.arrived == []
        into = buffers(len(mine))
        assert [meta.hash for meta in node.read(mine, into, float("inf")).arrived] == mine
        assert [bytes(buffer) for buffer in into] == [bytes(payload(name)) for name in mine]
    assert node.link.is_healthy


@pytest.fixture
def watched(cluster: Cluster) -> Iterator[RedisClusterTier]:
    for node in cluster.nodes:
        with node.client() as client:
            client.config_set("notify-keyspace-events", "EA")
    made = make(cluster.url, watching=Watching.LISTEN)
    nodes = made._topology.nodes().values()
    until(lambda: all(node.watch is not None and node.watch.hearing for node in nodes), "all nodes are heard")
    yield made
    made.close()
    assert not any(node.watch is None or node.watch._thread.is_alive() for node in nodes)


class Credit:
    """What a router that follows the events counts on."""

    def __init__(self, tier: RedisClusterTier) -> None:
        self.tier = tier
        self.held: set[bytes] = set()
        self.cleared = 0

    def __call__(self) -> set[bytes]:
        for event in self.tier.drain_events():
            match event:
                case BlockStored(hashes=hashes):
                    self.held.update(hashes)
                case BlockRemoved(hashes=hashes):
                    self.held.difference_update(hashes)
                case AllBlocksCleared():
                    self.held.clear()
                    self.cleared += 1
        return self.held


def test_removals_on_every_node_are_told(cluster: Cluster, watched: RedisClusterTier) -> None:
    metas, credit = chain(LENGTH), Credit(watched)
    watched.write(metas, payloads(metas))
    gone = [on(cluster, node, metas)[-1] for node in cluster.nodes]
    for i in gone:
        drop(cluster, metas[i].hash)
    expected = {short(meta.hash) for i, meta in enumerate(metas) if i not in gone}
    until(lambda: credit() == expected, "removals on all nodes are told")


def test_a_flush_of_one_node_costs_no_lasting_credit_on_the_others(cluster: Cluster, watched: RedisClusterTier) -> None:
    metas, credit = chain(LENGTH), Credit(watched)
    watched.write(metas, payloads(metas))
    victim = cluster.nodes[1]
    lost = on(cluster, victim, metas)
    with victim.client() as client:
        client.flushall()
    expected = {short(meta.hash) for i, meta in enumerate(metas) if i not in lost}
    until(lambda: credit() == expected, "the node's blocks are told as gone")
    for node in cluster.nodes:
        with node.client() as client:
            client.flushall()
    until(lambda: credit() == set(), "all blocks are told as gone")
    until(lambda: credit() == set() and credit.cleared == 4, "each flush is told")


def test_a_flush_of_one_node_is_told_by_a_worker_that_believed_in_nothing_there(
    cluster: Cluster, watched: RedisClusterTier
) -> None:
    """Blocks of a worker that has died are not counted on any more; those on other nodes are found by reading them."""
    metas, credit = chain(LENGTH), Credit(watched)
    dead = make(cluster.url)
    dead.write(metas, payloads(metas))
    credit.held |= {short(meta.hash) for meta in metas}
    dead.close()
    ours = chain(LENGTH, first_token=1)
    mine = [ours[i] for i in on(cluster, cluster.nodes[0], ours)]
    watched.write(mine, payloads(mine))
    with cluster.nodes[1].client() as client:
        client.flushall()
    until(lambda: credit() == {short(meta.hash) for meta in mine} and credit.cleared == 1, "the flush is told")
    lost = min(on(cluster, cluster.nodes[1], metas))
    assert read_back(watched, names(metas)) == lost
    assert credit() == {short(meta.hash) for meta in [*mine, *metas[:lost]]}


def test_a_block_that_moves_keeps_its_credit(cluster: Cluster, watched: RedisClusterTier) -> None:
    metas, credit = chain(LENGTH), Credit(watched)
    watched.write(metas, payloads(metas))
    slot = key_slot(key(metas[7].hash).encode())
    source = cluster.node_of(key(metas[7].hash))
    target = next(node for node in cluster.nodes if node is not source)
    for old, new in ((source, target), (target, source)):
        cluster.begin_move(slot, old, new)
        assert cluster.move_keys(slot, old, new) == 1  # tells "del" at its old node
        cluster.end_move(slot, old, new)
    drop(cluster, metas[0].hash)
    last = chain(1, first_token=77)
    watched.write(last, payloads(last))
    with source.client() as client:  # on the node that told of the move: what it says comes after that
        others = [meta for token in range(100, 200) for meta in chain(1, first_token=token)]
        mine = others[on(cluster, source, others)[0]]
        watched.write([mine], payloads([mine]))
        client.delete(key(mine.hash))
    expected = {short(meta.hash) for meta in [*metas[1:], *last]}
    until(lambda: credit() == expected, "only what was dropped is told as gone")


def test_calls_after_close_are_misses(cluster: Cluster) -> None:
    metas = chain(LENGTH)
    tier = make(cluster.url)
    tier.write(metas, payloads(metas))
    tier.close()
    assert tier.match(names(metas)) == 0
    assert read_back(tier, names(metas)) == 0
    assert tier.write(metas, payloads(metas)) == 0
    assert tier.refresh(metas) is None
    assert tier.remove(names(metas), RemovalCause.CLEARED) == 0


def _bytes_sent(cluster: Cluster) -> int:
    """By all nodes to clients."""
    total = 0
    for node in cluster.nodes:
        with node.client() as client:
            total += client.info("stats")["total_net_output_bytes"]
    return total
