"""From every block to its run, and what all of that takes. The index's inner structure.

Covers: finding a block's run, making runs and throwing them away, adding, moving and erasing the names of blocks, the
count of bytes. Does not cover: which blocks belong together (`run_cuts`), who holds them (`runs`).

Runs are made once and used again: Python's collector of garbage looks at young objects after so many were made *and
not freed*, so an index at its bound, which frees one for each that it makes, would let all of its runs become young
ones, and then look at a hundred thousand at once. `made` counts them, for whoever exempts them (`settling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import length_hint
from struct import iter_unpack

from kvstore.errors import InvariantError
from router.holders import NEVER, NOBODY, Holders
from router.run import Run
from router.run_order import PlacementOrder
from router.tables import Tables

# Bytes, measured against the process's memory (CPython 3.11, 64 bits); the dicts are measured as they are.
BLOCK_BYTES = 64 + 17  # the key object; its name in the run, with the slack of a growing array
RUN_BYTES = 440  # the object, its array, number, last name, neighbours' names, and a place in the list
SPARE_BYTES = 160  # a run that waits to be used again, and its place
_HOLES = 1.15  # dicts that grew leave some behind
_GROWTH_SHIFT = 6  # one dict of 512 gets up to four times as large, and two or three may do so at once
_SPARE_SHARE = 8  # spare runs are at most one for so many
_FEW_SPARE = 64


class RunTable:
    """Blocks and runs.

    Attributes:
        rows: as in `Tables`, from blocks to their runs' numbers. numbered: runs by number.
        order: in which they were placed. width: bytes of every name; zero: none was seen.
        nbytes: what all of this takes. growth: by how much dicts that get larger may add to it in one call.
        blocks: that are known. begun: runs that were begun, ever. made: objects made for them, which are fewer.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.begun = 0
        self.made = 0
        self.width = 0
        self.order = PlacementOrder()
        self.numbered: list[Run] = []
        self._tables = Tables()
        self.rows = self._tables.rows
        self._spare: list[Run] = []
        self._free: list[int] = []  # places in `numbered`
        self.nbytes = 0
        self.growth = 0
        self._note_tables(self._tables.nbytes)
        self._gone = Run()  # stands in free places
        self._format = ""

    def __len__(self) -> int:
        """Runs."""
        return len(self.numbered) - len(self._free)

    def learn_width(self, block: bytes) -> None:
        """The first name is seen: all are as long."""
        self.width, self._format = len(block), f"{len(block)}s"

    def find(self, block: bytes) -> Run | None:
        """The run of a block; None: nobody is known to hold it."""
        number = self.rows[block[0]][block[-1] & 15].get(block)
        return None if number is None else self.numbered[number]

    # Runs

    def new(self, names: bytearray, holders: Holders, before: bytes | None) -> Run:
        """A run, without a place in the order. Its blocks are pointed to it by the caller."""
        self.begun += 1
        run = self._unused()
        run.names, run.length, run.last = names, len(names) // self.width, bytes(names[-self.width :])
        run.proved, run.holders, run.before, run.after = 0, holders, before, None
        if self._free:
            run.number = self._free.pop()
            self.numbered[run.number] = run
        else:
            run.number = len(self.numbered)
            self.numbered.append(run)
        self.nbytes += RUN_BYTES
        return run

    def discard(self, run: Run) -> None:
        """The run has no blocks any more, or they are none of its own."""
        self.order.remove(run)
        self.nbytes -= RUN_BYTES
        self.numbered[run.number] = self._gone
        self._free.append(run.number)
        run.length, run.holders, run.names, run.last = 0, NOBODY, bytearray(), b""
        run.before = run.after = None
        if len(self._spare) < _FEW_SPARE + len(self) // _SPARE_SHARE:
            self._spare.append(run)
            self.nbytes += SPARE_BYTES

    def _unused(self) -> Run:
        if self._spare:
            self.nbytes -= SPARE_BYTES
            return self._spare.pop()
        self.made += 1
        return Run()

    # Names

    def add(self, run: Run, part: Sequence[bytes], joined: bytes) -> int:
        """Append blocks to a run, up to the first that is known or named twice: how many it got.

        `joined`: their names, joined.
        """
        number, rows = run.number, self.rows
        left = iter(part)
        for block in left:
            table = rows[block[0]][block[-1] & 15]
            if block in table:
                part = part[: len(part) - length_hint(left) - 1]
                break
            table[block] = number
        count = len(part)
        run.names += joined[: count * self.width]
        run.length += count
        run.last = part[-1]
        run.after = None
        run.holders.blocks += count
        self.blocks += count
        self.nbytes += count * BLOCK_BYTES
        if resized := self._tables.grown(count, self.blocks):
            self._note_tables(resized)
        return count

    def point(self, run: Run, names: bytearray) -> None:
        """These known blocks are in this run now."""
        number, rows = run.number, self.rows
        for (block,) in iter_unpack(self._format, names):
            rows[block[0]][block[-1] & 15][block] = number

    def erase(self, run: Run, names: bytearray) -> Sequence[bytes]:
        """These blocks of a run are not known any more: they, by name. The run is left as it was."""
        rows = self.rows
        blocks = [block for (block,) in iter_unpack(self._format, names)]
        for block in blocks:
            del rows[block[0]][block[-1] & 15][block]
        self.blocks -= len(blocks)
        self.nbytes -= len(blocks) * BLOCK_BYTES
        run.holders.blocks -= len(blocks)
        return blocks

    def _note_tables(self, change: int) -> None:
        now = self._tables.nbytes
        self.nbytes += int(now * _HOLES) - int((now - change) * _HOLES)
        self.growth = now >> _GROWTH_SHIFT

    def check(self) -> None:
        """Raises InvariantError when the books are wrong. O(everything)."""
        blocks = runs = 0
        for run in self.order:
            self._check_run(run)
            blocks += run.length
            runs += 1
        expect(runs == len(self), "runs were lost or forgotten twice")
        expect(blocks == self.blocks == len(self._tables), "blocks are known that are in no run")
        used = blocks * BLOCK_BYTES + runs * RUN_BYTES + len(self._spare) * SPARE_BYTES
        used += int(self._tables.nbytes * _HOLES)
        expect(used == self.nbytes, f"{self.nbytes} bytes were counted, {used} are used")
        expect(all(not run.length and run.holders is NOBODY for run in self._spare), "a spare run is in use")

    def _check_run(self, run: Run) -> None:
        own = [bytes(run.names[n : n + self.width]) for n in range(0, len(run.names), self.width)]
        expect(self.numbered[run.number] is run, f"run {run.number} is not under its number")
        expect(1 <= run.proved <= run.length == len(own) and run.room >= 0, f"run {run.number} has a wrong length")
        expect(run.last == own[-1], f"run {run.number} ends with another block")
        expect(len(set(own)) == len(own), f"run {run.number} has a block twice")
        expect(all(self.find(block) is run for block in own), f"a block of run {run.number} lies in another")
        expect(bool(run.holders.mask & 1) or run.holders.until == NEVER, f"run {run.number} ends and is not shared")


def expect(holds: bool, message: str) -> None:
    """Raises InvariantError unless it holds."""
    if not holds:
        raise InvariantError(f"prefix index: {message}; please report this with the router's log")
