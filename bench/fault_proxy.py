"""A way to a server on loopback, which can do harm to what the server says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Change = Callable[[bytes], bytes]


class HangUpError(Exception):
    """For a `Change` to raise: say these last bytes, then end the connection."""

    def __init__(self, last: bytes) -> None:
        super().__init__("hangs up")
        self.last = last


class Way:
    """The proxy.

    Attributes:
        address: `host:port` for clients.
    """

    def __init__(self, target: str) -> None:
        """To `host:port`."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._change: Change | None = None
        self._sockets: list[socket.socket] = []
        self._passing: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def say(self, change: Change) -> None:
        """Pass on what this makes of each piece of what the server says."""
        self._change = change

    def say_as_it_is(self) -> None:
        """Change nothing."""
        self._change = None

    def close(self) -> None:
        """Hang up on everybody."""
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):  # it hung up already
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for thread in self._passing:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:  # the server is down: whoever calls sees that it hangs up
                near.close()
                continue
            self._sockets += (near, far)
            for source, sink, is_server in ((near, far, False), (far, near, True)):
                self._passing.append(threading.Thread(target=self._pass, args=(source, sink, is_server), daemon=True))
                self._passing[-1].start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_server: bool) -> None:
        with suppress(OSError):  # one of the two hung up, and so does the other
            while data := source.recv(1 << 16):
                change = self._change
                try:
                    sink.sendall(change(data) if is_server and change is not None else data)
                except HangUpError as end:
                    sink.sendall(end.last)
                    break
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(target: str) -> Iterator[Way]:
    """A way to `host:port` for as long as it is needed."""
    way = Way(target)
    try:
        yield way
    finally:
        way.close()
