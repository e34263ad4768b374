"""Which Host headers name the router, and which requests a foreign page could have sent."""

from __future__ import annotations

import pytest

from router.config import RouterConfig
from router.errors import InvalidRequest, PermissionDenied
from router.web_guard import CSRF_HEADER, HostGuard, check_csrf, check_same_origin


def guard(host: str = "127.0.0.1", *names: str) -> HostGuard:
    return HostGuard(
        RouterConfig(name="r", model_dir="", model_name="m", http_host=host, http_allowed_hosts=tuple(names))
    )


@pytest.mark.parametrize(
    "header", ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "127.8.8.8"]
)
def test_loopback_names_are_always_ours(header: str) -> None:
    guard().check(header)
    guard("0.0.0.0").check(header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[",
        "user@evil",
        "10.0.0.5",
    ],
)
def test_a_foreign_host_is_refused_on_loopback(header: str | None) -> None:
    with pytest.raises(PermissionDenied, match="http_allowed_hosts"):
        guard().check(header)


def test_bind_host_and_configured_names_are_ours_in_any_case() -> None:
    guard("gpubox").check("GPUBOX:8080")
    guard("127.0.0.1", "router.example").check("Router.Example:80")


def test_addresses_are_ours_unless_bound_to_loopback_since_only_names_can_be_rebound() -> None:
    guard("0.0.0.0").check("10.0.0.5:8080")
    guard("0.0.0.0").check("[fd00::1]:8080")
    with pytest.raises(PermissionDenied):
        guard("0.0.0.0").check("evil.example")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:1", "Origin": "http://evil.example"},
        {"Host": "localhost:1", "Origin": "http://localhost:2"},
        {"Host": "localhost:1", "Origin": "null"},
        {"Host": "localhost:1", "Sec-Fetch-Site": "cross-site"},
        {"Host": "localhost:1", "Sec-Fetch-Site": "same-site", "Origin": "http://localhost:1"},
    ],
)
def test_another_origin_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(PermissionDenied):
        check_same_origin(headers)


def test_the_same_origin_and_programs_without_one_pass() -> None:
    check_same_origin({"Host": "localhost:1", "Origin": "http://localhost:1", "Sec-Fetch-Site": "same-origin"})
    check_same_origin({"Host": "localhost:1"})


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_a_body_that_a_form_can_send_is_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequest, match="Content-Type"):
        check_csrf({"Content-Type": content_type, CSRF_HEADER: "t"}, "t")


@pytest.mark.parametrize("token", [None, "", "T", "tt", "\udcff"])
def test_a_missing_or_wrong_token_is_refused(token: str | None) -> None:
    sent = {} if token is None else {CSRF_HEADER: token}
    with pytest.raises(PermissionDenied, match="csrf_token"):
        check_csrf({"Content-Type": "application/json", **sent}, "t")


def test_json_with_the_token_passes() -> None:
    check_csrf({"Content-Type": "application/json; charset=utf-8", CSRF_HEADER: "t"}, "t")
