"""The service that every simulated worker gives, whatever protocol it speaks. Pure, standard library only.

A worker computes prompts one after another, in order of arrival, at a fixed rate of tokens that are not cached;
decoding runs beside it and takes a fixed time. Its cache holds whole blocks, least recently used first to go, and of
one chain the end before the beginning. The last token of a prompt is always computed, since it gives the first new one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Constants:
    """What a worker is like.

    Attributes:
        block_tokens: tokens a block. capacity_blocks: blocks that it can hold.
        tokens_per_s: of prefill. decode_s: from the first token to the end of the answer.
    """

    block_tokens: int = 16
    capacity_blocks: int = 6000
    tokens_per_s: float = 40_000.0
    decode_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Served:
    """What a prompt cost.

    Attributes:
        ttft_s: from its arrival to its first token, queue and prefill. prompt_tokens, cached_tokens: its parts.
        chain: names of its full blocks, in order; the last `stored` of them are new. evicted: names that went.
    """

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    chain: tuple[int, ...]
    stored: int
    evicted: tuple[int, ...]


class SimulatedService:
    """A worker's cache and queue, on the caller's clock."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._held: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._free_at = 0.0

    def arrive(self, now: float, prompt: bytes) -> Served:
        """A prompt of ASCII characters comes in at `now` seconds, not before the last one."""
        chain = self._names(prompt)
        tokens = -(-len(prompt) // CHARS_PER_TOKEN)
        held = 0
        while held < len(chain) and chain[held] in self._held:
            held += 1
        evicted = self._make_room(chain[:held], -(-tokens // self._constants.block_tokens) - held)
        for name in reversed(chain):  # the beginning is used last, so that it outlives the end
            self._held[name] = None
            self._held.move_to_end(name)
        cached = min(held * self._constants.block_tokens, tokens - 1)
        self._free_at = max(now, self._free_at) + (tokens - cached) / self._constants.tokens_per_s
        return Served(self._free_at - now, tokens, cached, chain, len(chain) - held, evicted)

    def _make_room(self, pinned: tuple[int, ...], count: int) -> tuple[int, ...]:
        for name in reversed(pinned):
            self._held.move_to_end(name)
        evicted = []
        while len(self._held) + count > self._constants.capacity_blocks and len(self._held) > len(pinned):
            evicted.append(self._held.popitem(last=False)[0])
        return tuple(evicted)

    def _names(self, prompt: bytes) -> tuple[int, ...]:
        size, names, parent = self._constants.block_tokens * CHARS_PER_TOKEN, [], 0
        for start in range(0, len(prompt) - size + 1, size):
            parent = hash((parent, prompt[start : start + size]))
            names.append(parent)
        return tuple(names)


@dataclass(slots=True)
class WorkerBooks:
    """What a worker did since it started or was last told to forget it.

    Attributes:
        first_at: when its first prompt came, seconds since the epoch; None: none came.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    first_at: float | None = None

    def count(self, ttft_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        """One more prompt."""
        self.first_at = time.time() if self.first_at is None else self.first_at
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.ttft_ms.append(ttft_s * 1000)
