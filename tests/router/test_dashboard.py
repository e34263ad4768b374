"""The dashboard in a real browser: headless Chromium over the real HTTP side, fed by a scripted router."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiohttp import web
from playwright.sync_api import Browser, Page, expect, sync_playwright
from prometheus_client import CollectorRegistry

from router.auth import ApiKeys, open_access
from router.config import RouterConfig
from router.http import create_app
from tests.router.scripted_router import MIB, WEIGHTS, ScriptedRouter, hash_of
from warmkv.v1 import admin_pb2, common_pb2

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome in PATH")

ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PERIOD_S = 0.06
Result = TypeVar("Result")


class Server:
    """The HTTP side in a thread with a loop of its own; it can be stopped and started on the same port."""

    def __init__(self, router: ScriptedRouter, authenticate: Any, **config: Any) -> None:
        self.router = router
        self._authenticate = authenticate
        self._config = RouterConfig(name="r0", model_dir="", model_name="tiny-llama", **config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def do(self, action: Callable[[ScriptedRouter], Result]) -> Result:
        """Run it on the loop, so that no frame sees half of it."""

        async def run() -> Result:
            return action(self.router)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def advance(self, frames: int, *, seconds: float = 1.0) -> None:
        """Frames of the script, so many seconds apart."""

        async def run() -> None:
            for _ in range(frames):
                self.router.advance(seconds)
                await self.router.taken()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(60)

    async def _start(self) -> None:
        app = create_app(
            self.router, self._config, registry=CollectorRegistry(), authenticate=self._authenticate, period_s=PERIOD_S
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = self._runner.addresses[0][1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(ScriptedRouter(), open_access("default"), show_prompts=True)
    yield server
    server.close()


class Watched:
    """A page, and everything that went wrong on it."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(locale="en-US", timezone_id="UTC", **options)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        self.page.on("response", lambda response: self._note_response(response.status, response.url))
        self.page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url}"))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(f"{kind}: {text}")

    def _note_response(self, status: int, url: str) -> None:
        if status >= 400:
            self.problems.append(f"{status}: {url}")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Watched]]:
    opened: list[Watched] = []

    def open_page(url: str, **options: Any) -> Watched:
        watched = Watched(browser, **{"viewport": {"width": 1440, "height": 1000}, **options})
        opened.append(watched)
        watched.page.goto(url)
        return watched

    yield open_page
    for watched in opened:
        watched.context.close()


def live(page: Page) -> None:
    expect(page.locator("body")).to_have_attribute("data-connection", "live")
    expect(page.locator("#workers-ready")).not_to_have_text("–")


def text(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text()


def shot(page: Page, folder: Path, name: str) -> None:
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def set_second(router: ScriptedRouter) -> None:
    """One second in which 1,000 prompt tokens were served: 40 % from a cache."""
    now = router.now
    now.time_ms += 1000
    for fate, tokens in {"computed": 600, "device": 300, "host": 80, "redis": 20}.items():
        setattr(now.prompt_tokens, fate, getattr(now.prompt_tokens, fate) + tokens)
    now.requests["OK"] += 5
    now.requests["UNAVAILABLE"] += 1
    now.requests["CANCELLED"] += 2
    now.generated_tokens += 640
    now.in_flight = 7
    now.ttft.CopyFrom(admin_pb2.Latency(count=6, p50_ms=41.4, p95_ms=96.2, p99_ms=12_345))
    now.decisions["prefix"] += 3
    now.decisions["balance"] += 1
    now.handovers["lost"] += 2
    now.handovers["draining"] += 1
    now.handover_pause.CopyFrom(admin_pb2.Latency(count=3, p50_ms=181, p95_ms=400, p99_ms=412.4))
    now.prefill_jobs["done"] += 11
    now.prefill_jobs["failed"] += 1
    now.workers[0].role, now.workers[0].ranks, now.workers[0].kv_dtype = "prefill", 2, "int8"
    now.workers[1].role, now.workers[1].deterministic = "decode", True
    now.predicted_cached_tokens += 500
    now.reused_tokens += 400
    now.workers[0].running = 3
    now.workers[1].waiting = 2
    now.workers[3].state = admin_pb2.WORKER_STATE_LOST
    now.workers[3].problem = "its stream broke; look at its log"
    now.workers[0].tiers[0].used_bytes = 16 * MIB
    now.workers[1].tiers[1].healthy = False
    now.shared_tier.used_bytes = 64 * MIB
    now.shared_tier.blocks = 1024


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_the_page_loads_without_a_single_error_and_its_numbers_are_those_fed_in(
    server: Server, open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    watched = open_page(server.url)
    page = watched.page
    live(page)
    server.do(set_second)
    expect(page.locator("#hit-rate")).to_have_text("40.0 %")
    expect(page.locator("#hit-rate-sub")).to_have_text("40.0 % since start")
    expect(page.locator("#ttft-p50")).to_have_text("41 ms")
    expect(page.locator("#ttft-p50-sub")).to_have_text("6 in the last 60 s")
    expect(page.locator("#ttft-p95")).to_have_text("96 ms")
    expect(page.locator("#ttft-p95-sub")).to_have_text("p99 12.3 s")
    expect(page.locator("#request-rate")).to_have_text("8.0 /s")
    expect(page.locator("#request-rate-sub")).to_have_text("7 in flight · 1 failed")
    expect(page.locator("#token-rate")).to_have_text("640 /s")
    expect(page.locator("#workers-ready")).to_have_text("3 / 4")
    expect(page.locator("#workers-ready-sub")).to_have_text("3 running · 2 waiting")
    shares = {
        fate: text(page, f"[data-fate={fate}] [data-role=share]")
        for fate in ("computed", "device", "host", "redis", "disk")
    }
    assert shares == {"computed": "60.0 %", "device": "30.0 %", "host": "8.0 %", "redis": "2.0 %", "disk": "0.0 %"}
    assert text(page, "[data-fate=device] [data-role=total]") == "300"
    assert text(page, "[data-reason=prefix] b") == "3"
    assert text(page, "[data-reason=balance] .total") == "25.0 %"
    assert [text(page, f"#{name}") for name in ("predicted", "reused", "predicted-ratio")] == ["500", "400", "80.0 %"]
    assert [text(page, f"#{name}") for name in ("prefilled", "handovers", "handover-pause")] == [
        *("11 of 12", "3", "181 ms / 412 ms"),
    ]
    assert page.locator("#prefilled").get_attribute("title") == "done 11, failed 1"
    assert page.locator("#handovers").get_attribute("title") == "draining 1, lost 2"
    assert [text(page, f"#{name}") for name in ("model", "router", "policy-now")] == ["tiny-llama", "r0", "round_robin"]
    shot(page, tmp_path, "numbers")
    assert watched.problems == []


def test_workers_show_state_load_fill_and_what_is_wrong(server: Server, open_page: Callable[..., Watched]) -> None:
    server.do(set_second)
    page = open_page(server.url).page
    live(page)
    row = page.locator("#workers tbody tr")
    expect(row).to_have_count(4)
    cells = row.nth(0).locator("th, td").all_inner_texts()
    assert [cell.strip() for cell in cells[2:]] == [
        *("prefill", "int8 · 2 ranks", "3", "0", "62 ms/1k", "16 MiB of 64 MiB", "0 B of 192 MiB"),
    ]
    kinds = [[cell.strip() for cell in row.nth(at).locator("td").all_inner_texts()[1:3]] for at in (1, 2)]
    assert kinds == [["decode", "float32 · deterministic"], ["both", "float32"]]
    assert "ready" in cells[1]
    assert "lost" in row.nth(3).inner_text()
    assert text(page, "#problems") == "w3 its stream broke; look at its log"
    assert "cut off" in row.nth(1).inner_text()
    assert "cut off" not in row.nth(0).inner_text()
    assert share_of(row.nth(0).locator(".bar span").first) == pytest.approx(0.25, abs=0.01)
    assert "64 MiB of 256 MiB" in text(page, ".shared")
    assert "1,024 blocks" in text(page, ".shared")


def fill_store(router: ScriptedRouter) -> None:
    """Two workers with a disk and a Redis; one disk is full, the Redis is cut off."""
    down = "redis does not answer; start it"
    for name, problem in (("w0", ""), ("w1", "the disk is full; free room")):
        worker = router.store.workers.add(worker=name, state=admin_pb2.WORKER_STATE_READY)
        worker.tiers.add(
            tier=common_pb2.TIER_DISK,
            used_bytes=8 * MIB,
            capacity_bytes=32 * MIB,
            blocks=64,
            pinned=3,
            healthy=True,
            hits=10,
            misses={"corrupt": 1, "absent": 2},
            store_failures={"full": 4},
            problem=problem,
            removals={"evicted": 5},
            loads=4,
            bad_hits=1,
            load_ms=40,
            compute_ms=200,
        )
        worker.tiers.add(
            tier=common_pb2.TIER_REDIS,
            used_bytes=100 * MIB,
            capacity_bytes=200 * MIB,
            blocks=800,
            healthy=False,
            problem=down,
            misses={"deadline": 3},
        )


def test_the_store_shows_every_tier_with_its_misses_and_its_problems(
    server: Server, open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    watched = open_page(server.url)
    page = watched.page
    live(page)
    expect(page.locator("#store .empty")).to_be_visible()
    server.do(fill_store)
    rows = page.locator("#store tbody tr")
    expect(rows).to_have_count(2)
    cells = [[cell.strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows.all()]
    assert cells[0] == [
        *("Disk", "!has a problem (1 of 2)", "16 MiB of 64 MiB", "128", "6", "20"),
        *("absent 4, corrupt 2", "full 8", "evicted 10", "8 · 10 ms (computing 50 ms)", "2"),
    ]
    # One server is not two: what all workers share does not add up.
    assert cells[1][:4] == [
        *("Redis", "✕cut off (2 of 2)", "100 MiB of 200 MiB", "800"),
    ]
    alarming = page.locator("#store .bad").all_inner_texts()
    assert alarming == ["absent 4, corrupt 2", "full 8", "2"], "a deadline is no wrong byte"
    assert page.locator("#store-problems li").all_inner_texts() == [
        "Redis of w0, w1 redis does not answer; start it",
        "Disk of w1 the disk is full; free room",
    ]
    shot(page, tmp_path, "store")
    assert watched.problems == []


def share_of(locator: Any) -> float:
    """The width of a bar's filled part in its parent's. Transitions are waited for."""
    script = """async (bar) => {
      await Promise.all(bar.getAnimations().map((animation) => animation.finished));
      return bar.getBoundingClientRect().width / bar.parentElement.getBoundingClientRect().width; }"""
    return float(locator.evaluate(script))


def test_the_prefix_map_shows_who_holds_how_much_at_which_tier(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    def hold(router: ScriptedRouter) -> None:
        prefix = router.now.prefixes.add(label="ignored", tenant="search", tokens=1000, requests=1234, redis_tokens=250)
        prefix.held.add(worker="w1", device_tokens=500, host_tokens=750)
        prefix.held.add(worker="w2", device_tokens=0, host_tokens=1000)

    server.do(hold)
    page = open_page(server.url).page
    live(page)
    assert page.locator("#prefixes thead th").all_inner_texts() == [
        "Prefix",
        "Tokens",
        "Requests",
        "w0",
        "w1",
        "w2",
        "w3",
        "redis",
    ]
    cells = page.locator("#prefixes tbody tr").first.locator("th, td")
    assert cells.all_inner_texts()[:3] == ["You are a travel agent who", "1,000", "1,234"]
    widths = [[round(share_of(span), 2) for span in cells.nth(column).locator("span").all()] for column in range(3, 8)]
    assert widths == [[0, 0], [0.5, 0.25], [0, 1], [0, 0], [0.25]]
    assert cells.nth(4).locator("[role=img]").get_attribute("aria-label") == (
        "w1: 500 of 1,000 tokens on the device, 250 more in host RAM"
    )
    server.do(lambda router: setattr(router.now.prefixes[0].held[0], "device_tokens", 750))
    expect(cells.nth(4).locator("[role=img]")).to_have_attribute("aria-label", re.compile("750 of 1,000"))
    assert share_of(cells.nth(4).locator(".device")) == pytest.approx(0.75, abs=0.01)


def test_prompts_are_hashes_unless_configured(open_page: Callable[..., Watched]) -> None:
    server = Server(ScriptedRouter(), open_access("default"))
    try:
        server.advance(1)
        page = open_page(server.url).page
        live(page)
        expect(page.locator("#prefixes tbody th").first).to_have_text(hash_of(0))
        assert "travel agent" not in page.content()
    finally:
        server.close()


def test_the_last_decisions_show_what_was_predicted_and_what_came(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    def decide(router: ScriptedRouter) -> None:
        done = router.now.recent.add(
            time_ms=1_800_000_000_000, request_id="7f3a91c0de", tenant="search", worker="w1", policy="cache_aware",
            reason="prefix", prompt_tokens=1784, predicted_cached_tokens=1536, predicted_ttft_ms=38,
            runner_up="w3", runner_up_extra_ms=52,
        )  # fmt: skip
        done.reused_tokens = 1520
        done.ttft_ms = 41
        router.now.recent.add(request_id="b", worker="w0", reason="no_hit", prompt_tokens=10, predicted_ttft_ms=5)
        router.now.recent.add(request_id="c", worker="w1", tried=["w0"], went_on_at=["w2", "w3"])
        router.now.recent.add(request_id="d", worker="w1", prefill_worker="w0")

    server.do(decide)
    page = open_page(server.url).page
    live(page)
    rows = page.locator("#recent tbody tr")
    expect(rows).to_have_count(4)
    workers = [rows.nth(place).locator("th") for place in (2, 3)]
    assert [cell.inner_text() for cell in workers] == ["w0 ✕ w1 ⇢ w2 ⇢ w3", "w1 ← w0"]
    assert [cell.get_attribute("title") for cell in workers] == [
        "no token came from w0; handed over to w2, then to w3",
        "prefilled by w0",
    ]
    assert rows.nth(0).locator("th, td").all_inner_texts() == [
        "08:00:00", "7f3a91c0", "w1", "prefix", "1,784", "1,536 → 1,520", "38 ms → 41 ms", "w3 +52 ms",
    ]  # fmt: skip
    assert rows.nth(1).locator("th, td").all_inner_texts()[5:] == ["0 → …", "5.0 ms → …", ""]


def test_text_from_outside_is_shown_and_never_parsed(server: Server, open_page: Callable[..., Watched]) -> None:
    markup = "<img src=x onerror=alert(1)>"

    def inject(router: ScriptedRouter) -> None:
        router.now.workers[0].name = markup
        router.now.workers[0].problem = markup
        router.now.decisions[markup] = 1
        router.now.recent.add(request_id="a", reason=markup, worker=markup)

    server.do(inject)
    watched = open_page(server.url)
    live(watched.page)
    expect(watched.page.locator("#workers tbody th").first).to_have_text(markup)
    assert watched.page.locator("main img").count() == 0
    assert watched.problems == []


# ---- over time -----------------------------------------------------------------------------------------------------


def path_of(page: Page, chart: str, series: str) -> str:
    return page.locator(f"#{chart} path.series-{series}").last.get_attribute("d") or ""


def test_charts_grow_and_the_hit_rate_climbs_when_the_policy_changes(
    server: Server, open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    watched = open_page(server.url)
    page = watched.page
    live(page)
    server.advance(8, seconds=4)
    expect(page.locator("#read-hit")).to_have_text(re.compile(r"3\d\.\d %"))
    before = {(chart, series): path_of(page, chart, series) for chart, series in SERIES}
    assert all("L" in path for path in before.values()), before
    server.do(lambda router: router.set_policy(admin_pb2.SetPolicyRequest(policy={"name": "cache_aware"})))
    server.advance(18, seconds=4)
    expect(page.locator("#read-hit")).to_have_text(re.compile(r"8\d\.\d %"))
    expect(page.locator("#hit-rate")).to_have_text(re.compile(r"8\d\.\d %"))
    assert all(path_of(page, chart, series) != before[chart, series] for chart, series in SERIES)
    expect(page.locator("#chart-hit .marks text")).to_have_text("cache_aware")
    expect(page.locator("#policy-name")).to_have_value("cache_aware")
    shot(page, tmp_path, "switched")
    assert watched.problems == []


SERIES = [("chart-hit", "hit"), ("chart-fate", "device"), ("chart-fate", "computed"), ("chart-ttft", "p50"),
          ("chart-ttft", "p95"), ("chart-requests", "requests"), ("chart-tokens", "tokens")]  # fmt: skip


def test_a_page_that_is_opened_late_has_the_whole_past_at_once(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    server.advance(24, seconds=4)
    page = open_page(server.url).page
    live(page)
    assert path_of(page, "chart-hit", "hit").count("L") >= 22
    expect(page.locator("#chart-hit")).to_contain_text("−2 min")


def test_the_charts_cursor_follows_mouse_and_keys_and_all_readouts_follow_it(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    server.advance(10, seconds=4)
    server.do(lambda router: router.set_policy(admin_pb2.SetPolicyRequest(policy={"name": "cache_aware"})))
    server.advance(10, seconds=4)
    page = open_page(server.url).page
    live(page)
    now = text(page, "#read-hit")
    page.locator("#chart-requests svg").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#read-hit")).to_have_text(re.compile(r"3\d\.\d %"))
    assert page.locator("#chart-hit .cursor text").count() == 1
    page.keyboard.press("Escape")
    expect(page.locator("#read-hit")).to_have_text(now)
    box = page.locator("#chart-fate").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    expect(page.locator("#read-hit")).to_have_text(re.compile(r"3\d\.\d %"))


# ---- the policy ----------------------------------------------------------------------------------------------------


def test_the_policy_form_sets_the_policy_with_the_chosen_weights(
    server: Server, open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    watched = open_page(server.url)
    page = watched.page
    live(page)
    expect(page.locator("#policy-name")).to_have_value("round_robin")
    expect(page.locator("#apply")).to_be_disabled()
    page.select_option("#policy-name", "cache_aware")
    expect(page.locator("#policy-help")).to_contain_text("lowest predicted milliseconds")
    expect(page.locator(".weight")).to_have_count(len(WEIGHTS))
    page.fill("#weight-queue", "2.5")
    slider = page.get_by_role("slider", name="tie_ms")
    slider.focus()
    page.keyboard.press("ArrowRight")
    tie_ms = float(page.input_value("#weight-tie_ms"))
    assert tie_ms > 20
    page.get_by_role("switch").focus()
    page.keyboard.press("Space")
    shot(page, tmp_path, "edited")
    page.click("#apply")
    expect(page.locator("#policy-feedback")).to_have_text("cache_aware is in force from the next request on.")
    expect(page.locator("#policy-now")).to_have_text("cache_aware")
    expect(page.locator("#policy-version")).to_have_text("version 2")
    expect(page.locator("#apply")).to_be_disabled()
    [applied] = server.router.applied
    assert applied.policy.name == "cache_aware"
    assert applied.policy.weights["queue"] == 2.5
    assert applied.policy.weights["tie_ms"] == tie_ms
    assert applied.policy.weights["compute"] == 1.0
    assert applied.HasField("shared_tier_reads")
    assert applied.shared_tier_reads is False
    expect(page.locator("#shared-reads-now")).to_contain_text("reads are off")
    assert watched.problems == []


def test_a_weight_out_of_range_cannot_be_applied_and_defaults_can_be_had_back(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    page = open_page(server.url).page
    live(page)
    page.select_option("#policy-name", "cache_aware")
    for wrong in ("1000", "-1", ""):
        page.fill("#weight-queue", wrong)
        expect(page.locator("#policy-feedback")).to_have_text("queue goes from 0 to 100.")
        expect(page.locator("#weight-queue")).to_have_attribute("aria-invalid", "true")
        expect(page.locator("#apply")).to_be_disabled()
    page.get_by_role("button", name="queue: back to 1").click()
    expect(page.locator("#weight-queue")).to_have_value("1")
    expect(page.locator("#apply")).to_be_enabled()
    page.click("#revert")
    expect(page.locator("#policy-name")).to_have_value("round_robin")
    expect(page.locator(".weight")).to_have_count(0)


def test_a_change_made_elsewhere_is_shown_but_never_over_an_edit(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    page = open_page(server.url).page
    live(page)
    change = admin_pb2.SetPolicyRequest(policy={"name": "cache_aware", "weights": {"load": 3}})
    server.do(lambda router: router.set_policy(change))
    expect(page.locator("#weight-load")).to_have_value("3")
    page.fill("#weight-load", "4")
    server.do(lambda router: router.set_policy(admin_pb2.SetPolicyRequest(policy={"name": "least_loaded"})))
    expect(page.locator("#policy-feedback")).to_contain_text("now least_loaded")
    expect(page.locator("#weight-load")).to_have_value("4")
    page.click("#revert")
    expect(page.locator("#policy-name")).to_have_value("least_loaded")


def test_what_the_router_refuses_is_told(server: Server, open_page: Callable[..., Watched]) -> None:
    page = open_page(server.url).page
    live(page)
    page.select_option("#policy-name", "least_loaded")
    page.evaluate("document.querySelector('#policy-name option[value=least_loaded]').value = 'gone'")
    page.route("**/api/policy", lambda route: route.continue_(post_data='{"policy": {"name": "gone"}}'))
    page.click("#apply")
    expect(page.locator("#policy-feedback")).to_contain_text("There is no policy 'gone'")
    expect(page.locator("#apply")).to_be_enabled()


# ---- connection and keys -------------------------------------------------------------------------------------------


def test_the_page_comes_back_by_itself_after_the_router_restarted(
    server: Server, open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    server.advance(10)
    page = open_page(server.url).page
    live(page)
    server.stop()
    expect(page.locator("body")).to_have_attribute("data-connection", "lost")
    expect(page.locator("#connection")).to_have_text("Connection lost, trying again")
    shot(page, tmp_path, "lost")
    server.router = ScriptedRouter(workers=2, seed=7)
    server.start()
    expect(page.locator("body")).to_have_attribute("data-connection", "live", timeout=15_000)
    expect(page.locator("#workers-ready")).to_have_text("2 / 2")
    expect(page.locator("#hit-rate-sub")).to_have_text("no prompts yet")
    expect(page.locator("#chart-hit .empty")).to_be_visible()
    page.select_option("#policy-name", "cache_aware")
    page.click("#apply")
    expect(page.locator("#policy-now")).to_have_text("cache_aware")


def test_a_router_that_falls_silent_is_noticed(server: Server, open_page: Callable[..., Watched]) -> None:
    page = open_page(server.url).page
    live(page)
    blocked = threading.Event()
    server._loop.call_soon_threadsafe(blocked.wait, 20)
    try:
        expect(page.locator("body")).to_have_attribute("data-connection", "stale", timeout=15_000)
        expect(page.locator("#connection")).to_have_text("No news for some seconds")
    finally:
        blocked.set()
    expect(page.locator("body")).to_have_attribute("data-connection", "live", timeout=15_000)


def test_with_keys_the_page_asks_for_one_and_a_user_may_look_but_not_change(
    open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[keys]]\nkey="a-key"\ntenant="ops"\nrole="admin"\n[[keys]]\nkey="u-key"\ntenant="search"\n')
    server = Server(ScriptedRouter(), ApiKeys(path).authenticate)
    try:
        page = open_page(server.url).page
        dialog = page.locator("#key-dialog")
        expect(dialog).to_be_visible()
        shot(page, tmp_path, "key")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-problem")).to_contain_text("not known")
        page.fill("#key", "u-key")
        page.keyboard.press("Enter")
        live(page)
        expect(dialog).to_be_hidden()
        expect(page.locator("#policy-version")).to_contain_text("needs an admin's key")
        expect(page.locator("#policy-name")).to_be_disabled()
        page.reload()
        live(page)
        page.click("#forget-key")
        expect(dialog).to_be_visible()
        page.fill("#key", "a-key")
        page.keyboard.press("Enter")
        expect(page.locator("#policy-name")).to_be_enabled()
    finally:
        server.close()


def test_a_link_may_carry_the_key_which_then_leaves_the_address(
    browser: Browser, open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[keys]]\nkey="a-key"\ntenant="ops"\nrole="admin"\n')
    server = Server(ScriptedRouter(), ApiKeys(path).authenticate)
    try:
        page = open_page(f"{server.url}#key=a-key").page
        live(page)
        expect(page.locator("#policy-name")).to_be_enabled()
        assert "a-key" not in page.url
    finally:
        server.close()


# ---- looks ---------------------------------------------------------------------------------------------------------


def test_with_no_data_at_all_every_panel_says_what_to_do(open_page: Callable[..., Watched], tmp_path: Path) -> None:
    router = ScriptedRouter(workers=0)
    router.now.ClearField("shared_tier")
    server = Server(router, open_access("default"))
    try:
        watched = open_page(server.url)
        page = watched.page
        live(page)
        expect(page.locator("#workers")).to_contain_text("No workers yet")
        expect(page.locator("#prefixes")).to_contain_text("warmkv generate")
        expect(page.locator("#recent")).to_contain_text("warmkv explain")
        expect(page.locator("#reasons")).to_contain_text("No decisions yet")
        expect(page.locator("#hit-rate")).to_have_text("–")
        expect(page.locator(".shared")).to_contain_text("--redis")
        assert page.locator(".plot .empty >> visible=true").count() == 5
        assert not re.search(r"NaN|undefined|null|Infinity", page.locator("body").inner_text())
        shot(page, tmp_path, "empty")
        assert watched.problems == []
    finally:
        server.close()


def boxes(page: Page) -> dict[str, list[int]]:
    script = """() => Object.fromEntries([...document.querySelectorAll('.tiles, .panel:not(.at-workers, .at-recent)')]
      .map((one) => [one.className, one.getBoundingClientRect()])
      .map(([name, box]) => [name, [box.x, box.y, box.width, box.height].map(Math.round)]))"""
    return dict(page.evaluate(script))


def test_nothing_jumps_when_the_first_data_come_and_the_policy_changes(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    page = open_page(server.url).page
    live(page)
    before = boxes(page)
    server.advance(5)
    server.do(lambda router: router.set_policy(admin_pb2.SetPolicyRequest(policy={"name": "cache_aware"})))
    server.advance(3)
    expect(page.locator(".weight")).to_have_count(len(WEIGHTS))
    assert boxes(page) == before
    bottoms = [page.locator(one).bounding_box() for one in ("#apply", ".at-policy")]
    inner, outer = [box["y"] + box["height"] for box in bottoms if box is not None]
    assert inner < outer, "the weights scroll in their panel, the button stays"


@pytest.mark.parametrize("width", [380, 600, 1000, 1280])
def test_no_width_needs_sideways_scrolling(
    server: Server, open_page: Callable[..., Watched], tmp_path: Path, width: int
) -> None:
    def crowd(router: ScriptedRouter) -> None:
        router.set_policy(admin_pb2.SetPolicyRequest(policy={"name": "cache_aware"}))
        router.now.workers[0].problem = "a-very-long-word-without-a-space" * 6
        for index in range(4, 16):
            router.now.workers.add(name=f"worker-{index}", state=admin_pb2.WORKER_STATE_JOINING)
        router.advance()

    server.do(crowd)
    page = open_page(server.url, viewport={"width": width, "height": 800}).page
    live(page)
    expect(page.locator("#prefixes tbody tr")).to_have_count(8)
    expect(page.locator(".weight")).to_have_count(len(WEIGHTS))
    shot(page, tmp_path, f"width-{width}")
    assert page.evaluate("document.documentElement.scrollWidth") == width


# The ratio of relative luminances, as WCAG 2.2 defines it, of a text and the first opaque background behind it.
CONTRAST = """(selector) => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => channels(color).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const one = document.querySelector(selector);
  let behind = one;
  while (channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [light, dark] = [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor]
    .map(luminance).sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_themes_and_their_text_can_be_read(
    server: Server, open_page: Callable[..., Watched], tmp_path: Path, scheme: str
) -> None:
    server.do(set_second)
    server.do(lambda router: router.set_policy(admin_pb2.SetPolicyRequest(policy={"name": "cache_aware"})))
    server.advance(12)
    watched = open_page(server.url, color_scheme=scheme)
    page = watched.page
    live(page)
    expect(page.locator(".weight")).to_have_count(len(WEIGHTS))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background) < 64) is (scheme == "dark")
    for selector in ("#hit-rate", ".sub", ".hint", ".help", "#problems", "thead th", ".muted", ".state.lost", ".unit"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector
    shot(page, tmp_path, scheme)
    assert watched.problems == []


def test_everything_can_be_reached_by_keys_and_has_a_name(server: Server, open_page: Callable[..., Watched]) -> None:
    server.do(lambda router: router.set_policy(admin_pb2.SetPolicyRequest(policy={"name": "cache_aware"})))
    server.advance(2)
    page = open_page(server.url).page
    live(page)
    expect(page.locator(".weight")).to_have_count(len(WEIGHTS))
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.parentElement.id"))
    wanted = {
        "chart-hit",
        "chart-fate",
        "chart-ttft",
        "policy-name",
        "weight-queue",
        "shared-reads",
        "prefixes",
        "workers",
        "recent",
    }
    assert wanted <= reached
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, select, button, [role=img], [role=region], section')]
          .filter((one) => !(one.labels?.length || one.ariaLabel || one.getAttribute('aria-labelledby')
            || one.textContent.trim()))
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []


def test_tiers_below_host_have_columns_once_a_worker_has_them(
    server: Server, open_page: Callable[..., Watched]
) -> None:
    page = open_page(server.url).page
    live(page)
    heads = page.locator("#workers thead th")
    assert heads.all_inner_texts()[7:] == ["Device", "Host RAM"]
    server.do(
        lambda router: router.now.workers[0].tiers.add(
            tier=common_pb2.TIER_DISK, used_bytes=3 * MIB, capacity_bytes=0, blocks=9, healthy=True
        )
    )
    expect(heads.nth(9)).to_have_text("Disk")
    expect(page.locator("#workers tbody tr").first.locator("td").last).to_have_text("3.0 MiB")
