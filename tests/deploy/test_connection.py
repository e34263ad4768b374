"""The options by which a router is reached: the same on every command, and what is said when it is not."""

from __future__ import annotations

import inspect
from pathlib import Path

import grpc
import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from deploy.cli import app
from deploy.connection import Connection, Json, asks_router
from deploy.failures import Failure
from warmkv.errors import PermissionDenied, Unauthenticated

REACH = ("--router", "--api-key", "--tls-ca", "--tls-cert", "--tls-key")


def _commands(group: TyperGroup, path: str = "") -> dict[str, TyperCommand]:
    found: dict[str, TyperCommand] = {}
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            found |= _commands(command, f"{path}{name} ")
        else:
            found[path + name] = command
    return found


def test_every_command_that_asks_a_router_reaches_it_in_the_same_way() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    reached = {}
    for name, command in _commands(root).items():
        options = [parameter.opts[0] for parameter in command.params]
        if "--api-key" in options:
            at = options.index("--router")
            reached[name] = tuple(options[at : at + len(REACH)])
    assert {"status", "generate", "cache ls", "policy set"} <= reached.keys()
    assert len(reached) == 20
    assert set(reached.values()) == {REACH}


def test_the_options_stand_where_the_connection_stood_and_become_one() -> None:
    seen = []

    @asks_router
    def command(first: str, *, connection: Connection, as_json: Json = False) -> None:
        seen.append((first, connection, as_json))

    names = ["first", "router", "api_key", "tls_ca", "tls_cert", "tls_key", "as_json"]
    assert list(inspect.signature(command).parameters) == names
    command(first="x", router="h:1", api_key="k", tls_ca=None, tls_cert=None, tls_key=None, as_json=True)
    assert seen == [("x", Connection("h:1", "k", None), True)]
    with pytest.raises(Failure, match="--tls-ca"):
        command(first="x", router="h:1", api_key="k", tls_ca=Path("/nowhere"), tls_cert=None, tls_key=None)


def test_a_key_that_is_missing_is_asked_for_by_its_option() -> None:
    connection = Connection("127.0.0.1:1", None, None)
    with pytest.raises(Failure, match="WARMKV_API_KEY"), connection.client():
        raise Unauthenticated("no API key was sent", code=grpc.StatusCode.UNAUTHENTICATED, reason="UNAUTHENTICATED")
    with pytest.raises(PermissionDenied), connection.client():
        raise PermissionDenied("not yours", code=grpc.StatusCode.PERMISSION_DENIED, reason="PERMISSION_DENIED")
