"""What a worker's reasons mean to callers."""

from __future__ import annotations

import grpc
import pytest

from router import errors, worker_errors
from warmkv.v1 import worker_pb2


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        ("OUT_OF_MEMORY", errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("INVALID_CONSTRAINT", errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
        ("ENGINE_FAILURE", errors.InternalError, grpc.StatusCode.INTERNAL),
        ("WHATEVER_COMES_NEXT", errors.InternalError, grpc.StatusCode.INTERNAL),
    ],
)
def test_a_reason_becomes_the_callers_error(reason: str, kind: type[errors.RouterError], code: grpc.StatusCode) -> None:
    said = worker_pb2.JobError(reason=reason, message="the device has too little memory")
    error = worker_errors.error_of(said, worker="w0", request_id="r1")
    assert type(error) is kind
    assert error.code is code
    assert "too little memory" in error.message
