"""A trace made ready for a replay: which of its requests, when they arrive, and their prompts as runs of blocks.

Covers: choosing a part of a trace, undoing a coarse clock, faster or slower arrivals, closed loops, prompts as chains.
Does not cover: the file format (`traces`) or what happens to the requests (`simulation`).

A prompt of 100k tokens has thousands of blocks, and most of them are always requested together. So a chain is stored as
segments (`traces.segments`) with the block at which each ends; all that a replay does costs segments, not blocks.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

from replay.traces import Request, Trace, segments

_KEY_BYTES = 8


def segment_key(number: int) -> bytes:
    """The name of a segment in an index."""
    return number.to_bytes(_KEY_BYTES, "little")


class Chain(Sequence[bytes]):
    """The block hashes of one prompt, first block first, without a list of them.

    As a sequence it is what the router's core expects: one name for each block. Inside it is a few segments.

    Attributes:
        segments: numbers of the segments. keys: one name for each. ends: blocks from the start to the end of each.
    """

    __slots__ = ("ends", "keys", "segments")

    def __init__(self, numbers: Sequence[int], ends: Sequence[int]) -> None:
        self.segments = tuple(numbers)
        self.keys = [segment_key(number) for number in numbers]
        self.ends = tuple(ends)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        """The name of a block: its segment and its place from the start of the prompt."""
        if isinstance(at, slice):
            return [self._name(block) for block in range(*at.indices(len(self)))]
        block = at + len(self) if at < 0 else at
        if not 0 <= block < len(self):
            raise IndexError(f"the chain has {len(self)} blocks, there is no block {at}")
        return self._name(block)

    def blocks(self, leading: int) -> int:
        """Blocks in so many leading segments."""
        return self.ends[leading - 1] if leading else 0

    def whole_segments(self, blocks: int) -> int:
        """Leading segments that lie within so many leading blocks."""
        return bisect_right(self.ends, blocks)

    def start_of(self, segment: int) -> int:
        """Blocks before a segment of the chain."""
        return self.blocks(self.segments.index(segment))

    def followed_by(self, segment: int, blocks: int) -> Chain:
        """The same with one more segment."""
        return Chain((*self.segments, segment), (*self.ends, len(self) + blocks))

    def without_last(self) -> Chain:
        """The same with one segment less."""
        return Chain(self.segments[:-1], self.ends[:-1])

    def _name(self, block: int) -> bytes:
        return self.keys[bisect_right(self.ends, block)] + block.to_bytes(_KEY_BYTES, "little")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is replayed.

    Attributes:
        block_size: tokens a block. lengths: blocks of each segment. chains: of each request.
        arrivals_s: of each request; meaningless for those that wait for another one.
        waits_for: request -> the earlier turn of its session; it arrives `think_s` after that one has ended.
        speed: how many times faster than recorded; think times are shortened by it, too.
    """

    name: str
    block_size: int
    requests: tuple[Request, ...]
    lengths: list[int]
    chains: list[Chain]
    arrivals_s: list[float]
    waits_for: dict[int, int]
    speed: float

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(request.input_length for request in self.requests)


def part(
    trace: Trace, *, longest: int | None = None, share: float = 1.0, jitter_s: float = 0.0, seed: int = 3
) -> Trace:
    """Some of a trace's requests, with times as fine as they were before they were recorded.

    Args:
        longest: leave out prompts of more tokens. share: of the sessions to keep, each with its sub-agents.
        jitter_s: the tick of a coarse clock; requests of equal times are spread over it and keep their order.
    """
    rng = random.Random(seed)
    requests = [r for r in trace.requests if longest is None or r.input_length <= longest]
    if share < 1.0:
        kept: dict[str | None, bool] = {}
        requests = [r for r in requests if kept.setdefault(r.parent or r.session, rng.random() < share)]
    if jitter_s:
        requests = _spread(requests, jitter_s, rng)
    return replace(trace, requests=tuple(requests))


def workload(trace: Trace, *, speed: float = 1.0, closed_loop: bool = False) -> Workload:
    """Make a trace ready.

    Args:
        speed: times faster than recorded. closed_loop: a turn with a think time waits for the answer before it.

    Raises:
        ValueError: the trace knows no prefixes, or has no requests, or the speed is not positive.
    """
    if trace.block_size is None or not trace.requests:
        raise ValueError(f"{trace.name} has no requests with known prefixes; choose another trace")
    if not speed > 0:
        raise ValueError(f"the speed was {speed}; give a positive one, 1 for the recorded times")
    cut = segments(trace.requests)
    start = trace.requests[0].time_s
    return Workload(
        name=trace.name,
        block_size=trace.block_size,
        requests=trace.requests,
        lengths=cut.lengths,
        chains=[Chain(chain, [cut.ends[number] for number in chain]) for chain in cut.chains],
        arrivals_s=[(request.time_s - start) / speed for request in trace.requests],
        waits_for=_earlier_turns(trace.requests) if closed_loop else {},
        speed=speed,
    )


def _spread(requests: Sequence[Request], jitter_s: float, rng: random.Random) -> list[Request]:
    together: dict[float, list[Request]] = defaultdict(list)
    for request in requests:
        together[request.time_s].append(request)
    spread = [
        replace(request, time_s=time_s + late)
        for time_s, group in together.items()
        for request, late in zip(group, sorted(rng.uniform(0, jitter_s) for _ in group), strict=True)
    ]
    return sorted(spread, key=lambda request: request.time_s)


def _earlier_turns(requests: Sequence[Request]) -> dict[int, int]:
    latest: dict[str, int] = {}
    waits_for = {}
    for number, request in enumerate(requests):
        if request.session is None:
            continue
        if request.think_s is not None and request.session in latest:
            waits_for[number] = latest[request.session]
        latest[request.session] = number
    return waits_for
