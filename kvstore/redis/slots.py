"""Which node of a Redis Cluster serves which key.

Covers: reading the answer to CLUSTER SLOTS, the slot of a block's key (CRC16, as the Redis Cluster specification
says). Does not cover: when to ask (`topology`). Pure.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import redis

from kvstore.blocks import BlockHash

SLOTS = 16384
NOBODY = -1


class Primary(NamedTuple):
    """A node that serves slots: where it is, and the name under which the cluster knows it."""

    host: str
    port: int
    id: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SlotMap:
    """One answer of one node, some time old. Empty: nothing is known.

    Attributes:
        primaries: that serve slots. owner: for each slot an index into them, NOBODY: not served.
        unserved: how many slots nobody serves.
    """

    primaries: tuple[Primary, ...] = ()
    owner: Sequence[int] = field(default=(NOBODY,) * SLOTS, repr=False)
    unserved: int = SLOTS

    def split(self, slots: Iterable[int]) -> dict[Primary | None, list[int]]:
        """Positions in `slots` of those that each node serves, ascending; under None those that nobody serves."""
        parts: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            parts.setdefault(self.owner[slot], []).append(i)
        return {None if index == NOBODY else self.primaries[index]: found for index, found in parts.items()}


def slots_under(prefix: bytes) -> Callable[[BlockHash], int]:
    """The slot of a block whose key is this prefix, without braces, and its hash in hex. 0.3 us: CRC16 goes on from
    that of the prefix."""
    begun = crc_hqx(prefix, 0)
    return lambda name: crc_hqx(name.hex().encode(), begun) % SLOTS


def parse_slots(reply: object, *, asked: str) -> SlotMap:
    """The answer to CLUSTER SLOTS. `asked`: the host that gave it; one that does not know its own address means it.

    Raises:
        redis.InvalidResponse: it is no such answer.
    """
    if isinstance(reply, redis.ResponseError):
        raise reply
    try:
        primaries: dict[Primary, int] = {}
        owner = [NOBODY] * SLOTS
        for first, last, (host, port, *more), *_ in reply:  # type: ignore[attr-defined]
            primary = Primary(host.decode() if host else asked, int(port), more[0].decode() if more else "")
            index = primaries.setdefault(primary, len(primaries))
            owner[first : last + 1] = [index] * (last + 1 - first)
    except (TypeError, ValueError, AttributeError, UnicodeDecodeError):
        raise redis.InvalidResponse("CLUSTER SLOTS did not answer with slots and nodes") from None
    if len(owner) != SLOTS:
        raise redis.InvalidResponse("CLUSTER SLOTS told of slots that do not exist")
    return SlotMap(tuple(primaries), owner, owner.count(NOBODY))
