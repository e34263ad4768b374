"""Stacks are large in the pool, and the setting is as it was for all other threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.deep_threads import deep_threads

_LARGE = 96 << 20


def _setting() -> int:
    """To ask for it sets it to zero."""
    size = threading.stack_size()
    threading.stack_size(size)
    return size


def test_all_threads_of_the_pool_start_with_a_large_stack_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started_with: dict[str, int] = {}
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started_with[thread.name] = _setting()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    before = _setting()
    with deep_threads(3, stack_bytes=_LARGE, name="deep") as pool:
        assert started_with == {"deep_0": _LARGE, "deep_1": _LARGE, "deep_2": _LARGE}
        assert _setting() == before
        assert sorted(pool.map(str, range(20))) == sorted(map(str, range(20)))
        assert len(started_with) == 3


def test_threads_that_cannot_start_leave_none_behind_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, made = ThreadPoolExecutor.submit, []

    def fails_at_the_third(pool: ThreadPoolExecutor, *work: object) -> object:
        made.append(pool)
        if len(made) == 3:
            raise RuntimeError("can't start new thread")
        return submit(pool, *work)  # type: ignore[arg-type]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", fails_at_the_third)
    before = _setting()
    with pytest.raises(RuntimeError, match="start new thread"):
        deep_threads(3, stack_bytes=_LARGE, name="short")
    made[0].shutdown(wait=True)  # would wait for ever for a thread at the gate
    assert _setting() == before
