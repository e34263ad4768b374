"""The demo's terminal, from numbers to characters."""

from __future__ import annotations

import io

from rich.console import Console

from deploy.demo_screen import BAR_WIDTH, Screen, fate_bar, holding, sparkline
from deploy.summary import Act, Result
from warmkv.v1 import admin_pb2


def drawn(screen: Screen) -> str:
    console = Console(width=140, file=io.StringIO(), force_terminal=False)
    console.print(screen.render())
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_before_there_are_numbers_it_shows_the_steps_of_the_start() -> None:
    text = drawn(Screen(steps=["2.5 s  Ray: started"], dashboard="http://h/#key=k", note="a note"))
    for word in ("Ray: started", "http://h/#key=k", "a note", "starting"):
        assert word in text


def test_it_shows_who_holds_what_the_decisions_and_both_policies() -> None:
    stats = admin_pb2.WatchStatsResponse(
        workers=[admin_pb2.WorkerInfo(name="w0"), admin_pb2.WorkerInfo(name="w1")],
        prefixes=[
            admin_pb2.PrefixHolding(
                label="You are",
                tenant="acme",
                tokens=100,
                redis_tokens=100,
                held=[{"worker": "w1", "device_tokens": 50}],
            )
        ],
        recent=[
            admin_pb2.DecisionRecord(
                request_id="abcdefgh-1", worker="w1", reason="prefix", prompt_tokens=120, predicted_cached_tokens=96,
                predicted_ttft_ms=40, ttft_ms=44, runner_up="w0", runner_up_extra_ms=300,
            )
        ],
    )  # fmt: skip
    answered = Result("s", 0, "acme", 0.0, ttft_s=0.2, prompt_tokens=10, fates={"computed": 4, "device": 6})
    screen = Screen(act="act 2 of 3: cache_aware", stats=stats, acts=[Act("round_robin", (answered,), 1.0)])
    screen.live = Act("cache_aware", (answered,), 1.0)
    text = drawn(screen)
    for word in (
        "acme: You are",
        "w0",
        "w1",
        "████",
        "▒▒▒▒▒▒▒▒",
        "prefix",
        "overlap 96/120",
        "40 ms, was 44 ms",
        "+300 ms",
    ):
        assert word in text
    assert text.count("TTFT") == 2
    assert "60%" in text


def test_bars_are_as_wide_as_they_say() -> None:
    assert len(fate_bar({"computed": 0.25, "device": 0.5, "host": 0.25, "redis": 0.0}).plain) == BAR_WIDTH
    assert sparkline([0.0, 1.0]).plain.strip() == "▁█"  # type: ignore[arg-type]
    held = admin_pb2.PrefixHolding.Held(worker="w", device_tokens=50, host_tokens=100)
    assert holding(held, 100).plain == "████▓▓▓▓"
    assert holding(None, 100).plain == "·"
