"""A worker of the project's own protocol, paced as the mock is: `python -m bench.peers.own_worker --port PORT ...`.

Prints one line when it serves. A second port answers `/books` and `/forget` as the mock does.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer

from bench.peers.mock_worker import constants_from, constants_parser
from bench.peers.paced_engine import PacedEngine
from bench.peers.service import WorkerBooks
from workers.config import WorkerConfig
from workers.protocol import Engine
from workers.server import WorkerServer
from workers.simulated_info import info_for

SECRET = "bench"
CONTEXT_LENGTH = 32_768


class PacedServer(WorkerServer):
    """A worker's server that can be told to give its engine a turn later."""

    def wake_in(self, seconds: float) -> None:
        """A turn of the engine's thread after so long. Any thread."""
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._engine_thread.post, _nothing)


def _nothing(engine: Engine) -> None:
    """A command that only wakes the thread."""


def _config(options: argparse.Namespace) -> WorkerConfig:
    return WorkerConfig(
        name=f"w{options.number}",
        model_dir=options.model,
        model_name="mock",
        engine="simulated",
        host_bytes=0,
        block_size=options.block_tokens,
        context_length=CONTEXT_LENGTH,
        fleet_secret=SECRET,
        port=options.port,
    )


def _serve_books(engine: PacedEngine, port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/forget":
                engine.books = WorkerBooks()
            body = json.dumps(asdict(engine.books)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is logged."""

    server = HTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True, name="books").start()


def main() -> None:
    """Serve until killed."""
    parser = constants_parser()
    parser.add_argument("--model", required=True, help="model folder; weights are not looked at")
    parser.add_argument("--books-port", type=int, required=True)
    options = parser.parse_args()
    config, constants = _config(options), constants_from(options)
    servers: list[PacedServer] = []
    engine = PacedEngine(
        info_for(config), constants, clock=time.monotonic, wake_in=lambda seconds: servers[0].wake_in(seconds)
    )
    servers.append(PacedServer(config, engine))
    servers[0].start()
    _serve_books(engine, options.books_port)
    print(json.dumps({"serves": options.port, "at": time.time()}), flush=True)
    servers[0].wait_closed()


if __name__ == "__main__":
    main()
