"""PeerTier: blocks in the host tier of one other worker, read by hash.

Covers: what a tier promises, in terms of questions to a `PeerServer`. Does not cover: the connection and its faults
(`link`), the protocol (`wire`), which worker to ask (the router), whether it is worth it (`store`).

It reads only: the other worker decides what it holds, evicts and expires. What is read is used there, too: a block that
is wanted elsewhere stays warm. A value that is not the block ends the connection and counts as a fault of the peer;
there is nothing here to delete.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.errors import CodecError, LayoutError, MissReason
from kvstore.peer.link import PeerBusyError, PeerLink, PeerUnavailableError
from kvstore.peer.others import OfOthers
from kvstore.peer.promises import Progress
from kvstore.peer.watch import parsed
from kvstore.peer.wire import BUSY, END, MAX_HASHES, Channel, PeerProtocolError
from kvstore.tier import NOTHING_ASKED, BlockMeta, Clock, Delivery, TierStats

DEFAULT_TIMEOUT_S = 0.05
MAX_SEEN = 1 << 14


class PeerTier(OfOthers):
    """Blocks of another worker. Thread-safe. Keeps the reading side of the contract of `kvstore.tier.Tier`.

    `match`, `read` and `touch` may wait for the peer, no other method does. A peer that does not answer costs a caller
    one timeout, connecting included; after three in a row the breaker answers for it in microseconds.
    """

    def __init__(
        self,
        address: str,
        *,
        codec: BlockCodec,
        secret: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        clock: Clock = time.monotonic,
    ) -> None:
        """Connect to nothing yet.

        Args:
            address: `host:port` of its `PeerServer`; the host best as a number: names are looked up without a deadline.
            codec: of the blocks; both workers need the same namespace, layout and keyring.
            secret: of the fleet.
            timeout_s: longest silence of the peer: the wait for an answer, and within one for the next
                `kvstore.redis.resp.FLOW_NBYTES` of it. How long a whole read may take is its `deadline_s`.
            clock: of the breaker.

        Raises:
            TierError: the address or the secret cannot be used.
        """
        self._codec = codec
        self._link = PeerLink(address, codec=codec, secret=secret, timeout_s=timeout_s, clock=clock)
        self._lock = threading.Lock()
        self._seen: OrderedDict[BlockHash, BlockMeta] = OrderedDict()
        self._hits = 0
        self._misses: Counter[str] = Counter()

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """As `Tier.match`; one round trip. A fault is counted as a miss, an answer is not."""
        if not hashes:
            return 0
        try:
            with self._link.contact(_end(deadline_s)) as channel:
                return _ask(channel, "match", hashes)
        except PeerUnavailableError as fault:
            self._missed(fault.reason)
            return 0

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """As `Tier.read`; the first block takes one round trip, the others follow it. The timeout is for silence.

        Raises:
            LayoutError: a buffer has not the size of a block.
        """
        if not hashes:
            return NOTHING_ASKED
        hashes, buffers = hashes[:MAX_HASHES], [_as_bytes(buffer) for buffer in into[:MAX_HASHES]]
        if any(buffer.nbytes != self._codec.layout.block_nbytes for buffer in buffers):
            raise LayoutError(f"every buffer must have the {self._codec.layout.block_nbytes} bytes of a block")
        arrived: list[BlockMeta] = []
        ended: MissReason | None = None
        try:
            ends_at = _end(deadline_s)
            with self._link.contact(ends_at) as channel:
                self._receive(channel, hashes, buffers, arrived, ends_at)
        except (PeerUnavailableError, CodecError) as fault:
            ended = fault.reason
        is_short = len(arrived) < len(hashes)
        if is_short and ended is None:
            ended = MissReason.ABSENT
        if ended is not None:
            self._missed(ended)
        self._delivered(arrived)
        return Delivery(len(arrived), ended if is_short else None)  # what fails behind the last block ends nothing

    def progress(self, tickets: Sequence[BlockHash], seen: Sequence[Progress], *, patience_s: float) -> list[Progress]:
        """How far the peer is with what it makes; it answers when that is not as it was seen, or after the patience.

        Raises:
            PeerUnavailableError: it does not say.
        """
        with self._link.contact(math.inf) as channel:
            self._link.renew(channel, math.inf, more_s=patience_s)
            was = [(int(each.state), each.made) for each in seen]
            channel.send_frame("await", list(tickets), was, round(patience_s * 1e3))
            answers = parsed(channel.receive_frame(), len(tickets))
            if answers is None:
                raise PeerProtocolError("it does not answer await with how far it is")
            return answers

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """As `Tier.touch`; of a peer that does not answer, nothing is touched."""
        with suppress(PeerUnavailableError), self._link.contact(math.inf) as channel:
            _ask(channel, "touch", hashes)

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block was last read from it; None: not known. Never asks the peer."""
        with self._lock:
            return self._seen.get(name)

    def sweep(self) -> float | None:
        """Nothing to do: the peer drops what has expired."""
        return None

    def stats(self) -> TierStats:
        """As `Tier.stats`, without asking; fill is the peer's business, so unknown."""
        with self._lock:
            return TierStats(
                hits=self._hits,
                misses=dict(self._misses),
                read_bytes=self._hits * self._codec.layout.block_nbytes,
                healthy=self._link.is_healthy,
                problem=self._link.problem,
            )

    def check(self) -> None:
        """Nothing to audit: there are no books."""

    def close(self) -> None:
        """Close all connections. Calls that come later are misses."""
        self._link.close()

    def _receive(
        self,
        channel: Channel,
        hashes: Sequence[BlockHash],
        into: Sequence[memoryview],
        arrived: list[BlockMeta],
        ends_at: float,
    ) -> None:
        """Append what arrives, verified, until the peer has no more."""
        head = memoryview(bytearray(HEADER_NBYTES))
        channel.send_frame("read", list(hashes))
        for name, payload in zip(hashes, into, strict=True):
            self._link.renew(channel, ends_at)
            channel.receive_into(head)
            if head == END:
                return
            if head == BUSY:
                raise PeerBusyError
            channel.receive_into(payload)
            arrived.append(self._codec.decode(head, payload, expect=name).meta)
        self._link.renew(channel, ends_at)
        channel.receive_into(head)
        if head != END:
            raise PeerProtocolError("it sends more than it was asked for")

    def _delivered(self, metas: Sequence[BlockMeta]) -> None:
        with self._lock:
            self._hits += len(metas)
            for meta in metas:
                self._seen[meta.hash] = meta
                self._seen.move_to_end(meta.hash)
            while len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)

    def _missed(self, reason: MissReason) -> None:
        with self._lock:
            self._misses[reason] += 1


def _ask(channel: Channel, verb: str, hashes: Sequence[BlockHash]) -> int:
    channel.send_frame(verb, list(hashes[:MAX_HASHES]))
    match channel.receive_frame():
        case [int(count)] if 0 <= count <= len(hashes):
            return count
        case _:
            raise PeerProtocolError(f"it does not answer {verb} with a number of blocks")


def _end(deadline_s: float | None) -> float:
    return math.inf if deadline_s is None else time.monotonic() + deadline_s


def _as_bytes(buffer: memoryview) -> memoryview:
    return buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
