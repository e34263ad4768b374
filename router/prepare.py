"""From an input to a prompt with names: checked, encoded and hashed, once.

Covers: the limits on a prompt, its tenant's root, the names of its blocks. Does not cover: encoding itself
(`tokenizer`), sampling (`validation`), choosing (`decide`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvstore.blocks import BlockHash
from kvstore.token_ids import packed
from router.config import RouterConfig
from router.decide import Question
from router.fleet import Fleet
from router.hash_memo import HashMemo
from router.metrics import Metrics
from router.protocol import Caller, Encoder
from router.readiness import Readiness
from router.request import PreparedPrompt
from router.salts import group_salt
from router.validation import check_input, check_prompt
from warmkv.v1 import common_pb2, inference_pb2


class Preparer:
    """Prepares prompts for one fleet.

    Args:
        trust_group_of: the group of a tenant that an operator names; None: as last seen with that tenant, else its own.
    """

    def __init__(
        self,
        config: RouterConfig,
        encoder: Encoder,
        fleet: Fleet,
        readiness: Readiness,
        metrics: Metrics,
        *,
        trust_group_of: Callable[[str], str] | None,
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._fleet = fleet
        self._readiness = readiness
        self._encode_seconds = metrics.route_seconds.labels("encode")
        self._hash_seconds = metrics.route_seconds.labels("hash")
        self._memo = HashMemo()
        self._trust_group_of = trust_group_of
        self._seen_groups: dict[str, str] = {}

    async def prepare(
        self,
        given: inference_pb2.Input,
        caller: Caller,
        cache: common_pb2.CacheDirectives,
        *,
        deadline: float | None,
    ) -> PreparedPrompt:
        """Encode and hash.

        Raises:
            InvalidRequest: the input cannot be a prompt. NoWorkerAvailable: no worker has said yet what it serves.
        """
        check_input(given, self._config.max_prompt_bytes)
        identity = await self._readiness.identity(deadline)
        started = time.perf_counter()
        prompt = await self._encoder.encode(given, group=caller.trust_group)
        encoded = time.perf_counter()
        vocab_size = self._fleet.vocab_size() or self._encoder.vocab_size or 0
        check_prompt(prompt.token_ids, vocab_size, self._fleet.context_length(), largest_id=prompt.largest_id)
        self._seen_groups[caller.tenant] = caller.trust_group
        salt = self._salt(caller.trust_group)
        root = identity.scheme.root(salt)
        names = self._memo.names(prompt.token_ids, root, identity.scheme.block_size)
        question = Question(
            hashes=names.short,
            prompt_tokens=len(prompt.token_ids),
            block_size=identity.scheme.block_size,
            digest=names.last or _digest(root, prompt.token_ids),
            affinity=f"{caller.trust_group}\0{cache.affinity_key}" if cache.affinity_key else "",
            no_read=cache.no_read,
            no_store=cache.no_store,
        )
        self._encode_seconds.observe(encoded - started)
        self._hash_seconds.observe(time.perf_counter() - encoded)
        return PreparedPrompt(given, prompt, salt, root, names, question)

    def root_of_tenant(self, tenant: str) -> tuple[BlockHash, int]:
        """(root of its chains, tokens a block). Raises NoWorkerAvailable."""
        scheme = self._readiness.known_identity().scheme
        return scheme.root(self._salt(self._group(tenant))), scheme.block_size

    def caller_for(self, tenant: str, operator: Caller) -> Caller:
        """Whose blocks an operator means: those of a tenant that is named, else the operator's own."""
        return operator if not tenant else replace(operator, tenant=tenant, trust_group=self._group(tenant))

    def owners(self) -> dict[bytes, str]:
        """Tenants that this router has met, joined by commas where they share blocks, by the root of their chains."""
        tenants: dict[str, list[str]] = {}
        for tenant in sorted(self._seen_groups):
            tenants.setdefault(self._group(tenant), []).append(tenant)
        scheme = self._readiness.known_identity().scheme
        return {scheme.root(self._salt(group)): ",".join(names) for group, names in tenants.items()}

    def _group(self, tenant: str) -> str:
        return self._trust_group_of(tenant) if self._trust_group_of else self._seen_groups.get(tenant, tenant)

    def _salt(self, trust_group: str) -> bytes:
        return group_salt(self._config.fleet_secret, trust_group)


def _digest(root: BlockHash, token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(root + packed(token_ids)).digest()
