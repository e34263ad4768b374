"""What routers ask of a worker's cache, from the wire to the engine's thread: clears, operators' orders, probes.

Covers: promises that are broken, refusing what makes no sense, whose answer it will be. Does not cover: jobs
(`streams`), what a request means (`cache_commands`, the store), the answer's way back (`streams`, `outbox`).
"""

from __future__ import annotations

from kvstore.blocks import BlockHash
from warmkv.v1 import worker_pb2
from workers.cache_commands import CacheAnswer
from workers.cache_wire import HASH_BYTES, CommandRefused, command_from_wire, done_to_wire, probe_from_wire
from workers.engine_thread import ClearRequest, EngineThread, Order, ProbeRequest
from workers.router_stream import RouterStream
from workers.wire import clear_done_to_wire


class CacheRequests:
    """Of all routers, for one engine."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    def handle(self, stream: RouterStream, request: worker_pb2.ConnectRequest) -> None:
        """Whatever of a router's messages is about the cache; all others are none of this."""
        match request.WhichOneof("kind"):
            case "clear":
                self.clear(stream, request.clear)
            case "cache":
                self.order(stream, request.cache)
            case "probe":
                self.probe(stream, request.probe)
            case "peers_released":
                self.release_peers(stream, request.peers_released)
            case "promise_broken":
                self.promise_broken(request.promise_broken)

    def clear(self, stream: RouterStream, message: worker_pb2.Clear) -> None:
        """Have it carried out; a name of a wrong length is answered at once."""
        for field in ("chain_root", "prefix_hash"):
            length = len(getattr(message, field))
            if length not in (0, HASH_BYTES):
                error = f"{field} has {length} bytes; send {HASH_BYTES} or none"
                stream.outbox.add_answer(clear_done_to_wire(message.clear_id, {}, error))
                stream.wake()
                return
        self._engine.ask_clear(
            ClearRequest(
                asker=stream.number,
                clear_id=message.clear_id,
                root=BlockHash(message.chain_root) or None,
                prefix=BlockHash(message.prefix_hash) or None,
                shared=message.shared_tier,
                hold=(stream.router, message.peers_hold) if message.peers_hold else None,
            )
        )

    def release_peers(self, stream: RouterStream, message: worker_pb2.PeersReleased) -> None:
        """Of this router's clears the one with that hold is over."""
        key = (stream.router, message.peers_hold)
        self._engine.post(lambda engine: engine.cache.release_peers(key))

    def promise_broken(self, message: worker_pb2.PromiseBroken) -> None:
        """What jobs were promised there will not be made."""
        address, ticket = message.address, BlockHash(message.ticket)
        self._engine.post(lambda engine: engine.cache.promise_broken(address, ticket))

    def order(self, stream: RouterStream, message: worker_pb2.CacheCommand) -> None:
        """Have it carried out; one that is refused is answered at once."""
        try:
            command = command_from_wire(message)
        except CommandRefused as refused:
            stream.outbox.add_answer(done_to_wire(message.command_id, CacheAnswer(), f"{refused}"))
            stream.wake()
            return
        self._engine.order(Order(stream.number, message.command_id, command))

    def probe(self, stream: RouterStream, message: worker_pb2.Probe) -> None:
        """Have it looked up; one that is refused is answered at once."""
        try:
            hashes = probe_from_wire(message)
        except CommandRefused as refused:
            stream.outbox.add_probed(worker_pb2.Probed(probe_id=message.probe_id, error=f"{refused}"))
            stream.wake()
            return
        self._engine.probe(ProbeRequest(stream.number, message.probe_id, hashes))
