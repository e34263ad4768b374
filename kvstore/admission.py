"""Admission by name: which blocks are worth writing to the next lower tier. Pure; memory is bounded.

A hop (device to host, host to disk, host to Redis) has one rule. `always` writes each block once, as soon as it is
computed. `second_hit` writes it when it is used for the second time: most blocks never are, and their writes are saved;
the price is that a block evicted from above before its second use is computed once more. `on_eviction` writes only what
would be lost, when the upper tier evicts it: nothing is written while everything fits, but whoever makes room then
copies a block more, and a crash loses what had not been evicted yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from enum import StrEnum
from typing import Protocol


class Moment(StrEnum):
    """When a hop asks its rule."""

    USE = "use"  # each time that a block is computed, or used above
    EVICTION = "eviction"  # when the upper tier evicts it


class Admission(Protocol):
    """A rule.

    Attributes:
        moment: when to ask it; at other moments nothing is written.
    """

    moment: Moment

    def admits(self, name: Hashable) -> bool:
        """Whether to write this block now, unless the lower tier has it. Asking counts as seeing the block."""
        ...


class Always:
    """Writes each block as soon as it is computed."""

    moment = Moment.USE

    def admits(self, name: Hashable) -> bool:
        """As `Admission.admits`."""
        return True


class OnEviction:
    """Writes what the upper tier evicts."""

    moment = Moment.EVICTION

    def admits(self, name: Hashable) -> bool:
        """As `Admission.admits`."""
        return True


class SecondHit:
    """Writes what was seen before. Remembers the `memory` names seen last, O(1) each."""

    moment = Moment.USE

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def admits(self, name: Hashable) -> bool:
        """As `Admission.admits`."""
        before = name in self._seen
        self._seen[name] = None
        self._seen.move_to_end(name)
        if len(self._seen) > self._memory:
            self._seen.popitem(last=False)
        return before


ADMISSIONS = ("always", "second_hit", "on_eviction")


def make_admission(name: str, *, memory: int = 1 << 17) -> Admission:
    """The rule of that name; `memory` names at most are remembered (about 150 bytes each).

    Raises:
        ValueError: there is none of that name, or the memory holds no name.
    """
    if memory < 1:
        raise ValueError(
            f"an admission memory of {memory} names holds none; give it at least as many as blocks fit above"
        )
    if name == "always":
        return Always()
    if name == "second_hit":
        return SecondHit(memory)
    if name == "on_eviction":
        return OnEviction()
    raise ValueError(f"unknown admission rule {name!r}; choose one of {', '.join(ADMISSIONS)}")
