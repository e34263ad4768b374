"""Which blocks an operator's request is about: everybody's, a tenant's, or those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, short
from router.errors import InvalidRequest
from router.prepare import Preparer
from router.protocol import Caller
from warmkv.v1 import admin_pb2, common_pb2


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose blocks, and of which prompt. `root` None: everybody's. `names`: of the prompt's full blocks; none: any."""

    root: BlockHash | None
    names: Sequence[BlockHash] = ()

    def __str__(self) -> str:
        if self.names:
            return f"{len(self.names)} blocks up to {short(self.names[-1]).hex()}"
        return "all blocks" if self.root is None else "all blocks of the tenant"


class Scopes:
    """Reads a scope out of a request."""

    def __init__(self, preparer: Preparer) -> None:
        self._preparer = preparer

    async def of(
        self,
        tenant: str,
        request: admin_pb2.ListBlocksRequest | admin_pb2.PinRequest | admin_pb2.UnpinRequest,
        caller: Caller,
    ) -> Scope:
        """What a request names. Raises InvalidRequest: its prompt is no question, or shorter than a block."""
        if request.HasField("prompt"):
            whose = self._preparer.caller_for(tenant, caller)
            prepared = await self._preparer.prepare(request.prompt, whose, common_pb2.CacheDirectives(), deadline=None)
            return Scope(prepared.root, full_blocks(prepared.names, prepared.question.block_size))
        return Scope(self._preparer.root_of_tenant(tenant)[0] if tenant else None)

    async def narrow(
        self, tenant: str, request: admin_pb2.PinRequest | admin_pb2.UnpinRequest, caller: Caller
    ) -> Scope:
        """The same, of a request that must not be about everything. Raises InvalidRequest."""
        if not tenant and not request.HasField("prompt"):
            raise InvalidRequest("Neither a tenant nor a prompt is given; set one of them, or both.")
        return await self.of(tenant, request, caller)


def full_blocks(names: Sequence[BlockHash], block_size: int) -> Sequence[BlockHash]:
    """Raises InvalidRequest where there is none."""
    if not names:
        raise InvalidRequest(f"The prompt is shorter than a block; send at least {block_size} tokens.", field="prompt")
    return names
