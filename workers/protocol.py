"""What an engine takes and gives: plain data between `server` and any engine, the real one or the simulated one.

No torch, no gRPC, no Ray. Times are seconds on the engine's clock unless a name ends in `_ms`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from kvstore.blocks import BlockHash, HashScheme
from kvstore.events import BlockStored, KvEvent, TierName
from kvstore.lifetime import Lifetime
from kvstore.tier import TierStats

JobId = Hashable  # the server makes it of (stream, number)


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer's text is held to.

    Attributes:
        kind: `json_schema`, `regex`, `grammar` (Lark) or `json_object`. text: of it; empty for `json_object`.
    """

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; every default filled in and every value in range (the router refuses the rest).

    Attributes:
        max_tokens: at least 1. temperature: 0 is greedy. top_p: (0, 1]. top_k: 0 means all. min_p: [0, 1].
        seed: draws depend on it and the position only, never on the batch.
        stop: end before the first of these strings. stop_token_ids: end at these, besides the model's own end tokens.
        logprobs: None, or how many alternatives to return with each token (0 to 20).
        ignore_eos: do not stop at the model's own end tokens; never with a constraint.
        repetition_penalty: (0, 10], of tokens of prompt and answer. presence_penalty, frequency_penalty: [-2, 2], of
        tokens of the answer. logit_bias: (token, [-100, 100]), each token once. See `logits` for what they do.
        constraint: what the text is held to; None: nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before are less or more likely for it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_last_token(self) -> bool:
        """Whether a step's logits cannot be sampled before the token of the step before is known on the host."""
        return self.penalizes or self.constraint is not None


@dataclass(frozen=True, slots=True)
class PeerHint:
    """A worker that seems to hold the leading `blocks` blocks of a prompt in host RAM, and where it serves them."""

    address: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Promised:
    """Another worker computes the leading `blocks` blocks of a prompt for this job, and serves them at `address`.

    `ready_ms`: when all should be there, from the job's arrival. `margin_ms`: what it is worth not to compute them
    here, besides the time that takes.
    """

    address: str
    blocks: int
    ready_ms: float
    margin_ms: float


@dataclass(frozen=True, slots=True)
class Job:
    """A request, ready to run.

    Attributes:
        token_ids: the prompt, at least one. block_hashes: its full blocks' names (32 bytes), under `root`.
        lifetime: of its blocks; None: the store's default.
        no_store: keep none of its blocks. no_read: use no cached block.
        keep_priority: 0 to 100; eviction policies that look at it keep its blocks the longer, the higher it is.
        turn: of its conversation, from 1; None: not known.
        deadline: on the engine's clock; None: none.
        request_id: for log lines.
        resumed: how many of the last `token_ids` another worker generated for this job: they are no part of the prompt
        and are not told again; `block_hashes` names their full blocks, too.
        peers: who seems to hold more of it than this worker, whom to ask first.
        promise: who is computing blocks of it right now; None: nobody.
        prefill_only: compute the prompt's blocks, commit them, and end without a token.
    """

    job_id: JobId
    token_ids: Sequence[int]
    root: BlockHash
    block_hashes: Sequence[BlockHash]
    sampling: SamplingParams
    priority: int = 0
    lifetime: Lifetime | None = None
    no_store: bool = False
    no_read: bool = False
    keep_priority: int = 0
    turn: int | None = None
    deadline: float | None = None
    request_id: str = ""
    peers: tuple[PeerHint, ...] = ()
    resumed: int = 0
    promise: Promised | None = None
    prefill_only: bool = False

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.token_ids) - self.resumed

    def as_asked(self, block_size: int) -> Job:
        """The job as it was before anything was generated for it."""
        if not self.resumed:
            return self
        hashes = self.block_hashes[: self.num_prompt // block_size]
        return replace(self, token_ids=self.token_ids[: self.num_prompt], block_hashes=hashes, resumed=0)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token's natural log-probability under the raw logits, and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job was refused or failed: an UPPER_SNAKE reason, and what happened and what to do."""

    reason: str
    message: str


@dataclass(slots=True)
class Output:
    """What one step made for one job. The last one has `finish`; after it nothing comes.

    Attributes:
        fates: tokens by tier name, and under "computed" the rest; sums to the prompt; set with the first token and with
        `finish`, except for a job that ended before it was admitted. resumed_fates: likewise of all tokens that a
        resumed job came with, set with its first token.
        completion_tokens: generated so far, before it was resumed too. worker_ttft_ms: from submit to first token here,
        set with that; of which queue_ms waited for the first step and load_ms loaded blocks.
    """

    job_id: JobId
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    fates: dict[str, int] | None = None
    resumed_fates: dict[str, int] | None = None
    completion_tokens: int = 0
    error: JobError | None = None
    worker_ttft_ms: float | None = None
    queue_ms: float = 0.0
    load_ms: float = 0.0


@dataclass(slots=True)
class Load:
    """How busy the engine is. Prefill of n new tokens after m cached ones is predicted as
    `prefill_fixed_ms + prefill_token_ms * n + prefill_pair_ms * n * (m + n / 2)`.

    `prefill_share`: share of the last half minute that went to steps that prefill. `prefill_error`: mean relative error
    of the predicted prefill time. `answer_blocks`: what answers under way hold besides their prompts, and will before
    one of them ends. `slots`: sequences that may hold blocks. `answer_ms`, `freed_blocks`: of answers that ended
    lately, mean time since the first token and mean of blocks that could be had then and not before. `tiers` has
    (counters and fill, read latency ms, ms to read a block) for each tier.
    """

    running: int = 0
    waiting: int = 0
    pending_prefill_tokens: int = 0
    decoding: int = 0
    prefill_fixed_ms: float = 0.0
    prefill_token_ms: float = 0.0
    prefill_pair_ms: float = 0.0
    decode_step_ms: float = 0.0
    steps: int = 0
    preemptions: int = 0
    prefill_share: float = 0.0
    prefill_error: float = 0.0
    answer_blocks: int = 0
    slots: int = 0
    answer_ms: float = 0.0
    freed_blocks: float = 0.0
    tiers: dict[TierName, tuple[TierStats, float, float]] = field(default_factory=dict)


@dataclass(slots=True)
class StepReport:
    """What one step made."""

    outputs: list[Output] = field(default_factory=list)
    events: list[KvEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A block that a worker holds, as operators see it.

    Attributes:
        hash: its name. parent: the block before it; None: it starts a chain. root: of its chain; empty: not known.
        tiers: where it lies, from fast to slow.
        ttl_s: seconds that it lives after its last use; zero: its end is fixed; None: until it is evicted.
        ttl_left_s: seconds until it expires if nobody uses it; None: not known, or never.
        leased: whether one of the tiers has promised to keep it. priority: 0 to 100.
        position: how many blocks come before it; None: not known, as one of them is not held here.
    """

    hash: BlockHash
    parent: BlockHash | None
    root: BlockHash
    tiers: tuple[TierName, ...]
    ttl_s: float | None = None
    ttl_left_s: float | None = None
    leased: bool = False
    priority: int = 0
    position: int | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the two ends of a stream must agree on, and what a router needs to know.

    `shared_tier_id` identifies the shared tier's server (its run_id); empty without one. `peer_address`: where other
    workers read its host tier, `host:port`; empty: nowhere.
    """

    scheme: HashScheme
    model: str
    tokenizer_sha256: bytes
    context_length: int
    vocab_size: int
    block_nbytes: int
    device: str
    eos_token_ids: tuple[int, ...]
    shared_tier_id: str = ""
    peer_address: str = ""


class Cache(Protocol):
    """An engine's blocks, for operators and routers: every method is called from the engine's thread, between steps."""

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> dict[TierName, int]:
        """Drop blocks of this worker's own tiers; how many, by tier. See `kvstore.store.TieredStore.clear`."""
        ...

    def shared_clearing(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None
    ) -> Callable[[], dict[TierName, int]] | None:
        """What drops the same in the shared tier; None: there is none. Call `clear` first, and it in another thread.

        It waits for a server that may have millions of keys. Raises StoreError: not all of them went. Until
        `shared_cleared` the engine reads nothing from the shared tier, or it would bring back what is being dropped.
        """
        ...

    def shared_cleared(self) -> None:
        """What `shared_clearing` gave has ended, well or not."""
        ...

    def hold_peers(self, key: Hashable, for_s: float) -> None:
        """Start no read from other workers until `release_peers`, or for so long: they may hold what is cleared."""
        ...

    def release_peers(self, key: Hashable) -> None:
        """End a hold; none of that key: nothing happens."""
        ...

    def promise_broken(self, address: str, ticket: BlockHash) -> None:
        """The worker that serves blocks there has failed to make these: wait for them no more. See `Promise`."""
        ...

    def list_blocks(
        self, *, root: BlockHash | None, prefix: BlockHash | None, after: BlockHash | None, limit: int
    ) -> list[CachedBlock]:
        """The first `limit` blocks behind `after`, in the order of their hashes.

        Args:
            root: only its blocks; None: of all. prefix: only this block and those that follow it; None: all.
        """
        ...

    def prefetch(self, hashes: Sequence[BlockHash], *, root: BlockHash, lifetime: Lifetime | None) -> int:
        """Bring a chain's blocks up from slow tiers without waiting; how many are on their way now.

        `lifetime`: what they get at least; None: the store's default.
        """
        ...

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> dict[TierName, int]:
        """Forbid to drop them for so long (None: until `end_leases`); how many each tier promised."""
        ...

    def end_leases(self, hashes: Sequence[BlockHash]) -> dict[TierName, int]:
        """Allow it again; how many leases each tier ended."""
        ...

    def where(self, hashes: Sequence[BlockHash]) -> list[tuple[TierName, ...]]:
        """For each block the tiers of this worker alone (device, host, disk) that hold it now. A question; no I/O."""
        ...

    def owes_peers(self) -> bool:
        """Whether blocks that were made for other workers are, or may be, still to be read by them. A question."""
        ...

    def share_running(self) -> bool:
        """Queue what running jobs have made for the tier that other workers read, whatever admission says.

        Returns whether all of that is there by now; ask again. Without such a tier, or while it is down: True.
        """
        ...

    def check(self) -> None:
        """Audit the store.

        Raises:
            InvariantError: its books are wrong; says how.
        """
        ...

    def set_shared_reads(self, *, enabled: bool) -> None:
        """Whether requests may read blocks from the shared tier (the fleet record decides)."""
        ...


class Engine(Protocol):
    """Synchronous and owned by one thread: every method is called from it.

    Attributes:
        info: any thread may read it.
    """

    info: EngineInfo

    @property
    def cache(self) -> Cache:
        """What is done with its blocks besides jobs."""
        ...

    def submit(self, job: Job) -> None:
        """Queue a job. A job that cannot run gets an Output with an error from the next step; nothing is raised."""
        ...

    def cancel(self, job_id: JobId) -> None:
        """Forget a job and free its blocks before the next forward; its last Output has CANCELLED. Unknown: no-op."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def step(self) -> StepReport:
        """Schedule, fetch, forward, sample, commit: once."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Sleep while all sequences wait for blocks on their way; returns when one arrived, or after the timeout."""
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    def snapshot(self) -> list[BlockStored]:
        """All that the store holds; events not yet reported follow though it includes them: replayed, they agree."""
        ...

    def close(self, *, flush_s: float) -> None:
        """End: flush the store's queued writes for at most that long and give everything back."""
        ...
