"""A simulated sequence, what its work costs, and which tokens it "samples". Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from kvstore.blocks import BlockHash
from workers.protocol import Job
from workers.simulated_store import Block


@dataclass(frozen=True, slots=True)
class Timing:
    """What things cost, in milliseconds.

    Prefill of n new tokens after m cached ones takes the fixed part, n times the token part and `n * (m + n / 2)` times
    the pair part; a read of k blocks from host takes the latency and k times the block part. The defaults resemble a
    small model on two CPU cores.
    """

    prefill_fixed_ms: float = 2.0
    prefill_token_ms: float = 0.25
    prefill_pair_ms: float = 0.00002
    decode_step_ms: float = 8.0
    host_latency_ms: float = 0.02
    host_block_ms: float = 0.03

    def prefill_ms(self, new: int, cached: int) -> float:
        """Time to compute `new` tokens after `cached` ones."""
        return self.prefill_fixed_ms + self.prefill_token_ms * new + self.prefill_pair_ms * new * (cached + new / 2)

    def host_ms(self, blocks: int) -> float:
        """Time to copy that many blocks from host to device."""
        return self.host_latency_ms + self.host_block_ms * blocks


@dataclass(slots=True, eq=False)
class Sequence:
    """A job under way. `computed` tokens have their K/V; `names` are the known names of full blocks, in order."""

    job: Job
    order: int
    submitted_at: float
    tokens: list[int]
    names: list[BlockHash]
    digest: bytes
    expected_cached: int = 0
    computed: int = 0
    registered: int = 0  # full blocks that were offered to the store
    held: list[Block] = field(default_factory=list)
    private: int = 0
    ready_at: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None
    load_ms: float = 0.0
    generated: int = 0  # those before it was resumed included
    fates: dict[str, int] | None = None
    resumed_fates: dict[str, int] | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Order of admission: priority, then age."""
        return (-self.job.priority, self.order)

    @property
    def missing(self) -> int:
        """Tokens whose K/V must be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def reusable(self) -> list[BlockHash]:
        """Names of the blocks that it may take from the cache; all of them known with the prompt."""
        return [] if self.job.no_read else self.names

    @property
    def pending(self) -> int:
        """Prompt tokens still to be computed; zero while it decodes."""
        left = self.missing if self.computed else self.missing - self.expected_cached
        return left if left > 1 else 0


def pseudo_token(sequence: Sequence, vocab_size: int) -> int:
    """The next token: follows from the prompt, the position and, with a temperature, the seed. Nothing else."""
    sampling = sequence.job.sampling
    seed = sampling.seed if sampling.temperature > 0 else 0
    drawn = hashlib.sha256(sequence.digest + f"{seed}/{sequence.generated}".encode()).digest()
    return int.from_bytes(drawn[:8], "little") % vocab_size
