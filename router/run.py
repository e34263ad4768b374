"""One run: consecutive blocks with one set of holders, and how lists of names are compared with it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from router.holders import Holders

LONGEST_RUN = 512  # blocks; 64 to 2,048 measured the same, and cutting a run rewrites up to half of it


class Run:
    """Consecutive blocks with one holder set.

    Attributes:
        names: the blocks' names, joined. length: blocks; zero: the run is gone. last: the last block.
        proved: leading blocks that a question went through, so that they are known to be consecutive.
        before, after: the blocks around it, as far as they are known.
        number: the run's in the tables. older, newer: neighbours in the order of placement.
    """

    __slots__ = ("after", "before", "holders", "last", "length", "names", "newer", "number", "older", "proved")

    names: bytearray
    length: int
    last: bytes
    proved: int
    holders: Holders
    before: bytes | None
    after: bytes | None
    number: int
    older: Run
    newer: Run

    @property
    def room(self) -> int:
        """Blocks that may still join it."""
        return LONGEST_RUN - self.length

    def takes(self, holders: Holders, count: int) -> bool:
        """Whether so many blocks with these holders may join it."""
        return self.holders is holders and self.length + count <= LONGEST_RUN

    def relabel(self, holders: Holders) -> None:
        """All of its blocks have these holders now."""
        self.holders.blocks -= self.length
        holders.blocks += self.length
        self.holders = holders

    def offset(self, block: bytes) -> int:
        """Where one of its blocks stands: 0 is the first."""
        names = self.names
        if names.startswith(block):
            return 0
        width = len(block)
        at = names.find(block)
        while at % width:
            at = names.find(block, at + 1)
        return at // width

    def agreed(self, hashes: Sequence[bytes], at: int) -> int:
        """How many blocks of a chain, from `at` on, are the run's: `hashes[at]` is in it. At least 1. Exact."""
        first, width = self.offset(hashes[at]), len(self.last)
        most = min(self.length - first, len(hashes) - at)
        if first + most <= self.proved:
            return self._agreed_of_proved(first, most, hashes, at)
        agreed = common(self.names, first * width, b"".join(hashes[at : at + most]), width)
        if not first and agreed > self.proved:
            self.proved = agreed
        return agreed

    def stretch(self, hashes: Sequence[bytes], at: int) -> tuple[int, int]:
        """The stretch of it that `hashes` names from `at` on, forwards or backwards: first block and length."""
        first, width, names = self.offset(hashes[at]), len(self.last), self.names
        if at + 1 == len(hashes):
            return first, 1
        following = hashes[at + 1]
        if names.startswith(following, (first + 1) * width):
            most = min(self.length - first, len(hashes) - at)
            return first, common(names, first * width, b"".join(hashes[at : at + most]), width)
        if not first or not names.startswith(following, (first - 1) * width):
            return first, 1
        most = min(first + 1, len(hashes) - at)
        backwards = b"".join(hashes[at + most - 1 : at - 1 if at else None : -1])
        count = _common_end(names, (first + 1) * width, backwards, width)
        return first - count + 1, count

    def _agreed_of_proved(self, first: int, most: int, hashes: Sequence[bytes], at: int) -> int:
        """As `agreed`, where the blocks are known to be consecutive: they agree up to some block and nowhere after."""
        names, width = self.names, len(self.last)
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if names.startswith(hashes[at + middle - 1], (first + middle - 1) * width):
                low = middle
            else:
                high = middle - 1
        return low


def common(names: bytearray, start: int, joined: bytes, width: int) -> int:
    """How many leading names of `joined` lie in `names` from byte `start` on; at least the first does."""
    if names.startswith(joined, start):
        return len(joined) // width
    low, high = 1, len(joined) // width - 1
    while low < high:
        middle = (low + high + 1) // 2
        if names.startswith(joined[low * width : middle * width], start + low * width):
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(names: bytearray, end: int, joined: bytes, width: int) -> int:
    """How many names at the end of `joined` lie in `names` up to byte `end`; at least the last two do."""
    if names.endswith(joined, 0, end):
        return len(joined) // width
    whole = len(joined)
    low, high = 2, whole // width - 1
    while low < high:
        middle = (low + high + 1) // 2
        if names.endswith(joined[whole - middle * width : whole - low * width], 0, end - low * width):
            low = middle
        else:
            high = middle - 1
    return low
