"""The HTTP side over real sockets: every route, who may ask, what a foreign page cannot do, and the stream."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from router.assets import load_assets
from router.auth import ApiKeys, open_access
from router.config import RouterConfig
from router.http import create_app
from router.metrics import Metrics
from router.protocol import RouterApi
from router.stats_json import POINT_FIELDS
from router.web_guard import CSRF_HEADER
from tests.router.scripted_router import ScriptedRouter
from warmkv.v1 import admin_pb2

ADMIN = {"Authorization": "Bearer admin-key"}
USER = {"Authorization": "Bearer user-key"}


@asynccontextmanager
async def serving(
    router: RouterApi,
    *,
    config: dict[str, Any] | None = None,
    registry: CollectorRegistry | None = None,
    **options: Any,
) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a running application."""
    settings = RouterConfig(name="r0", model_dir="", model_name="tiny-llama", **(config or {}))
    app = create_app(
        router,
        settings,
        registry=registry or CollectorRegistry(),
        **{"authenticate": open_access("default"), "period_s": 0.02, **options},
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as client:
            yield client
    finally:
        await runner.cleanup()


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys.toml"
    path.write_text(
        '[[keys]]\nkey = "admin-key"\ntenant = "ops"\nrole = "admin"\n[[keys]]\nkey = "user-key"\ntenant = "search"\n'
    )
    return ApiKeys(path)


async def get(client: aiohttp.ClientSession, path: str, **headers: str) -> tuple[int, str, Any]:
    """Status, text, headers."""
    async with client.get(path, headers=headers) as response:
        return response.status, await response.text(), response.headers


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str, str]:
    body = await response.json()
    return response.status, body["error"]["reason"], body["error"]["message"]


async def read_events(response: aiohttp.ClientResponse, count: int) -> list[tuple[str, Any]]:
    """The next events of the stream, as (name, data)."""
    events = []
    for _ in range(count):
        raw = (await asyncio.wait_for(response.content.readuntil(b"\n\n"), 10)).decode()
        name, data = raw.strip().split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


# ---- metrics and health -------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_metrics_come_as_prometheus_text_or_as_openmetrics_when_asked() -> None:
    registry = CollectorRegistry()
    Counter("warmkv_things", "Things.", registry=registry).inc(3)
    async with serving(ScriptedRouter(), registry=registry) as client:
        status, text, headers = await get(client, "/metrics")
        assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
        assert "warmkv_things_total 3.0" in text
        assert "# EOF" not in text
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        status, text, headers = await get(client, "/metrics", Accept=accept)
        assert (status, headers["Content-Type"].split(";")[0]) == (200, "application/openmetrics-text")
        assert text.endswith("# EOF\n")


@pytest.mark.asyncio
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_to_say_about_our_metrics() -> None:
    registry = Metrics(router="r0", model="tiny-llama", version="0").registry
    async with serving(ScriptedRouter(), registry=registry) as client:
        _, text, _ = await get(client, "/metrics")
    assert "warmkv_prompt_tokens" in text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)  # noqa: ASYNC221
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.asyncio
async def test_a_live_router_is_healthy_even_where_it_is_not_ready() -> None:
    router = ScriptedRouter()
    router.is_ready = False
    async with serving(router) as client:
        assert (await get(client, "/healthz"))[0] == 200


@pytest.mark.asyncio
async def test_readiness_says_why_not() -> None:
    router = ScriptedRouter(workers=2)
    async with serving(router) as client:
        assert (await get(client, "/readyz"))[0] == 200
        router.is_ready = False
        async with client.get("/readyz") as response:
            status, reason, message = await error_of(response)
        assert (status, reason) == (503, "DRAINING")
        router.now.catching_up.append("w1")
        async with client.get("/readyz") as response:
            status, reason, message = await error_of(response)
        assert (status, reason, "w1" in message) == (503, "NO_WORKER_AVAILABLE", True)
        del router.now.catching_up[:]
        router.now.workers[0].state = admin_pb2.WORKER_STATE_LOST
        router.now.workers[1].state = admin_pb2.WORKER_STATE_JOINING
        async with client.get("/readyz") as response:
            status, reason, message = await error_of(response)
        assert (status, reason) == (503, "NO_WORKER_AVAILABLE")
        assert "1 lost, 1 joining" in message
        del router.now.workers[:]
        async with client.get("/readyz") as response:
            assert "No worker has been found yet" in (await error_of(response))[2]


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_page_and_all_its_parts_are_served_with_strict_headers() -> None:
    async with serving(ScriptedRouter()) as client:
        for path in ["/", "/favicon.ico", *(f"/static/{name}" for name in load_assets())]:
            status, _, headers = await get(client, path)
            assert status == 200, path
            policy = headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] == "no-cache"


def test_the_page_names_only_parts_that_exist_and_has_no_inline_code_or_style() -> None:
    assets = {name: asset.body.decode() for name, asset in load_assets().items()}
    named = {name for text in assets.values() for name in re.findall(r"/static/([\w.-]+)", text)}
    assert named <= assets.keys()
    page = assets["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://", page)
    assert re.findall(r"<script[^>]*>", page) == ['<script type="module" src="/static/app.js">']


def test_no_part_of_the_page_reaches_outside_or_parses_markup() -> None:
    for name, asset in load_assets().items():
        text = asset.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|\beval\(", text), name


@pytest.mark.asyncio
async def test_a_browser_that_has_a_part_is_told_so() -> None:
    async with serving(ScriptedRouter()) as client:
        _, _, headers = await get(client, "/static/app.js")
        assert (await get(client, "/static/app.js", **{"If-None-Match": headers["ETag"]}))[0] == 304
        assert (await get(client, "/static/app.js", **{"If-None-Match": '"other"'}))[0] == 200


@pytest.mark.asyncio
@pytest.mark.parametrize("path", ["/static/nothing.js", "/static/..%2fhttp.py", "/static/%2e%2e/http.py", "/nowhere"])
async def test_what_is_not_there_is_a_404_in_json(path: str) -> None:
    async with serving(ScriptedRouter()) as client, client.get(path) as response:
        assert (await error_of(response))[:2] == (404, "NOT_FOUND")


@pytest.mark.asyncio
async def test_a_wrong_method_is_a_405_that_names_the_right_one() -> None:
    async with serving(ScriptedRouter()) as client, client.post("/api/stats") as response:
        assert (await error_of(response))[:2] == (405, "METHOD_NOT_ALLOWED")
        assert "GET" in response.headers["Allow"]


@pytest.mark.asyncio
async def test_a_foreign_host_is_refused_everywhere_but_at_the_probes() -> None:
    async with serving(ScriptedRouter()) as client:
        for path in [
            "/",
            "/static/app.js",
            "/metrics",
            "/api/stats",
            "/api/cache",
            "/api/policy",
            "/events",
            "/nowhere",
        ]:
            async with client.get(path, headers={"Host": "evil.example:8080"}) as response:
                assert (await error_of(response))[:2] == (403, "PERMISSION_DENIED"), path
        for path in ["/healthz", "/readyz"]:
            assert (await get(client, path, Host="10-0-0-5.pod.cluster"))[0] == 200


@pytest.mark.asyncio
async def test_a_configured_host_is_served() -> None:
    async with serving(ScriptedRouter(), config={"http_allowed_hosts": ("router.example",)}) as client:
        assert (await get(client, "/metrics", Host="router.example:8080"))[0] == 200


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_stats_are_the_routers_numbers() -> None:
    router = ScriptedRouter()
    router.advance()
    async with serving(router) as client:
        status, text, headers = await get(client, "/api/stats")
    stats = json.loads(text)
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    assert stats["time_ms"] == router.now.time_ms
    assert stats["prompt_tokens"]["device"] == router.now.prompt_tokens.device
    assert stats["requests"] == {"OK": 20}
    assert stats["workers"][1]["state"] == "WORKER_STATE_READY"
    assert stats["prefixes"][0]["held"][0]["device_tokens"] == router.now.prefixes[0].held[0].device_tokens


@pytest.mark.asyncio
async def test_the_tiers_of_all_workers_are_those_that_they_reported() -> None:
    router = ScriptedRouter()
    tier = router.store.workers.add(worker="w0").tiers.add(hits=1 << 40, misses={"absent": 7}, problem="none")
    async with serving(router) as client:
        status, text, headers = await get(client, "/api/cache")
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    (worker,) = json.loads(text)["workers"]
    assert worker["tiers"][0]["hits"] == tier.hits, "a number, not a text"
    assert (worker["tiers"][0]["misses"], worker["tiers"][0]["problem"]) == ({"absent": 7}, "none")


@pytest.mark.asyncio
async def test_the_stream_starts_with_the_history_and_goes_on_with_frames() -> None:
    router = ScriptedRouter()
    async with serving(router) as client:
        async with client.get("/events") as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            assert response.headers["Cache-Control"] == "no-store"
            await read_events(response, 3)
        router.advance()
        async with client.get("/events") as response:
            (first, history), (second, frame) = await read_events(response, 2)
    assert (first, second) == ("history", "stats")
    assert history["fields"] == list(POINT_FIELDS)
    assert (history["router"], history["model"], history["period_ms"]) == ("r0", "tiny-llama", 20)
    assert len(history["points"]) >= 3
    assert frame["point"][0] == frame["stats"]["time_ms"] == router.now.time_ms


@pytest.mark.asyncio
async def test_listeners_share_one_snapshot_a_period() -> None:
    router = ScriptedRouter()
    async with (
        serving(router) as client,
        client.get("/events") as one,
        client.get("/events") as two,
        client.get("/events") as three,
    ):
        streams = [dict(await read_events(stream, 1)) for stream in (one, two, three)]
        assert all("history" in stream for stream in streams)
        before = len(router.snapshots)
        frames = await asyncio.gather(*(read_events(stream, 10) for stream in (one, two, three)))
        taken = len(router.snapshots) - before
    assert all(len(each) == 10 for each in frames)
    assert taken < 20, "three listeners must not take three snapshots a period"


@pytest.mark.asyncio
async def test_one_listener_too_many_is_told_to_come_back() -> None:
    async with serving(ScriptedRouter(), max_listeners=1) as client:
        async with client.get("/events") as first:
            await read_events(first, 2)
            async with client.get("/events") as second:
                assert (await error_of(second))[:2] == (429, "OVERLOADED")
                assert int(second.headers["Retry-After"]) > 0
        assert await admitted(client)


@pytest.mark.asyncio
async def test_a_listener_that_does_not_read_is_dropped_and_others_go_on() -> None:
    router = ScriptedRouter()
    router.now.workers[0].problem = "x" * 400_000
    async with serving(router, max_listeners=2, max_queued_frames=3) as client:
        with socket.socket() as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            base = client._base_url
            assert base is not None
            idle.connect((base.host, base.port))
            idle.sendall(f"GET /events HTTP/1.1\r\nHost: {base.host}:{base.port}\r\n\r\n".encode())
            async with client.get("/events") as reader:
                await read_events(reader, 30)
                assert await admitted(client), "the idle listener still holds its place"
                await read_events(reader, 3)


async def admitted(client: aiohttp.ClientSession) -> bool:
    """Whether /events takes a listener within some seconds."""
    for _ in range(100):
        async with client.get("/events") as response:
            if response.status == 200:
                return True
        await asyncio.sleep(0.05)
    return False


@pytest.mark.asyncio
async def test_streams_end_when_the_router_stops() -> None:
    async with serving(ScriptedRouter()) as client:
        response = await client.get("/events")
        await read_events(response, 2)
        reading = asyncio.create_task(response.content.read())
    await asyncio.wait_for(asyncio.wait([reading]), 5)
    assert reading.done()
    response.close()


@pytest.mark.asyncio
async def test_a_defect_is_a_500_whose_id_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ScriptedRouter):
        def get_policy(self) -> admin_pb2.GetPolicyResponse:
            raise ZeroDivisionError("a secret detail")

    async with serving(Broken()) as client, client.get("/api/policy") as response:
        status, reason, message = await error_of(response)
    assert (status, reason) == (500, "INTERNAL")
    assert "secret" not in message
    [record] = [record for record in caplog.records if record.message == "http request failed"]
    assert record.__dict__["error_id"] in message


# ---- policy --------------------------------------------------------------------------------------------------------

CHANGE = {"policy": {"name": "cache_aware", "weights": {"queue": 2.5}}, "shared_tier_reads": False}


async def csrf_token(client: aiohttp.ClientSession, **headers: str) -> str:
    return str(json.loads((await get(client, "/api/policy", **headers))[1])["csrf_token"])


@pytest.mark.asyncio
async def test_the_policy_is_told_with_its_choices_and_the_callers_role() -> None:
    async with serving(ScriptedRouter()) as client:
        _, text, headers = await get(client, "/api/policy")
    body = json.loads(text)
    assert body["policy"]["name"] == "round_robin"
    assert [one["name"] for one in body["available"]] == ["round_robin", "least_loaded", "cache_aware"]
    assert body["available"][2]["weights"][0]["default_value"] == 1.0
    assert (body["role"], body["version"], body["shared_tier_reads"]) == ("admin", 1, True)
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.asyncio
async def test_setting_the_policy_reaches_the_router() -> None:
    router = ScriptedRouter()
    async with serving(router) as client:
        headers = {CSRF_HEADER: await csrf_token(client), "Origin": str(client._base_url).rstrip("/")}
        async with client.post("/api/policy", json=CHANGE, headers=headers) as response:
            body = await response.json()
    assert (body["policy"]["name"], body["policy"]["weights"]["queue"], body["version"]) == ("cache_aware", 2.5, 2)
    assert dict(router.applied[0].policy.weights) == {"queue": 2.5}
    assert router.now.shared_tier_reads is False


@pytest.mark.asyncio
async def test_every_process_has_a_token_of_its_own() -> None:
    async with serving(ScriptedRouter()) as one, serving(ScriptedRouter()) as two:
        first, second = await csrf_token(one), await csrf_token(two)
    assert first != second
    assert min(len(first), len(second)) >= 32


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({CSRF_HEADER: None}, (403, "PERMISSION_DENIED")),
        ({CSRF_HEADER: "guess"}, (403, "PERMISSION_DENIED")),
        ({"Content-Type": "text/plain"}, (400, "INVALID_REQUEST")),
        ({"Content-Type": "application/x-www-form-urlencoded"}, (400, "INVALID_REQUEST")),
        ({"Origin": "http://evil.example"}, (403, "PERMISSION_DENIED")),
        ({"Origin": "null"}, (403, "PERMISSION_DENIED")),
        ({"Sec-Fetch-Site": "cross-site"}, (403, "PERMISSION_DENIED")),
        ({"Host": "evil.example"}, (403, "PERMISSION_DENIED")),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, (403, "PERMISSION_DENIED")),
    ],
)
async def test_what_a_foreign_page_could_send_changes_nothing(
    headers: dict[str, str | None], expected: tuple[int, str]
) -> None:
    router = ScriptedRouter()
    async with serving(router) as client:
        good = {CSRF_HEADER: await csrf_token(client), "Content-Type": "application/json"}
        sent = {name: value for name, value in {**good, **headers}.items() if value is not None}
        async with client.post("/api/policy", data=json.dumps(CHANGE), headers=sent) as response:
            assert (await error_of(response))[:2] == expected
    assert router.applied == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "body",
    ["", "no json", "[]", "7", '{"policy": 7}', '{"unknown": 1}', '{"policy": {"weights": {"queue": "x"}}}',
     '{"policy": {"name": "nobody_knows"}}', '{"shared_tier_reads": "yes"}',
     "[" * 60_000, '{"policy":' * 6_000, '{"policy": {"weights": {"queue": %s}}}' % ("[" * 900 + "]" * 900)],
)  # fmt: skip
async def test_a_body_that_is_no_policy_is_a_400_that_says_what_to_send(body: str) -> None:
    router = ScriptedRouter()
    async with serving(router) as client:
        headers = {CSRF_HEADER: await csrf_token(client), "Content-Type": "application/json"}
        async with client.post("/api/policy", data=body, headers=headers) as response:
            status, reason, message = await error_of(response)
    assert (status, reason) == (400, "INVALID_REQUEST")
    assert "Send" in message or "Use" in message
    assert router.applied == []


@pytest.mark.asyncio
async def test_a_huge_body_is_refused() -> None:
    async with serving(ScriptedRouter()) as client:
        headers = {CSRF_HEADER: await csrf_token(client), "Content-Type": "application/json"}
        async with client.post("/api/policy", data=b" " * (1 << 20), headers=headers) as response:
            assert (await error_of(response))[0] == 413


# ---- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_with_keys_data_needs_one_and_the_page_and_scrapers_do_not(keys: ApiKeys) -> None:
    async with serving(ScriptedRouter(), authenticate=keys.authenticate) as client:
        for path in ["/api/stats", "/api/cache", "/api/policy", "/events"]:
            async with client.get(path) as response:
                assert (await error_of(response))[:2] == (401, "UNAUTHENTICATED"), path
                assert response.headers["WWW-Authenticate"] == "Bearer"
            for header in ["Bearer wrong", "Basic dXNlcg==", "Bearer \xff"]:
                async with client.get(path, headers={"Authorization": header}) as response:
                    assert response.status == 401, header
            async with client.get(path, headers=USER) as response:
                assert response.status == 200, path
        for path in ["/", "/static/app.js", "/metrics", "/healthz", "/readyz"]:
            assert (await get(client, path))[0] == 200, path


@pytest.mark.asyncio
async def test_only_an_admin_sets_the_policy(keys: ApiKeys) -> None:
    router = ScriptedRouter()
    async with serving(router, authenticate=keys.authenticate) as client:
        token = await csrf_token(client, **USER)
        for headers, status in [({}, 401), (USER, 403), (ADMIN, 200)]:
            async with client.post("/api/policy", json=CHANGE, headers={CSRF_HEADER: token, **headers}) as response:
                assert response.status == status
    assert len(router.applied) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("configured", "headers", "query", "shown"),
    [
        (True, ADMIN, "?show_prompts=1", True),
        (True, ADMIN, "", False),
        (True, USER, "?show_prompts=1", False),
        (False, ADMIN, "?show_prompts=1", False),
    ],
)
async def test_prompts_are_shown_only_where_configured_asked_for_and_to_admins(
    keys: ApiKeys, configured: bool, headers: dict[str, str], query: str, shown: bool
) -> None:
    router = ScriptedRouter()
    router.advance()
    async with serving(router, config={"show_prompts": configured}, authenticate=keys.authenticate) as client:
        text = (await get(client, f"/api/stats{query}", **headers))[1]
        async with client.get(f"/events{query}", headers=headers) as response:
            streamed = json.dumps((await read_events(response, 2))[1])
    assert ("travel agent" in text) is shown
    assert ("travel agent" in streamed) is shown
