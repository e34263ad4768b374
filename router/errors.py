"""One table: what can go wrong, its gRPC code, its HTTP status, its reason and the remedy.

    RouterError
    ├── InvalidRequest            INVALID_ARGUMENT / 400
    │   └── ContextLengthExceeded
    ├── Unauthenticated           UNAUTHENTICATED / 401
    ├── PermissionDenied          PERMISSION_DENIED / 403
    ├── ModelNotFound             NOT_FOUND / 404
    ├── AdapterNotFound           NOT_FOUND / 404
    ├── WorkerNotFound            NOT_FOUND / 404
    ├── Overloaded                RESOURCE_EXHAUSTED / 429, with RetryInfo
    │   ├── DeadlineUnreachable
    │   └── QuotaExceeded
    ├── PoisonRequest             FAILED_PRECONDITION / 409
    ├── NoWorkerAvailable         UNAVAILABLE / 503
    ├── WorkerLost                UNAVAILABLE / 503
    ├── Draining                  UNAVAILABLE / 503
    ├── DeadlineExceeded          DEADLINE_EXCEEDED / 504
    ├── NotSupported              UNIMPLEMENTED / 501
    └── InternalError             INTERNAL / 500, with an id that is in the log

Every message says what happened and ends with what to do next. `reason` and `metadata` travel as `google.rpc.ErrorInfo`
of the domain `warmkv`.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

DOMAIN = "warmkv"


class RouterError(Exception):
    """Anything that a caller is told.

    Attributes:
        reason: UPPER_SNAKE, stable. code: the gRPC status. http_status: the HTTP status.
        metadata: facts for programs. retry_after_s: when to try again; None: not said.
    """

    reason: ClassVar[str] = "INTERNAL"
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after_s: float | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata
        self.retry_after_s = retry_after_s


class InvalidRequest(RouterError):
    """The request can never succeed as it is."""

    reason = "INVALID_REQUEST"
    code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the model."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class Unauthenticated(RouterError):
    """No key, or an unknown one."""

    reason = "UNAUTHENTICATED"
    code = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401


class PermissionDenied(RouterError):
    """The key's role does not allow this."""

    reason = "PERMISSION_DENIED"
    code = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403


class ModelNotFound(RouterError):
    """This fleet does not serve that model."""

    reason = "MODEL_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    http_status = 404


class AdapterNotFound(RouterError):
    """This fleet does not serve that LoRA adapter."""

    reason = "ADAPTER_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    http_status = 404


class WorkerNotFound(RouterError):
    """No worker of that name."""

    reason = "WORKER_NOT_FOUND"
    code = grpc.StatusCode.NOT_FOUND
    http_status = 404


class Overloaded(RouterError):
    """A limit on requests is reached, or a queue is full."""

    reason = "OVERLOADED"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429


class DeadlineUnreachable(Overloaded):
    """The answer would come after the caller's deadline, so the request was not begun, or not waited for."""

    reason = "DEADLINE_UNREACHABLE"


class QuotaExceeded(Overloaded):
    """The tenant has used its tokens of this minute."""

    reason = "QUOTA_EXCEEDED"


class PoisonRequest(RouterError):
    """Two workers were lost while they ran this request; it is not sent to another."""

    reason = "POISON_REQUEST"
    code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class NoWorkerAvailable(RouterError):
    """No worker can take a request now."""

    reason = "NO_WORKER_AVAILABLE"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503


class WorkerLost(RouterError):
    """A worker was lost while it ran this, and it was not, or could not be, given to another one.

    `metadata["generated_tokens"]`: how many tokens of the answer had come, where some had.
    """

    reason = "WORKER_LOST"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503


class Draining(RouterError):
    """This router is shutting down."""

    reason = "DRAINING"
    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503


class DeadlineExceeded(RouterError):
    """The caller's deadline passed."""

    reason = "DEADLINE_EXCEEDED"
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class NotSupported(RouterError):
    """This deployment cannot do that."""

    reason = "NOT_SUPPORTED"
    code = grpc.StatusCode.UNIMPLEMENTED
    http_status = 501


class InternalError(RouterError):
    """A defect of ours; `metadata["request_id"]` is in the log."""
