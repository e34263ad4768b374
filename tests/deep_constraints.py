"""Constraints that nest as deeply as their size allows: `(kind, text)` of each name, for tests of router and workers.

The library that parses them recurses in its own language, where a stack that ends takes the process with it: tests try
them in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice, pairwise, product
from string import ascii_lowercase

_MOST_PARENTHESES = 28  # the library refuses a few more


def deep(name: str, size: int) -> tuple[str, str]:
    """The longest of its shape that has at most `size` bytes."""
    kind, make = _SHAPES[name]
    least, most = 1, size
    while least < most:
        depth = (least + most + 1) // 2
        least, most = (depth, most) if len(make(depth)) <= size else (least, depth - 1)
    return kind, make(least)


def _names() -> Iterator[str]:
    """The shortest first: a, b, ..., aa, ab."""
    return ("".join(letters) for length in count(1) for letters in product(ascii_lowercase, repeat=length))


def _chain(rule: str) -> Callable[[int], str]:
    """Each rule names the next one, as `rule` says with an x for its name."""

    def make(depth: int) -> str:
        names = list(islice(_names(), depth + 1))
        rules = "".join(f"{name}:{rule.replace('x', after)}\n" for name, after in pairwise(names))
        return f'start: a\n{rules}{names[-1]}:"x"'

    return make


def _upper(make: Callable[[int], str]) -> Callable[[int], str]:
    return lambda depth: make(depth).upper().replace("START: A", "start: A")


def _nested(before: str, inmost: str, after: str) -> Callable[[int], str]:
    return lambda depth: before * depth + inmost + after * depth


def _references(reference: str) -> Callable[[int], str]:
    """Definitions of a schema, each of which names the next one, as `reference` says with an X for it."""

    def make(depth: int) -> str:
        each = ",".join(f'"{n}":' + reference.replace("X", f'{{"$ref":"#/$defs/{n + 1}"}}') for n in range(depth))
        return f'{{"$ref":"#/$defs/0","$defs":{{{each},"{depth}":{{"type":"integer"}}}}}}'

    return make


_PARENTHESES = f"{'(' * _MOST_PARENTHESES}x{')' * _MOST_PARENTHESES}"
_SHAPES: dict[str, tuple[str, Callable[[int], str]]] = {
    "rules": ("grammar", _chain("x")),
    "rules in parentheses": ("grammar", _chain("(x)")),
    "rules in many parentheses": ("grammar", _chain(_PARENTHESES)),
    "optional rules": ("grammar", _chain("x?")),
    "rules in sequence": ("grammar", _chain('"b" x')),
    "terminals": ("grammar", _upper(_chain("x"))),
    "terminals in many parentheses": ("grammar", _upper(_chain(_PARENTHESES))),
    "parentheses": ("grammar", lambda depth: "start: " + _nested("(", '"a"', ")")(depth)),
    "regex parentheses": ("regex", _nested("(", "a", ")")),
    "regex groups": ("regex", _nested("(?:b", "a", ")?")),
    "schema of items": ("json_schema", _nested('{"items":', "{}", "}")),
    "schema of choices": ("json_schema", _nested('{"anyOf":[', "{}", "]}")),
    "schema of references": ("json_schema", _references("X")),
    "schema of objects by reference": ("json_schema", _references('{"properties":{"x":X}}')),
    "schema of parts by reference": ("json_schema", _references('{"allOf":[X]}')),
}
NAMES = tuple(_SHAPES)
