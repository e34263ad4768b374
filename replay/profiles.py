"""Engine profiles from measurement: named ones as data, and one made of what a running fleet reports of itself.

Covers: the figures, where each comes from, and reading `Load` messages. Does not cover: what the figures mean
(`batched_profile`, `tiers`), asking a fleet (the command line does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from replay.batched_profile import BatchedProfile
from replay.tiers import TierProfile, Tiers
from router.cost import PrefillFit, TierRead
from router.kv_wire import prefill_fit, tier_reads
from warmkv.v1 import common_pb2, worker_pb2

_READ_MIN_MS = 1e-6  # a tier that reads in no time at all was not measured


@dataclass(frozen=True, slots=True)
class NamedProfile:
    """A profile that comes with the project.

    Attributes:
        source: where its figures come from. tiers: that suit the machine; use them, or leave them out.
    """

    name: str
    source: str
    profile: BatchedProfile
    tiers: Tiers


_ALL = (
    NamedProfile(
        "h100_8b",
        "Llama-3-8B shape in bf16 on one H100, measured: prefill of 2,048 tokens 64 ms, of 8,192 300 ms and of 16,384 "
        "720 ms in chunks of 2,048; decode at 1,024 tokens of context 8.6 ms with one sequence and 16.5 ms with 128; "
        "pinned RAM gives a token in 2.6 us. 49 GiB of pool at 128 KiB a token; the shared tier at 4 GB/s a worker. "
        "Assumed, not measured: 10 GB/s between two workers.",
        BatchedProfile(
            PrefillFit(2.0, 0.0285, 1.9e-6),
            decode_ms=8.5,
            decode_sequence_ms=0.029,
            decode_context_ms=3.3e-5,
            mixed_sequence_ms=0.0285,
            max_batch_tokens=2048,
            max_running=256,
            pool_tokens=400_000,
        ),
        Tiers(
            host=TierProfile(2_000_000, latency_ms=0.05, token_ms=0.0026),
            redis=TierProfile(20_000_000, latency_ms=1.0, token_ms=0.033),
            peer=TierProfile(0, latency_ms=1.0, token_ms=0.0131),
        ),
    ),
    NamedProfile(
        "h100x8_70b",
        "estimate: a 70B model on eight H100s with tensor parallelism: 8.75 times the work of the 8B on eight "
        "times the machine at 80 % of its efficiency, 320 KiB a token, 0.95 TiB of pool, eight times 10 GB/s "
        "between two workers.",
        BatchedProfile(
            PrefillFit(3.0, 0.039, 1.2e-6),
            decode_ms=14.0,
            decode_sequence_ms=0.04,
            decode_context_ms=1e-5,
            mixed_sequence_ms=0.039,
            max_batch_tokens=8192,
            max_running=256,
            pool_tokens=3_200_000,
        ),
        Tiers(
            host=TierProfile(6_000_000, latency_ms=0.1, token_ms=0.0033),
            redis=TierProfile(60_000_000, latency_ms=1.0, token_ms=0.08),
            peer=TierProfile(0, latency_ms=1.0, token_ms=0.0041),
        ),
    ),
    NamedProfile(
        "simulated",
        "the defaults of `--engine simulated` (`workers.simulated_sequence.Timing`), which resemble a small model on "
        "two CPU cores",
        BatchedProfile(
            PrefillFit(0.0, 0.25, 0.00002),
            decode_ms=8.0,
            chunk_ms=2.0,
            mixed_ms=8.0,
            max_batch_tokens=2048,
            max_running=64,
            pool_tokens=64_000,
            reserves_prompt=True,
        ),
        Tiers(
            host=TierProfile(256_000, latency_ms=0.02, token_ms=0.03 / 16),
            peer=TierProfile(0, latency_ms=1.0, token_ms=0.25 / 16),
        ),
    ),
    NamedProfile(
        "cpu_tiny",
        "measured with `python -m bench.engine_profile`: the torch engine with a model of six layers and hidden size "
        "256 on one thread of a 2.5 GHz Xeon, CPU time of its steps, least of two; the core was shared with other "
        "programs, an idle one is faster",
        BatchedProfile(
            PrefillFit(13.1, 0.154, 1.0e-4),
            decode_ms=8.9,
            decode_sequence_ms=0.375,
            decode_context_ms=0.0032,
            mixed_sequence_ms=0.15,
            max_batch_tokens=2048,
            max_running=64,
            pool_tokens=4_000,
        ),
        Tiers(),
    ),
)
PROFILES: dict[str, NamedProfile] = {each.name: each for each in _ALL}


def find_profile(name: str) -> NamedProfile:
    """The profile of that name. Raises ValueError that names those there are."""
    if name not in PROFILES:
        raise ValueError(f"there is no engine profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a fleet's workers say of themselves, and how their engines are set, which they do not say.

    Attributes:
        loads: the last report of each worker, as its `Load` messages tell. block_size: tokens a block.
        block_nbytes: bytes a block; what turns the tiers' bytes into tokens.
    """

    loads: Sequence[worker_pb2.Load]
    block_size: int
    block_nbytes: int


def measured_profile(
    measured: Measured, *, max_batch_tokens: int = 2048, max_running: int = 64, ttl_s: float | None = None
) -> tuple[BatchedProfile, Tiers]:
    """A profile with the fleet's own figures: medians over its workers, so one that is slow just now does not count.

    Decode is what was measured at the fleet's present batches, whatever its size: a step costs the same with more.

    Raises:
        ValueError: no worker has measured a prefill yet; send some requests first.
    """
    loads = measured.loads
    fits = [fit for load in loads if (fit := prefill_fit(load)) is not None]
    if not fits:
        raise ValueError("no worker has measured a prefill yet; send the fleet some requests, and ask again")
    fixed, token, pair = (median(column) for column in zip(*fits, strict=True))
    steps = [load.decode_step_ms for load in loads if load.decode_step_ms > 0]
    pool = _tokens(measured, common_pb2.TIER_DEVICE)
    if not pool:
        raise ValueError("no worker tells how large its pool is; give the profile's pool_tokens by hand")
    profile = BatchedProfile(
        PrefillFit(fixed, max(token, 1e-6), pair),
        decode_ms=median(steps) if steps else fixed + token,
        mixed_sequence_ms=token,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        pool_tokens=pool,
    )
    return profile, Tiers(
        host=_tier(measured, common_pb2.TIER_HOST),
        disk=_tier(measured, common_pb2.TIER_DISK),
        redis=_tier(measured, common_pb2.TIER_REDIS),
        ttl_s=ttl_s,
    )


def _tier(measured: Measured, tier: common_pb2.Tier.ValueType) -> TierProfile | None:
    """None: the fleet has none, or nobody knows how large it is."""
    reads = [read for load in measured.loads if (read := _read(load, tier)) is not None]
    tokens = _tokens(measured, tier)
    if not reads or not tokens:
        return None
    return TierProfile(
        tokens,
        latency_ms=median(read.latency_ms for read in reads),
        token_ms=max(_READ_MIN_MS, median(read.block_ms for read in reads) / measured.block_size),
    )


def _read(load: worker_pb2.Load, tier: common_pb2.Tier.ValueType) -> TierRead | None:
    wanted = worker_pb2.Load(tiers=[each for each in load.tiers if each.tier == tier])
    return next(iter(tier_reads(wanted).values()), None)


def _tokens(measured: Measured, tier: common_pb2.Tier.ValueType) -> int:
    capacities = [each.capacity_bytes for load in measured.loads for each in load.tiers if each.tier == tier]
    return int(median(capacities)) // measured.block_nbytes * measured.block_size if capacities else 0
