"""A read of blocks over one connection: values stream into the caller's buffers, and their TTLs begin again on the way.

Covers: what is under way at a time, which answer belongs to which question, when a block's TTL is renewed. Does not
cover: the form of a value (`values`), faults (`node`).

Each block is asked for by HMGET, and renewed by a command of its own whose answer is a number:

- of a block whose TTL the caller knows, right behind its HMGET;
- of any other, once its header has told the TTL: with the next question that is sent, or after the last block.

So a read waits for its values, and once more at the end if the last blocks were not known. A block that does not arrive
whole is renewed only if it was known, which does no harm: it is dropped, or is not there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import redis

from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES
from kvstore.errors import LayoutError
from kvstore.redis.commands import BlockCommands
from kvstore.redis.resp import Wire, pack
from kvstore.tier import BlockMeta, prolonged


class BlockReading:
    """One read. Call `blocks` to its end, then `settle`; whatever either raises, the connection must be closed.

    Unread answers: at most `BlockCommands.window` values, and twice as many numbers.

    Attributes:
        renewals: commands that were sent to renew blocks.
    """

    def __init__(
        self,
        wire: Wire,
        commands: BlockCommands,
        names: Sequence[BlockHash],
        into: Sequence[memoryview],
        *,
        known: Mapping[BlockHash, BlockMeta],
        by_script: bool,
    ) -> None:
        """Ask nothing yet.

        Args:
            wire: renewed for each answer.
            known: what the caller believes of some blocks; of a TTL there and one in a header the longer one counts.
            by_script: the server's PEXPIRE knows no GT.

        Raises:
            LayoutError: a buffer has not the size of a block.
        """
        nbytes = commands.codec.layout.block_nbytes
        if any(payload.nbytes != nbytes for payload in into):
            raise LayoutError(f"every buffer must have the {nbytes} bytes of a block; give it buffers of that size")
        self._wire = wire
        self._commands = commands
        self._names = names
        self._into = into
        self._known = known
        self._by_script = by_script
        self._head = commands.form.buffer()
        self._unsent: list[bytes] = []
        self._asked = self._taken = 0  # values, of the leading blocks
        self._numbers_before: deque[int] = deque()  # for each value under way: numbers between the one before and it
        self._numbers_last = 0  # behind the last value
        self._renewed: deque[BlockMeta] = deque()  # whose numbers are under way
        self.renewals = 0
        self._forgotten: list[BlockMeta] = []  # to be renewed by a script that the server did not know
        self._refusal: redis.ResponseError | None = None

    def blocks(self) -> Iterator[BlockMeta]:
        """Leading blocks, each verified before it is told, with the TTL that it has now; ends at the first absent one.

        Raises:
            CodecError: the next value is not the block. redis.RedisError, OSError: as `commands`.
        """
        for _ in self._names[: self._commands.window]:
            self._ask()
        self._send()
        for name, payload in zip(self._names, self._into, strict=True):
            self._wire.renew()
            if not self._take():
                return
            if self._asked < len(self._names):
                self._ask()
                self._send()  # before the bytes are looked at: the server shall be busy meanwhile
            found = self._commands.codec.decode(self._head[:HEADER_NBYTES], payload, expect=name).meta
            yield self._renew_by_header(found)

    def settle(self) -> redis.ResponseError | None:
        """Take what is still under way and renew what is left; the first refusal to renew a block, if there was one.

        Raises:
            redis.RedisError, OSError: as `commands`. CodecError: a value behind the first absent one is no block.
        """
        while self._numbers_before:
            self._wire.renew()
            self._take()
        self._send()
        self._wire.renew()
        self._take_numbers(self._numbers_last)
        if self._forgotten:
            ttls = [(meta.hash, meta.ttl_s) for meta in self._forgotten if meta.ttl_s is not None]
            self._commands.lengthen(self._wire, ttls, by_script=True)
        return self._refusal

    def _ask(self) -> None:
        """The next value, and what renews its block if the TTL is known."""
        name = self._names[self._asked]
        self._unsent.append(pack(b"HMGET", self._commands.key(name), b"h", b"d"))
        self._numbers_before.append(self._numbers_last)
        self._numbers_last = 0
        self._asked += 1
        known = self._known.get(name)
        if known is not None and known.ttl_s:  # a use renews no fixed end
            self._renew(known)

    def _renew_by_header(self, found: BlockMeta) -> BlockMeta:
        known = self._known.get(found.hash)
        wanted = found if known is None else prolonged(found, known.lifetime)
        is_sent = known is not None and known.ttl_s is not None and wanted.ttl_s == known.ttl_s
        is_done = found.ttl_s is None or wanted.ttl_s == 0 or is_sent
        if not is_done:
            self._renew(wanted)
        return wanted

    def _renew(self, meta: BlockMeta) -> None:
        self._unsent.append(self._commands.renewal(meta, by_script=self._by_script))
        self._renewed.append(meta)
        self._numbers_last += 1
        self.renewals += 1

    def _send(self) -> None:
        if self._unsent:
            self._wire.send([b"".join(self._unsent)])
            self._unsent.clear()

    def _take(self) -> bool:
        """The next value under way, into its buffer; whether there was one."""
        self._take_numbers(self._numbers_before.popleft())
        at, self._taken = self._taken, self._taken + 1
        return self._commands.form.receive(self._wire, self._names[at], self._head, self._into[at])

    def _take_numbers(self, count: int) -> None:
        for _ in range(count):
            reply, meta = self._wire.read_number(), self._renewed.popleft()
            if isinstance(reply, redis.exceptions.NoScriptError):
                self._forgotten.append(meta)
            elif isinstance(reply, redis.ResponseError):
                self._refusal = self._refusal or reply
