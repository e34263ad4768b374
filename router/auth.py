"""Who calls: API keys to callers.

Covers: the keys file, its reload, the check of a key. Does not cover: what a role allows (`service`, `http`), quotas.

The file is TOML:

    [[keys]]
    key = "wk-..."                  # or key_sha256 = "<64 hex digits>", so that the file holds no secret
    tenant = "search"
    role = "user"                   # or "admin"; user when left out
    trust_group = "company"         # whose cached blocks may be shared; the tenant's own when left out
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from router.errors import Unauthenticated
from router.protocol import Caller, Role

log = logging.getLogger(__name__)

_FIELDS = frozenset({"key", "key_sha256", "tenant", "role", "trust_group"})
_CHECK_EVERY_S = 1.0
Stamp = tuple[int, int, int]


class KeysFileError(ValueError):
    """The keys file is missing or wrong. The message names the entry, never a key."""


def open_access(tenant: str) -> Callable[[str | None], Caller]:
    """What stands in for keys where there is no keys file: everybody is `tenant`, with the role admin."""
    caller = Caller(tenant=tenant, role=Role.ADMIN, trust_group=tenant)
    return lambda _token: caller


class ApiKeys:
    """The keys of one file. Reads it again when it changed, looking at most once a second.

    A file that became unreadable or wrong changes nothing: the keys read before stay in force, and an error is logged.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            KeysFileError: it is missing, no TOML, or an entry is wrong.
        """
        self._path = Path(path)
        self._clock = clock
        self._stamp = self._stat()
        self._callers = _read(self._path)
        self._checked_at = clock()

    def authenticate(self, token: str | None) -> Caller:
        """The caller of a bearer token; None: none was sent.

        Raises:
            Unauthenticated: no token, or an unknown one.
        """
        self._reload_if_changed()
        if token is None:
            raise Unauthenticated("no API key was sent. Send the header `authorization: Bearer <key>`.")
        digest = hashlib.sha256(token.encode()).digest()
        # Found by digest, so time tells nothing of a key: nobody can choose what his guess hashes to.
        known, caller = self._callers.get(digest, (b"", None))
        if caller is None or not hmac.compare_digest(known, digest):
            raise Unauthenticated("the API key is not known here. Check it, or ask the operator for one.")
        return caller

    def trust_group_of(self, tenant: str) -> str:
        """The group of a tenant's first key; its own name when it has no key."""
        groups = (caller.trust_group for _, caller in self._callers.values() if caller.tenant == tenant)
        return next(groups, tenant)

    def tenants(self) -> frozenset[str]:
        """Those that have keys."""
        return frozenset(caller.tenant for _, caller in self._callers.values())

    def _reload_if_changed(self) -> None:
        if self._clock() - self._checked_at < _CHECK_EVERY_S:
            return
        self._checked_at = self._clock()
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._callers = _read(self._path)
        except KeysFileError as error:
            log.error("API keys were not reloaded; those read before stay in force", extra={"problem": str(error)})
            return
        log.info("API keys were reloaded", extra={"path": str(self._path), "keys": len(self._callers)})

    def _stat(self) -> Stamp:
        try:
            found = self._path.stat()
        except OSError as error:
            raise KeysFileError(f"{self._path} cannot be read ({error.strerror}). Restore it.") from error
        return found.st_mtime_ns, found.st_size, found.st_ino


def bearer_token(authorization: str | None) -> str | None:
    """The token of an `authorization` header.

    Raises:
        Unauthenticated: the header has another form.
    """
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("the authorization header is not `Bearer <key>`. Send it in this form.")
    return token.strip()


def _read(path: Path) -> Mapping[bytes, tuple[bytes, Caller]]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("keys")
    except OSError as error:
        raise KeysFileError(f"{path} cannot be read ({error.strerror}). Restore it.") from error
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise KeysFileError(f"{path} is not valid TOML ({error}). Correct it.") from error
    if not isinstance(entries, list) or not entries:
        raise KeysFileError(f"{path} has no [[keys]]. Add one, or start without a keys file.")
    callers: dict[bytes, tuple[bytes, Caller]] = {}
    for number, entry in enumerate(entries, start=1):
        digest, caller = _parse(entry, f"{path}: [[keys]] number {number}")
        if digest in callers:
            raise KeysFileError(f"{path}: [[keys]] number {number} repeats an earlier key. Remove one of them.")
        callers[digest] = digest, caller
    return callers


def _parse(entry: Any, where: str) -> tuple[bytes, Caller]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) and value for value in entry.values()):
        raise KeysFileError(f"{where}: every field is a text that is not empty. Correct it.")
    if unknown := entry.keys() - _FIELDS:
        raise KeysFileError(f"{where}: unknown fields {sorted(unknown)}. Use {sorted(_FIELDS)}.")
    if "tenant" not in entry:
        raise KeysFileError(f"{where}: tenant is missing. Add it.")
    if entry.get("role", Role.USER) not in tuple(Role):
        raise KeysFileError(f'{where}: the role is neither "user" nor "admin". Correct it.')
    tenant = str(entry["tenant"])
    caller = Caller(tenant, Role(entry.get("role", Role.USER)), str(entry.get("trust_group", tenant)))
    return _digest_of(entry, where), caller


def _digest_of(entry: dict[str, Any], where: str) -> bytes:
    if ("key" in entry) == ("key_sha256" in entry):
        raise KeysFileError(f"{where}: give exactly one of key and key_sha256.")
    if "key" in entry:
        return hashlib.sha256(entry["key"].strip().encode()).digest()
    try:
        digest = bytes.fromhex(entry["key_sha256"])
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise KeysFileError(f"{where}: key_sha256 is not 64 hex digits. Make it by: printf %s KEY | sha256sum")
    return digest
