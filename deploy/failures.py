"""How commands fail: one line that says what happened and what to do, and an exit code that a script can use.

Covers: the codes, and the way from every expected error to one of them. No traceback reaches a user; a defect is one
line as well, and WARMKV_DEBUG=1 shows where it came from.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

FAILED, USAGE, UNREACHABLE, UNHEALTHY = 1, 2, 3, 4
EXIT_CODES = "Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 no router can be reached, 4 unhealthy."


class Failure(Exception):
    """A command cannot go on. `code` is its exit code; the message ends with what to do."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def reports_failures(command: Callable[P, R]) -> Callable[P, R]:
    """Turns a command's errors into one line on standard error and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - a user must never see a traceback
            if os.environ.get("WARMKV_DEBUG"):
                traceback.print_exc()
            failure = _failure_of(error)
            sys.stderr.write(f"warmkv: {' '.join(str(failure).split())}\n")
            raise typer.Exit(failure.code) from None

    return run


def _failure_of(error: Exception) -> Failure:
    if isinstance(error, Failure):
        return error
    for expected, code in _expected():
        if isinstance(error, expected):
            return Failure(str(error), code)
    return Failure(
        f"this is a defect: {type(error).__name__}: {error}; run it again with WARMKV_DEBUG=1 and report what it prints"
    )


def _expected() -> Iterator[tuple[type[Exception], int]]:
    """Errors that have a remedy. The router, which is slow to import, is looked at last."""
    from deploy.cluster import ClusterProblem
    from deploy.layers import SettingsProblem
    from deploy.redis_server import RedisServerError
    from deploy.state import StateProblem
    from kvstore.errors import StoreError
    from warmkv.errors import WarmkvError

    yield SettingsProblem, USAGE
    yield StoreError, USAGE
    yield from ((kind, FAILED) for kind in (ClusterProblem, StateProblem, RedisServerError, WarmkvError))

    from deploy.local_fleet import FleetProblem
    from router.app import STARTUP_ERRORS
    from router.model_folder import ModelFolderError

    yield ModelFolderError, USAGE
    yield from ((kind, FAILED) for kind in (FleetProblem, *STARTUP_ERRORS))
