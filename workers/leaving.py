"""A worker that ends hands back the jobs that it could not finish, so that their answers go on elsewhere.

Covers: the order of things and how long each may take. Does not cover: who is told (`streams`), what routers do with
a job that they were handed back.

First what running jobs have made is sent to the tier that other workers read, while they go on: with the admission
`on_eviction` it may lie nowhere but here. Then they are given up, and for a moment this worker stays, because its peers
may be reading from its host RAM what the next worker needs.

A worker whose jobs have all ended may owe something, too: it has prefilled for others, and they are not done reading.
It stays until they are, or have given up, or the time that it was given to end is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

from workers.engine_thread import EngineThread
from workers.job_wire import Refusal
from workers.protocol import Engine, JobError

# The longest that blocks may take to reach the shared tier; what is not there by then is computed again.
SHARE_S = 2.0
_LOOK_AGAIN_S = 0.02
# How long peers may still read from here.
LINGER_S = 1.0

logger = logging.getLogger(__name__)


async def hand_back(engine: EngineThread, give_up: Callable[[JobError], int]) -> None:
    """Share blocks, give up all jobs, linger. `give_up` ends every job with an error and returns how many there were.

    Takes `SHARE_S + LINGER_S` at most. Belongs to the server's event loop.
    """
    shared = await _shared(engine)
    message = "the worker takes no more requests; the answer goes on at another one"
    jobs = give_up(JobError(Refusal.WORKER_DRAINING.value, message))
    logger.info("jobs were handed back", extra={"jobs": jobs, "blocks_shared": shared})
    if jobs:
        await asyncio.sleep(LINGER_S)


async def see_off(engine: EngineThread, until: float) -> bool:
    """Stay while peers are to read what was made for them; whether they have. `until`: on the monotonic clock, or
    `LINGER_S` from now where that is later. Belongs to the server's event loop.
    """
    until = max(until, time.monotonic() + LINGER_S)
    while time.monotonic() < until:
        if not await _asked(engine, lambda engine: engine.cache.owes_peers(), LINGER_S):
            return True
        await asyncio.sleep(_LOOK_AGAIN_S)
    logger.info("the worker ends though others have not read all that was made for them")
    return False


async def _shared(engine: EngineThread) -> bool:
    """Whether all that running jobs have made could be sent in time."""
    until = time.monotonic() + SHARE_S
    while (left_s := until - time.monotonic()) > 0:
        shared = await _asked(engine, lambda engine: engine.cache.share_running(), left_s)
        if shared is None or shared:
            return bool(shared)
        await asyncio.sleep(_LOOK_AGAIN_S)
    return False


async def _asked(engine: EngineThread, question: Callable[[Engine], bool], within_s: float) -> bool | None:
    """What the engine says in its thread; None: nothing in time, or its thread has failed."""
    answer: Future[bool] = Future()

    def ask(engine: Engine) -> None:
        if answer.set_running_or_notify_cancel():
            answer.set_result(question(engine))

    engine.post(ask)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(answer), within_s)
    except TimeoutError:
        return None
