"""How much fits where, and which tier is fast enough: arithmetic for operators. Pure.

Covers: bytes a token, blocks and tokens of a tier, the bandwidth at which loading is as fast as computing, and how long
a prefix must be for a load to win. Does not cover: measurements of a running system (`estimate`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.layout import KVLayout


@dataclass(frozen=True, slots=True)
class TierPlan:
    """A tier to be sized.

    Attributes:
        capacity_bytes: what it may hold. bytes_per_s: of one reader; zero: not known. latency_s: of a read.
        overhead_bytes: stored beside each payload, as a header is. align_bytes: what a stored block is rounded up to.
    """

    capacity_bytes: int
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    overhead_bytes: int = 0
    align_bytes: int = 1

    def __post_init__(self) -> None:
        if self.align_bytes < 1 or min(self.capacity_bytes, self.bytes_per_s, self.latency_s, self.overhead_bytes) < 0:
            raise ValueError(f"sizes, speeds and times of a tier cannot be negative: {self}")


@dataclass(frozen=True, slots=True)
class TierSize:
    """What a tier comes to for one model.

    Attributes:
        stored_block_bytes: of one block with all that is stored beside it.
        blocks, tokens: how many fit.
        speedup: times that loading is faster than computing for a long prefix; None: its bandwidth is not known.
        worth_tokens: shortest prefix that is loaded sooner than computed; None: there is none, or it is not known.
    """

    stored_block_bytes: int
    blocks: int
    tokens: int
    speedup: float | None
    worth_tokens: int | None


def break_even_bytes_per_s(layout: KVLayout, prefill_tokens_per_s: float) -> float:
    """The bandwidth at which a token is loaded in the time in which it is computed.

    Raises:
        ValueError: the prefill rate is not positive.
    """
    if prefill_tokens_per_s <= 0:
        raise ValueError(f"prefill_tokens_per_s is {prefill_tokens_per_s}; give tokens per second, more than zero")
    return layout.token_nbytes * prefill_tokens_per_s


def worth_loading_tokens(layout: KVLayout, plan: TierPlan, prefill_tokens_per_s: float) -> int | None:
    """The shortest prefix, in whole blocks, whose load is sooner done than its computation; None: there is none.

    A load of n tokens takes `latency + n * bytes / bandwidth`, computing them `n / rate`. Prefill is taken as linear:
    attention makes long prefixes dearer to compute, so a load wins somewhat earlier than this says.
    """
    if plan.bytes_per_s <= break_even_bytes_per_s(layout, prefill_tokens_per_s):
        return None
    saved_s_per_token = 1 / prefill_tokens_per_s - layout.token_nbytes / plan.bytes_per_s
    if saved_s_per_token <= 0:  # by rounding
        return None
    blocks = int(plan.latency_s / (saved_s_per_token * layout.block_size)) + 1
    return blocks * layout.block_size


def size_tier(layout: KVLayout, plan: TierPlan, prefill_tokens_per_s: float) -> TierSize:
    """What fits into a tier, and whether it is fast enough.

    Raises:
        ValueError: the prefill rate is not positive.
    """
    raw = layout.block_nbytes + plan.overhead_bytes
    stored = -(-raw // plan.align_bytes) * plan.align_bytes
    blocks = plan.capacity_bytes // stored
    break_even = break_even_bytes_per_s(layout, prefill_tokens_per_s)
    return TierSize(
        stored_block_bytes=stored,
        blocks=blocks,
        tokens=blocks * layout.block_size,
        speedup=plan.bytes_per_s / break_even if plan.bytes_per_s else None,
        worth_tokens=worth_loading_tokens(layout, plan, prefill_tokens_per_s) if plan.bytes_per_s else None,
    )
