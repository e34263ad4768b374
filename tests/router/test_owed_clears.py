"""Clears of workers that are away: nobody who comes back with its disk keeps what was cleared meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from router.core import Router
from router.errors import WorkerLost
from tests.router.fake_worker import FakeWorker
from tests.router.rig import ADMIN, all_ready, eventually, rig, states
from tests.router.test_fleet import fakes
from warmkv.v1 import admin_pb2, worker_pb2


class Clearing:
    """Has workers confirm what they are asked, each clear once."""

    def __init__(self) -> None:
        self._confirmed: set[tuple[int, int]] = set()

    def confirm(self, *workers: FakeWorker) -> bool:
        for worker in workers:
            for one in clears(worker):
                if (id(worker), one.clear_id) not in self._confirmed:
                    self._confirmed.add((id(worker), one.clear_id))
                    worker.say(clear_done={"clear_id": one.clear_id, "disk": 5})
        return True


def clears(worker: FakeWorker) -> list[worker_pb2.Clear]:
    return [one.clear for one in worker.heard if one.HasField("clear")]


def begin(router: Router, tenant: str = "") -> asyncio.Future[admin_pb2.ClearCacheResponse]:
    scope = admin_pb2.ClearCacheRequest(tenant=tenant) if tenant else admin_pb2.ClearCacheRequest(all=True)
    return asyncio.ensure_future(router.clear_cache(scope, caller=ADMIN))


def owed(router: Router, worker: str) -> int:
    return sum(worker not in clear.confirmed for clear in router.fleet.record.clears)


async def cleared_without(router: Router, gone: FakeWorker, *here: FakeWorker) -> None:
    """Lose one worker, clear the others."""
    await gone.stop()
    await eventually(lambda: states(router)[gone.name] == "LOST")
    clearing, helper = begin(router), Clearing()
    await eventually(lambda: helper.confirm(*here) and clearing.done())
    with pytest.raises(WorkerLost, match=f"{gone.name}: it is lost"):
        clearing.result()


@pytest.mark.asyncio
async def test_a_worker_that_was_lost_is_cleared_as_a_new_incarnation_before_its_first_job_and_once() -> None:
    gone, here = FakeWorker("w0"), FakeWorker("w1")
    async with fakes(gone, here) as (_, router):
        await all_ready(router, 2)
        port = gone.port
        await cleared_without(router, gone, here)
        assert (owed(router, "w0"), owed(router, "w1")) == (1, 0)
        again = FakeWorker("w0", incarnation=2)
        await again.start(port)
        await eventually(lambda: "clear" in again.kinds())
        assert again.kinds()[:2] == ["hello", "clear"]
        await all_ready(router, 2)
        Clearing().confirm(again)
        await eventually(lambda: owed(router, "w0") == 0)
        again.hello.incarnation += 1
        again.heard.clear()
        again.hang_up()
        await eventually(lambda: again.connects == 2 and states(router)["w0"] == "READY")
        await eventually(lambda: "fleet" in again.kinds())
        assert clears(again) == [], "what it has made since is not to be dropped"
        await again.stop()


@pytest.mark.asyncio
async def test_a_worker_that_dies_in_the_middle_of_a_clear_must_confirm_as_the_next_incarnation() -> None:
    dies, here = FakeWorker("w0"), FakeWorker("w1")
    async with fakes(dies, here) as (_, router):
        await all_ready(router, 2)
        port = dies.port
        clearing = begin(router)
        await eventually(lambda: clears(here) and clears(dies))
        Clearing().confirm(here)
        await dies.stop()
        again = FakeWorker("w0", incarnation=2)
        await again.start(port)
        await all_ready(router, 2)
        await eventually(lambda: clears(again))
        assert not clearing.done()
        Clearing().confirm(again)
        done = await clearing
        assert {each.worker: sum(t.blocks for t in each.dropped) for each in done.workers} == {"w0": 5, "w1": 5}
        await again.stop()


@pytest.mark.asyncio
async def test_a_worker_that_was_scaled_away_is_cleared_when_it_is_scaled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.fleet._FORGET_AFTER_S", 0.0)
    w0, w1 = FakeWorker("w0"), FakeWorker("w1")
    async with fakes(w0, w1) as (fleet, router):
        await all_ready(router, 2)
        address = fleet.addresses.pop("w1")
        fleet.announce()
        await w1.stop()
        await eventually(lambda: list(states(router)) == ["w0"])
        for tenant in ("alice", "bob"):
            clearing, helper = begin(router, tenant), Clearing()
            await eventually(lambda: helper.confirm(w0) and clearing.done())  # noqa: B023
            assert [each.worker for each in clearing.result().workers] == ["w0"]
        again = FakeWorker("w1", incarnation=2)
        await again.start(int(address.rpartition(":")[2]))
        fleet.addresses["w1"] = address
        fleet.announce()
        await eventually(lambda: len(clears(again)) == 2)
        assert len({one.chain_root for one in clears(again)}) == 2
        await again.stop()


@pytest.mark.asyncio
async def test_a_router_that_never_heard_the_clear_itself_asks_a_worker_that_the_first_one_lost() -> None:
    async with rig(2) as fleet:
        first = await fleet.start_router("r0")
        await all_ready(first, 2)
        second = await fleet.start_router("r1")
        await all_ready(second, 2)
        # To the first router w1 is lost, to the second it is alive.
        first.fleet.link("w1").moved("127.0.0.1:1")
        await eventually(lambda: states(first)["w1"] == "LOST")
        with pytest.raises(WorkerLost, match="w1: it is lost"):
            await begin(first)
        await eventually(lambda: owed(second, "w1") == 0 and len(second.fleet.record.clears) == 1)
        await eventually(lambda: owed(first, "w1") == 0)  # it hears of it through the other worker


@pytest.mark.asyncio
async def test_routers_that_come_later_know_of_the_clear_from_the_workers() -> None:
    async with rig(2) as fleet:
        first = await fleet.start_router("r0")
        await all_ready(first, 2)
        await fleet.kill_worker("w1")
        await eventually(lambda: states(first)["w1"] == "LOST")
        with pytest.raises(WorkerLost, match="w1: it is lost"):
            await begin(first)
        await first.close()
        fleet.routers.remove(first)
        later = await fleet.start_router("r1")
        await eventually(lambda: owed(later, "w1") == 1)
        fleet.start_worker("w1")
        await eventually(lambda: owed(later, "w1") == 0)


@pytest.mark.asyncio
async def test_a_worker_that_fails_to_clear_is_asked_again_when_it_is_heard_of() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        clearing = begin(router)
        await eventually(lambda: clears(worker))
        worker.say(clear_done={"clear_id": clears(worker)[0].clear_id, "error": "the disk is read-only"})
        with pytest.raises(WorkerLost, match="read-only"):
            await clearing
        await eventually(lambda: len(clears(worker)) == 2)
        worker.say(clear_done={"clear_id": clears(worker)[1].clear_id, "error": "the disk is read-only"})
        await asyncio.sleep(0.1)
        assert (owed(router, "w0"), len(clears(worker))) == (1, 2)
        worker.hang_up()
        await eventually(lambda: len(clears(worker)) == 3)
        Clearing().confirm(worker)
        await eventually(lambda: owed(router, "w0") == 0)
