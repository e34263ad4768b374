"""The two ids that follow a request through logs, workers and answers: `x-request-id` and W3C `traceparent`.

Covers: taking them from a caller, making them, and holding them for the log lines of the running task. Does not cover:
spans and their export.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"

# What may stand in a header, a log line and a shell without quoting.
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header: version-trace-parent-flags, lower case; later versions may
# append fields; version ff and ids of zeros are invalid.
_TRACEPARENT_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
_TRACEPARENT_V0_LENGTH = 55
_MAX_TRACEPARENT_LENGTH = 256

NewHex = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class RequestIds:
    """A request's ids."""

    request_id: str
    traceparent: str


CURRENT_IDS: ContextVar[RequestIds | None] = ContextVar("warmkv_request_ids", default=None)


def take_ids(request_id: str | None, traceparent: str | None, *, new_hex: NewHex = secrets.token_hex) -> RequestIds:
    """The caller's ids where they are well formed, new ones otherwise.

    Args:
        new_hex: makes so many random bytes, in hex.
    """
    taken = request_id is not None and _REQUEST_ID_FORM.fullmatch(request_id)
    return RequestIds(
        request_id=request_id if taken and request_id else new_hex(16),
        traceparent=traceparent if _is_traceparent(traceparent) and traceparent else _new_traceparent(new_hex),
    )


def _is_traceparent(value: str | None) -> bool:
    if value is None or len(value) > _MAX_TRACEPARENT_LENGTH or not _TRACEPARENT_FORM.fullmatch(value):
        return False
    return not value.startswith("00-") or len(value) == _TRACEPARENT_V0_LENGTH


def _new_traceparent(new_hex: NewHex) -> str:
    """Version 0, sampled."""
    return f"00-{new_hex(16)}-{new_hex(8)}-01"
