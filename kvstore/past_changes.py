"""The history that a fleet keeps of its changes, as two of its memories make one. Pure.

Covers: which changes both know together. Does not cover: what a change is (routers), carrying it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

MAX_CHANGES = 50

Change = TypeVar("Change")


def merged_changes(
    in_force: Iterable[Change],
    overruled: Iterable[Change],
    *,
    version: int,
    key: Callable[[Change], tuple[int, str]],
) -> list[Change]:
    """The youngest `MAX_CHANGES` of both, the oldest first.

    Two operators who change something on two routers in the same moment make two records of one version. One is in
    force, but both orders were given, so both are told.

    Args:
        in_force: of the record that is in force. overruled: of the other one.
        version: of the record in force. What is younger in the other one was never in force, and is left out; but a
            record of version 0 was never changed, and knows no better.
        key: of a change: (version, router).
    """
    heard = {key(change): change for change in overruled if not version or key(change)[0] <= version}
    known = heard | {key(change): change for change in in_force}
    return [known[each] for each in sorted(known)][-MAX_CHANGES:]
