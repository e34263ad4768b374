"""What the client raises: one tree, told apart by the status that the router sent.

WarmkvError
├── InvalidRequest      the request can never succeed as it is
│   └── InvalidOption   found before it was sent; a ValueError too
├── Unauthenticated     no API key, or an unknown one
├── PermissionDenied    the key's role does not allow this
├── NotFound            no such model or worker
├── Overloaded          a limit, a queue or a quota is full, or the deadline is out of reach; see `retry_after`
├── Refused             the request was refused for what it did before
├── Unavailable         no router, or no worker, could take the request, or one was lost
├── DeadlineExceeded    the deadline passed
├── NotSupported        this deployment cannot do that
├── Cancelled           somebody cancelled the call
└── ServerError         a defect of the router's; `metadata["request_id"]` is in its log
"""

from __future__ import annotations

from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "warmkv"
_STATUS_KEY = "grpc-status-details-bin"


class WarmkvError(Exception):
    """A call that failed.

    Attributes:
        message: what happened and what to do, for people.
        code: the gRPC status.
        reason: UPPER_SNAKE, stable, for programs; empty when the error did not come from a router.
        metadata: facts for programs, `request_id` among them.
        retry_after: seconds after which to try again; None: not said.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{reason or code.name}: {message}")
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = metadata or {}
        self.retry_after = retry_after


class InvalidRequest(WarmkvError):
    """The request can never succeed as it is."""


class InvalidOption(InvalidRequest, ValueError):
    """The same, found before anything was sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_REQUEST")


class Unauthenticated(WarmkvError):
    """No API key, or an unknown one."""


class PermissionDenied(WarmkvError):
    """The key's role does not allow this."""


class NotFound(WarmkvError):
    """No such model or worker."""


class Overloaded(WarmkvError):
    """A limit, a queue or a quota is full, the deadline is out of reach, or a message is too large."""


class Refused(WarmkvError):
    """The request was refused for what it did before, for example for losing two workers."""


class Unavailable(WarmkvError):
    """No router, or no worker, could take the request, or one was lost while it ran."""


class DeadlineExceeded(WarmkvError):
    """The deadline passed."""


class NotSupported(WarmkvError):
    """This deployment cannot do that."""


class Cancelled(WarmkvError):
    """Somebody else than the stream's own `cancel` cancelled the call."""


class ServerError(WarmkvError):
    """A defect of the router's."""


_BY_CODE: dict[grpc.StatusCode, type[WarmkvError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: NotSupported,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_rpc_error(error: grpc.RpcError) -> WarmkvError:
    """The typed error of a failed call, sync or asyncio."""
    call = cast("grpc.Call", error)  # what grpc raises is both
    code = call.code()
    info, retry_after = _details(call)
    return _BY_CODE.get(code, ServerError)(
        call.details() or "the call failed without a message",
        code=code,
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_after=retry_after,
    )


def _details(call: grpc.Call) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    """ErrorInfo of our domain (else an empty one) and the delay of RetryInfo."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after = None
    for detail in _status(call).details:
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Is(info.DESCRIPTOR):
            found = error_details_pb2.ErrorInfo()
            if detail.Unpack(found) and found.domain == DOMAIN:
                info = found
    return info, retry_after


def _status(call: grpc.Call) -> status_pb2.Status:
    data = next((value for key, value in call.trailing_metadata() or () if key == _STATUS_KEY), b"")
    return status_pb2.Status.FromString(data if isinstance(data, bytes) else b"")
