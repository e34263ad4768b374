"""From a block's name to a number, in many dicts of uneven shares, so that memory grows smoothly. Pure.

One dict of ten million entries pauses for 0.4 s when it grows, and doubles its memory at once. So names, which are
digests, are spread by their first and last bytes over `_TABLES` dicts. Equal shares would all double at once;
the largest share is twice the smallest, with equal ratios between, so that the dicts double one after the other, and
what one leaves behind is filled by the next. A dict of bytes and ints is none of the garbage collector's business, so
a full collection does not look at the blocks.

Where names come and go, a dict grows once the places of those that went are used up, to three times what it holds.
`grown` looks at some dicts now and then, at all of them while a sixty-fourth of the names came anew, reads their
sizes, and copies those that are that wasteful, not many a call; so `nbytes` lags behind by less than a hundredth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise

_TABLES = 512
_ROWS = 256
_COLUMNS = 16
_LOOK_EVERY = 8  # names that come between two looks at a dict, or more where there are many names
_COPIED = 1024  # names that are copied in one call, but for one dict: a name takes 0.1 to 0.3 us
_AT_ONCE = 8  # dicts that are looked at
_LOOKS_SHIFT = 15  # names that are known, over 64 times the number of dicts
_FULL = 0.75  # a copy that is fuller would soon grow again
_ENTRY_BYTES = 24

Table = dict[bytes, int]


class Tables:
    """The dicts. `rows[name[0]][name[-1] & 15]` is the one for a name. `nbytes`: what they take."""

    def __init__(self) -> None:
        self._tables: list[Table] = [{} for _ in range(_TABLES)]
        self._places = _places()
        self.rows: list[list[Table]] = [[{}] * _COLUMNS for _ in range(_ROWS)]
        for at, table in enumerate(self._tables):
            self._replace(at, table)
        self._sizes = [table.__sizeof__() for table in self._tables]
        self.nbytes = sum(self._sizes) + sum(row.__sizeof__() for row in self.rows)
        self._wasteful: deque[int] = deque()  # that were found so
        self._unseen = 0
        self._next = 0

    def __len__(self) -> int:
        """Names. O(dicts)."""
        return sum(map(len, self._tables))

    def __iter__(self) -> Iterator[Table]:
        """The dicts."""
        return iter(self._tables)

    def grown(self, names: int, known: int) -> int:
        """So many names came, and so many are known now: look at some dicts, none of which may be in use.

        By how many bytes they were found to have changed.
        """
        self._unseen += names
        before = self.nbytes
        copied = 0
        while self._wasteful and copied < _COPIED:
            copied += self._copy(self._wasteful.popleft())
        every = max(_LOOK_EVERY, known >> _LOOKS_SHIFT) * _AT_ONCE
        while self._unseen >= every:
            self._unseen -= every
            first, end = self._next, self._next + _AT_ONCE
            self._next = end % _TABLES
            sizes = list(map(dict.__sizeof__, self._tables[first:end]))
            if sizes != self._sizes[first:end]:
                self._resized(first, sizes)
        return self.nbytes - before

    def _resized(self, first: int, sizes: list[int]) -> None:
        for at, size in enumerate(sizes, first):
            if size > self._sizes[at] and _is_wasteful(len(self._tables[at]), size):
                self._wasteful.append(at)
            self.nbytes += size - self._sizes[at]
        self._sizes[first : first + len(sizes)] = sizes

    def _copy(self, at: int) -> int:
        table = self._tables[at]
        size = table.__sizeof__()
        if _is_wasteful(len(table), size):
            copy: Table = {}
            copy.update(table)
            self._replace(at, copy)
            size = copy.__sizeof__()
        self.nbytes += size - self._sizes[at]
        self._sizes[at] = size
        return len(table)

    def _replace(self, at: int, table: Table) -> None:
        for place in self._places[at]:
            self.rows[place // _COLUMNS][place % _COLUMNS] = table
        self._tables[at] = table


def _places() -> list[range]:
    """For each dict its places, row by row; shares grow from 1 to 2 with equal ratios."""
    ends = [0, *(round(_ROWS * _COLUMNS * (2 ** ((n + 1) / _TABLES) - 1)) for n in range(_TABLES))]
    return [range(first, end) for first, end in pairwise(ends)]


def _is_wasteful(names: int, size: int) -> bool:
    """Whether a copy would take about half of the memory, or less, and have room."""
    places = 1 << (names * 3 // 2).bit_length()
    return names < _FULL * places * 2 / 3 and size > 1.5 * _ENTRY_BYTES * places * 2 / 3
