"""What a request's caller is told when it goes on nowhere, or when its worker ended it. Pure.

Covers: the errors. Does not cover: when it is given up (`attempts`), what a worker's own errors mean (`worker_errors`).
"""

from __future__ import annotations

from router import handover
from router.errors import InternalError, NoWorkerAvailable, PoisonRequest, RouterError, WorkerLost
from router.readiness import too_late
from router.request import Request
from warmkv.v1 import common_pb2, worker_pb2


def poisonous(work: Request) -> PoisonRequest:
    """For one that has lost as many workers as it may."""
    return PoisonRequest(
        f"Workers {' and '.join(work.lost)} were lost while they ran this request, so it is not sent to"
        f" another; look for the cause in their logs under the id {work.context.request_id}.",
        workers=",".join(work.lost),
    )


def broken_twice(work: Request, worker: str, why: str) -> RouterError:
    """For one that only a worker is left for whose stream had two gaps."""
    why = f"The stream of worker {worker} broke twice and no other one is ready ({why}); send the request again."
    return none_left(work, NoWorkerAvailable(why, retry_after_s=1.0))


def none_left(work: Request, error: NoWorkerAvailable) -> RouterError:
    """For a request that has lost a worker another error, since a client that sends it again would take it to another:
    here its losses would be counted from zero.
    """
    if work.generated:
        left = [*dict.fromkeys((*work.lost, *work.gaps, *work.avoid))]
        return handover.stopped(left, f"no other one went on with it: {error.message}", tokens=work.generated)
    if not work.lost:
        return error
    return WorkerLost(
        f"Worker {work.lost[0]} was lost while it ran this request, and no other one is ready ({error.message}); look"
        " for the cause in its log before you send the request again.",
        lost_workers=",".join(work.lost),
    )


def check_end(work: Request, output: worker_pb2.SequenceOutput) -> None:
    """Raises where the end of the answer is an error to its caller."""
    if output.finish_reason == common_pb2.FINISH_REASON_DEADLINE:
        raise too_late()
    if output.finish_reason == common_pb2.FINISH_REASON_CANCELLED:
        raise InternalError(
            f"The worker cancelled the request {work.context.request_id} unasked; send it again.",
            request_id=work.context.request_id,
        )
