"""Hit rate against the size of a cache, for all sizes and several times to live in one pass over a trace.

Covers: one LRU cache that all requests share. Does not cover: several workers with caches of their own (replay them),
other evictions, time.

LRU has the inclusion property: what a cache of C blocks holds is the top C of one stack, whatever C is, so the place of
a block in the stack when it is asked for tells every size that has it (Mattson, Gecsei, Slutz and Traiger, 1970). A
prompt's last blocks are used before its first, as engines free them, so ancestors lie above descendants, and what is
held of a chain is always a leading part of it. Two things follow that make it fast:

- blocks of a segment (`traces.segments`) lie together in the stack, so a segment at depth d with n blocks adds a line
  of slope one from d to d + n to the curve, and nobody walks over blocks;
- what lies above a segment that request r used last is what later requests used last, and its own ancestors among
  what is left of r. One sum over requests (Fenwick, 1994) and one walk over the chain give all depths.

Cost: O(segments + groups x log(requests)), a group being a part of a chain that the same earlier request used last.

A time to live that a use renews takes blocks away from the bottom of the stack only (they are the oldest), so it
changes no depth above: a block is there when it is near enough to the top and young enough.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from replay.workload import Workload


class Piece(NamedTuple):
    """Blocks that were asked for together: they lie from `depth` on in the stack, for `age_s` seconds unused.

    `tokens`: of each block. A cache of C blocks holds min(blocks, C - depth) of them, and none if that is negative.
    """

    depth: int
    blocks: int
    tokens: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Share of prompt tokens that a cache would have had, by its size.

    Attributes:
        block_size: tokens a block. prompt_tokens: that counted. ends: sizes in blocks, ascending from 0.
        hits: tokens found at each; between two sizes the curve is a straight line, beyond the last one level.
    """

    block_size: int
    prompt_tokens: int
    ends: Sequence[int]
    hits: Sequence[int]

    def hit_rate(self, capacity_tokens: float) -> float:
        """Of a cache of so many tokens, as whole blocks."""
        blocks = math.floor(capacity_tokens / self.block_size) if capacity_tokens < math.inf else self.ends[-1]
        at = bisect_right(self.ends, blocks) - 1
        if at == len(self.ends) - 1:
            return self.hits[-1] / self.prompt_tokens
        rise = (self.hits[at + 1] - self.hits[at]) / (self.ends[at + 1] - self.ends[at])
        return (self.hits[at] + rise * (blocks - self.ends[at])) / self.prompt_tokens

    @property
    def most(self) -> float:
        """The hit rate of a cache without limit."""
        return self.hits[-1] / self.prompt_tokens

    @property
    def enough_tokens(self) -> int:
        """The smallest cache that has as many hits as one without limit."""
        return self.ends[-1] * self.block_size


def curves(work: Workload, *, ttls_s: Sequence[float] = (math.inf,), warm_up: float = 0.1) -> list[Curve]:
    """One for each time to live.

    Args:
        warm_up: share of the requests, from the start, that fill the cache and do not count.

    Raises:
        ValueError: no request counts.
    """
    counted = int(warm_up * len(work.requests))
    tokens = sum(request.input_length for request in work.requests[counted:])
    if not tokens:
        raise ValueError("no request is left that counts; give a longer trace or a shorter warm-up")
    slopes: list[dict[int, int]] = [defaultdict(int) for _ in ttls_s]
    for number, piece in pieces(work):
        if number < counted:
            continue
        for slope, ttl_s in zip(slopes, ttls_s, strict=True):
            if piece.age_s <= ttl_s:
                slope[piece.depth] += piece.tokens
                slope[piece.depth + piece.blocks] -= piece.tokens
    return [_curve(work.block_size, tokens, slope) for slope in slopes]


def pieces(work: Workload) -> Iterator[tuple[int, Piece]]:
    """(number of the request, piece) for every block that was used before; blocks used for the first time are left out.

    Requests count as served in the order of the workload, each at once.
    """
    owner = [-1] * len(work.lengths)  # the request that used a segment last
    held = _Sums(len(work.requests))  # blocks by the request that used them last
    for number, chain in enumerate(work.chains):
        last_tokens = _last_block_tokens(work, number)
        latest, depth, blocks = -1, 0, 0
        for segment in chain.segments:
            length = work.lengths[segment]
            before = owner[segment]
            if before < 0:
                break
            if before != latest:
                latest, depth = before, held.after(before)
            age_s = work.arrivals_s[number] - work.arrivals_s[before]
            blocks += length
            yield from _pieces_of(number, depth, length, work.block_size, age_s, last_tokens, blocks == len(chain))
            depth += length
        for segment in chain.segments:
            if owner[segment] >= 0:
                held.add(owner[segment], -work.lengths[segment])
            owner[segment] = number
        held.add(number, len(chain))


def _pieces_of(
    number: int, depth: int, length: int, block_size: int, age_s: float, last_tokens: int, whole_prompt: bool
) -> Iterator[tuple[int, Piece]]:
    """A segment; the last block of a prompt may be a partial one."""
    full = length - 1 if whole_prompt and last_tokens != block_size else length
    if full:
        yield number, Piece(depth, full, block_size, age_s)
    if full < length and last_tokens:
        yield number, Piece(depth + full, 1, last_tokens, age_s)


def _last_block_tokens(work: Workload, number: int) -> int:
    """Prompt tokens that the last known block of a request holds."""
    blocks, size = len(work.chains[number]), work.block_size
    return max(0, min(size, work.requests[number].input_length - (blocks - 1) * size))


def _curve(block_size: int, tokens: int, slopes: dict[int, int]) -> Curve:
    ends, hits, slope = [0], [0], 0
    for at in sorted(slopes):
        if at > ends[-1]:
            hits.append(hits[-1] + slope * (at - ends[-1]))
            ends.append(at)
        slope += slopes[at]
    return Curve(block_size, tokens, ends, hits)


class _Sums:
    """Numbers at places 0 to n - 1 and the sums behind a place (Fenwick, 1994). O(log n) each."""

    def __init__(self, places: int) -> None:
        self._tree = [0] * (places + 1)
        self._total = 0

    def add(self, place: int, amount: int) -> None:
        """Add to the number there."""
        self._total += amount
        at = place + 1
        while at < len(self._tree):
            self._tree[at] += amount
            at += at & -at

    def after(self, place: int) -> int:
        """Sum of the numbers behind that place."""
        up_to, at = 0, place + 1
        while at > 0:
            up_to += self._tree[at]
            at -= at & -at
        return self._total - up_to
