"""Options that several commands have, said once: a command takes one argument, typer sees the options behind it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


def asks_for(argument: str, group: Callable[..., object], command: Callable[..., R]) -> Callable[..., R]:
    """The command with the options of `group` in the place of `argument`, which gets what `group` makes of them."""
    asked = inspect.signature(group, eval_str=True).parameters.values()
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**given: Any) -> R:
        options = {option.name: given.pop(option.name) for option in asked}
        return command(**{argument: group(**options)}, **given)

    shown: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        shown += asked if parameter.name == argument else [parameter]
    as_options = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in shown]
    run.__signature__ = own.replace(parameters=as_options)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in shown}
    return run
