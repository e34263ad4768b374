"""What a worker's refusal or failure of a job means for its caller. Pure.

Covers: which refusals are tried elsewhere, and the error of the others. Does not cover: lost workers (`core`).
"""

from __future__ import annotations

from router.errors import (
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    NotSupported,
    Overloaded,
    RouterError,
)
from warmkv.v1 import worker_pb2

# The job never ran, and another worker may take it.
ELSEWHERE = frozenset({"WORKER_DRAINING"})
# A worker whose device tier or context is smaller than that of the one before cannot go on with an answer.
TOO_SMALL = frozenset({"CONTEXT_LENGTH_EXCEEDED", "PROMPT_TOO_LARGE_FOR_WORKER"})
# The whole engine is gone: the job may have been the cause, so it counts as a lost worker.
ENGINE_LOST = frozenset({"ENGINE_FAILED"})

_MEANING: dict[str, type[RouterError]] = {
    "CONTEXT_LENGTH_EXCEEDED": ContextLengthExceeded,
    "PROMPT_TOO_LARGE_FOR_WORKER": InvalidRequest,
    "EMPTY_PROMPT": InvalidRequest,
    "TOKEN_OUT_OF_RANGE": InvalidRequest,
    "INVALID_SAMPLING": InvalidRequest,
    "INVALID_CONSTRAINT": InvalidRequest,
    "CONSTRAINT_TOO_COMPLEX": InvalidRequest,
    "CONSTRAINT_DEAD_END": InvalidRequest,
    "CONSTRAINT_NOT_SUPPORTED": NotSupported,
    "OVERLOADED": Overloaded,
    "OUT_OF_MEMORY": Overloaded,
}


def error_of(error: worker_pb2.JobError, *, worker: str, request_id: str) -> RouterError:
    """The error to raise; reasons that are not the caller's doing are a defect of ours."""
    kind = _MEANING.get(error.reason)
    if kind is not None:
        return kind(f"{error.message[:1].upper()}{error.message[1:]}", worker=worker)
    return InternalError(
        f"Worker {worker} failed the request ({error.reason or 'no reason given'}: {error.message}); try again, and"
        f" report it with the id {request_id} if it stays.",
        worker=worker,
        worker_reason=error.reason,
        request_id=request_id,
    )
