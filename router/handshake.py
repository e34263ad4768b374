"""Whether a worker fits this router and the fleet. Pure: a hello in, a problem or an identity out.

Covers: what both ends must agree on before a block can be shared or a token streamed. Does not cover: liveness or
incarnations (`link`). A worker that does not fit is refused, with the field that differs and what to do about it;
it is asked again, so that it joins as soon as it was put right.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.blocks import HashScheme
from warmkv.v1 import worker_pb2

PROTOCOL_VERSION = 3


@dataclass(frozen=True, slots=True)
class FleetIdentity:
    """What all workers of a fleet have in common."""

    scheme: HashScheme
    model: str
    tokenizer_sha256: bytes


@dataclass(frozen=True, slots=True)
class Expected:
    """What the router itself knows. `tokenizer_sha256` empty: not compared."""

    model: str
    tokenizer_sha256: bytes


def identity_of(hello: worker_pb2.WorkerHello) -> FleetIdentity:
    """What a worker says that it is."""
    wire = hello.scheme
    scheme = HashScheme(
        model_fingerprint=wire.model_fingerprint,
        layout=wire.layout,
        block_size=wire.block_size,
        adapter=wire.adapter,
        canonical=wire.canonical,
        tp_size=wire.tp_size,
        tp_rank=wire.tp_rank,
        version=wire.version,
    )
    return FleetIdentity(scheme, hello.model, hello.tokenizer_sha256)


def misfit(hello: worker_pb2.WorkerHello, expected: Expected, fleet: FleetIdentity | None) -> str:
    """Why the worker cannot join, and the remedy; empty when it can. `fleet`: of the workers that have joined."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return (
            f"protocol_version is {hello.protocol_version} and this router speaks {PROTOCOL_VERSION};"
            " install the same warmkv version on both."
        )
    if expected.model and hello.model != expected.model:
        return f"model is {hello.model!r} and this router serves {expected.model!r}; start it with that model_name."
    if expected.tokenizer_sha256 and hello.tokenizer_sha256 != expected.tokenizer_sha256:
        return (
            "tokenizer_sha256 differs from this router's: the tokenizer.json files are not the same;"
            " give both the same model_dir."
        )
    if hello.scheme.block_size < 1:
        return f"block_size is {hello.scheme.block_size}; set it to at least 1."
    return "" if fleet is None else _differs(identity_of(hello), fleet)


def _differs(worker: FleetIdentity, fleet: FleetIdentity) -> str:
    fields = worker.scheme.differences(fleet.scheme)
    if not fields:
        return ""
    mine, theirs = (", ".join(f"{f}={_shown(getattr(i.scheme, f))}" for f in fields) for i in (worker, fleet))
    return (
        f"its blocks would not be the fleet's: {mine}, and the fleet has {theirs};"
        " start it with the same model folder and settings as the others."
    )


def _shown(value: object) -> str:
    return value.hex()[:12] if isinstance(value, bytes) else repr(value)
