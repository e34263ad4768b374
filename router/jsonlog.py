"""Log lines as JSON objects, one a line, with the ids of the request that they belong to.

Covers: the formatter and its set-up. What is logged, and at which level, is each module's own matter.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from router.tracing import CURRENT_IDS

# What every record has; anything else came by `extra` and goes into the line.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class RequestIdFilter(logging.Filter):
    """Puts `request_id` and `traceparent` of the running request on every record; lets every record pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Mark the record."""
        ids = CURRENT_IDS.get()
        if ids is not None:
            for name in ("request_id", "traceparent"):
                if not hasattr(record, name):
                    setattr(record, name, getattr(ids, name))
        return True


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: `time` (RFC 3339, UTC), `level`, `logger`, `message`, then the extras."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end. Values that JSON does not know are written as their `str`."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # ASCII only: some readers take U+2028 for the end of a line, and a stream may not know every character.
        return json.dumps(line, default=str)


def log_as_json(level: str | int = "INFO", stream: TextIO | None = None) -> logging.Handler:
    """Write the root logger's records to `stream` (standard error when None) as JSON, in place of its other handlers.

    Raises:
        ValueError: no such level.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(RequestIdFilter())
    root = logging.getLogger()
    root.setLevel(level)
    root.handlers[:] = [handler]
    return handler
