"""How busy an engine is, worked out of its sequences, its store and what it has measured of itself. A question."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from kvstore.blocks import shared_blocks
from kvstore.store import TieredStore
from workers.protocol import Load
from workers.scheduler import Scheduler
from workers.sequence import Sequence
from workers.step_times import Answers, StepTimes


def load_of(
    scheduler: Scheduler,
    before: Items[Sequence],
    times: StepTimes,
    answers: Answers,
    store: TieredStore,
    block_size: int,
) -> Load:
    """All but what the engine alone knows: `steps`, `slots`, `prefill_share`. `before`: who waits before `scheduler`:
    their prompts are work like any other, which begins as soon as their constraints are compiled."""
    prefill, read_ms = times.prefill, store.read_ms()
    decoding = [sequence for sequence in scheduler.running if sequence.remaining == 1]
    return Load(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting) + len(before),
        pending_prefill_tokens=sum(_pending(sequence, block_size) for sequence in (*scheduler, *before)),
        decoding=len(decoding),
        prefill_fixed_ms=prefill.fixed_ms,
        prefill_token_ms=prefill.token_ms,
        prefill_pair_ms=prefill.pair_ms,
        decode_step_ms=times.decode_step_ms,
        preemptions=scheduler.preemptions,
        prefill_error=times.prefill_error,
        answer_blocks=_answer_blocks(decoding, answers, block_size),
        answer_ms=answers.ms,
        freed_blocks=answers.blocks,
        tiers={name: (stats, *_one_block(*read_ms.get(name, (0, 0)))) for name, stats in store.stats().items()},
    )


def expected_tokens(sequence: Sequence, near: int, promised: int, before: Iterable[Sequence], block_size: int) -> int:
    """Tokens in reach of a sequence that comes now, when those `before` it are prefilled: a burst over one document
    computes it once. `near`, `promised`: leading blocks that local tiers hold, and that another worker makes."""
    names = sequence.readable(block_size)
    prefilling = (other for other in before if other.remaining > 1 and not other.job.no_store)
    made = [shared_blocks(names, other.hashes) for other in prefilling]
    return max(near, min(promised, len(names)), *made) * block_size


def _answer_blocks(decoding: list[Sequence], answers: Answers, block_size: int) -> int:
    held = sum(len(sequence.block_table) - sequence.num_prompt // block_size for sequence in decoding)
    return held + answers.growth_blocks if decoding else 0


def _one_block(latency_ms: float, block_ms: float) -> tuple[float, float]:
    """Latency, and the time to read one block, as `Load` tells them."""
    return latency_ms, latency_ms + block_ms


def _pending(sequence: Sequence, block_size: int) -> int:
    """Prompt tokens still to be computed; zero while it decodes."""
    if sequence.block_table or sequence.num_computed:
        expected = 0 if sequence.tail is None else sequence.tail.expected * block_size
        return max(1, sequence.remaining - expected) if sequence.remaining > 1 else 0
    return max(1, sequence.remaining - sequence.expected_cached)
