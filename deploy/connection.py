"""The options by which commands reach a router, said once for all of them, and the client that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deploy.failures import UNREACHABLE, USAGE, Failure
from deploy.option_groups import asks_for

if TYPE_CHECKING:
    from warmkv.client import Client, Tls

R = TypeVar("R")

DEFAULT_ROUTER = "127.0.0.1:50051"
# Commands that ask once; a generation may take as long as it takes.
ASK_TIMEOUT_S = 30.0
# Commands that wait for workers: the router bounds them (a clear: 30 s; scaling down: its drain grace, the flush and a
# minute), and its answer, also that it was too late, must come before we give up.
WAIT_TIMEOUT_S = 600.0

Router = Annotated[
    str,
    typer.Option("--router", "-r", metavar="HOST:PORT", envvar="WARMKV_ROUTER", help="The router's gRPC address."),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="WARMKV_API_KEY", help="Sent with every call.", show_default=False)
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca", envvar="WARMKV_TLS_CA", help="PEM file to check the router's certificate against; turns TLS on."
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", envvar="WARMKV_TLS_CERT", help="PEM file of our own certificate, for routers that ask for one."
    ),
]
TlsKey = Annotated[
    Path | None, typer.Option("--tls-key", envvar="WARMKV_TLS_KEY", help="PEM file of the key of --tls-cert.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@dataclass(frozen=True, slots=True)
class Connection:
    """What a command was told about its router; see `asks_router`."""

    router: str
    api_key: str | None
    tls: Tls | None

    @contextmanager
    def client(self, *, timeout: float | None = ASK_TIMEOUT_S) -> Iterator[Client]:
        """A client, closed at the end of the block. Failing to reach the router becomes its own exit code.

        Args:
            timeout: seconds of every call; None: as long as it takes.

        Raises:
            Failure: no router answers.
        """
        from warmkv.client import Client

        with self.reaching(), Client(self.router, api_key=self.api_key, timeout=timeout, tls=self.tls) as client:
            yield client

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Failing to reach the router inside the block becomes its own exit code. Raises Failure."""
        from warmkv.client import WarmkvError
        from warmkv.errors import DeadlineExceeded, Unauthenticated, Unavailable

        try:
            yield
        except WarmkvError as error:
            # A router signs its errors with a reason; without one nobody has answered.
            if isinstance(error, Unavailable | DeadlineExceeded) and not error.reason:
                where = f"no router answers at {self.router}"
                raise Failure(f"{where}; start one by `warmkv up`, or give --router HOST:PORT", UNREACHABLE) from error
            if isinstance(error, Unauthenticated):
                raise Failure(f"{error} For this command: --api-key KEY, or WARMKV_API_KEY.") from error
            raise


def asks_router(command: Callable[..., R]) -> Callable[..., R]:
    """Gives a command the options by which a router is reached, in the place of its argument `connection`.

    The command is called with a `Connection`; typer sees the options.
    """
    return asks_for("connection", _reach, command)


def _reach(
    router: Router = DEFAULT_ROUTER,
    api_key: ApiKey = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> Connection:
    """The options that every command has that asks a router. Raises Failure."""
    return Connection(router, api_key, _tls_of(tls_ca, tls_cert, tls_key))


def _tls_of(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    """TLS with these PEM files; None where none is named.

    Raises:
        Failure: a file is missing, or a certificate comes without its key or the reverse.
    """
    from warmkv.client import Tls

    for option, path in (("--tls-ca", ca), ("--tls-cert", cert), ("--tls-key", key)):
        if path is not None and not path.is_file():
            raise Failure(f"{path} is no file; give {option} a PEM file")
    if (cert is None) != (key is None):
        raise Failure("a certificate needs its key, and the reverse; give both --tls-cert and --tls-key", USAGE)
    return None if ca is None and cert is None else Tls(ca=ca, cert=cert, key=key)
