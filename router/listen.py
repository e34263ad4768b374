"""Where to listen, and what it means when that fails. Pure but for one look at the port."""

from __future__ import annotations

import errno
import socket

_WHY = {
    errno.EADDRINUSE: "another process listens there. End it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have that address. Choose another host",
    errno.EACCES: "ports below 1024 need privileges. Choose another port",
}


class ListenError(OSError):
    """A server cannot listen where it was told to. The message names the address, the reason and the flag."""


def host_port(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def check_free(host: str, port: int, flag: str) -> None:
    """Bind once and let go, since gRPC's own failure does not say why.

    Args:
        flag: the command line's option that chooses the port, for the message.

    Raises:
        ListenError: nobody can listen there now.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: connections that linger from the last run are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise cannot_listen(host, port, flag, error) from error


def cannot_listen(host: str, port: int, flag: str, error: OSError) -> ListenError:
    """The error to raise for a bind that failed."""
    why = _WHY.get(error.errno or 0, f"{error.strerror or error}. Choose another address")
    return ListenError(f"cannot listen on {host_port(host, port)}: {why} with {flag}.")
