"""Whom a link tells what it learns: the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from warmkv.v1 import worker_pb2

if TYPE_CHECKING:
    from router.link import WorkerLink


class Listener(Protocol):
    """Whom a link tells what it learns. Calls are made from the event loop and must not block."""

    def greeted(self, link: WorkerLink, hello: worker_pb2.WorkerHello) -> None:
        """The worker said hello. Raises Refused."""
        ...

    def joined(self, link: WorkerLink, hello: worker_pb2.WorkerHello) -> None:
        """Its hello fits, and it is the incarnation that is heard."""
        ...

    def heard_record(self, link: WorkerLink, record: worker_pb2.FleetRecord) -> None:
        """The worker carries this fleet record."""
        ...

    def changed(self, link: WorkerLink) -> None:
        """Its state, or what it can take, changed."""
        ...

    def lost(self, link: WorkerLink, why: str) -> None:
        """A stream that had been up is down."""
        ...

    def reported(self, link: WorkerLink) -> None:
        """It has a new report of its load."""
        ...

    def resynced(self, link: WorkerLink) -> None:
        """A snapshot was asked for, because messages were missed or what is believed was found wrong."""
        ...

    def missed(self, link: WorkerLink) -> None:
        """Messages were missed."""
        ...

    def behind(self, link: WorkerLink, seconds: float) -> None:
        """So old is its oldest K/V event that has not come."""
        ...

    def snapped(self, link: WorkerLink) -> None:
        """Its snapshot is complete."""
        ...

    def cleared(self, link: WorkerLink) -> None:
        """It dropped blocks as it was told."""
        ...

    def heard_others(self, link: WorkerLink, jobs: Sequence[worker_pb2.OtherJob]) -> None:
        """How jobs of other routers stand there."""
        ...

    def found_shared_tier(self, link: WorkerLink) -> None:
        """It has a shared tier, though its hello named no server: that had not answered the worker yet."""
        ...
