"""Pages of blocks: the token that says where the next one begins, and blocks as operators see them. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgpack

from kvstore.blocks import BlockHash, short
from router.errors import InvalidRequest
from warmkv.v1 import admin_pb2, worker_pb2

DEFAULT_PAGE, MAX_PAGE = 100, 1000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page begins: at this worker, behind this block (empty: at its first)."""

    worker: str = ""
    after: bytes = b""


def page_size(request: admin_pb2.ListBlocksRequest) -> int:
    """Raises InvalidRequest."""
    if request.page_size > MAX_PAGE:
        raise InvalidRequest(
            f"page_size is {request.page_size}; send 1 to {MAX_PAGE}, and read on by next_page_token.",
            field="page_size",
        )
    return request.page_size or DEFAULT_PAGE


def token_of(place: Place, request: admin_pb2.ListBlocksRequest) -> str:
    """The page token for a place in the answer to this request."""
    packed: bytes = msgpack.packb([place.worker, place.after, _digest(request)])
    return base64.urlsafe_b64encode(packed).decode()


def place_of(request: admin_pb2.ListBlocksRequest) -> Place:
    """Where the page begins that is asked for.

    Raises:
        InvalidRequest: the token is none of ours, or belongs to a question of other fields.
    """
    if not request.page_token:
        return Place()
    try:
        worker, after, digest = msgpack.unpackb(base64.urlsafe_b64decode(request.page_token))
    except (ValueError, TypeError, binascii.Error, msgpack.UnpackException):
        worker = after = digest = None
    if not (isinstance(worker, str) and isinstance(after, bytes) and len(after) in (0, 32)):
        raise InvalidRequest("The page_token is damaged; send next_page_token as it came, or none.", field="page_token")
    if digest != _digest(request):
        raise InvalidRequest(
            "The page_token belongs to another question; send it with the fields that it was made for.",
            field="page_token",
        )
    return Place(worker, after)


def _digest(request: admin_pb2.ListBlocksRequest) -> bytes:
    """Of the fields that say which blocks are meant."""
    asked = admin_pb2.ListBlocksRequest()
    asked.CopyFrom(request)
    asked.page_token, asked.page_size = "", 0
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()[:8]


def shown(
    worker: str,
    blocks: Sequence[worker_pb2.CacheDone.Block],
    *,
    prompt: Sequence[BlockHash],
    owners: Mapping[bytes, str],
    block_size: int,
    block_nbytes: int,
) -> list[admin_pb2.CachedBlock]:
    """Blocks of one worker.

    Args:
        prompt: names of a prompt's full blocks, whose positions are known whatever the worker holds of it.
        owners: tenants by chain root.
    """
    at: dict[bytes, int] = {name: position for position, name in enumerate(prompt)}
    at |= {block.hash: block.position for block in blocks if block.HasField("position") or not block.parent}
    return [
        admin_pb2.CachedBlock(
            worker=worker,
            hash=short(BlockHash(block.hash)).hex(),
            parent=short(BlockHash(block.parent)).hex(),
            tenant=owners.get(block.chain_root, ""),
            first_token=at[block.hash] * block_size if block.hash in at else None,
            tokens=block_size,
            bytes=block_nbytes,
            tiers=block.tiers,
            ttl_seconds=block.ttl_ms / 1000 if block.HasField("ttl_ms") else None,
            ttl_left_seconds=block.ttl_left_ms / 1000 if block.HasField("ttl_left_ms") else None,
            pinned=block.leased,
            priority=block.priority,
        )
        for block in blocks
    ]
