"""What a router knows of itself and its fleet right now, for whoever collects metrics or looks at a worker.

Covers: reading it from the parts. Does not cover: its names and forms (`metrics`), statistics over time (`board`). A
question changes nothing.
"""

from __future__ import annotations

from router.admission import Admission
from router.beliefs import Beliefs
from router.decide import Decider
from router.fleet import Fleet
from router.index import PrefixIndex
from router.link import WorkerLink
from router.metrics import RouterGauges, WorkerGauges
from router.self_audit import SelfAudit
from router.waiting_room import WaitingRoom
from router.worker_facts import facts_of
from warmkv.v1 import admin_pb2


class State:
    """Reads."""

    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        beliefs: Beliefs,
        audit: SelfAudit,
        decider: Decider,
        admission: Admission,
        room: WaitingRoom,
    ) -> None:
        self._fleet, self._index, self._beliefs, self._audit = fleet, index, beliefs, audit
        self._decider, self._admission, self._room = decider, admission, room

    def trust(self, link: WorkerLink) -> admin_pb2.IndexTrust:
        """How far this router relies on what it believes of a worker, and what it found out about that."""
        tally, credit = self._audit.tally(link), self._beliefs.credits.of(link.name)
        return admin_pb2.IndexTrust(
            approximate=link.name in self._beliefs.approximate,
            credit=credit.factor,
            suspect=credit.why,
            precision=tally.precision,
            recall=tally.recall,
            probed=tally.probed,
        )

    def gauges(self) -> RouterGauges:
        """What `metrics` exports."""
        links = self._fleet.links()
        ready = [link for link in links if self._fleet.takes_requests(link)]
        return RouterGauges(
            in_flight=self._admission.in_flight,
            queued=len(self._room),
            queued_tokens=self._room.tokens,
            index_blocks=len(self._index),
            index_runs=self._index.runs,
            index_bytes=self._index.nbytes,
            index_limit_bytes=self._index.limit_bytes,
            index_evicted_blocks=self._index.evicted_blocks,
            fleet_version=self._fleet.record.version,
            utilisation=self._decider.utilisation(ready),
            catching_up=len(self._fleet.catching_up),
            workers=[self._of_worker(link) for link in links],
        )

    def _of_worker(self, link: WorkerLink) -> WorkerGauges:
        return WorkerGauges(
            link.name,
            admin_pb2.WorkerState.Name(self._fleet.state(link)).removeprefix("WORKER_STATE_").lower(),
            link.incarnation,
            link.report.message if link.report and link.connected else None,
            self.trust(link) if link.whole else None,
            facts_of(link.hello) if link.hello else None,
        )
