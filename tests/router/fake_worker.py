"""A worker that misbehaves on command, over real gRPC: silent, forgetful, refusing, an impostor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from tests.router.rig import BLOCK, LAYOUT
from warmkv import versions
from warmkv.v1 import common_pb2, kv_events_pb2, worker_pb2, worker_pb2_grpc

Submitted = Callable[["FakeWorker", worker_pb2.Job], None]


def answers(worker: FakeWorker, job: worker_pb2.Job) -> None:
    """The whole answer at once."""
    ids = [7] * job.sampling.max_tokens
    fates = common_pb2.TokensByFate(computed=len(job.packed_token_ids) // 4)
    worker.say(
        step=worker_pb2.Step(
            outputs=[
                worker_pb2.SequenceOutput(
                    job_id=job.job_id,
                    token_ids=ids,
                    text="x" * len(ids),
                    completion_tokens=len(ids),
                    finish_reason=common_pb2.FINISH_REASON_LENGTH,
                    fates=fates,
                )
            ]
        )
    )


def says_one_token(worker: FakeWorker, job: worker_pb2.Job) -> None:
    worker.say(
        step=worker_pb2.Step(
            outputs=[worker_pb2.SequenceOutput(job_id=job.job_id, token_ids=[7], text="x", completion_tokens=1)]
        )
    )


def stays_quiet(worker: FakeWorker, job: worker_pb2.Job) -> None:
    return None


def refuses(reason: str, message: str = "no") -> Submitted:
    def refuse(worker: FakeWorker, job: worker_pb2.Job) -> None:
        output = worker_pb2.SequenceOutput(
            job_id=job.job_id,
            finish_reason=common_pb2.FINISH_REASON_ERROR,
            error=worker_pb2.JobError(reason=reason, message=message),
        )
        worker.say(step=worker_pb2.Step(outputs=[output]))

    return refuse


def breaks(worker: FakeWorker, job: worker_pb2.Job) -> None:
    worker.hang_up()


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One router at a time. `say` sends anything; heartbeats come while `beating`."""

    def __init__(self, name: str, submitted: Submitted = answers, **hello: Any) -> None:
        self.name = name
        self.submitted = submitted
        self.hello = worker_pb2.WorkerHello(
            protocol_version=versions.NEWEST,
            worker=name,
            incarnation=1,
            model="sim",
            context_length=8192,
            vocab_size=1000,
            scheme=worker_pb2.HashScheme(
                model_fingerprint=b"f" * 32, layout=LAYOUT.describe(), block_size=BLOCK, tp_size=1, version=1
            ),
        )
        for field, value in hello.items():
            setattr(self.hello, field, value)
        self.beating = True
        self.snapshots = True
        self.heard: list[worker_pb2.ConnectRequest] = []
        self.connects = 0
        self._outgoing: asyncio.Queue[worker_pb2.ConnectResponse | None] = asyncio.Queue()
        self._seq = 0

    async def start(self, port: int = 0) -> str:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self._server.stop(None)

    def say(self, **kind: Any) -> None:
        self._outgoing.put_nowait(worker_pb2.ConnectResponse(**kind))

    def skip(self) -> None:
        """Lose a message."""
        self._seq += 1

    def hang_up(self) -> None:
        self._outgoing.put_nowait(None)

    def holds(self, *hashes: bytes, first: bool = True, last: bool = True) -> None:
        """Send a snapshot."""
        stored = [kv_events_pb2.BlockStored(tier=common_pb2.TIER_DEVICE, hashes=b"".join(hashes))] if hashes else []
        self.say(snapshot=worker_pb2.Snapshot(blocks=stored, first=first, last=last))

    def kinds(self) -> list[str | None]:
        return [request.WhichOneof("kind") for request in self.heard]

    async def Connect(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.ConnectResponse]:
        self.connects += 1
        self._seq = 0
        self._outgoing = asyncio.Queue()
        self.say(hello=self.hello)
        if self.snapshots:
            self.holds()
        tasks = [asyncio.create_task(self._listen(request_iterator)), asyncio.create_task(self._beat())]
        try:
            while (message := await self._outgoing.get()) is not None:
                self._seq += 1
                message.seq = self._seq
                yield message
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
        finally:
            for task in tasks:
                task.cancel()

    async def _listen(self, requests: Any) -> None:
        async for request in requests:
            self.heard.append(request)
            if request.HasField("submit"):
                self.submitted(self, request.submit)

    async def _beat(self) -> None:
        while True:
            if self.beating:
                self.say(step=worker_pb2.Step(load=worker_pb2.Load()))
            await asyncio.sleep(0.05)
