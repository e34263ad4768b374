"""Keyrings, and that the protection is the standard one: held against another implementation of each standard."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import pickle
import threading

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from kvstore import crypto
from kvstore.crypto import BlockKeys, Keyring, Protection
from kvstore.errors import KeyringError

FIRST, SECOND = bytes(range(32)), bytes(range(1, 33))
NAMESPACE = b"n" * 32
SALT = b"salt salt salt s"
NONCE = SALT + b"nonce nonce "


def line(key_id: str, secret: bytes = FIRST) -> str:
    return f"{key_id}:{base64.b64encode(secret).decode()}"


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869, one block of output."""
    return hmac.digest(hmac.digest(salt, secret, hashlib.sha256), info + b"\x01", hashlib.sha256)


def expanded(key: bytes) -> bytes:
    """The second half of RFC 5869, with a salt of this format as the context."""
    return hmac.digest(key, b"warmkv salt " + SALT + b"\x01", hashlib.sha256)


def keys_of(*secrets: tuple[str, bytes], namespace: bytes = NAMESPACE) -> BlockKeys:
    return Keyring(dict(secrets)).for_namespace(namespace)


@given(header=st.binary(max_size=64), body=st.binary(min_size=1, max_size=200))
def test_encryption_is_aes_256_gcm_under_an_hkdf_key(header: bytes, body: bytes) -> None:
    tag, stored = keys_of(("a", FIRST)).protect(Protection.ENCRYPT, NONCE, header, memoryview(body))
    key = expanded(hkdf(FIRST, NAMESPACE, b"warmkv block encrypt"))
    assert bytes(stored) + tag == AESGCM(key).encrypt(NONCE[16:], body, header)


@given(header=st.binary(max_size=64), body=st.binary(min_size=1, max_size=200))
def test_authentication_is_gmac_under_an_hkdf_key_of_its_own(header: bytes, body: bytes) -> None:
    tag, stored = keys_of(("a", FIRST)).protect(Protection.AUTHENTICATE, NONCE, header, memoryview(body))
    key = expanded(hkdf(FIRST, NAMESPACE, b"warmkv block authenticate"))
    assert stored == body
    assert tag == AESGCM(key).encrypt(NONCE[16:], b"", header + body)


def test_the_keys_are_those_that_this_version_derived_first() -> None:
    tags = [keys_of(("a", FIRST)).protect(how, NONCE, b"h", memoryview(b"p"))[0].hex() for how in Protection]
    assert tags == ["d7bd9fc925bc9380884b3e0367ab83bd", "f3b7afb7b7ff0c6dba73bc3270612654"]


@pytest.mark.parametrize("how", Protection)
@given(st.binary(min_size=1, max_size=300))
def test_what_is_protected_can_be_read_in_place(how: Protection, body: bytes) -> None:
    keys = keys_of(("a", FIRST))
    nonce = keys.new_nonce()
    tag, stored = keys.protect(how, nonce, b"header", memoryview(body))
    target = bytearray(stored)
    assert len(stored) == len(body)
    assert keys.unprotect("a", how, nonce, b"header", memoryview(target), tag)
    assert target == body


@pytest.mark.parametrize("how", Protection)
@pytest.mark.parametrize("what", ["nonce", "salt", "header", "payload", "tag", "namespace", "secret", "protection"])
def test_anything_else_than_what_was_protected_is_refused(how: Protection, what: str) -> None:
    tag, stored = keys_of(("a", FIRST)).protect(how, NONCE, b"header", memoryview(b"payload"))
    secret, namespace = SECOND if what == "secret" else FIRST, b"m" * 32 if what == "namespace" else NAMESPACE
    keys = keys_of(("a", secret), namespace=namespace)
    nonce, header = (
        {"nonce": SALT + b"other nonce ", "salt": b"S" + NONCE[1:]}.get(what, NONCE),
        b"Header" if what == "header" else b"header",
    )
    body = bytearray(stored)
    body[3] ^= what == "payload"
    others = {Protection.ENCRYPT: Protection.AUTHENTICATE, Protection.AUTHENTICATE: Protection.ENCRYPT}
    as_what = others[how] if what == "protection" else how
    shown = bytes([tag[0] ^ 1]) + tag[1:] if what == "tag" else tag
    assert not keys.unprotect("a", as_what, nonce, header, memoryview(body), shown)


@pytest.mark.parametrize("length", [0, 4, 8, 12, 15, 17])
def test_a_shorter_tag_is_no_tag(length: int) -> None:
    keys = keys_of(("a", FIRST))
    tag, stored = keys.protect(Protection.AUTHENTICATE, NONCE, b"header", memoryview(b"payload"))
    assert not keys.unprotect(
        "a", Protection.AUTHENTICATE, NONCE, b"header", memoryview(bytearray(stored)), (tag + b"0")[:length]
    )


def test_threads_share_keys() -> None:
    keys, wrong = keys_of(("a", FIRST)), []

    def work(seed: int) -> None:
        body = bytes([seed]) * 5000
        for _ in range(50):
            nonce = keys.new_nonce()
            tag, stored = keys.protect(Protection.ENCRYPT, nonce, b"h", memoryview(body))
            target = bytearray(stored)
            if not keys.unprotect("a", Protection.ENCRYPT, nonce, b"h", memoryview(target), tag) or target != body:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_first_line_writes_and_all_lines_read() -> None:
    text = f"# made in May\n\n{line('2027-05', SECOND)}\n  {line('2026-11')}  \n"
    keyring = Keyring.parse(text)
    assert (keyring.active, keyring.ids) == ("2027-05", ("2027-05", "2026-11"))
    keys = keyring.for_namespace(NAMESPACE)
    tag, _ = keys_of(("2026-11", FIRST)).protect(Protection.AUTHENTICATE, NONCE, b"h", memoryview(b"p"))
    assert keys.active == "2027-05"
    assert keys.unprotect("2026-11", Protection.AUTHENTICATE, NONCE, b"h", memoryview(b"p"), tag)
    assert (keys.knows("2027-05"), keys.knows("2026-11"), keys.knows("2025")) == (True, True, False)


SECRET_TEXT = base64.b64encode(FIRST).decode()
BAD_KEYRINGS = {
    "empty": ("", "empty"),
    "comments only": ("# a:b\n", "empty"),
    "no id": (SECRET_TEXT, "line 1"),
    "an empty id": (f":{SECRET_TEXT}", "line 1"),
    "an id with spaces": (f"my key:{SECRET_TEXT}", "line 1"),
    "an id that is too long": (f"{'k' * 33}:{SECRET_TEXT}", "line 1"),
    "the secret in the id's place": (f"{SECRET_TEXT}:a", "line 1"),
    "no base64": (f"a:{SECRET_TEXT[:-3]}*!=", "base64"),
    "hexadecimal": (f"a:{FIRST.hex()}", "48 bytes"),
    "half of it": (line("a", FIRST[:16]), "16 bytes"),
    "too much": (line("a", FIRST + FIRST), "64 bytes"),
    "an id twice": (f"{line('a')}\n{line('a', SECOND)}", "line 2 .* repeats the id a"),
    "the second line": (f"{line('a')}\n{line('b')[:-9]}", "line 2"),
    "zeros": (line("a", bytes(32)), "guess"),
}


@pytest.mark.parametrize(("text", "says"), BAD_KEYRINGS.values(), ids=BAD_KEYRINGS)
def test_a_keyring_that_cannot_be_used_is_refused_with_a_remedy_and_without_the_secret(text: str, says: str) -> None:
    with pytest.raises(KeyringError, match=says) as caught:
        Keyring.parse(text)
    shown = str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)
    assert "openssl rand" in shown or "give" in shown
    assert SECRET_TEXT[:12] not in shown
    assert FIRST.hex()[:12] not in shown


@given(st.text(max_size=200))
def test_any_text_is_a_keyring_or_is_refused(text: str) -> None:
    with pytest.raises(KeyringError):
        Keyring.parse(text)


def test_secrets_are_neither_shown_nor_sent_away() -> None:
    keyring = Keyring.parse(line("a"))
    for holder in (keyring, keyring.for_namespace(NAMESPACE)):
        shown = repr(holder) + str(holder) + f"{holder}"
        assert "'a'" in shown
        assert not any(piece in shown for piece in (SECRET_TEXT[:8], FIRST.hex()[:8], repr(FIRST)[2:12]))
        for send in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="send the settings"):
                send(holder)


def test_each_writer_has_a_salt_of_its_own_and_another_one_before_its_nonces_run_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crypto, "BLOCKS_A_SALT", 3)
    writers = [keys_of(("a", FIRST)) for _ in range(2)]
    nonces = [[keys.new_nonce() for _ in range(8)] for keys in writers]
    salts = [[nonce[:16] for nonce in drawn] for drawn in nonces]
    for drawn in salts:
        assert [drawn.count(salt) for salt in dict.fromkeys(drawn)] == [3, 3, 2]
    assert len({salt for drawn in salts for salt in drawn}) == 6
    assert len({nonce[16:] for drawn in nonces for nonce in drawn}) == 16
    reader = keys_of(("b", SECOND), ("a", FIRST))
    for keys, drawn in zip(writers, nonces, strict=True):
        for nonce in drawn:
            tag, stored = keys.protect(Protection.ENCRYPT, nonce, b"h", memoryview(b"payload"))
            target = bytearray(stored)
            assert reader.unprotect("a", Protection.ENCRYPT, nonce, b"h", memoryview(target), tag)
            assert target == b"payload"


def test_no_more_blocks_are_written_under_a_salt_than_its_key_may_have() -> None:
    assert crypto.BLOCKS_A_SALT < 2**32  # SP 800-38D, section 8.3


def test_a_key_is_derived_once_a_salt_and_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypto, "KEPT_SUBKEYS", 2)
    derived: list[bytes] = []
    derive = BlockKeys._derive_subkey

    def counted(keys: BlockKeys, key_id: str, how: Protection, salt: bytes) -> bytes:
        derived.append(salt[:1])
        return derive(keys, key_id, how, salt)

    monkeypatch.setattr(BlockKeys, "_derive_subkey", counted)
    keys = keys_of(("a", FIRST))
    for salt in (b"1", b"1", b"2", b"1", b"3", b"1", b"2"):
        keys.protect(Protection.ENCRYPT, salt.ljust(28), b"h", memoryview(b"p"))
    assert derived == [b"1", b"2", b"3", b"2"]


@pytest.mark.parametrize("length", [0, 12, 16, 27, 29])
def test_a_nonce_of_another_length_is_refused(length: int) -> None:
    tag, stored = keys_of(("a", FIRST)).protect(Protection.ENCRYPT, NONCE, b"h", memoryview(b"payload"))
    target = memoryview(bytearray(stored))
    nonce = (NONCE + b"+")[:length]
    assert not keys_of(("a", FIRST)).unprotect("a", Protection.ENCRYPT, nonce, b"h", target, tag)
