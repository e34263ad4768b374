"""How fast an engine with continuous batching is, as data.

Covers: the times of steps and the limits of batches. Does not cover: the step loop (`batched_engine`), figures of real
engines (`profiles`).
"""

from __future__ import annotations

from dataclasses import dataclass

from router.cost import PrefillFit


@dataclass(frozen=True, slots=True)
class BatchedProfile:
    """A step computes one token of each decoding sequence, and chunks of prompts in what is left of its budget.

    A step that only decodes takes `decode_ms + decode_sequence_ms * d + decode_context_ms * t` for d sequences with t
    tokens of K/V together. A step with chunks takes `prefill.fixed_ms`, for each chunk of n tokens after m
    `chunk_ms + prefill.token_ms * n + prefill.pair_ms * n * (m + n / 2)`, and where sequences decode along
    `mixed_ms + mixed_sequence_ms * d + decode_context_ms * t` more.

    Attributes:
        max_batch_tokens: the budget. max_running: sequences that hold blocks; at most the budget.
        pool_tokens: tokens whose blocks the pool holds.
        reserves_prompt: blocks of the whole prompt are taken at admission, first come first served, as
            `workers.simulated` does; else chunk by chunk, by rank, as `workers.scheduler` does, where a prompt whose
            next block is being computed by another one waits for it.
        report_s, heartbeat_s: shortest and longest time between two reports of load.
        fit_error: the prefill rate that routers are told, as a multiple of the true one.
    """

    prefill: PrefillFit
    decode_ms: float
    chunk_ms: float = 0.0
    decode_sequence_ms: float = 0.0
    decode_context_ms: float = 0.0
    mixed_ms: float = 0.0
    mixed_sequence_ms: float = 0.0
    max_batch_tokens: int = 8192
    max_running: int = 256
    pool_tokens: int = 400_000
    reserves_prompt: bool = False
    report_s: float = 0.02
    heartbeat_s: float = 0.5
    fit_error: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for what could never make a step."""
        if not 1 <= self.max_running <= self.max_batch_tokens:
            raise ValueError(
                f"max_running is {self.max_running} and max_batch_tokens {self.max_batch_tokens}: every running "
                "sequence must fit a step; give 1 <= max_running <= max_batch_tokens"
            )
        times = (*self.prefill, self.chunk_ms, self.decode_sequence_ms, self.decode_context_ms, self.mixed_ms)
        if min(*times, self.mixed_sequence_ms) < 0 or self.decode_ms <= 0 or self.prefill.token_ms <= 0:
            raise ValueError("a time is negative, or a token costs nothing; give positive decode_ms and token_ms")
        if min(self.report_s, self.fit_error) <= 0 or self.heartbeat_s < self.report_s:
            raise ValueError("report_s and fit_error must be positive, and heartbeat_s not below report_s")

    @property
    def fit(self) -> PrefillFit:
        """What an engine like this would measure of itself."""
        fixed, token, pair = self.prefill
        return PrefillFit(fixed + self.chunk_ms, token / self.fit_error, pair / self.fit_error)

    def decode_step_ms(self, sequences: int, context: int) -> float:
        """A step of decodes alone."""
        return self.decode_ms + self.decode_sequence_ms * sequences + self.decode_context_ms * context

    def mixed_part_ms(self, sequences: int, context: int) -> float:
        """What decodes add to a step with chunks."""
        if not sequences:
            return 0.0
        return self.mixed_ms + self.mixed_sequence_ms * sequences + self.decode_context_ms * context

    def chunk_part_ms(self, tokens: int, before: int) -> float:
        """One chunk, without the step's fixed part."""
        fit = self.prefill
        return self.chunk_ms + fit.token_ms * tokens + fit.pair_ms * tokens * (before + tokens / 2)
