"""Blocks with their holders, as runs of consecutive blocks. The index's inner structure.

Covers: adding and taking holders, following a chain, forgetting what was placed longest ago when memory ends. Does not
cover: whose events count, when a life ends (`index`), what a holder set is (`holders`), what a run is (`run`), where a
block's run is found (`run_table`), how runs are cut and joined (`run_cuts`).

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

No call pauses: memory is freed ahead, a few blocks for each that comes, so that when a dict gets larger there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router import run_cuts
from router.holders import Gone, Holders, HolderSets
from router.run import LONGEST_RUN, Run, common
from router.run_table import RUN_BYTES, RunTable, expect
from router.tombstones import Tombstones

_ANCESTORS = 8  # runs above a new one that count as placed with it
TOMBSTONE_BYTES = 230
SET_BYTES = 640
_HEADROOM = LONGEST_RUN * TOMBSTONE_BYTES + 8 * RUN_BYTES  # what one step of a call may add before it looks again
_AHEAD = 2 * LONGEST_RUN  # blocks that one step may forget for the room that is kept free
LEAST_BYTES = 4 << 20

Fuller = Callable[[Holders | None], Holders]
Fewer = Callable[[Holders], Holders | None]


class Runs:
    """All runs. `table`: where they are found. `evicted`: blocks forgotten for want of memory.

    `aside`: bytes that others take of the same memory.
    """

    def __init__(self, sets: HolderSets, tombstones: Tombstones, *, limit: int) -> None:
        self.evicted = 0
        self.aside = 0
        self.limit = limit
        self.table = RunTable()
        self.find = self.table.find
        self._sets = sets
        self._tombstones = tombstones

    @property
    def nbytes(self) -> int:
        """What all of this takes."""
        tombstones, sets = len(self._tombstones) * TOMBSTONE_BYTES, self._sets.count * SET_BYTES
        return self.table.nbytes + tombstones + sets + self.aside

    # Changes

    def store(self, hashes: Sequence[bytes], parent: bytes | None, fuller: Fuller) -> None:
        """Blocks got a holder, claimed to be consecutive after `parent`; `fuller` gives the set after theirs (or none).

        Raises:
            ValueError: a name is longer or shorter than the first one ever stored.
        """
        if not hashes:
            return
        if not self.table.width:
            self.table.learn_width(hashes[0])
        joined = b"".join(hashes)
        if len(joined) != len(hashes) * self.table.width:
            raise ValueError(f"a block's name has other than {self.table.width} bytes; give the index short hashes")
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
            first, count = run.stretch(hashes, at)
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
            at += run.agreed(hashes, at)
        for run in reversed(path):
            self.table.order.touch(run)

    def begin_sweep(self) -> None:
        """Holder sets were emptied: look through all runs again."""
        self.table.order.rewind()

    def sweep(self, limit: int) -> bool:
        """Throw out blocks that nobody holds; whether more may wait. A run that is kept costs as much as a block."""
        order = self.table.order
        while limit > 0 and (run := order.advance()) is not None:
            if run.holders.mask:
                limit -= 1
                continue
            count = min(limit, run.length)
            self._drop(run, run.length - count, count, run.holders.gone)
            limit -= count
            if run.length:
                order.cursor = run
        self._keep_limit(0)
        return order.cursor is not None

    # Storing

    def _store(self, hashes: Sequence[bytes], joined: bytes, parent: bytes | None, fuller: Fuller) -> None:
        path: list[Run] = []
        begun = self.table.begun
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
        self._touch_path(path, ancestors=_ANCESTORS if self.table.begun > begun else 0)

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
        if before is not None and before.takes(holders, 1):
            run = before
        else:
            run = self.table.new(bytearray(), holders, hashes[at - 1] if at else parent)
            run.proved = 1
            self.table.order.append(run)
        end = min(len(hashes), at + run.room)
        part, width = hashes[at:end], self.table.width
        count = self.table.add(run, part, joined[at * width : end * width])
        self._tombstones.forget(part if count == len(part) else part[:count])
        return run, count

    def _fill(
        self, before: Run | None, run: Run, hashes: Sequence[bytes], joined: bytes, at: int, fuller: Fuller
    ) -> tuple[Run | None, Run, int]:
        """Known blocks from `at` on, as many as lie in one run: the run that ends with them, theirs, and how many."""
        first, width = run.offset(hashes[at]), self.table.width
        most = min(run.length - first, len(hashes) - at)
        count = common(run.names, first * width, joined[at * width : (at + most) * width], width)
        holders = fuller(run.holders)
        if holders is run.holders:
            return (run if first + count == run.length else None), run, count
        if first:
            before, run = run_cuts.cut(self.table, run, first)
        if before is not None and before.takes(holders, count):
            run_cuts.move_down(self.table, run, count, before)
            return before, before, count
        if count < run.length:
            run, _ = run_cuts.cut(self.table, run, count)
        run.relabel(holders)
        return run, run, count

    # Taking

    def _drop(self, run: Run, first: int, count: int, cause: Gone) -> None:
        """These blocks of a run have no holder any more."""
        table, width = self.table, self.table.width
        if first and first + count < run.length:
            run, _ = run_cuts.cut(table, run, first + count)
        self._tombstones.bury(table.erase(run, run.names[first * width : (first + count) * width]), cause)
        if count == run.length:
            table.discard(run)
        elif first:
            run_cuts.shorten(table, run, first, None)
        else:
            run_cuts.behead(table, run, count)

    def _hand_over(self, run: Run, first: int, count: int, rest: Holders) -> None:
        """These blocks of a run have fewer holders now; they join a neighbour that has the same ones."""
        following = run_cuts.following(self.table, run) if first + count == run.length else None
        if following is not None and following.takes(rest, count):
            run_cuts.move_up(self.table, run, first, following)
            return
        previous = None if first else run_cuts.previous(self.table, run)
        if previous is not None and previous.takes(rest, count):
            run_cuts.move_down(self.table, run, count, previous)
            return
        if first + count < run.length:
            run, _ = run_cuts.cut(self.table, run, first + count)
        if first:
            _, run = run_cuts.cut(self.table, run, first)
        run.relabel(rest)

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
                self.table.order.touch(run)

    def _keep_limit(self, headroom: int) -> None:
        """Forget the runs placed longest ago until so many bytes are free, and somewhat more for a dict that grows."""
        if self.limit - self.nbytes >= headroom + self.table.growth:
            return
        self._sets.recount()
        room = self.limit - self.nbytes
        most = self.evicted + _AHEAD
        while room < headroom or (room < headroom + self.table.growth and self.evicted < most):
            oldest = self.table.order.oldest
            if oldest is None:
                break
            self._evict(oldest)
            room = self.limit - self.nbytes

    def _evict(self, run: Run) -> None:
        if not run.holders.mask:
            self._drop(run, 0, run.length, run.holders.gone)
            return
        self.evicted += run.length
        self.table.erase(run, run.names)
        self.table.discard(run)

    def check(self) -> None:
        """Raises InvariantError when the books are wrong. O(everything)."""
        self.table.check()
        counted = dict.fromkeys(self._sets, 0)
        for run in self.table.order:
            counted[run.holders] += run.length
            own = (run.names[n : n + self.table.width] for n in range(0, len(run.names), self.table.width))
            expect(not any(bytes(block) in self._tombstones for block in own), "a block is known and buried")
        expect(all(holders.blocks == n for holders, n in counted.items()), "holder sets count other blocks")
        expect(self.nbytes <= self.limit, "the index is larger than it may be")
