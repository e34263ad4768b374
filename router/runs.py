"""Blocks with their holders, as runs of consecutive blocks. The index's inner structure.

Covers: adding and taking holders, cutting and joining runs, following a chain, forgetting what was placed longest ago
when memory ends. Does not cover: whose events count, when a life ends (`index`), what a holder set is (`holders`).

The structure: small dicts (`tables`) from block to the number of its run. A run is a stretch of blocks that have one
set of holders, with their names joined, so that whole stretches are compared by one `memcmp`.

Invariants, all of them audited by `check`:
1. Every known block is in exactly one run, and all blocks of a run have the run's holder set. So `find(block).holders`
   is exact, whatever an event claimed about order.
2. That a run's blocks follow one another in one chain was only claimed, by the event that brought them. Nobody is
   believed: the first question that goes through a run compares every name (25 ns a block) and notes how many leading
   blocks it `proved`. As hashes are chained, a later question that agrees on the last block of a wholly proved run
   agrees on all of it: one probe and one compare a run. A list that was no chain is thus compared in full for ever,
   and ends where it differs. The notes hold for questions that are chains; they are dropped when a run changes.
3. `before` and `after` are claims, too: they decide which runs are joined and kept together, never what is answered.
4. `nbytes` is at most `limit` when a call returns, and never above it by more than the tables that a call made grow.

Why runs: a cold dict probe costs 0.3 to 0.7 us, so who touches fewer blocks wins. Worst case: another holder set at
every block; then a run is one block, costs about 0.5 KB, and a question one probe a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import length_hint
from struct import iter_unpack

from kvstore.errors import InvariantError
from router.holders import NEVER, Gone, Holders, HolderSets
from router.tables import Tables
from router.tombstones import Tombstones

LONGEST_RUN = 512  # blocks; 64 to 2,048 measured the same, and cutting a run rewrites up to half of it
_ANCESTORS = 8  # runs above a new one that count as placed with it

# Bytes, measured against the process's memory (CPython 3.11, 64 bits); the dicts are measured as they are.
BLOCK_BYTES = 64 + 17  # the key object; its name in the run, with the slack of a growing array
RUN_BYTES = 440  # the object, its array, number, last name, neighbours' names, and a place in the list
_HOLES = 1.15  # dicts that grew leave some behind
TOMBSTONE_BYTES = 230
SET_BYTES = 640
_HEADROOM = LONGEST_RUN * TOMBSTONE_BYTES + 8 * RUN_BYTES  # what one step of a call may add before it looks again
LEAST_BYTES = 4 << 20

Fuller = Callable[[Holders | None], Holders]
Fewer = Callable[[Holders], Holders | None]


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


class Runs:
    """All runs. `blocks`, `evicted`: blocks known, and blocks forgotten for want of memory."""

    def __init__(self, sets: HolderSets, tombstones: Tombstones, *, limit: int) -> None:
        self.blocks = 0
        self.evicted = 0
        self.limit = limit
        self.tables = Tables()
        self.rows = self.tables.rows
        self.numbered: list[Run] = []
        self._made = 0
        self._end = _sentinel()
        self._free: list[int] = []
        self._sets = sets
        self._tombstones = tombstones
        self._width = 0  # bytes of every name, learnt from the first
        self._format = ""
        self._used = 0  # by blocks and runs, without the tables
        self._swept: Run | None = None

    def __len__(self) -> int:
        """Runs."""
        return len(self.numbered) - len(self._free)

    def __iter__(self) -> Iterator[Run]:
        """The runs, those placed longest ago first. Nothing may change meanwhile."""
        run = self._end.newer
        while run is not self._end:
            yield run
            run = run.newer

    @property
    def nbytes(self) -> int:
        """What all of this takes."""
        return (
            self._used
            + int(self.tables.bytes * _HOLES)
            + len(self._tombstones) * TOMBSTONE_BYTES
            + self._sets.count * SET_BYTES
        )

    # Questions

    def find(self, block: bytes) -> Run | None:
        """The run of a block; None: nobody is known to hold it."""
        number = self.rows[block[0]][block[-1] & 15].get(block)
        return None if number is None else self.numbered[number]

    def agreed(self, run: Run, hashes: Sequence[bytes], at: int) -> int:
        """How many blocks of a chain, from `at` on, are the run's: `hashes[at]` is in it. At least 1. Exact."""
        first = self._offset(run, hashes[at])
        most = min(run.length - first, len(hashes) - at)
        if first + most <= run.proved:
            return self._agreed_of_proved(run, first, most, hashes, at)
        agreed = _common(run.names, first * self._width, b"".join(hashes[at : at + most]), self._width)
        if not first and agreed > run.proved:
            run.proved = agreed
        return agreed

    # Changes

    def store(self, hashes: Sequence[bytes], parent: bytes | None, fuller: Fuller) -> None:
        """Blocks got a holder, claimed to be consecutive after `parent`; `fuller` gives the set after theirs (or none).

        Raises:
            ValueError: a name is longer or shorter than the first one ever stored.
        """
        if not hashes:
            return
        if not self._width:
            self._width, self._format = len(hashes[0]), f"{len(hashes[0])}s"
        joined = b"".join(hashes)
        if len(joined) != len(hashes) * self._width:
            raise ValueError(f"a block's name has other than {self._width} bytes; give the index short hashes")
        self._store(hashes, joined, parent, fuller)
        self._keep_limit(0)

    def take(self, hashes: Sequence[bytes], bit: int, fewer: Fewer, cause: Gone) -> None:
        """Blocks lost a holder: of those whose set has `bit`, in any order. `fewer`: what is left; None: nobody."""
        at = 0
        while at < len(hashes):
            self._keep_limit(_HEADROOM)
            run = self.find(hashes[at])
            if run is None or not run.holders.mask & bit:
                at += 1
                continue
            first, count = self._stretch(run, hashes, at)
            rest = fewer(run.holders)
            if rest is None:
                self._drop(run, first, count, cause)
            else:
                self._hand_over(run, first, count, rest)
            at += count
        self._keep_limit(0)

    def placed(self, hashes: Sequence[bytes], most: int) -> None:
        """A chain was used: its runs, at most so many, are now those placed last, the first of them the very last."""
        path: list[Run] = []
        at = 0
        while at < len(hashes) and len(path) < most:
            run = self.find(hashes[at])
            if run is None or not run.holders.mask:
                break
            path.append(run)
            at += self.agreed(run, hashes, at)
        for run in reversed(path):
            self._touch(run)

    def begin_sweep(self) -> None:
        """Holder sets were emptied: look through all runs again."""
        self._swept = self._end.newer

    def sweep(self, limit: int) -> bool:
        """Throw out blocks that nobody holds; whether more may wait. A run that is kept costs as much as a block."""
        while self._swept is not None and limit > 0:
            run = self._swept
            self._swept = None if run is self._end else run.newer
            if run is self._end or run.holders.mask:
                limit -= 1
                continue
            count = min(limit, run.length)
            self._drop(run, run.length - count, count, run.holders.gone)
            limit -= count
            if run.length:
                self._swept = run
        self._keep_limit(0)
        return self._swept is not None

    # Storing

    def _store(self, hashes: Sequence[bytes], joined: bytes, parent: bytes | None, fuller: Fuller) -> None:
        path: list[Run] = []
        made = self._made
        before = None if parent is None else self.find(parent)
        if before is not None and before.last != parent:
            before = None
        at = 0
        while at < len(hashes):
            self._keep_limit(_HEADROOM)
            if before is not None and not before.length:  # evicted just now
                before = None
            run = self.find(hashes[at])
            if run is None:
                run, count = self._add(before, hashes, joined, at, fuller(None), parent)
                before = run
            else:
                before, run, count = self._fill(before, run, hashes, joined, at, fuller)
            at += count
            if not path or path[-1] is not run:
                path.append(run)
        self._touch_path(path, ancestors=_ANCESTORS if made != self._made else 0)

    def _add(
        self,
        before: Run | None,
        hashes: Sequence[bytes],
        joined: bytes,
        at: int,
        holders: Holders,
        parent: bytes | None,
    ) -> tuple[Run, int]:
        """Blocks from `at` on that are not known yet, as many as fit one run: appended to `before`, or a new run."""
        if before is not None and before.holders is holders and before.length < LONGEST_RUN:
            run = before
        else:
            run = self._new(bytearray(), b"", holders, hashes[at - 1] if at else parent)
            run.proved = 1
        number, rows, width = run.number, self.rows, self._width
        part = hashes[at : at + LONGEST_RUN - run.length]
        left = iter(part)
        for block in left:
            table = rows[block[0]][block[-1] & 15]
            if block in table:  # known, or named twice
                part = part[: len(part) - length_hint(left) - 1]
                break
            table[block] = number
        count = len(part)
        run.names += joined[at * width : (at + count) * width]
        run.length += count
        run.last = part[-1]
        run.after = None
        holders.blocks += count
        self.blocks += count
        self._used += count * BLOCK_BYTES
        self._tombstones.forget(part)
        self.tables.grown(count)
        return run, count

    def _fill(
        self, before: Run | None, run: Run, hashes: Sequence[bytes], joined: bytes, at: int, fuller: Fuller
    ) -> tuple[Run | None, Run, int]:
        """Known blocks from `at` on, as many as lie in one run: the run that ends with them, theirs, and how many."""
        first, width = self._offset(run, hashes[at]), self._width
        most = min(run.length - first, len(hashes) - at)
        count = _common(run.names, first * width, joined[at * width : (at + most) * width], width)
        holders = fuller(run.holders)
        if holders is run.holders:
            return (run if first + count == run.length else None), run, count
        if first:
            before, run = self._cut(run, first)
        if before is not None and _takes(before, holders, count):
            self._move_down(run, count, before)
            return before, before, count
        if count < run.length:
            run, _ = self._cut(run, count)
        _relabel(run, holders)
        return run, run, count

    # Taking

    def _stretch(self, run: Run, hashes: Sequence[bytes], at: int) -> tuple[int, int]:
        """The stretch of the run that `hashes` names from `at` on, forwards or backwards: first block and length."""
        first, width, names = self._offset(run, hashes[at]), self._width, run.names
        if at + 1 == len(hashes):
            return first, 1
        following = hashes[at + 1]
        if names.startswith(following, (first + 1) * width):
            most = min(run.length - first, len(hashes) - at)
            return first, _common(names, first * width, b"".join(hashes[at : at + most]), width)
        if not first or not names.startswith(following, (first - 1) * width):
            return first, 1
        count, most = 2, min(first + 1, len(hashes) - at)
        while count < most and names.startswith(hashes[at + count], (first - count) * width):
            count += 1
        return first - count + 1, count

    def _drop(self, run: Run, first: int, count: int, cause: Gone) -> None:
        """These blocks of a run have no holder any more."""
        if first and first + count < run.length:
            run, _ = self._cut(run, first + count)
        width, rows = self._width, self.rows
        gone = run.names[first * width : (first + count) * width]
        blocks = [block for (block,) in iter_unpack(self._format, gone)]
        for block in blocks:
            del rows[block[0]][block[-1] & 15][block]
        self._tombstones.bury(blocks, cause)
        self.blocks -= count
        self._used -= count * BLOCK_BYTES
        run.holders.blocks -= count
        if count == run.length:
            self._discard(run)
        elif first:
            self._shorten(run, first, None)
        else:
            self._behead(run, count)

    def _hand_over(self, run: Run, first: int, count: int, rest: Holders) -> None:
        """These blocks of a run have fewer holders now; they join a neighbour that has the same ones."""
        following = self._following(run) if first + count == run.length else None
        if following is not None and _takes(following, rest, count):
            self._move_up(run, first, following)
            return
        previous = None if first else self._previous(run)
        if previous is not None and _takes(previous, rest, count):
            self._move_down(run, count, previous)
            return
        if first + count < run.length:
            run, _ = self._cut(run, first + count)
        if first:
            _, run = self._cut(run, first)
        _relabel(run, rest)

    # Runs

    def _new(self, names: bytearray, last: bytes, holders: Holders, before: bytes | None) -> Run:
        """A run, placed last. Its blocks are pointed to it by the caller."""
        run = Run()
        run.names, run.length, run.last = names, len(names) // self._width, last
        run.proved, run.holders, run.before, run.after = 0, holders, before, None
        if self._free:
            run.number = self._free.pop()
            self.numbered[run.number] = run
        else:
            run.number = len(self.numbered)
            self.numbered.append(run)
        _link(run, self._end)
        self._made += 1
        self._used += RUN_BYTES
        return run

    def _cut(self, run: Run, at: int) -> tuple[Run, Run]:
        """Two runs of one, after `at` blocks. The longer part stays the object that it was."""
        width, names = self._width, run.names
        first, last = bytes(names[at * width : (at + 1) * width]), bytes(names[(at - 1) * width : at * width])
        proved = max(1, run.proved - at)
        if 2 * at >= run.length:
            piece = self._new(names[at * width :], run.last, run.holders, last)
            piece.after, piece.proved = run.after, proved
            self._move(piece, run)
            if run is self._swept:
                self._swept = piece
            self._shorten(run, at, first)
            self._point(piece)
            return run, piece
        piece = self._new(names[: at * width], last, run.holders, run.before)
        piece.after, piece.proved = first, min(run.proved, at)
        self._move(piece, run.newer)
        self._behead(run, at)
        self._point(piece)
        return piece, run

    def _move_down(self, run: Run, count: int, before: Run) -> None:
        """The run's first blocks become the last of the run before it, which has the holders that they are to have."""
        width = self._width
        part = run.names[: count * width]
        number, rows = before.number, self.rows
        for (block,) in iter_unpack(self._format, part):
            rows[block[0]][block[-1] & 15][block] = number
        before.names += part
        before.length += count
        before.last = bytes(part[-width:])
        before.holders.blocks += count
        run.holders.blocks -= count
        if count == run.length:
            before.after = run.after
            self._discard(run)
        else:
            self._behead(run, count)
            before.after = bytes(run.names[:width])

    def _move_up(self, run: Run, at: int, following: Run) -> None:
        """The run's blocks from `at` on become the first of the run after it, as `_move_down` does."""
        width = self._width
        part = run.names[at * width :]
        count = run.length - at
        number, rows = following.number, self.rows
        for (block,) in iter_unpack(self._format, part):
            rows[block[0]][block[-1] & 15][block] = number
        following.names[:0] = part
        following.length += count
        following.proved = min(count, max(1, run.proved - at))
        following.holders.blocks += count
        run.holders.blocks -= count
        if at:
            self._shorten(run, at, bytes(part[:width]))
            following.before = run.last
        else:
            following.before = run.before
            self._discard(run)

    def _shorten(self, run: Run, length: int, after: bytes | None) -> None:
        """Only its first blocks stay in a run."""
        del run.names[length * self._width :]
        run.length, run.last, run.after = length, bytes(run.names[-self._width :]), after
        run.proved = min(run.proved, length)

    def _behead(self, run: Run, count: int) -> None:
        """A run's first blocks leave it; they stay those before it."""
        run.before = bytes(run.names[(count - 1) * self._width : count * self._width])
        del run.names[: count * self._width]
        run.length -= count
        run.proved = max(1, run.proved - count)

    def _point(self, run: Run) -> None:
        number, rows = run.number, self.rows
        for (block,) in iter_unpack(self._format, run.names):
            rows[block[0]][block[-1] & 15][block] = number

    def _discard(self, run: Run) -> None:
        """The run has no blocks any more, or they are none of its own."""
        self._unlink(run)
        self._used -= RUN_BYTES
        run.length = 0
        self.numbered[run.number] = self._end
        self._free.append(run.number)

    def _following(self, run: Run) -> Run | None:
        """The run that begins with the block after this one."""
        following = None if run.after is None else self.find(run.after)
        if following is None or following is run or not following.names.startswith(run.after or b""):
            return None
        return following

    def _previous(self, run: Run) -> Run | None:
        """The run that ends with the block before this one."""
        previous = None if run.before is None else self.find(run.before)
        return previous if previous is not None and previous is not run and previous.last == run.before else None

    def _offset(self, run: Run, block: bytes) -> int:
        if run.names.startswith(block):
            return 0
        at = run.names.find(block)
        while at % self._width:
            at = run.names.find(block, at + 1)
        return at // self._width

    def _agreed_of_proved(self, run: Run, first: int, most: int, hashes: Sequence[bytes], at: int) -> int:
        """As `agreed`, where the blocks are known to be consecutive: they agree up to some block and nowhere after."""
        names, width = run.names, self._width
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if names.startswith(hashes[at + middle - 1], (first + middle - 1) * width):
                low = middle
            else:
                high = middle - 1
        return low

    # Order of placement, and memory

    def _touch_path(self, path: list[Run], *, ancestors: int) -> None:
        """Placed last: the runs of a chain, and some above them, so that no run is forgotten before what follows it."""
        above = path[0] if path else None
        for _ in range(ancestors):
            above = self.find(above.before) if above is not None and above.before is not None else None
            if above is None:
                break
            path.insert(0, above)
        for run in reversed(path):
            if run.length:
                self._touch(run)

    def _touch(self, run: Run) -> None:
        if run.newer is not self._end:
            self._move(run, self._end)

    def _move(self, run: Run, newer: Run) -> None:
        if newer is not run:
            self._unlink(run)
            _link(run, newer)

    def _unlink(self, run: Run) -> None:
        if run is self._swept:
            self._swept = run.newer
        run.older.newer, run.newer.older = run.newer, run.older

    def _keep_limit(self, headroom: int) -> None:
        """Forget the runs placed longest ago until so many bytes are free."""
        if self.nbytes > self.limit - headroom:
            self._sets.recount()
            while self.nbytes > self.limit - headroom and self._end.newer is not self._end:
                self._evict(self._end.newer)

    def _evict(self, run: Run) -> None:
        if not run.holders.mask:
            self._drop(run, 0, run.length, run.holders.gone)
            return
        rows = self.rows
        for (block,) in iter_unpack(self._format, run.names):
            del rows[block[0]][block[-1] & 15][block]
        self.blocks -= run.length
        self._used -= run.length * BLOCK_BYTES
        self.evicted += run.length
        run.holders.blocks -= run.length
        self._discard(run)

    def check(self) -> None:
        """Raises InvariantError when the books are wrong. O(everything)."""
        width, blocks, counted = self._width, 0, dict.fromkeys(self._sets, 0)
        runs = list(self)
        for run in runs:
            own = [bytes(run.names[n : n + width]) for n in range(0, len(run.names), width)]
            _expect(self.numbered[run.number] is run, f"run {run.number} is not under its number")
            _expect(1 <= run.proved <= run.length == len(own) <= LONGEST_RUN, f"run {run.number} has a wrong length")
            _expect(run.last == own[-1], f"run {run.number} ends with another block")
            _expect(len(set(own)) == len(own), f"run {run.number} has a block twice")
            for block in own:
                _expect(self.find(block) is run, f"block {block.hex()} lies in another run")
                _expect(block not in self._tombstones, f"block {block.hex()} is known and buried")
            _expect(
                bool(run.holders.mask & 1) or run.holders.until == NEVER, f"run {run.number} ends and is not shared"
            )
            blocks += run.length
            counted[run.holders] += run.length
        _expect(len(runs) == len(self), "runs were lost or forgotten twice")
        _expect(blocks == self.blocks == len(self.tables), "blocks are known that are in no run")
        _expect(all(holders.blocks == n for holders, n in counted.items()), "holder sets count other blocks")
        used = blocks * BLOCK_BYTES + len(runs) * RUN_BYTES
        _expect(used == self._used, f"{self._used} bytes were counted, {used} are used")
        _expect(self.nbytes <= self.limit, "the index is larger than it may be")


def _sentinel() -> Run:
    """The end of the order of placement: after the newest, before the oldest."""
    end = Run()
    end.older = end.newer = end
    end.length, end.number = 0, -1
    return end


def _link(run: Run, newer: Run) -> None:
    """Put a run into the order just before one that is newer."""
    run.older, run.newer = newer.older, newer
    newer.older.newer = run
    newer.older = run


def _takes(run: Run, holders: Holders, count: int) -> bool:
    """Whether so many blocks with these holders may join a run."""
    return run.holders is holders and run.length + count <= LONGEST_RUN


def _relabel(run: Run, holders: Holders) -> None:
    run.holders.blocks -= run.length
    holders.blocks += run.length
    run.holders = holders


def _common(names: bytearray, start: int, joined: bytes, width: int) -> int:
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


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(f"prefix index: {message}; please report this with the router's log")
