"""A store over one tier that is about to fail, and requests that tell what they got.

Covers: filling a tier, one request's added delay and the truth of its bytes. Does not cover: the faults (`fault_redis`,
`fault_disk`), the table (`faults`). The tests of `tests/scenarios` use the same parts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from bench.fault_blocks import ROOT, Shape, chain, payload
from kvstore.acquisition import ReadTiers
from kvstore.device import DeviceTier
from kvstore.patience import DEFAULT_SLACK_S
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta, LocalTier, SharedTier

log = logging.getLogger(__name__)

COMPUTE_MS = 25.0  # a block, in the caller's prediction; what computing these prompts would cost
PATIENT_MS = 5000.0  # a block, where a fault states how many blocks must come: none may be missing for lack of time
PATIENT_SLACK_S = 5.0  # the same
UNDER_LOAD_S = 0.003  # requests run for so long before what they use is killed
GIVE_UP_S = 60.0


@dataclass(slots=True)
class Tally:
    """What requests saw.

    Attributes:
        wrong_blocks: delivered with other bytes than were stored. failed: requests that raised.
        unexpected: requests that got fewer blocks than they must have, or, while the harm was new, more.
        added_ms: what each request waited for the store. blocks: how many each got.
    """

    wrong_blocks: int = 0
    failed: int = 0
    unexpected: int = 0
    added_ms: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class Asked(Protocol):
    """Whom `run` asks."""

    shape: Shape
    tally: Tally
    chains: list[list[BlockMeta]]

    def request(self, metas: Sequence[BlockMeta]) -> int:
        """Ask for a prefix and count what came; how many blocks. Never raises."""
        ...

    def between(self) -> None:
        """A request has ended, another one follows."""
        ...

    def forget(self) -> None:
        """What was computed has gone down, and the next request finds nothing above."""
        ...


class Rig:
    """One engine's view of a store: no forward passes, real blocks.

    Attributes:
        store: under test; without host RAM, so that every request goes down to the tier. chains: what was stored.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        shared: SharedTier | None = None,
        disk: LocalTier | None = None,
        block_ms: float = COMPUTE_MS,
    ) -> None:
        """Over one tier; `block_ms`: what the caller predicts that computing a block takes."""
        self.shape = shape
        self._block_ms = block_ms
        blocks = shape.chains * shape.blocks + 2 * shape.blocks
        device = DeviceTier(shape.layout, blocks * shape.layout.block_nbytes, clock=time.monotonic)
        self.store = TieredStore(
            shape.layout,
            device,
            None,
            shared,
            disk=disk,
            clock=time.monotonic,
            default_ttl_s=3600.0,
            load_slack_s=DEFAULT_SLACK_S if block_ms == COMPUTE_MS else PATIENT_SLACK_S,
        )
        self.chains = [chain(shape, number) for number in range(shape.chains)]
        self.tally = Tally()

    def fill(self) -> None:
        """Compute every chain, wait until the tier has been offered all, and read each: its speed is known then."""
        for metas in self.chains:
            self.compute(metas)
        for metas in self.chains:
            self.forget()
            self.request(metas)
        self.forget()
        self.tally = Tally()

    def compute(self, metas: Sequence[BlockMeta]) -> None:
        """As an engine that found nothing."""
        device = self.store.device
        block_ids = self.store.allocate(len(metas)) or []
        device.inject(block_ids, [payload(meta.hash, self.shape.layout) for meta in metas[: len(block_ids)]])
        self.store.commit(block_ids, metas[: len(block_ids)])
        self.store.release(block_ids)

    def request(self, metas: Sequence[BlockMeta]) -> int:
        """Ask for a prefix as the engine does, check what comes, compute the rest; how many blocks came.

        Whatever it raises, a request would have failed: that is counted, and no block came.
        """
        started, count = time.perf_counter(), 0
        try:
            count = self._acquire(metas, started)
        except Exception:
            log.exception("a request failed")
            self.tally.failed += 1
        self.tally.blocks.append(count)
        return count

    def between(self) -> None:
        """As `Asked.between`: nothing is found in the device."""
        self.store.pump()
        self.store.device.clear()

    def forget(self) -> None:
        """As `Asked.forget`."""
        self.store.flush(GIVE_UP_S)
        self.store.pump()
        self.store.device.clear()

    def close(self) -> None:
        """Audit and end.

        Raises:
            InvariantError: the books are wrong.
        """
        self.store.check()
        if any(self.store.device.refs(block) for block in range(self.store.device.num_blocks)):
            raise RuntimeError("a request ended and left a block referenced")
        self.store.close()

    def _acquire(self, metas: Sequence[BlockMeta], started: float) -> int:
        store, names = self.store, [meta.hash for meta in metas]
        acquisition = store.acquire(names, reads=ReadTiers(), compute_ms=self._compute_ms, root=ROOT)
        while not acquisition.done:
            store.wait(0.05)
            store.pump()
            if time.perf_counter() - started > GIVE_UP_S:
                acquisition.cancel()
                raise TimeoutError("the store kept a request waiting")
        self.tally.added_ms.append(1e3 * (time.perf_counter() - started))
        got = store.device.payloads(acquisition.block_ids)
        for meta, found in zip(metas, got, strict=False):
            self.tally.wrong_blocks += bytes(found) != bytes(payload(meta.hash, self.shape.layout))
        count = len(acquisition.block_ids)
        store.release(acquisition.block_ids)
        self.compute(metas[count:])
        return count

    def _compute_ms(self, first: int, count: int) -> float:
        return self._block_ms * count


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault did.

    Attributes:
        tally: of the requests during it. worst_added_ms: of the longest. recovered: all was found again afterwards,
        without a restart of anything of ours. misses: by reason, of the tier since it was made; empty: not looked at.
    """

    tally: Tally
    worst_added_ms: float
    recovered: bool
    misses: Mapping[str, int] = field(default_factory=dict)


def run(
    rig: Asked,
    inject: Callable[[], None],
    recover: Callable[[], None],
    *,
    due: Sequence[int | None] | None = None,
    lasts: bool = True,
    under_load: bool = False,
) -> Outcome:
    """Requests during and after a fault.

    Args:
        rig: filled. inject, recover: what breaks its tier, and what mends it.
        due: of each chain how many leading blocks must come: the first request gets just those, as what was harmed
            must have been found out. None: however many come, of one or of all.
        lasts: the later ones no fewer; False: a breaker may have opened.
        under_load: break it while requests run, not before them.
    """
    during = rig.tally = Tally()
    breaking = threading.Thread(target=_break_soon if under_load else inject, args=(inject,) if under_load else ())
    breaking.start()
    if not under_load:
        breaking.join()
    number = since = 0  # requests, and those of them that began when it was broken
    while number < rig.shape.requests or since < len(rig.chains):
        is_broken = not breaking.is_alive()
        which = number % len(rig.chains)
        count = rig.request(rig.chains[which])
        wanted = None if due is None else due[which]
        if wanted is not None:
            during.unexpected += count != wanted if number == which else lasts and count < wanted
        rig.between()
        number += 1
        since += is_broken
    breaking.join()
    recover()
    rig.tally = Tally()
    recovered = _recovers(rig)
    during.wrong_blocks += rig.tally.wrong_blocks
    during.failed += rig.tally.failed
    return Outcome(during, max(during.added_ms, default=0.0), recovered)


def _break_soon(inject: Callable[[], None]) -> None:
    time.sleep(UNDER_LOAD_S)
    inject()


def _recovers(rig: Asked) -> bool:
    give_up = time.monotonic() + GIVE_UP_S
    while time.monotonic() < give_up:
        rig.forget()
        counts = [rig.request(metas) for metas in rig.chains]
        if counts == [len(metas) for metas in rig.chains]:
            return True
        time.sleep(0.05)
    return False


@contextmanager
def closing(rig: Rig) -> Iterator[Rig]:
    """The rig, ended and audited afterwards."""
    try:
        yield rig
    finally:
        rig.close()
