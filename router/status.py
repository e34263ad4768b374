"""A RouterError as `google.rpc.Status`: what programs read behind the gRPC code."""

from __future__ import annotations

from typing import cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from router.errors import DOMAIN, InvalidRequest, RouterError

# Statuses travel in trailers, and transports refuse trailers of more than 8 KiB: the error would be lost with its text.
# A byte of the message takes up to three there, and one and a third in each copy among the details.
_MAX_MESSAGE_BYTES = 800
_MAX_VALUE_BYTES = 160


def to_grpc_status(error: RouterError, request_id: str) -> grpc.Status:
    """The status to abort a call with: ErrorInfo always, RetryInfo and BadRequest where they apply."""
    message = _cut(error.message, _MAX_MESSAGE_BYTES)
    metadata = {key: _cut(str(value), _MAX_VALUE_BYTES) for key, value in error.metadata.items()}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={**metadata, "request_id": request_id})
    ]
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, InvalidRequest) and "field" in metadata:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=metadata["field"], description=_cut(message, _MAX_VALUE_BYTES)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    status = status_pb2.Status(code=error.code.value[0], message=message, details=[_packed(d) for d in details])
    return cast("grpc.Status", rpc_status.to_status(status))


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _cut(text: str, most: int) -> str:
    data = text.encode()
    return text if len(data) <= most else data[:most].decode(errors="ignore") + "…"
