"""The fleet record as a worker carries it between routers: the greatest version, all clears and changes.

Covers: what two records say together. Does not cover: what it means (routers), whom to tell (`streams`).
"""

from __future__ import annotations

from kvstore.past_changes import merged_changes
from kvstore.past_clears import PastClear, merged
from warmkv.v1 import common_pb2, worker_pb2


def joined(ours: worker_pb2.FleetRecord, theirs: worker_pb2.FleetRecord) -> worker_pb2.FleetRecord:
    """The one with the greater (version, author), ours where they are equal, with clears and history of both."""
    won, lost = (theirs, ours) if _rank(theirs) > _rank(ours) else (ours, theirs)
    changes = merged_changes(won.changes, lost.changes, version=won.version, key=_change_key)
    whole = worker_pb2.FleetRecord()
    whole.CopyFrom(won)
    del whole.changes[:], whole.clears[:]
    whole.changes.extend(changes)
    whole.clears.extend(_to_wire(clear) for clear in merged(_clears(ours), _clears(theirs)))
    return whole


def is_news(record: worker_pb2.FleetRecord, known: worker_pb2.FleetRecord) -> bool:
    """Whether `record`, which was joined with what is `known`, says more than that."""
    return (
        _rank(record) > _rank(known)
        or _clears(record) != _clears(known)
        or [_change_key(each) for each in record.changes] != [_change_key(each) for each in known.changes]
    )


def _rank(record: worker_pb2.FleetRecord) -> tuple[int, str]:
    return (record.version, record.author)


def _change_key(change: common_pb2.PolicyChange) -> tuple[int, str]:
    return (change.version, change.router)


def _clears(record: worker_pb2.FleetRecord) -> list[PastClear]:
    return [
        PastClear(each.number, each.author, each.chain_root, each.prefix_hash, frozenset(each.confirmed))
        for each in record.clears
    ]


def _to_wire(clear: PastClear) -> worker_pb2.PastClear:
    return worker_pb2.PastClear(
        number=clear.number,
        author=clear.author,
        chain_root=clear.root,
        prefix_hash=clear.prefix,
        confirmed=sorted(clear.confirmed),
    )
