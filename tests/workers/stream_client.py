"""A router of few words for tests: speaks the stream, keeps a naive mirror of the store, can stop reading."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count

import grpc

from kvstore.blocks import SHORT_HASH_BYTES, HashScheme, block_hashes, short
from kvstore.events import BlockStored
from kvstore.token_ids import packed
from warmkv import versions
from warmkv.v1 import common_pb2, worker_pb2, worker_pb2_grpc

SECRET = "fleet secret"
PATIENCE_S = 30.0  # how long a test waits for what must come; never how fast it must be

TIER_NAMES = {
    common_pb2.TIER_DEVICE: "device",
    common_pb2.TIER_HOST: "host",
    common_pb2.TIER_DISK: "disk",
    common_pb2.TIER_REDIS: "redis",
}
# Small windows, so that a router that does not read is noticed after some kilobytes.
CLIENT_OPTIONS = (("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0))


def split(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + SHORT_HASH_BYTES] for at in range(0, len(hashes), SHORT_HASH_BYTES)]


class Mirror:
    """What the stream says the worker holds: (tier, short hash)."""

    def __init__(self) -> None:
        self.blocks: set[tuple[str, bytes]] = set()
        self.complete = False
        self.snapshots = 0

    def apply(self, response: worker_pb2.ConnectResponse) -> None:
        if response.HasField("snapshot"):
            self._apply_snapshot(response.snapshot)
        for event in response.step.events:
            match event.WhichOneof("kind"):
                case "stored":
                    self._store(event.stored)
                case "removed":
                    tier = TIER_NAMES[event.removed.tier]
                    self.blocks -= {(tier, name) for name in split(event.removed.hashes)}
                case "cleared":
                    tier = TIER_NAMES[event.cleared.tier]
                    self.blocks = {block for block in self.blocks if block[0] != tier}

    def _apply_snapshot(self, piece: worker_pb2.Snapshot) -> None:
        if piece.first:
            self.blocks.clear()
            self.complete = False
            self.snapshots += 1
        for run in piece.blocks:
            self._store(run)
        self.complete |= piece.last

    def _store(self, run: worker_pb2.BlockStored) -> None:
        self.blocks |= {(TIER_NAMES[run.tier], name) for name in split(run.hashes)}


def held(snapshot: list[BlockStored]) -> set[tuple[str, bytes]]:
    """The same of an engine's snapshot."""
    return {(run.tier.value, name) for run in snapshot for name in run.hashes}


def job(
    scheme: HashScheme, number: int, token_ids: list[int], *, max_tokens: int = 4, tenant: bytes = b"tenant"
) -> worker_pb2.Job:
    root = scheme.root(tenant)
    return worker_pb2.Job(
        job_id=number,
        request_id=f"request {number}",
        packed_token_ids=packed(token_ids),
        tenant_salt=tenant,
        chain_root=root,
        block_hashes=b"".join(map(short, block_hashes(token_ids, root, scheme.block_size))),
        sampling=common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
    )


class StreamClient:
    """One router's stream. Messages are read by a thread, unless `reading` is cleared."""

    def __init__(
        self,
        address: str,
        *,
        name: str = "r0",
        secret: str = SECRET,
        protocol_version: int = versions.NEWEST,
        newest_protocol_version: int = 0,
        first: worker_pb2.ConnectRequest | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.messages: list[worker_pb2.ConnectResponse] = []
        self.outputs: dict[int, list[worker_pb2.SequenceOutput]] = defaultdict(list)
        self.mirror = Mirror()
        self.error: grpc.RpcError | None = None
        self.ended = False
        self._probes = count(1 << 40)
        self.reading = threading.Event()
        self.reading.set()
        self._heard = threading.Condition()
        self._requests: queue.SimpleQueue[worker_pb2.ConnectRequest | None] = queue.SimpleQueue()
        self._channel = (
            grpc.insecure_channel(address, CLIENT_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, CLIENT_OPTIONS)
        )
        hello = worker_pb2.RouterHello(
            protocol_version=protocol_version,
            newest_protocol_version=newest_protocol_version,
            package_version="0.0.1",
            router=name,
        )
        self._requests.put(first or worker_pb2.ConnectRequest(hello=hello))
        stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        metadata = (("authorization", f"Bearer {secret}"),)
        self._call = stub.Connect(self._pending_requests(), metadata=metadata)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _pending_requests(self) -> Iterator[worker_pb2.ConnectRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def _read(self) -> None:
        try:
            for message in self._call:
                with self._heard:
                    self._take(message)
                    self._heard.notify_all()
                self.reading.wait()
        except grpc.RpcError as error:
            self.error = error
        with self._heard:
            self.ended = True
            self._heard.notify_all()

    def _take(self, message: worker_pb2.ConnectResponse) -> None:
        self.messages.append(message)
        self.mirror.apply(message)
        for output in message.step.outputs:
            self.outputs[output.job_id].append(output)

    def send(self, **kind: object) -> None:
        self._requests.put(worker_pb2.ConnectRequest(**kind))  # type: ignore[arg-type]

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until it holds; fails the test when it does not in a long time, or when the stream ended without."""
        end = time.monotonic() + PATIENCE_S
        with self._heard:
            while not condition():
                assert not self.ended, f"the stream ended: {self.error}"
                assert self._heard.wait(end - time.monotonic()), "what was waited for did not come"

    def wait_ended(self) -> grpc.RpcError | None:
        with self._heard:
            assert self._heard.wait_for(lambda: self.ended, PATIENCE_S), "the stream did not end"
        return self.error

    def finished(self, number: int) -> bool:
        return bool(self.outputs[number]) and self.outputs[number][-1].finish_reason != 0

    def tokens(self, number: int) -> list[int]:
        return [token for output in self.outputs[number] for token in output.token_ids]

    def wait_finished(self, *numbers: int) -> None:
        self.wait_for(lambda: all(self.finished(number) for number in numbers))

    def wait_handled(self) -> None:
        """Until the server has read everything sent so far: an empty prompt is refused in its turn."""
        number = next(self._probes)
        self.send(submit=worker_pb2.Job(job_id=number))
        self.wait_finished(number)

    def loads(self) -> list[worker_pb2.Load]:
        return [message.step.load for message in list(self.messages) if message.step.HasField("load")]

    def kinds(self) -> list[str | None]:
        return [message.WhichOneof("kind") for message in self.messages]

    def leave(self) -> None:
        """End in good order."""
        self._requests.put(None)

    def drop(self) -> None:
        """Vanish."""
        self.reading.set()
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()
        self._reader.join(PATIENCE_S)
