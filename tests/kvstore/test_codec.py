"""The stored value's format, and that nothing wrong gets past `BlockCodec.decode`, with and without a secret."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.crypto import Keyring, Protection
from kvstore.errors import CodecError, LayoutError, MissReason
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, chain, payload

NAMESPACE = b"n" * 32
META = BlockMeta(BlockHash(b"h" * 32), BlockHash(b"p" * 32), BlockHash(b"r" * 32), 60.0, 7, 1_800_000_000.0, 3)
OTHER = BlockMeta(BlockHash(b"x" * 32), META.hash, META.root, 60.0, 7)
PAYLOAD = bytes(range(LAYOUT.block_nbytes))
VALUE_NBYTES = HEADER_NBYTES + len(PAYLOAD)

OLD, NEW = bytes(range(32)), bytes(range(100, 132))
KEYRING = Keyring({"new": NEW, "old": OLD})

PLAIN = BlockCodec(LAYOUT, NAMESPACE)
SIGNED = BlockCodec(LAYOUT, NAMESPACE, KEYRING, Protection.AUTHENTICATE)
SECRET = BlockCodec(LAYOUT, NAMESPACE, KEYRING, Protection.ENCRYPT)
CODECS = {"plain": PLAIN, "authenticated": SIGNED, "encrypted": SECRET}
WRONG = (MissReason.CORRUPT, MissReason.FOREIGN, MissReason.TRUNCATED)


@dataclass(frozen=True, slots=True)
class Case:
    """A codec and a value that it wrote."""

    codec: BlockCodec
    value: bytes


def value_of(codec: BlockCodec, meta: BlockMeta = META, body: bytes = PAYLOAD) -> bytes:
    header, stored = codec.encode(meta, body, 1_700_000_000.5)
    return header + bytes(stored)


CASES = {name: Case(codec, value_of(codec)) for name, codec in CODECS.items()}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def read(codec: BlockCodec, value: bytes, expect: BlockHash = META.hash, parent: BlockHash | None = None) -> bytes:
    """The raw payload."""
    body = bytearray(value[HEADER_NBYTES:])
    codec.decode(value[:HEADER_NBYTES], memoryview(body), expect=expect, parent=parent)
    return bytes(body)


def reason(codec: BlockCodec, value: bytes, expect: BlockHash = META.hash) -> MissReason:
    with pytest.raises(CodecError) as caught:
        read(codec, value, expect)
    return caught.value.reason


def checksum(value: bytes) -> bytes:
    seed = xxhash.xxh3_64(value[512:]).intdigest()
    return xxhash.xxh3_64(value[:504], seed=seed).digest()[::-1]


def forged(value: bytes, at: int, new: bytes) -> bytes:
    """The value with other bytes and a checksum that fits: what somebody who knows the format can write."""
    changed = bytearray(value)
    changed[at : at + len(new)] = new
    changed[504:512] = checksum(bytes(changed))
    return bytes(changed)


def test_the_format_is_the_one_that_this_version_wrote_first() -> None:
    record = (
        b"\xdc\x00\x12\x03"
        + b"".join(b"\xc4\x20" + letter * 32 for letter in (b"n", b"h", b"p", b"r"))
        + b"\xb8L2 KVH1 K4 V2 float32 B2"
        + b"\xa7float32\x02\xa3raw\x60"
        + b"\xcb\x41\xd9\x54\xfc\x40\x20\x00\x00"
        + b"\xcb\x40\x4e\x00\x00\x00\x00\x00\x00"
        + b"\xcb\x41\xda\xd2\x74\x80\x00\x00\x00"
        + b"\x07\x03\xa7xxh3-64\xa0\xc4\x00"
    )
    head = b"WKVB" + len(record).to_bytes(2, "little") + record
    value = CASES["plain"].value
    assert value[:504] == head.ljust(504, b"\0")
    assert value[504:512].hex() == "ea8bf5b656c5f172"
    assert value[512:] == PAYLOAD


@pytest.mark.parametrize(("codec", "name"), [(SIGNED, b"\xa8raw+gmac"), (SECRET, b"\xabaes-256-gcm")])
def test_a_protected_header_differs_in_codec_key_id_nonce_tag_and_checksum(codec: BlockCodec, name: bytes) -> None:
    value = value_of(codec)
    fields = msgpack.unpackb(value[6 : 6 + int.from_bytes(value[4:6], "little")])
    assert msgpack.packb(fields[8]) == name
    assert fields[16] == "new"
    assert len(fields[17]) == 28
    plain = msgpack.unpackb(CASES["plain"].value[6:300].rstrip(b"\0") + b"\0")
    assert fields[:8] + fields[9:16] == plain[:8] + plain[9:16]
    assert value[488:504] != bytes(16)
    assert value[504:512] == checksum(value)


@cases
def test_a_header_says_what_was_put_in(case: Case) -> None:
    body = bytearray(case.value[HEADER_NBYTES:])
    header = case.codec.decode(case.value[:HEADER_NBYTES], memoryview(body), expect=META.hash, parent=META.parent)
    assert header == case.codec.parse(case.value[:HEADER_NBYTES])
    assert header.meta == META
    assert (header.version, header.created, header.num_tokens) == (3, 1_700_000_000.5, LAYOUT.block_size)
    assert (header.layout, header.dtype, header.payload_nbytes) == (LAYOUT.describe(), "float32", len(PAYLOAD))
    assert header.namespace == NAMESPACE
    assert body == PAYLOAD


@cases
def test_a_value_has_the_length_that_is_announced(case: Case) -> None:
    assert len(case.value) == case.codec.value_nbytes == VALUE_NBYTES


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_block_without_ttl_keeps_none_and_what_was_given_is_not_changed(codec: BlockCodec) -> None:
    meta = chain(1)[0]
    given_bytes = bytearray(payload(meta.hash))
    header, stored = codec.encode(meta, memoryview(given_bytes), 0)
    assert codec.parse(header).meta == meta
    assert read(codec, header + bytes(stored), meta.hash) == given_bytes == payload(meta.hash)


def test_without_encryption_the_payload_is_not_copied() -> None:
    body = memoryview(bytearray(PAYLOAD))
    for codec in (PLAIN, SIGNED):
        _, stored = codec.encode(META, body, 0)
        body[0] ^= 1
        assert stored[0] == body[0]


@cases
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(case: Case, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, 8 * VALUE_NBYTES - 1))
    broken = bytearray(case.value)
    broken[position // 8] ^= 1 << position % 8
    assert reason(case.codec, bytes(broken)) in WRONG


@cases
def test_a_flipped_bit_in_each_byte_is_found(case: Case) -> None:
    for position in range(VALUE_NBYTES):
        broken = bytearray(case.value)
        broken[position] ^= 1 << position % 8
        assert reason(case.codec, bytes(broken)) in WRONG
        if position >= HEADER_NBYTES:
            assert reason(case.codec, bytes(broken)) is MissReason.CORRUPT


@cases
@given(data=st.data())
def test_any_other_byte_anywhere_is_found(case: Case, data: st.DataObject) -> None:
    broken = bytearray(case.value)
    broken[data.draw(st.integers(0, VALUE_NBYTES - 1))] ^= data.draw(st.integers(1, 255))
    assert reason(case.codec, bytes(broken)) in WRONG


@cases
@given(data=st.data())
def test_a_truncated_value_is_called_truncated(case: Case, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, VALUE_NBYTES - 1))
    assert reason(case.codec, case.value[:length]) is MissReason.TRUNCATED


@cases
@given(extra=st.binary(min_size=1, max_size=700))
def test_an_extended_value_is_corrupt(case: Case, extra: bytes) -> None:
    assert reason(case.codec, case.value + extra) is MissReason.CORRUPT


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@given(value=st.binary(max_size=2 * HEADER_NBYTES))
def test_arbitrary_bytes_are_no_block(codec: BlockCodec, value: bytes) -> None:
    assert reason(codec, value) in WRONG


@given(st.binary(min_size=500, max_size=600))
def test_arbitrary_bytes_behind_our_magic_are_no_block(tail: bytes) -> None:
    assert reason(PLAIN, b"WKVB" + tail) in WRONG


_ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.integers(0, 17), _ANYTHING)
def test_a_field_of_any_other_content_is_refused_or_is_not_looked_at(number: int, content: object) -> None:
    value = CASES["plain"].value
    fields = msgpack.unpackb(value[6 : 6 + int.from_bytes(value[4:6], "little")])
    was, fields[number] = fields[number], content
    record = msgpack.packb(fields)
    if content == was or len(record) > 488 - 6:
        return
    front = (b"WKVB" + len(record).to_bytes(2, "little") + record).ljust(488, b"\0")
    # Parent, root, created, lifetime, priority and turn; key id and nonce say nothing here.
    if number in (3, 4, 10, 11, 12, 13, 14, 16, 17):
        with suppress(CodecError):
            assert read(PLAIN, forged(value, 0, front)) == PAYLOAD
    else:
        assert reason(PLAIN, forged(value, 0, front)) in WRONG


@pytest.mark.parametrize("change", [{"until": float("nan")}, {"ttl_s": float("nan")}, {"turn": -1}, {"priority": -1}])
def test_a_lifetime_or_hint_that_is_none_is_corrupt(change: dict[str, float]) -> None:
    assert reason(PLAIN, value_of(PLAIN, replace(META, **change))) is MissReason.CORRUPT


@cases
@given(data=st.data())
def test_one_payload_under_another_header_is_never_delivered(case: Case, data: st.DataObject) -> None:
    other = value_of(case.codec, OTHER, data.draw(st.binary(min_size=len(PAYLOAD), max_size=len(PAYLOAD))))
    if other[HEADER_NBYTES:] == case.value[HEADER_NBYTES:]:
        return
    assert reason(case.codec, case.value[:HEADER_NBYTES] + other[HEADER_NBYTES:]) is MissReason.CORRUPT
    assert reason(case.codec, other[:HEADER_NBYTES] + case.value[HEADER_NBYTES:]) in WRONG


@cases
def test_another_whole_block_under_this_name_is_foreign(case: Case) -> None:
    assert reason(case.codec, value_of(case.codec, OTHER)) is MissReason.FOREIGN


@cases
def test_a_block_with_another_one_before_it_is_foreign(case: Case) -> None:
    moved = value_of(case.codec, replace(META, parent=BlockHash(b"q" * 32)))
    assert read(case.codec, moved) == PAYLOAD
    with pytest.raises(CodecError, match="parent"):
        read(case.codec, moved, parent=META.parent)


@cases
def test_a_block_of_another_layout_of_the_same_size_is_foreign(case: Case) -> None:
    swapped = KVLayout(layers=2, kv_heads=1, k_dim=2, v_dim=4, dtype="float32", block_size=2)
    assert swapped.block_nbytes == LAYOUT.block_nbytes
    assert reason(replace(case.codec, layout=swapped), case.value) is MissReason.FOREIGN


@cases
def test_a_block_of_another_namespace_is_foreign(case: Case) -> None:
    assert reason(replace(case.codec, namespace=b"m" * 32), case.value) is MissReason.FOREIGN


@cases
def test_a_block_of_another_format_version_is_foreign(case: Case) -> None:
    assert case.value[9] == 3
    assert reason(case.codec, forged(case.value, 9, b"\x02")) is MissReason.FOREIGN
    assert reason(case.codec, forged(case.value, 9, b"\x04")) is MissReason.FOREIGN


@cases
def test_a_value_with_another_magic_is_foreign(case: Case) -> None:
    assert reason(case.codec, b"PNG!" + case.value[4:]) is MissReason.FOREIGN


def test_a_payload_of_another_length_is_refused_when_it_is_written() -> None:
    with pytest.raises(LayoutError):
        PLAIN.encode(META, PAYLOAD[:-1], 0.0)


def test_a_layout_whose_description_does_not_fit_is_refused_when_it_is_written() -> None:
    with pytest.raises(LayoutError, match="does not fit"):
        replace(PLAIN, namespace=bytes(400)).encode(META, PAYLOAD, 0.0)


@pytest.mark.parametrize("codec", [SIGNED, SECRET], ids=["authenticated", "encrypted"])
class TestWithASecret:
    """What somebody can write who knows the format, and not the secret."""

    def test_a_value_without_protection_is_refused(self, codec: BlockCodec) -> None:
        assert reason(codec, CASES["plain"].value) is MissReason.FOREIGN

    def test_a_reader_without_the_secret_refuses_it(self, codec: BlockCodec) -> None:
        assert reason(PLAIN, value_of(codec)) is MissReason.FOREIGN

    @given(data=st.data())
    def test_a_change_with_a_right_checksum_is_not_delivered(self, codec: BlockCodec, data: st.DataObject) -> None:
        value = value_of(codec)
        position = data.draw(st.one_of(st.integers(0, 503), st.integers(512, VALUE_NBYTES - 1)))
        changed = forged(value, position, bytes([value[position] ^ data.draw(st.integers(1, 255))]))
        assert reason(codec, changed) in WRONG

    def test_a_changed_payload_with_a_right_checksum_is_foreign(self, codec: BlockCodec) -> None:
        value = value_of(codec)
        assert reason(codec, forged(value, HEADER_NBYTES, bytes([value[HEADER_NBYTES] ^ 1]))) is MissReason.FOREIGN

    def test_padding_is_protected_too(self, codec: BlockCodec) -> None:
        assert reason(codec, forged(value_of(codec), 480, b"\x01")) is MissReason.FOREIGN

    def test_a_payload_of_another_block_with_a_right_checksum_is_foreign(self, codec: BlockCodec) -> None:
        other = value_of(codec, OTHER, bytes(len(PAYLOAD)))
        assert reason(codec, forged(value_of(codec), HEADER_NBYTES, other[HEADER_NBYTES:])) is MissReason.FOREIGN

    def test_a_value_of_another_secret_under_the_same_id_is_foreign(self, codec: BlockCodec) -> None:
        stranger = replace(codec, keyring=Keyring({"new": bytes(range(50, 82))}))
        assert reason(codec, value_of(stranger)) is MissReason.FOREIGN

    def test_a_value_under_an_unknown_key_id_is_foreign(self, codec: BlockCodec) -> None:
        assert reason(codec, value_of(replace(codec, keyring=Keyring({"newer": NEW})))) is MissReason.FOREIGN

    def test_a_value_of_a_rotated_key_is_read_until_the_key_is_taken_away(self, codec: BlockCodec) -> None:
        before = value_of(replace(codec, keyring=Keyring({"old": OLD})))
        assert read(codec, before) == PAYLOAD
        assert reason(replace(codec, keyring=Keyring({"new": NEW})), before) is MissReason.FOREIGN

    def test_a_reader_takes_either_protection(self, codec: BlockCodec) -> None:
        for protection in Protection:
            assert read(codec, value_of(replace(codec, protection=protection))) == PAYLOAD

    def test_one_protection_cannot_be_passed_for_the_other(self, codec: BlockCodec) -> None:
        value = value_of(codec)
        name, other = (b"\xa8raw+gmac", b"\xa3raw") if codec is SIGNED else (b"\xabaes-256-gcm", b"\xa8raw+gmac")
        changed = value[:488].replace(name, other)
        length = int.from_bytes(value[4:6], "little") + len(other) - len(name)
        front = (changed[:4] + length.to_bytes(2, "little") + changed[6:]).ljust(488, b"\0")
        assert codec.parse(forged(value, 0, front)[:HEADER_NBYTES]).codec == other[1:].decode()
        assert reason(codec, forged(value, 0, front)) is MissReason.FOREIGN

    def test_the_same_block_is_never_written_twice_in_the_same_way(self, codec: BlockCodec) -> None:
        nonces = {codec.parse(value_of(codec)[:HEADER_NBYTES]).nonce for _ in range(100)}
        assert len(nonces) == 100


def test_an_encrypted_payload_shows_nothing_of_the_block() -> None:
    zeros = value_of(SECRET, META, bytes(len(PAYLOAD)))[HEADER_NBYTES:]
    assert len(set(zeros)) > 20
    assert hashlib.sha256(zeros).digest() != hashlib.sha256(value_of(SECRET, META, bytes(len(PAYLOAD)))[512:]).digest()


def test_a_codec_shows_no_secret() -> None:
    for codec in (SIGNED, SECRET):
        shown = repr(codec) + str(codec)
        assert "ids=('new', 'old')" in shown
        assert not any(secret.hex() in shown or repr(secret)[2:20] in shown for secret in (OLD, NEW))
