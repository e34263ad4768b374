"""Byte sizes and durations as people write them: `512MiB`, `30m`.

Covers: reading and writing both, and the pydantic types made of them. Values are plain numbers inside: bytes, seconds.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_BYTES = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_BYTES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_BINARY_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_WHOLE_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1))  # milliseconds
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_LARGEST_SIZE = 1 << 60
_LARGEST_DURATION_S = 100 * 365 * 86400.0


def parse_size(value: object) -> int:
    """Bytes from `512MiB`, `1.5 GB`, `4096` or a whole number.

    Raises:
        ValueError: it is something else, negative, or no whole number of bytes.
    """
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, int) and not isinstance(value, bool):
        size = Decimal(value)
    elif found is not None and (found[2] or "B").upper() in _BYTES:
        size = Decimal(found[1]) * _BYTES[(found[2] or "B").upper()]
    else:
        raise ValueError(f"{value!r} is no byte size; write it like 512MiB, 1.5GB or 4096")
    if size != int(size) or not 0 <= size <= _LARGEST_SIZE:
        raise ValueError(f"{value!r} is no whole number of bytes from 0 to 1024 PiB; write it like 512MiB")
    return int(size)


def format_size(size: int) -> str:
    """The shortest exact form: `512MiB`, or plain bytes where no unit divides it."""
    for unit, factor in _BINARY_UNITS:
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size}B"


def size_text(size: float) -> str:
    """For people, rounded: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_duration(value: object) -> float:
    """Seconds from `30m`, `1h30m`, `250ms`, or a number of seconds.

    Raises:
        ValueError: it is something else, negative, or longer than a century.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and _PART.sub("", value.strip()) == "" and value.strip():
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(value))
    else:
        raise ValueError(f"{value!r} is no duration; write it like 30m, 1h30m, 250ms or 2.5s")
    if not 0 <= seconds <= _LARGEST_DURATION_S:  # false for NaN as well
        raise ValueError(f"{value!r} is not from 0 to a century; write it like 30m")
    return seconds


def format_duration(seconds: float) -> str:
    """`1h30m`, `250ms`; finer than a millisecond as seconds."""
    left = round(seconds * 1000)
    if abs(left - seconds * 1000) > 1e-6:
        return f"{seconds:.9f}".rstrip("0") + "s"
    text = ""
    for unit, factor in _WHOLE_UNITS:
        count, left = divmod(left, factor)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def _duration_or_never(value: object) -> float | None:
    return None if value is None or value == "never" else parse_duration(value)


def _format_or_never(seconds: float | None) -> str:
    return "never" if seconds is None else format_duration(seconds)


Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(format_size)]
Duration = Annotated[float, BeforeValidator(parse_duration), PlainSerializer(format_duration)]
# A duration, or "never".
OptionalDuration = Annotated[
    float | None, BeforeValidator(_duration_or_never), PlainSerializer(_format_or_never, return_type=str)
]
