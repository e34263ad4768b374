"""What rank 0 tells the others, as bytes: msgpack of plain data and of the dataclasses that a job is made of.

Which classes may travel follows from the annotations of `Job`, so that a new field of a job travels by itself. Nothing
else can be named in a message: decoding makes no object of any other class.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from typing import Any

import msgpack

from workers.protocol import Job

_TUPLE, _FROZENSET, _OBJECT, _ENUM = 1, 2, 3, 4


class NotSendable(TypeError):
    """A value that no message can carry. Says which."""


def packed(value: object) -> bytes:
    """As bytes.

    Raises:
        NotSendable: it holds something that no message can carry.
    """
    data: bytes = msgpack.packb(value, default=_pack, strict_types=True)
    return data


def unpacked(data: bytes) -> Any:
    """What `packed` was given; sequences that were no tuples are lists."""
    return msgpack.unpackb(data, ext_hook=_unpack, strict_map_key=False, use_list=True)


@cache
def sendable() -> dict[str, type]:
    """Dataclasses, named tuples and enums that a job may hold, by name."""
    return {found.__name__: found for found in _classes_in(Job, set())}


def _classes_in(annotation: Any, seen: set[Any]) -> Iterator[type]:
    if annotation in seen:
        return
    if isinstance(annotation, type) and (issubclass(annotation, Enum) or _field_names(annotation)):
        seen.add(annotation)
        yield annotation
        for hint in typing.get_type_hints(annotation).values() if _field_names(annotation) else ():
            yield from _classes_in(hint, seen)
    for part in typing.get_args(annotation):
        yield from _classes_in(part, seen)


def _field_names(kind: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(kind):
        return tuple(each.name for each in dataclasses.fields(kind))
    return getattr(kind, "_fields", ()) if issubclass(kind, tuple) else ()


def _pack(value: object) -> msgpack.ExtType | list[object] | int | str | bytes:
    name = type(value).__name__
    if sendable().get(name) is type(value):
        if isinstance(value, Enum):
            return msgpack.ExtType(_ENUM, packed([name, value.value]))
        fields = {each: getattr(value, each) for each in _field_names(type(value))}
        return msgpack.ExtType(_OBJECT, packed([name, fields]))
    if type(value) is tuple:
        return msgpack.ExtType(_TUPLE, packed(list(value)))
    if isinstance(value, (frozenset, set)):
        return msgpack.ExtType(_FROZENSET, packed(sorted(value)))
    if isinstance(value, tuple) or dataclasses.is_dataclass(value) or isinstance(value, Enum):
        raise NotSendable(f"a {name} cannot be sent to the other ranks of a worker; only what `Job` is made of can")
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    if isinstance(value, str):  # a subclass, which msgpack was told not to take for one
        return str(value)
    if isinstance(value, int):
        return int(value)
    raise NotSendable(f"a {name} cannot be sent to the other ranks of a worker; only what `Job` is made of can")


def _unpack(code: int, data: bytes) -> object:
    value = unpacked(data)
    if code == _TUPLE:
        return tuple(value)
    if code == _FROZENSET:
        return frozenset(value)
    name, content = value
    return sendable()[name](**content) if code == _OBJECT else sendable()[name](content)
