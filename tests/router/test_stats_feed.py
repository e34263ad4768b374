"""The feed by itself, ticked by hand: sharing, history, and listeners that fall behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from router.errors import Overloaded
from router.stats_feed import HISTORY_SECONDS, Listener, StatsFeed
from router.stats_json import POINT_FIELDS
from tests.router.scripted_router import ScriptedRouter


def feed_of(router: ScriptedRouter, **options: Any) -> StatsFeed:
    settings = {"period_s": 1.0, "max_listeners": 4, "max_queued_frames": 3, "about": {"router": "r0"}, **options}
    return StatsFeed(lambda show_prompts: router.stats(show_prompts=show_prompts), **settings)


def ignore() -> None:
    """Nobody is told of the drop."""


async def read(listener: Listener, count: int) -> list[bytes]:
    frames = listener.frames()
    return [await anext(frames) for _ in range(count)]


def data_of(event: bytes) -> Any:
    return json.loads(event.decode().split("data: ")[1])


@pytest.mark.asyncio
async def test_one_snapshot_a_tick_serves_every_listener_the_same_bytes() -> None:
    router = ScriptedRouter()
    feed = feed_of(router)
    with feed.listen(show_prompts=False, on_drop=ignore) as one, feed.listen(show_prompts=False, on_drop=ignore) as two:
        feed.tick()
        router.advance()
        feed.tick()
        first, second = await read(one, 2), await read(two, 2)
    assert router.snapshots == [False, False]
    assert all(mine is theirs for mine, theirs in zip(first, second, strict=True))
    assert data_of(first[0])["point"][0] < data_of(first[1])["point"][0] == router.now.time_ms


@pytest.mark.asyncio
async def test_prompts_go_only_to_those_who_may_see_them() -> None:
    router = ScriptedRouter()
    router.advance()
    feed = feed_of(router)
    with (
        feed.listen(show_prompts=True, on_drop=ignore) as admin,
        feed.listen(show_prompts=False, on_drop=ignore) as user,
    ):
        feed.tick()
        labels = [data_of((await read(one, 1))[0])["stats"]["prefixes"][0]["label"] for one in (admin, user)]
    assert labels[0] == "You are a travel agent who"
    assert "travel" not in labels[1]


@pytest.mark.asyncio
async def test_history_is_the_last_ten_minutes_oldest_first_and_never_names_prompts() -> None:
    router = ScriptedRouter()
    feed = feed_of(router)
    for _ in range(HISTORY_SECONDS + 7):
        router.advance(requests=1)
        feed.tick()
    history = data_of(feed.history())
    times = [point[0] for point in history["points"]]
    assert history["fields"] == list(POINT_FIELDS)
    assert history["router"] == "r0"
    assert len(times) == HISTORY_SECONDS
    assert times == sorted(times)
    assert times[-1] == router.now.time_ms
    assert b"travel" not in feed.history()


@pytest.mark.asyncio
async def test_a_slow_listener_is_dropped_and_the_others_miss_nothing() -> None:
    feed = feed_of(ScriptedRouter())
    dropped: list[str] = []
    drop: Callable[[], None] = lambda: dropped.append("slow")  # noqa: E731
    with feed.listen(show_prompts=False, on_drop=drop), feed.listen(show_prompts=False, on_drop=ignore) as quick:
        for _ in range(8):
            feed.tick()
            assert len(await read(quick, 1)) == 1
    assert dropped == ["slow"]


@pytest.mark.asyncio
async def test_more_listeners_than_allowed_are_refused_until_one_leaves() -> None:
    feed = feed_of(ScriptedRouter(), max_listeners=1)
    with (
        feed.listen(show_prompts=False, on_drop=ignore),
        pytest.raises(Overloaded, match="api/stats"),
        feed.listen(show_prompts=False, on_drop=ignore),
    ):
        pass
    with feed.listen(show_prompts=False, on_drop=ignore):
        pass


@pytest.mark.asyncio
async def test_a_snapshot_that_fails_is_logged_and_the_next_one_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    router = ScriptedRouter()
    failures = iter([RuntimeError("broken once")])

    def snapshot(show_prompts: bool) -> Any:
        for failure in failures:
            raise failure
        return router.stats(show_prompts=show_prompts)

    feed = StatsFeed(snapshot, period_s=0.001, max_listeners=1, max_queued_frames=1000, about={})
    with feed.listen(show_prompts=False, on_drop=ignore) as listener:
        task = asyncio.create_task(feed.run())
        assert len(await asyncio.wait_for(read(listener, 1), 5)) == 1
        task.cancel()
    assert "stats snapshot failed" in caplog.text


@pytest.mark.asyncio
async def test_the_end_ends_every_stream_those_that_come_later_too() -> None:
    feed = feed_of(ScriptedRouter())
    with feed.listen(show_prompts=False, on_drop=ignore) as listener:
        feed.end()
        assert [frame async for frame in listener.frames()] == []
    with feed.listen(show_prompts=False, on_drop=ignore) as late:
        assert [frame async for frame in late.frames()] == []


@pytest.mark.asyncio
async def test_the_end_cuts_off_a_listener_that_is_behind() -> None:
    feed = feed_of(ScriptedRouter())
    dropped: list[bool] = []
    with feed.listen(show_prompts=False, on_drop=lambda: dropped.append(True)):
        feed.tick()
        feed.end()
    assert dropped == [True]
