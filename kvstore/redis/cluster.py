"""RedisClusterTier: blocks in a Redis Cluster that the whole fleet shares.

Covers: the contract of a shared tier over several nodes. Does not cover: one node (`node`), which node serves
what (`topology`, `slots`).

The blocks of one prefix lie on many nodes, so that no prefix is hotter than its cluster. Every operation is split by
node, and the nodes are asked at the same time, each with its own pipelined batch, breaker and deadline. The answer for
the prefix is the least of what the nodes say of their parts: a node that fails shortens prefixes, and nothing else.

A slot that moves: its old node says so, which is a miss, and the map is asked for in the background.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec, Header
from kvstore.errors import MissReason, TierError
from kvstore.events import RemovalCause
from kvstore.redis.address import parse_seeds
from kvstore.redis.books import MAX_BELIEFS, FromBooks
from kvstore.redis.clear import choose
from kvstore.redis.commands import BlockCommands
from kvstore.redis.link import Purpose, UnavailableError
from kvstore.redis.node import Reading, RedisNode, Writing, end_of, flattened
from kvstore.redis.slots import Primary, slots_under
from kvstore.redis.tier import DEFAULT_TIMEOUT_S, DEFAULT_WRITE_TIMEOUT_S, key_prefix
from kvstore.redis.topology import Topology
from kvstore.redis.watch import Watching, start_watch
from kvstore.tier import NOTHING_ASKED, BlockMeta, Clock, Delivery, TierStats

T = TypeVar("T")


class RedisClusterTier(FromBooks):
    """Blocks in a Redis Cluster. Thread-safe. Keeps the contract of `kvstore.tier.SharedTier`.

    Waits for servers where `RedisTier` does, and no longer: nodes are waited for at the same time.
    """

    def __init__(
        self,
        url: str,
        *,
        codec: BlockCodec,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        write_timeout_s: float = DEFAULT_WRITE_TIMEOUT_S,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        watching: Watching = Watching.OFF,
    ) -> None:
        """Ask the cluster for its map. One that is down is a problem (see `stats`), not an error.

        Args:
            url: `redis+cluster://[user:password@]node[:port][,node[:port]...]`; some nodes, which name the others.
            others: as in `RedisTier`; the timeouts are of each node, and each has a watch of its own.

        Raises:
            TierError: the URL cannot be used.
        """
        super().__init__(wall_clock=wall_clock)
        seeds = parse_seeds(url)
        self._commands = BlockCommands(key_prefix(codec.namespace), codec, scattered=True)
        self._slot = slots_under(self._commands.prefix)
        self._block_nbytes = codec.layout.block_nbytes
        self._timeout_s = timeout_s
        self._write_timeout_s = write_timeout_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._watching = watching
        self._topology = Topology(seeds, self._make_node, clock=clock)
        self._topology.learn()
        self.probe()

    def run_id(self) -> str:
        """Names the nodes and their runs; empty: unknown.

        Another one than before: a node started anew, came, went or was replaced, and blocks may have gone with it. Two
        workers that know the same cluster agree, unless one of them has never reached a node; then they know less.
        """
        nodes = self._topology.nodes()
        runs = sorted(f"{primary.id}={node.link.facts.run_id}" for primary, node in nodes.items())
        return hashlib.sha256("\n".join(runs).encode()).hexdigest()[:40] if runs else ""

    def probe(self) -> bool:
        """Ask all nodes for a sign of life, if their breakers let us; whether there was one."""
        if not self._topology.slots.primaries:
            self._topology.outdated()
        return any(alive is True for alive in self._topology.ask_all(lambda node: node.probe()))

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """As `Tier.match`; one round trip to all nodes at once, up to 1024 blocks on each."""
        count, absent, fault = self._look_up(hashes, end_of(deadline_s))
        if fault is not None:
            self._books.missed(fault.reason)
        self._books.absent(absent)
        return count

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """As `Tier.read`. Asks first how far the prefix reaches, so that no node sends values from behind a gap."""
        if not hashes:
            return NOTHING_ASKED
        ends_at = end_of(deadline_s)
        there, absent, fault = self._look_up(hashes, ends_at)
        reason = fault.reason if fault is not None else MissReason.ABSENT if there < len(hashes) else None
        count, metas, late_reason = self._receive(hashes[:there], into[:there], ends_at)
        reason = late_reason or reason
        if reason is not None:
            self._books.missed(reason)
        self._books.delivered(metas, self._block_nbytes)
        self._books.absent([*absent, *(hashes[count : count + 1] if late_reason is MissReason.ABSENT else [])])
        return Delivery(count, reason)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `RedisTier.write`, each node its own blocks. Blocks behind one that fails are written all the same."""
        flat = [flattened(payload) for payload in payloads]
        held: set[BlockHash] = set()
        written = 0

        def work(node: RedisNode, part: list[int]) -> Writing:
            return node.write([metas[i] for i in part], [flat[i] for i in part])

        for part, answer in self._tell([meta.hash for meta in metas], work):
            writing = answer if isinstance(answer, Writing) else Writing(fault=answer)
            self._topology.heed(writing.fault)
            held |= writing.held
            written += writing.written
            if writing.fault is not None:
                self._books.failed_to_store(writing.fault.failure, len(part) - len(writing.held))
        kept = [meta for meta in metas if meta.hash in held]
        self._books.stored(kept, written=written, nbytes=self._block_nbytes)
        return len(kept)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """As `RedisTier.touch`."""
        believed = self._books.believed(hashes)
        headers, _ = self._headers([name for name in hashes if name not in believed], Purpose.TOUCHES)
        metas = [*believed.values(), *(header.meta for header in headers.values() if header is not None)]
        self._tell([meta.hash for meta in metas], lambda node, part: node.touch([metas[i] for i in part]))

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        """As `SharedTier.refresh`. What lies on a node that gives no answer, nobody can read: it counts as missing."""
        answers = self._tell([meta.hash for meta in metas], lambda node, part: node.refresh([metas[i] for i in part]))
        if answers and all(isinstance(answer, UnavailableError) for _, answer in answers):
            return None
        held: set[BlockHash] = set()
        for part, answer in answers:
            if not isinstance(answer, UnavailableError):
                held.update(metas[i].hash for i, is_there in zip(part, answer, strict=True) if is_there)
        self._books.stored([meta for meta in metas if meta.hash in held], written=0, nbytes=0)
        missing = [meta.hash for meta in metas if meta.hash not in held]
        self._books.absent(missing)
        return missing

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """As `RedisTier.remove`."""
        dropped, _ = self._drop(hashes)
        self._books.removed(dropped, cause)
        return len(dropped)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """As `RedisTier.clear`, on every node.

        Raises:
            TierError: some node did not drop all of them; clear again when it answers.
        """
        if not self._topology.learn():
            raise TierError(f"Redis was not cleared; {'; '.join(self._topology.problems())}; then clear again")
        names, fault = self._names()
        everything, blind = root is None and prefix is None, None
        if not everything:
            headers, blind = self._headers(names)
            remembered = self._books.believed(self._books.names()).values()
            names = choose(headers, remembered, root, prefix)
        dropped, left = self._drop(names)
        fault = fault or blind or left
        if everything and fault is None:
            self._books.emptied(len(dropped))
        else:
            self._books.removed(dropped, RemovalCause.CLEARED)
        if fault is not None:
            raise TierError(f"Redis was not cleared, {len(dropped)} blocks went; {fault}; then clear again")
        return len(dropped)

    def recall(self) -> int:
        """As `RedisTier.recall`, of the nodes that answer."""
        run = self.run_id()
        with self._books.recalling() as recalled:
            answers = self._topology.ask_all(lambda node: node.survey(MAX_BELIEFS))
            found = [pair for answer in answers if not isinstance(answer, UnavailableError) for pair in answer]
            return recalled(found) if self.run_id() == run else 0

    def stats(self) -> TierStats:
        """As `RedisTier.stats`, summed over the nodes; healthy while any of them is."""
        nodes = self._topology.nodes().values()
        stats = self._books.stats()
        stats.used_bytes = sum(node.link.facts.used_memory for node in nodes)
        limits = [node.link.facts.maxmemory for node in nodes]
        stats.capacity_bytes = sum(limits) if all(limits) else 0
        stats.healthy = any(node.link.is_healthy for node in nodes)
        stats.problem = "; ".join(dict.fromkeys(self._topology.problems()))
        return stats

    @property
    def advice(self) -> str:
        """As `RedisTier.advice`; of several nodes that of one."""
        return next(filter(None, (node.advice for node in self._topology.nodes().values())), "")

    def close(self) -> None:
        """Close all connections. Calls that come later are misses."""
        self._topology.close()

    def _look_up(
        self, hashes: Sequence[BlockHash], ends_at: float
    ) -> tuple[int, list[BlockHash], UnavailableError | None]:
        """How far the prefix reaches, which blocks are known to be absent, in order, and the fault that ended it."""
        count, absent, ended_by = len(hashes), list[BlockHash](), None
        for part, answer in self._ask(
            hashes, lambda node, part: node.look_up([hashes[i] for i in part], ends_at), ends_at
        ):
            fault = answer if isinstance(answer, UnavailableError) else None
            leading, gone = (0, []) if isinstance(answer, UnavailableError) else answer
            absent += gone
            if leading < len(part) and part[leading] < count:
                count, ended_by = part[leading], fault
        place = {name: i for i, name in enumerate(hashes)}
        return count, sorted(absent, key=place.__getitem__), ended_by

    def _receive(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], ends_at: float
    ) -> tuple[int, list[BlockMeta], MissReason | None]:
        """How many leading blocks arrived, their metadata, and why not all did."""
        flat = [flattened(buffer) for buffer in into]
        known = self._books.believed(hashes)
        count, reason = len(hashes), None
        metas: dict[int, BlockMeta] = {}

        def work(node: RedisNode, part: list[int]) -> Reading:
            return node.read([hashes[i] for i in part], [flat[i] for i in part], ends_at, known)

        for part, answer in self._ask(hashes, work, ends_at):
            reading = answer if isinstance(answer, Reading) else Reading(reason=answer.reason, fault=answer)
            self._topology.heed(reading.fault)
            if reading.dropped:
                self._books.removed(reading.dropped, RemovalCause.INVALID)
            metas.update(zip(part, reading.arrived, strict=False))
            arrived = len(reading.arrived)
            if arrived < len(part) and part[arrived] < count:
                count, reason = part[arrived], reading.reason
        return count, [metas[i] for i in range(count)], reason

    def _drop(self, hashes: Sequence[BlockHash]) -> tuple[list[BlockHash], UnavailableError | None]:
        """Those that were dropped, and a fault that kept others."""
        dropped: list[BlockHash] = []
        fault: UnavailableError | None = None
        for _, answer in self._tell(
            hashes, lambda node, part: node.drop([hashes[i] for i in part], self._write_timeout_s)
        ):
            names, ended_by = ([], answer) if isinstance(answer, UnavailableError) else answer
            self._topology.heed(ended_by)
            dropped += names
            fault = fault or ended_by
        return dropped, fault

    def _names(self) -> tuple[list[BlockHash], UnavailableError | None]:
        """All blocks on all nodes that answer, and the fault of one that did not."""
        names: dict[BlockHash, None] = {}
        fault: UnavailableError | None = None
        for answer in self._topology.ask_all(lambda node: node.names()):
            if isinstance(answer, UnavailableError):
                fault = answer
            else:
                names.update(dict.fromkeys(answer))
        return list(names), fault

    def _headers(
        self, names: Sequence[BlockHash], purpose: Purpose = Purpose.REMOVALS
    ) -> tuple[dict[BlockHash, Header | None], UnavailableError | None]:
        """The headers of these, None where there is none to read, and the fault of a node that gave no answer."""
        headers: dict[BlockHash, Header | None] = {}
        fault: UnavailableError | None = None
        for _, answer in self._tell(names, lambda node, part: node.headers([names[i] for i in part], purpose)):
            if isinstance(answer, UnavailableError):
                fault = answer
            else:
                headers.update(answer)
        return headers, fault

    def _ask(
        self, names: Sequence[BlockHash], work: Callable[[RedisNode, list[int]], T], ends_at: float
    ) -> list[tuple[list[int], T | UnavailableError]]:
        """As `Topology.ask`, by block."""
        return self._topology.ask([self._slot(name) for name in names], work, ends_at)

    def _tell(
        self, names: Sequence[BlockHash], work: Callable[[RedisNode, list[int]], T]
    ) -> list[tuple[list[int], T | UnavailableError]]:
        """As `Topology.tell`, by block."""
        return self._topology.tell([self._slot(name) for name in names], work)

    def _make_node(self, url: str, primary: Primary | None) -> RedisNode:
        watching = Watching.OFF if primary is None else self._watching
        is_ours = partial(self._is_served_by, primary)
        return RedisNode(
            url,
            self._commands,
            timeout_s=self._timeout_s,
            write_timeout_s=self._write_timeout_s,
            clock=self._clock,
            wall_clock=self._wall_clock,
            on_restart=partial(self._restarted, primary),
            in_cluster=True,
            watch=start_watch(watching, url, prefix=self._commands.prefix, books=self._books, is_ours=is_ours),
        )

    def _is_served_by(self, primary: Primary | None, name: BlockHash) -> bool:
        return primary in self._topology.slots.split([self._slot(name)])

    def _restarted(self, primary: Primary | None) -> None:
        """A node holds nothing of what it held."""
        if primary is not None:
            self._books.absent([name for name in self._books.names() if self._is_served_by(primary, name)])
