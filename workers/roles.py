"""Which part of requests a worker is there for: prefill, decode, or both. Pure.

A fleet's roles are counts, `prefill=2,decode=6`: the workers are numbered (`w0`, `w1`, ...), the first counts of them
have the first role and so on, and who is beyond all counts does both. So a worker keeps its role when it is restarted,
and one that is added later is of use to everybody.
"""

from __future__ import annotations

import re
from enum import StrEnum


class Role(StrEnum):
    """What a router gives to a worker."""

    BOTH = "both"  # whole requests, and prefills for decode workers
    PREFILL = "prefill"  # prefills whose answers others give
    DECODE = "decode"  # answers: prompts that are short, cached, or prefilled elsewhere


_PART = re.compile(r"\s*(prefill|decode|both)\s*=\s*(\d{1,4})\s*")


def parse_roles(text: str) -> list[tuple[Role, int]]:
    """Roles and how many workers have each, in order; empty text: none is named.

    Raises:
        ValueError: it is no list of roles.
    """
    if not text.strip():
        return []
    found: list[tuple[Role, int]] = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{part.strip()!r} names no role; write them as prefill=2,decode=6")
        found.append((Role(match[1]), int(match[2])))
    return found


def role_of(name: str, text: str) -> Role:
    """The role of the worker of that name; `both` for a name without a number, and beyond all counts.

    Raises:
        ValueError: see `parse_roles`.
    """
    roles, digits = parse_roles(text), re.search(r"\d+$", name)
    if digits is None:
        return Role.BOTH
    number = int(digits[0])
    for role, count in roles:
        if number < count:
            return role
        number -= count
    return Role.BOTH
