"""Router messages as JSON for the page: numbers stay numbers, and one compact point a second for the charts.

protobuf's own JSON mapping writes 64-bit integers as strings, since JavaScript's numbers are exact only up to 2**53.
Token counts, bytes and milliseconds stay far below that, so the page gets numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from warmkv.v1 import admin_pb2

FATES = ("computed", "device", "host", "disk", "redis", "peer")

# Order of a point's values. Totals count since the router started; times to first token are null while there is none.
POINT_FIELDS = (
    "time_ms",
    *FATES,
    "generated",
    "requests",
    "failed",
    "in_flight",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "policy",
)

# Status codes that are no failure of ours: a client that leaves is its own affair.
_NOT_FAILED = frozenset({"OK", "CANCELLED"})

_WIDE = frozenset(
    {
        FieldDescriptor.TYPE_INT64,
        FieldDescriptor.TYPE_UINT64,
        FieldDescriptor.TYPE_SINT64,
        FieldDescriptor.TYPE_FIXED64,
        FieldDescriptor.TYPE_SFIXED64,
    }
)


def to_plain(message: Message) -> dict[str, Any]:
    """The message as JSON-ready values: proto field names, all fields, enum names, 64-bit integers as numbers."""
    plain: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _restore_numbers(plain, message.DESCRIPTOR.fields)
    return plain


def stats_to_plain(stats: admin_pb2.WatchStatsResponse) -> dict[str, Any]:
    """As `to_plain`; the parts that every frame has are there even while they are empty. No shared tier: no field."""
    complete = admin_pb2.WatchStatsResponse()
    complete.CopyFrom(stats)
    for part in (complete.prompt_tokens, complete.ttft, complete.handover_pause, complete.policy):
        part.SetInParent()
    return to_plain(complete)


def history_point(stats: admin_pb2.WatchStatsResponse) -> list[float | int | str | None]:
    """One value for each of POINT_FIELDS."""
    tokens = stats.prompt_tokens
    failed = sum(count for code, count in stats.requests.items() if code not in _NOT_FAILED)
    measured = stats.ttft.count > 0
    return [
        stats.time_ms,
        *(getattr(tokens, fate) for fate in FATES),
        stats.generated_tokens,
        sum(stats.requests.values()),
        failed,
        stats.in_flight,
        round(stats.ttft.p50_ms, 3) if measured else None,
        round(stats.ttft.p95_ms, 3) if measured else None,
        stats.policy.name,
    ]


def _restore_numbers(plain: dict[str, Any], fields: Iterable[Any]) -> None:  # protobuf's descriptors share no base
    for field in fields:
        if field.name in plain:
            plain[field.name] = _restored(plain[field.name], field)


def _restored(value: Any, field: FieldDescriptor) -> Any:
    entry = field.message_type
    if entry is None:
        return _numbers(value) if field.type in _WIDE else value
    if entry.GetOptions().map_entry:
        return {key: _restored(item, entry.fields_by_name["value"]) for key, item in value.items()}
    for message in value if isinstance(value, list) else [value]:
        _restore_numbers(message, entry.fields)
    return value


def _numbers(value: Any) -> Any:
    return [int(item) for item in value] if isinstance(value, list) else int(value)
