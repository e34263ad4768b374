"""What keeps other web pages out of the HTTP side: the Host check, the CSRF check and the response headers.

Covers browsers only. Who may do what is `router.auth`'s matter.

Two attacks are meant. **DNS rebinding**: a page of evil.example makes its own name resolve to 127.0.0.1 and then reads
us as its own origin; its requests carry `Host: evil.example`, so a Host that is not ours is refused. Addresses cannot
be rebound, only names can. **Cross-site request forgery**: a page posts to us blindly; it can neither set our header
nor read our token, and its requests carry its `Origin`.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from router.config import RouterConfig
from router.errors import InvalidRequest, PermissionDenied

CSRF_HEADER = "x-warmkv-csrf"

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class HostGuard:
    """Decides whether a `Host` header names this router.

    Accepted: `localhost`, loopback addresses, the bind host, the configured names and, unless bound to loopback, any
    literal address.
    """

    def __init__(self, config: RouterConfig) -> None:
        bind = config.http_host.lower()
        self._names = {"localhost", bind, *(name.lower() for name in config.http_allowed_hosts)}
        self._any_address = not _is_loopback(bind)

    def check(self, header: str | None) -> None:
        """Accept the header or raise.

        Raises:
            PermissionDenied: it names somebody else.
        """
        host = _hostname(header or "")
        if host in self._names or _is_loopback(host) or (self._any_address and _is_address(host)):
            return
        raise PermissionDenied(
            f"The Host header {header!r} is not a name of this router. Address it by localhost or by its bind address, "
            "or add the name to http_allowed_hosts."
        )


def check_same_origin(headers: Mapping[str, str]) -> None:
    """Refuse a request that a browser says comes from another origin.

    Raises:
        PermissionDenied: `Origin` or `Sec-Fetch-Site` tells of another origin.
    """
    origin = headers.get("Origin")
    foreign = origin is not None and urlsplit(origin).netloc != headers.get("Host")
    if foreign or headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        raise PermissionDenied(
            f"A page of another origin ({origin or 'unnamed'}) may not change this router. Use its own dashboard, "
            "or `warmkv policy set`."
        )


def check_csrf(headers: Mapping[str, str], token: str) -> None:
    """Refuse a request that a plain form or a foreign page could have sent.

    Raises:
        InvalidRequest: the body is not declared as JSON.
        PermissionDenied: the token is missing or wrong.
    """
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest("The body must be JSON. Send it with `Content-Type: application/json`.")
    if not hmac.compare_digest(headers.get(CSRF_HEADER, "").encode(errors="surrogateescape"), token.encode()):
        raise PermissionDenied(
            f"The header {CSRF_HEADER} does not hold this process's token. Read `csrf_token` from GET /api/policy "
            "again (it changes with every start of the router)."
        )


def _hostname(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
