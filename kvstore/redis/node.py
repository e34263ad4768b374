"""One Redis server, alone or a node of a cluster: asks it about blocks that it serves, and says what came of it.

Covers: operations on one server, in terms of commands (`commands`) over a link (`link`). Does not cover:
what an outcome means for counters and events (`redis`), which node to ask (`cluster`). Keeps no books.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import compress
from types import MappingProxyType

import redis
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from kvstore.blocks import BlockHash
from kvstore.codec import Header
from kvstore.errors import CodecError, MissReason
from kvstore.redis.address import parse_address
from kvstore.redis.commands import BlockCommands
from kvstore.redis.link import NEVER, Purpose, RedisLink, UnavailableError
from kvstore.redis.reading import BlockReading
from kvstore.redis.resp import Wire
from kvstore.redis.slots import SlotMap, parse_slots
from kvstore.redis.watch import RedisWatch
from kvstore.tier import BlockMeta, Clock

log = logging.getLogger(__name__)

MOVING = "slots of the cluster are moving; try again"
DOWN = (
    "the Redis cluster is down because slots are lost; bring the lost nodes back, or let the others serve "
    "(CONFIG SET cluster-require-full-coverage no on every node)"
)
_ELSEWHERE = (MovedError, AskError, TryAgainError, ClusterDownError)


class ElsewhereError(UnavailableError):
    """The node does not serve a slot (any more, or yet): the map of slots is out of date."""


@dataclass(slots=True)
class Reading:
    """What a read brought.

    Attributes:
        arrived: the leading blocks.
        reason: why it ended early; None: it did not.
        dropped: the next block, if its value was not the block and was dropped for it.
        fault: what kept the server from answering.
    """

    arrived: list[BlockMeta] = field(default_factory=list)
    reason: MissReason | None = None
    dropped: list[BlockHash] = field(default_factory=list)
    fault: UnavailableError | None = None


@dataclass(slots=True)
class Writing:
    """What a write left: the blocks that the node holds, `written` of them since now, and what ended it early."""

    held: set[BlockHash] = field(default_factory=set)
    written: int = 0
    fault: UnavailableError | None = None


class RedisNode:
    """Thread-safe. Methods raise UnavailableError when the node gives no answer, unless they return it."""

    def __init__(
        self,
        url: str,
        commands: BlockCommands,
        *,
        timeout_s: float,
        write_timeout_s: float,
        clock: Clock,
        wall_clock: Clock,
        on_restart: Callable[[], None],
        watch: RedisWatch | None = None,
        in_cluster: bool = False,
    ) -> None:
        """Connect to nothing yet; settings as in `RedisTier`.

        Args:
            on_restart, in_cluster: as in `RedisLink`.
            watch: on this server; closed with it.

        Raises:
            TierError: the URL cannot be used.
        """
        self.url = url
        self.watch = watch
        self._commands = commands
        self._in_cluster = in_cluster
        self._timeout_s = timeout_s
        self._write_timeout_s = write_timeout_s
        self._wall_clock = wall_clock
        nbytes = commands.codec.layout.block_nbytes
        self.link = RedisLink(url, clock=clock, on_restart=on_restart, in_cluster=in_cluster, block_nbytes=nbytes)

    def slots(self) -> SlotMap:
        """What this node knows of its cluster."""
        with self._contact(Purpose.PROBES, self._write_timeout_s) as wire:
            asked = str(parse_address(self.url).settings["host"])
            return parse_slots(wire.ask(b"CLUSTER", b"SLOTS"), asked=asked)

    def probe(self) -> bool:
        """Ask for a sign of life, if the breaker lets us; whether there was one."""
        return self.link.probe(self._write_timeout_s)

    def look_up(self, names: Sequence[BlockHash], ends_at: float) -> tuple[int, list[BlockHash]]:
        """How many leading ones are there, and which of those asked for are not."""
        with self._contact(Purpose.LOOK_UPS, self._timeout_s, ends_at) as wire:
            return self._commands.look_up(wire, names)

    def read(
        self,
        names: Sequence[BlockHash],
        into: Sequence[memoryview],
        ends_at: float,
        known: Mapping[BlockHash, BlockMeta] = MappingProxyType({}),
    ) -> Reading:
        """Leading blocks into the buffers; their TTLs begin again, and a wrong value is dropped.

        Args:
            known: what is believed of some of them; a longer TTL there counts instead of the header's.
        """
        reading = Reading()
        is_over = False
        try:
            with self._contact(Purpose.READS, self._timeout_s, ends_at) as wire:
                by_script = not self.link.facts.can_only_lengthen
                talk = BlockReading(wire, self._commands, names, into, known=known, by_script=by_script)
                for meta in talk.blocks():
                    reading.arrived.append(meta)
                reading.reason = MissReason.ABSENT if len(reading.arrived) < len(names) else None
                is_over = True
                self._note_renewals(talk.settle(), talk.renewals)
        except CodecError as error:  # which closed the connection, whatever else it had to say
            if not is_over:
                self._drop_wrong(reading, names, error, ends_at)
            self._renew_apart(reading.arrived, ends_at)
        except UnavailableError as fault:
            reading.fault = fault
            reading.reason = reading.reason if is_over else fault.reason
        return reading

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> Writing:
        """Send those that the node does not hold, lengthen the TTLs of the others."""
        writing = Writing()
        try:
            with self._contact(Purpose.WRITES, self._write_timeout_s) as wire:
                self.link.refresh_facts(wire)
                there = self._commands.holds(wire, [meta.hash for meta in metas])
                self._prolong(wire, list(compress(metas, there)))
                writing.held.update(meta.hash for meta in compress(metas, there))
                missing = [
                    pair for pair, held in zip(zip(metas, payloads, strict=True), there, strict=True) if not held
                ]
                for meta in self._commands.send(wire, missing, self._wall_clock()):
                    writing.held.add(meta.hash)
                    writing.written += 1
        except UnavailableError as fault:
            writing.fault = fault
        return writing

    def refresh(self, metas: Sequence[BlockMeta]) -> list[bool]:
        """For each block whether it is there; those that are, are used and have at least these TTLs."""
        with self._contact(Purpose.TOUCHES, self._write_timeout_s) as wire:
            self.link.refresh_facts(wire)
            there = self._commands.holds(wire, [meta.hash for meta in metas])
            self._prolong(wire, list(compress(metas, there)))
            return there

    def touch(self, metas: Sequence[BlockMeta]) -> None:
        """Those that are there are used, and their TTLs begin again."""
        with self._contact(Purpose.TOUCHES, self._write_timeout_s) as wire:
            self._lengthen(wire, metas)
            self._commands.use(wire, [meta.hash for meta in metas if not meta.ttl_s])

    def drop(
        self, names: Sequence[BlockHash], patience_s: float, ends_at: float = NEVER
    ) -> tuple[list[BlockHash], UnavailableError | None]:
        """Drop blocks; those that were there, and what ended it early."""
        dropped: list[BlockHash] = []
        try:
            with self._contact(Purpose.REMOVALS, patience_s, ends_at) as wire:
                dropped.extend(self._commands.unlink(wire, names))
        except UnavailableError as fault:
            return dropped, fault
        return dropped, None

    def names(self) -> list[BlockHash]:
        """All blocks of the namespace that it holds."""
        with self._contact(Purpose.REMOVALS, self._write_timeout_s) as wire:
            return list(dict.fromkeys(self._commands.scan(wire)))

    def headers(
        self, names: Sequence[BlockHash], purpose: Purpose = Purpose.REMOVALS
    ) -> list[tuple[BlockHash, Header | None]]:
        """The header of each; None: there is none that can be read."""
        with self._contact(purpose, self._write_timeout_s) as wire:
            return list(self._commands.headers(wire, names))

    def survey(self, limit: int) -> list[tuple[BlockMeta, float | None]]:
        """What it holds of the namespace, at most `limit` blocks, and the seconds that each has left (None: no end)."""
        with self._contact(Purpose.REMOVALS, self._write_timeout_s) as wire:
            names: dict[BlockHash, None] = {}
            for name in self._commands.scan(wire):
                names[name] = None
                if len(names) >= limit:
                    break
        with self._contact(Purpose.REMOVALS, self._write_timeout_s) as wire:
            return list(self._commands.survey(wire, list(names)))

    @property
    def problem(self) -> str:
        """What is wrong and what to do; empty when nothing is."""
        return self.link.problem or ("" if self.watch is None else self.watch.problem)

    @property
    def advice(self) -> str:
        """What could be better about the server, though nothing is wrong, and what to do; empty when nothing could."""
        heard = "" if self.watch is None else self.watch.advice
        return "; ".join(filter(None, [heard, *self.link.advice]))

    def close(self) -> None:
        """Close all connections."""
        if self.watch is not None:
            self.watch.close()
        self.link.close()

    @contextmanager
    def _contact(self, purpose: Purpose, patience_s: float, ends_at: float = NEVER) -> Iterator[Wire]:
        elsewhere: Exception | None = None
        with self.link.contact(purpose, patience_s, ends_at) as wire:
            try:
                yield wire
            except _ELSEWHERE as error:
                if not self._in_cluster:
                    raise
                wire.close()  # an answer like any other; but replies behind it lie unread
                elsewhere = error
        if elsewhere is not None:
            is_down = isinstance(elsewhere, ClusterDownError)
            raise ElsewhereError(DOWN if is_down else MOVING, MissReason.ERROR) from elsewhere

    def _note_renewals(self, refusal: redis.ResponseError | None, count: int) -> None:
        """A slot that moves is no refusal: who reads the block from its new node renews it there."""
        if count and not (self._in_cluster and isinstance(refusal, _ELSEWHERE)):
            self.link.noted(Purpose.TOUCHES, refusal)

    def _drop_wrong(self, reading: Reading, names: Sequence[BlockHash], error: CodecError, ends_at: float) -> None:
        """A read ended at a value that is not the block."""
        wrong = names[len(reading.arrived) : len(reading.arrived) + 1]
        log.warning("value in redis was wrong", extra={"block": wrong[0].hex(), "reason": str(error.reason)})
        reading.reason = error.reason
        reading.dropped = self.drop(wrong, self._timeout_s, ends_at)[0]

    def _renew_apart(self, metas: Sequence[BlockMeta], ends_at: float) -> None:
        """Let the TTLs of blocks that have arrived begin again, over another connection."""
        if any(meta.ttl_s for meta in metas):
            with (
                suppress(UnavailableError),  # noted as a problem; the blocks have arrived all the same
                self._contact(Purpose.TOUCHES, self._timeout_s, ends_at) as wire,
            ):
                self._lengthen(wire, metas)

    def _lengthen(self, wire: Wire, metas: Sequence[BlockMeta]) -> None:
        """They were used: let begin again what a use renews, so no fixed end."""
        ttls = [(meta.hash, meta.ttl_s) for meta in metas if meta.ttl_s]
        self._commands.lengthen(wire, ttls, by_script=not self.link.facts.can_only_lengthen)

    def _prolong(self, wire: Wire, metas: Sequence[BlockMeta]) -> None:
        """Give blocks at least their lifetimes: those without an end keep none.

        In seconds from now, fixed ends too: the server's clock may be another one than ours.
        """
        wall = self._wall_clock()
        left = [(meta.hash, s) for meta in metas if (s := meta.lifetime.left_s(wall)) is not None and s > 0]
        self._commands.lengthen(wire, left, by_script=not self.link.facts.can_only_lengthen)
        self._commands.keep(wire, [meta.hash for meta in metas if meta.ttl_s is None])


def end_of(deadline_s: float | None) -> float:
    """When `time.monotonic()` shows the end of a deadline, in seconds from now; None: it has none."""
    return NEVER if deadline_s is None else time.monotonic() + deadline_s


def flattened(buffer: memoryview) -> memoryview:
    """The same bytes, as bytes."""
    return buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
