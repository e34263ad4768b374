"""Protection of stored blocks by a secret: who wrote them (always), and what they say (if asked for).

Covers: keyrings and their rotation, keys derived per namespace, tags and encryption of one block. Does not cover: where
nonce, tag and key id stand in a stored value (`codec`), where the operator's secret comes from (settings).

A keyring names several secrets; the first writes, the others still read. From each secret and namespace two keys are
derived (HKDF-SHA-256, RFC 5869), one for each way to protect:

    encrypt       AES-256-GCM (NIST SP 800-38D) of the payload, with the header as associated data
    authenticate  GMAC (the same, section 3): an AES-256-GCM tag of header and payload, which stay readable

GMAC, because it is the cheapest sound choice measured on one core with AES instructions, 2 MiB in its cache: 7.1 GB/s,
against 3.4 of Poly1305, 0.4 of keyed BLAKE2b and 0.2 of HMAC-SHA-256.

Nonces are 96 random bits, and SP 800-38D (section 8.3) allows 2^32 of those under one key: 1 PiB of 256 KiB blocks,
which a fleet that shares one secret writes in a day. So nobody writes under the derived keys themselves: who writes
draws a salt of 128 random bits, derives a key from it (HKDF-Expand), and draws another salt after BLOCKS_A_SALT blocks.
The salt stands before the nonce in the block. So a secret need not be rotated for the number of blocks.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import threading
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from kvstore.errors import KeyringError

SECRET_NBYTES = 32
SALT_NBYTES = 16
NONCE_NBYTES = SALT_NBYTES + 12  # a salt, and what GCM calls the nonce
TAG_NBYTES = 16
MAX_KEY_ID_LENGTH = 32

BLOCKS_A_SALT = 1 << 31  # half of what is allowed: a process may be forked
KEPT_SUBKEYS = 1024  # 12 us each to derive again

KEY_LINE = "id:base64-of-32-bytes"
_KEY_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_KEY_ID_LENGTH}}}")
_HOW_TO_MAKE = 'make one with: echo "$(date +%F):$(openssl rand -base64 32)"'


class Protection(StrEnum):
    """What a writer with a secret does to a block. A reader with the secret takes either."""

    AUTHENTICATE = "authenticate"
    ENCRYPT = "encrypt"


class Keyring:
    """An operator's secrets by id. Immutable; shows ids only, never a secret.

    Attributes:
        ids: all of them. active: the first, which writes.
    """

    __slots__ = ("_secrets", "active", "ids")

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        """Take secrets of SECRET_NBYTES each, the active one first.

        Raises:
            KeyringError: there is none, or an id or a secret cannot be used.
        """
        if not secrets:
            raise KeyringError(f"the keyring is empty; give it a line {KEY_LINE}; {_HOW_TO_MAKE}")
        for key_id, secret in secrets.items():
            _check(key_id, secret)
        self._secrets = dict(secrets)
        self.ids = tuple(secrets)
        self.active = self.ids[0]

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """A keyring from lines `id:base64-of-32-bytes`; the first is active. Empty lines and `#` lines are skipped.

        Raises:
            KeyringError: a line cannot be used; it is named by its number, never by its text.
        """
        secrets: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key_id, secret = _parse_line(number, line.strip())
            if key_id in secrets:
                raise KeyringError(f"line {number} of the keyring repeats the id {key_id}; give every key its own")
            secrets[key_id] = secret
        return cls(secrets)

    def for_namespace(self, namespace: bytes) -> BlockKeys:
        """The keys of one namespace (`HashScheme.digest()`)."""
        return BlockKeys(
            self.active,
            {(i, p): _derive(s, namespace, p) for i, s in self._secrets.items() for p in Protection},
        )

    def __repr__(self) -> str:
        return f"Keyring(ids={self.ids!r})"

    def __reduce__(self) -> str:
        raise TypeError("a keyring is not pickled, because it holds secrets; send the settings instead")


class BlockKeys:
    """The keys of one namespace. Thread-safe.

    Attributes:
        active: id of the key that writes.
    """

    __slots__ = ("_keys", "_left", "_lock", "_salt", "_subkey", "active")

    def __init__(self, active: str, keys: Mapping[tuple[str, Protection], bytes]) -> None:
        self.active = active
        self._keys = dict(keys)
        self._lock = threading.Lock()
        self._salt = b""
        self._left = 0  # blocks that may be written under the salt
        self._subkey = lru_cache(KEPT_SUBKEYS)(self._derive_subkey)

    def new_nonce(self) -> bytes:
        """NONCE_NBYTES for one call of `protect`."""
        with self._lock:
            if self._left == 0:
                self._salt, self._left = os.urandom(SALT_NBYTES), BLOCKS_A_SALT
            self._left -= 1
            salt = self._salt
        return salt + os.urandom(NONCE_NBYTES - SALT_NBYTES)

    def knows(self, key_id: str) -> bool:
        """Whether there is a key of this id."""
        return (key_id, Protection.ENCRYPT) in self._keys

    def protect(
        self, how: Protection, nonce: bytes, header: bytes | memoryview, payload: memoryview
    ) -> tuple[bytes, memoryview]:
        """Tag and payload to store: the given payload, or its ciphertext of the same length in a new buffer.

        Args:
            how: what to do.
            nonce: `self.new_nonce()`; never used twice.
            header: the bytes that the tag covers besides the payload.
            payload: contiguous; not changed.
        """
        context = self._cipher(self.active, how, nonce).encryptor()
        context.authenticate_additional_data(header)
        stored = payload
        if how is Protection.ENCRYPT:
            stored = memoryview(context.update(payload))
        else:
            context.authenticate_additional_data(payload)
        context.finalize()
        return context.tag, stored

    def unprotect(
        self, key_id: str, how: Protection, nonce: bytes, header: bytes | memoryview, payload: memoryview, tag: bytes
    ) -> bool:
        """Verify the tag and make `payload` the raw bytes, in place; whether the tag is right.

        `payload` must be writable when it is encrypted, and holds garbage if the tag is wrong.

        Raises:
            KeyError: no such key; see `knows`.
        """
        if len(tag) != TAG_NBYTES or len(nonce) != NONCE_NBYTES:
            return False
        context = self._cipher(key_id, how, nonce).decryptor()
        context.authenticate_additional_data(header)
        if how is Protection.ENCRYPT:
            context.update_into(payload, payload)
        else:
            context.authenticate_additional_data(payload)
        try:
            context.finalize_with_tag(tag)
        except InvalidTag:
            return False
        return True

    def __repr__(self) -> str:
        return f"BlockKeys(active={self.active!r})"

    def __reduce__(self) -> str:
        raise TypeError("keys are not pickled, because they are secrets; send the settings instead")

    def _cipher(self, key_id: str, how: Protection, nonce: bytes) -> Cipher[GCM]:
        key = self._subkey(key_id, how, nonce[:SALT_NBYTES])
        return Cipher(AES256(key), GCM(nonce[SALT_NBYTES:]))

    def _derive_subkey(self, key_id: str, how: Protection, salt: bytes) -> bytes:
        info = b"warmkv salt " + salt
        return HKDFExpand(algorithm=SHA256(), length=32, info=info).derive(self._keys[key_id, how])


def _check(key_id: str, secret: bytes) -> None:
    if not _KEY_ID.fullmatch(key_id):
        raise KeyringError(f"a key's id has 1 to {MAX_KEY_ID_LENGTH} letters, digits, dots, dashes; write {KEY_LINE}")
    if len(secret) != SECRET_NBYTES:
        raise KeyringError(f"key {key_id} has {len(secret)} bytes, not {SECRET_NBYTES}; {_HOW_TO_MAKE}")
    if len(set(secret)) == 1:
        raise KeyringError(f"key {key_id} is one byte repeated, which anybody can guess; {_HOW_TO_MAKE}")


def _parse_line(number: int, line: str) -> tuple[str, bytes]:
    key_id, colon, encoded = line.partition(":")
    # Nothing of a line is shown before it is known to be an id: a misplaced secret must not get into a log.
    if not colon or not _KEY_ID.fullmatch(key_id):
        raise KeyringError(f"line {number} of the keyring is not {KEY_LINE}; {_HOW_TO_MAKE}")
    try:
        secret = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise KeyringError(f"line {number} of the keyring has no base64 after the colon; {_HOW_TO_MAKE}") from None
    if len(secret) != SECRET_NBYTES:
        raise KeyringError(f"line {number} of the keyring has {len(secret)} bytes, not {SECRET_NBYTES}; {_HOW_TO_MAKE}")
    return key_id, secret


def _derive(secret: bytes, namespace: bytes, purpose: Protection) -> bytes:
    info = b"warmkv block " + purpose.encode()
    return HKDF(algorithm=SHA256(), length=32, salt=namespace, info=info).derive(secret)
