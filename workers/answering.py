"""What sampled tokens make of a sequence: its outputs, its text, its end. Knows of no block and no device.

Does not cover: how a token is chosen (`sampler`), text itself (`detokenize`), what becomes of blocks (`engine`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from torch import Tensor

from kvstore.tier import Clock
from workers.protocol import EngineInfo, FinishReason, JobError, Output, TokenLogprob
from workers.sampler import Row, Sampled, sample
from workers.sequence import Sequence

log = logging.getLogger(__name__)


class Answering:
    """Of one engine; owned by its thread."""

    def __init__(self, info: EngineInfo, capacity: int, clock: Clock) -> None:
        """`info`: of the engine; its context and end tokens count. `capacity`: tokens that the device tier holds."""
        self._info, self._longest, self._clock = info, min(info.context_length, capacity), clock

    def ends_with(self, sequence: Sequence, tokens: int) -> bool:
        """Whether it may not grow beyond so many tokens."""
        return tokens - sequence.num_prompt >= sequence.job.sampling.max_tokens or tokens >= self._longest

    def add(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> Output:
        """Append a token; the output that tells of it, with the reason if it is the last."""
        sequence.token_ids.append(token_id)
        ended = self._is_end(sequence, token_id)
        output = self._output(sequence, token_id, logprob)
        if ended:
            output.finish = FinishReason.STOP
        else:
            _read(output, partial(sequence.text.push, token_id))
            if sequence.row is not None:
                sequence.row.append(token_id)
        if output.finish is None and (sequence.text.stopped or (sequence.row is not None and sequence.row.complete)):
            output.finish = FinishReason.STOP
        elif output.finish is None and self.ends_with(sequence, len(sequence.token_ids)):
            output.finish = FinishReason.LENGTH
        return output

    def flush(self, sequence: Sequence, output: Output) -> None:
        """Complete a sequence's last output."""
        _read(output, sequence.text.flush)
        if sequence.text.stopped and output.finish is FinishReason.LENGTH:
            output.finish = FinishReason.STOP
        output.fates = sequence.fates

    def _output(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> Output:
        output = Output(sequence.job.job_id, [token_id], completion_tokens=sequence.num_generated)
        if logprob is not None:
            output.logprobs.append(logprob)
        if sequence.num_generated == sequence.job.resumed + 1:
            output.fates, output.resumed_fates = sequence.fates, sequence.resumed_fates
            sequence.first_token_at = self._clock()
            waited = (sequence.first_step_at or sequence.submitted_at) - sequence.submitted_at
            output.worker_ttft_ms = (sequence.first_token_at - sequence.submitted_at) * 1000
            output.load_ms = sequence.load_ms
            output.queue_ms = max(0.0, waited * 1000 - sequence.load_ms)
        return output

    def _is_end(self, sequence: Sequence, token_id: int) -> bool:
        sampling = sequence.job.sampling
        return token_id in sampling.stop_token_ids or (not sampling.ignore_eos and token_id in self._info.eos_token_ids)


def sample_ready(ready: list[Sequence], logits: Tensor) -> dict[Sequence, Sampled]:
    """The next token of each, on the host. `logits`: [R, vocab], a row for each of R sequences."""
    if not ready:
        return {}
    rows = [Row(sequence.job.sampling, len(sequence.token_ids), sequence.row) for sequence in ready]
    return dict(zip(ready, sample(logits, rows), strict=True))


def _read(output: Output, piece: Callable[[], str]) -> None:
    """Add text to an output; tokens that cannot be decoded end their sequence, not the worker."""
    try:
        output.text += piece()
    except Exception as error:
        log.exception("text could not be decoded")
        message = f"the answer's tokens could not be decoded ({error}); check the model's tokenizer.json"
        output.finish, output.error = FinishReason.ERROR, JobError("DETOKENIZATION_FAILED", message)
