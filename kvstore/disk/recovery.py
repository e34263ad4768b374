"""What a slab holds, found out when it is opened: from its log, or from its slots where there is no whole log.

Covers: replaying records, asking slots. Does not cover: bytes of payloads, which are verified when they are read; what
time has done to the blocks meanwhile (`books`).

A slot tells when its block was written, not when it was used last. So what only the slots know is as old as its bytes:
it may be evicted or expire too early, never too late. Leases that only the log knew are lost with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter

from kvstore.codec import BlockCodec
from kvstore.disk.log import (
    HASH,
    INDEX,
    PROMISED,
    SEQUENCE,
    TTL_S,
    UNTIL,
    USED,
    Condition,
    Contents,
    Found,
    Kind,
    Record,
)
from kvstore.disk.slab import Slab
from kvstore.errors import CodecError
from kvstore.lifetime import Lifetime

SCAN_THREADS = 8  # a page costs a device's latency, not its bandwidth


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a slab was found to hold.

    Attributes:
        found: least recently used first; one for each name.
        log_is_whole: the log told all of it. log_is_stale: it tells of more than that, or of uses in the future.
    """

    found: list[Found]
    log_is_whole: bool
    log_is_stale: bool


def recover(slab: Slab, contents: Contents, codec: BlockCodec, wall: float) -> Recovered:
    """Find out what the slab holds; `wall`: seconds since the epoch.

    Raises:
        OSError: the slots cannot be read.
    """
    whole = contents.condition in (Condition.WHOLE, Condition.TORN)
    try:
        slots = replay(contents.records)
    except (TypeError, ValueError, IndexError):  # frames are checksummed, so another version wrote them
        slots, whole = {}, False
    if not whole and not slab.is_new:
        slots = _ask_slots(slab, codec, slots)
    found = _one_a_name([one for one in slots.values() if one[INDEX] < slab.num_slots])
    is_stale = len(found) < len(slots) or max(map(itemgetter(USED), found), default=wall) > wall
    return Recovered(found, whole, is_stale)


def replay(records: Iterable[Found]) -> dict[int, Found]:
    """Slot to what it holds, in order of the last use. Takes the records' lists for it: do not use them any more.

    Raises:
        TypeError, ValueError, IndexError: they are no records of ours.
    """
    slots: dict[int, Found] = {}
    for record in records:
        kind = record[0]
        if kind == Kind.STORED:
            slots.pop(record[INDEX], None)  # the new one goes to the end
            slots[record[INDEX]] = record
        elif kind == Kind.REMOVED:
            for index in record[1]:
                slots.pop(index, None)
        elif kind == Kind.USED:
            _use(slots, record[1])
        else:
            _change(slots, kind, record)
    return slots


def _use(slots: dict[int, Found], uses: Sequence[float]) -> None:
    for index, used in zip(uses[::2], uses[1::2], strict=True):
        one = slots.pop(int(index), None)
        if one is not None:
            one[USED] = used
            slots[one[INDEX]] = one


def _change(slots: dict[int, Found], kind: int, record: Record) -> None:
    match Kind(kind):
        case Kind.PROLONGED:
            index, ttl_s, until = record[1:]
            if index in slots:
                own = Lifetime(slots[index][TTL_S], slots[index][UNTIL])
                slots[index][TTL_S], slots[index][UNTIL], _ = own.joined(Lifetime(ttl_s, until))
        case Kind.LEASED:
            index, promised, for_s = record[1:]
            if index in slots:
                slots[index][PROMISED:] = promised, for_s
        case Kind.RELEASED:
            for index in record[1]:
                if index in slots:
                    del slots[index][PROMISED:]


def _ask_slots(slab: Slab, codec: BlockCodec, known: dict[int, Found]) -> dict[int, Found]:
    """What the slots say of themselves; of writes that the log knows too, what the log says."""

    def ask(index: int) -> Found | None:
        page = slab.page(index)
        if page is None or not slab.counts(index, page):
            return None
        logged = known.get(index)
        if logged is not None and logged[SEQUENCE] == page.sequence:
            return logged
        try:
            header = codec.parse(page.header)
        except CodecError:
            return None
        names = (header.hash, header.parent, header.root)
        told = (header.ttl_s, header.until, header.priority, header.turn)
        return [Kind.STORED, index, page.sequence, *names, *told, header.created]

    with ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="kvstore-disk-scan") as pool:
        chunks = (range(start, min(start + 256, slab.num_slots)) for start in range(0, slab.num_slots, 256))
        found = [one for chunk in pool.map(lambda chunk: [ask(i) for i in chunk], chunks) for one in chunk if one]
    # Blocks of one write have one time; the tail of a chain, which was written last, must be the oldest.
    found.sort(key=lambda one: (one[USED], -one[SEQUENCE]))
    return {one[INDEX]: one for one in found}


def _one_a_name(found: list[Found]) -> list[Found]:
    """Of slots that name one block only the one that was written last."""
    if len(set(map(itemgetter(HASH), found))) == len(found):
        return found
    latest: dict[bytes, Found] = {}
    for one in found:
        other = latest.setdefault(one[HASH], one)
        if other[SEQUENCE] < one[SEQUENCE]:
            latest[one[HASH]] = one
    return [one for one in found if latest[one[HASH]] is one]
