"""Jobs that an engine cannot run, and what their callers can do. Pure: no torch, no clock."""

from __future__ import annotations

from collections.abc import Container

from workers.protocol import EngineInfo, Job, JobError, JobId


def refusal(job: Job, info: EngineInfo, *, capacity: int, running: Container[JobId]) -> JobError | None:
    """Why a job cannot run on an engine whose device tier holds `capacity` tokens; None: it can."""
    return (
        empty(job)
        or _duplicate(job, running)
        or _out_of_vocabulary(job, info.vocab_size)
        or too_long(job, info.context_length)
        or _too_large(job, capacity)
    )


def empty(job: Job) -> JobError | None:
    """A prompt needs a token."""
    if not job.token_ids:
        return JobError("EMPTY_PROMPT", "the prompt has no tokens; send at least one")
    return None


def too_long(job: Job, longest: int) -> JobError | None:
    """A prompt must leave a token of the context for its answer."""
    if len(job.token_ids) >= longest:
        message = f"the prompt has {len(job.token_ids)} tokens and the context {longest}; shorten the prompt"
        return JobError("CONTEXT_LENGTH_EXCEEDED", message)
    return None


def needs_text(job: Job) -> JobError | None:
    """An engine that makes no text of its own cannot hold it to anything."""
    if job.sampling.constraint is None:
        return None
    message = "a simulated worker makes no text that a constraint could hold; leave it out, or serve a model"
    return JobError("CONSTRAINT_NOT_SUPPORTED", message)


def _duplicate(job: Job, running: Container[JobId]) -> JobError | None:
    if job.job_id in running:
        return JobError("DUPLICATE_JOB", f"job {job.job_id} is running already; give each job an id of its own")
    return None


def _out_of_vocabulary(job: Job, vocab_size: int) -> JobError | None:
    if all(0 <= token < vocab_size for token in job.token_ids):
        return None
    message = f"a token id is outside the vocabulary of {vocab_size}; encode with this model's tokenizer"
    return JobError("TOKEN_OUT_OF_RANGE", message)


def _too_large(job: Job, capacity: int) -> JobError | None:
    if len(job.token_ids) <= capacity:
        return None
    message = (
        f"the prompt has {len(job.token_ids)} tokens and this worker's device tier holds {capacity}; shorten the "
        "prompt, or give the worker more device_bytes"
    )
    return JobError("PROMPT_TOO_LARGE_FOR_WORKER", message)
