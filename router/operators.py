"""What operators do to a fleet: drain, scale, set the policy, clear.

Covers: turning their requests into changes of the fleet record and into clears. Does not cover: who may (`service`),
how the record travels (`fleet`), what else is asked of the cache (`cache_admin`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvstore.blocks import block_hashes
from router import handover
from router.audit import audited
from router.board import Board
from router.errors import InvalidRequest, NotSupported, NoWorkerAvailable
from router.fleet import Fleet
from router.link import WorkerLink
from router.pairing import PREFILL
from router.policy_history import Order, PolicySetting, rollback_target
from router.prepare import Preparer
from router.protocol import Caller
from router.shadow import Shadow
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2


class Operators:
    """`author`: this router's name, under which changes travel. `wall_clock`: seconds since 1970."""

    def __init__(
        self,
        author: str,
        fleet: Fleet,
        board: Board,
        preparer: Preparer,
        shadow: Shadow,
        *,
        wall_clock: Callable[[], float],
    ) -> None:
        self._shadow = shadow
        self._wall_clock = wall_clock
        self._author = author
        self._fleet = fleet
        self._board = board
        self._preparer = preparer

    def drain_worker(self, worker: str, *, hand_over_after_s: float | None = None) -> int:
        """Send it nothing new, on all routers; requests that still run there.

        Those go on elsewhere after `hand_over_after_s`; None: they finish there.

        Raises:
            WorkerNotFound: there is none of that name. NoWorkerAvailable: no other one can go on with them.
            NotSupported: it runs a warmkv that hands nothing over.
        """
        link = self._fleet.link(worker)
        if hand_over_after_s is not None:
            self._check_handover(link)
        if worker not in self._fleet.record.drained:
            self._fleet.change(self._fleet.record.with_drained(self._author, worker))
        if hand_over_after_s is not None:
            link.hand_over(hand_over_after_s)
        return max(link.jobs, link.report.load.running if link.report else 0)

    def _check_handover(self, link: WorkerLink) -> None:
        links = self._fleet.links()
        unable = handover.unable(links)
        if not link.connected or link.name in unable:
            raise NotSupported(
                f"Worker {link.name} is not connected, or runs an older warmkv that hands nothing over; drain it"
                " without a handover.",
                worker=link.name,
            )
        able = [each for each in links if each is not link and each.role != PREFILL and each.name not in unable]
        if not any(self._fleet.takes_requests(each) for each in able):
            raise NoWorkerAvailable(
                f"No other worker can go on with what runs on {link.name}, which was not drained; start one, or drain"
                " it without a handover.",
                retry_after_s=1.0,
            )

    def undrain_worker(self, worker: str) -> None:
        """Send to it again. Raises WorkerNotFound."""
        if worker in self._fleet.record.drained:
            self._fleet.change(self._fleet.record.with_undrained(self._author, worker))
        else:
            self._fleet.link(worker)

    async def scale_workers(self, workers: int) -> tuple[list[str], list[str]]:
        """Names started, names stopped. A drain ends with its worker. Raises NotSupported."""
        started, stopped = await self._fleet.scale(workers)
        if self._fleet.record.drained & set(stopped):
            self._fleet.change(self._fleet.record.with_undrained(self._author, *stopped))
        return started, stopped

    def get_policy(self) -> admin_pb2.GetPolicyResponse:
        """The policy in force, its shadow and its past, and those available."""
        record = self._fleet.record
        return admin_pb2.GetPolicyResponse(
            policy=self._board.policy(),
            version=record.version,
            available=self._board.policies(),
            shared_tier_reads=record.shared_tier_reads,
            shadow=self._shadow.report(record),
            changes=[change.to_wire() for change in reversed(record.changes)],
        )

    def set_policy(self, request: admin_pb2.SetPolicyRequest, *, caller: Caller) -> admin_pb2.SetPolicyResponse:
        """From the next request on, on all routers within a second. Raises InvalidRequest; then nothing changed.

        A policy without weights gets its defaults; without a name, the given weights change in the policy in force.
        """
        record = self._fleet.record
        after = record.setting
        if request.HasField("policy"):
            kept = {} if request.policy.name else record.weights
            weights = {**kept, **request.policy.weights}
            after = replace(after, name=request.policy.name or record.policy, weights=weights)
        if request.HasField("shared_tier_reads"):
            after = replace(after, shared_tier_reads=request.shared_tier_reads)
        if after != record.setting:
            self._put_in_force(Order.SET, after, caller)
        return admin_pb2.SetPolicyResponse(policy=self._board.policy(), version=self._fleet.record.version)

    def rollback_policy(
        self, request: admin_pb2.RollbackPolicyRequest, *, caller: Caller
    ) -> admin_pb2.RollbackPolicyResponse:
        """Return to an earlier policy. Raises InvalidRequest; then nothing changed."""
        self._put_in_force(Order.ROLLBACK, rollback_target(self._fleet.record.changes, request.to_version), caller)
        record = self._fleet.record
        return admin_pb2.RollbackPolicyResponse(
            policy=self._board.policy(), version=record.version, shared_tier_reads=record.shared_tier_reads
        )

    def set_shadow_policy(
        self, request: admin_pb2.SetShadowPolicyRequest, *, caller: Caller
    ) -> admin_pb2.SetShadowPolicyResponse:
        """Let a policy score without acting, or end that. Raises InvalidRequest; then nothing changed."""
        record = self._fleet.record
        after = None
        if request.HasField("policy"):
            after = PolicySetting(request.policy.name, dict(request.policy.weights), record.shared_tier_reads)
        if after != record.shadow:
            changed = record.with_shadow(self._author, after, by=caller.tenant, time_ms=self._now_ms())
            with audited("shadow", caller, policy=_told(after), was=_told(record.shadow), version=changed.version):
                self._fleet.change(changed)
        return admin_pb2.SetShadowPolicyResponse(version=self._fleet.record.version)

    def _put_in_force(self, order: Order, after: PolicySetting, caller: Caller) -> None:
        record = self._fleet.record
        changed = record.with_setting(self._author, order, after, by=caller.tenant, time_ms=self._now_ms())
        with audited(
            f"policy {order}", caller, policy=_told(after), was=_told(record.setting), version=changed.version
        ):
            self._fleet.change(changed)

    def _now_ms(self) -> int:
        return int(self._wall_clock() * 1000)

    async def clear_cache(
        self, request: admin_pb2.ClearCacheRequest, *, caller: Caller
    ) -> admin_pb2.ClearCacheResponse:
        """Drop blocks; returns when every worker confirmed.

        Raises:
            InvalidRequest: no scope. WorkerLost: a worker did not confirm. NoWorkerAvailable: none is connected.
        """
        with audited("clear", caller, scope=request.WhichOneof("scope"), of_tenant=_tenant(request)):
            done = await self._fleet.clear(self._clear_request(request, caller), shared_tier=True)
        return admin_pb2.ClearCacheResponse(workers=[_cleared(name, answer) for name, answer in sorted(done.items())])

    def _clear_request(self, request: admin_pb2.ClearCacheRequest, caller: Caller) -> worker_pb2.Clear:
        match request.WhichOneof("scope"):
            case "all" if request.all:
                return worker_pb2.Clear()
            case "tenant" if request.tenant:
                return worker_pb2.Clear(chain_root=self._preparer.root_of_tenant(request.tenant)[0])
            case "prefix":
                root, size = self._preparer.root_of_tenant(request.prefix.tenant or caller.tenant)
                names = block_hashes(request.prefix.token_ids, root, size)
                if not names:
                    raise InvalidRequest(f"The prefix is shorter than a block; send at least {size} token ids.")
                return worker_pb2.Clear(chain_root=root, prefix_hash=names[-1])
        raise InvalidRequest("The scope is missing; set all to true, or name a tenant, or give a prefix.")


def _told(setting: PolicySetting | None) -> str:
    """As the log says it."""
    if setting is None:
        return "none"
    weights = " ".join(f"{name}={value:g}" for name, value in sorted(setting.weights.items()))
    reads = "" if setting.shared_tier_reads else " without shared-tier reads"
    return f"{setting.name} {weights}".rstrip() + reads


def _tenant(request: admin_pb2.ClearCacheRequest) -> str:
    return request.prefix.tenant if request.HasField("prefix") else request.tenant


def _cleared(worker: str, done: worker_pb2.ClearDone) -> admin_pb2.ClearCacheResponse.Cleared:
    counts = (
        (common_pb2.TIER_DEVICE, done.device),
        (common_pb2.TIER_HOST, done.host),
        (common_pb2.TIER_DISK, done.disk),
        (common_pb2.TIER_REDIS, done.redis),
    )
    dropped = [admin_pb2.ClearCacheResponse.TierCount(tier=tier, blocks=blocks) for tier, blocks in counts]
    return admin_pb2.ClearCacheResponse.Cleared(worker=worker, dropped=dropped)
