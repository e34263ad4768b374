"""The stored value's format, and that nothing wrong gets past `decode`."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES, decode, decode_parts, encode_header
from kvstore.errors import CodecError, LayoutError, MissReason
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, chain, payload

META = BlockMeta(BlockHash(b"h" * 32), BlockHash(b"p" * 32), BlockHash(b"r" * 32), 60.0)
PAYLOAD = bytes(range(LAYOUT.block_nbytes))
VALUE = encode_header(META, LAYOUT, PAYLOAD, 1_700_000_000.5) + PAYLOAD


def reason(value: bytes, expect: BlockHash = META.hash, layout: KVLayout = LAYOUT) -> MissReason:
    with pytest.raises(CodecError) as caught:
        decode(value, expect=expect, layout=layout)
    return caught.value.reason


def test_the_format_is_the_one_that_earlier_versions_wrote() -> None:
    record = (
        b"\x9c\x01"
        + b"".join(b"\xc4\x20" + field * 32 for field in (b"h", b"p", b"r"))
        + b"\xb8L2 KVH1 K4 V2 float32 B2"
        + b"\xa7float32\x02\xa3raw\x60"
        + b"\xcb\x41\xd9\x54\xfc\x40\x20\x00\x00"
        + b"\xcb\x40\x4e\x00\x00\x00\x00\x00\x00"
        + b"\xa7xxh3-64"
    )
    head = b"WKVB" + len(record).to_bytes(2, "little") + record
    assert VALUE[:504] == head.ljust(504, b"\0")
    assert VALUE[504:512].hex() == "210c87e09c28a296"
    assert VALUE[512:] == PAYLOAD


def test_a_header_says_what_was_put_in() -> None:
    header = decode(VALUE, expect=META.hash, layout=LAYOUT)
    assert header.meta == META
    assert (header.version, header.created, header.num_tokens) == (1, 1_700_000_000.5, LAYOUT.block_size)
    assert (header.layout, header.dtype, header.payload_nbytes) == (LAYOUT.describe(), "float32", len(PAYLOAD))


def test_a_block_without_ttl_keeps_none() -> None:
    meta = chain(1)[0]
    value = encode_header(meta, LAYOUT, payload(meta.hash), 0) + bytes(payload(meta.hash))
    assert decode(value, expect=meta.hash, layout=LAYOUT).meta == meta


def test_header_and_payload_may_lie_in_two_buffers() -> None:
    head, body = memoryview(VALUE)[:HEADER_NBYTES], bytearray(PAYLOAD)
    assert decode_parts(head, body, expect=META.hash, layout=LAYOUT).hash == META.hash
    body[0] ^= 1
    with pytest.raises(CodecError):
        decode_parts(head, body, expect=META.hash, layout=LAYOUT)


@pytest.mark.parametrize("position", range(len(VALUE)))
def test_a_flipped_byte_anywhere_is_found(position: int) -> None:
    broken = bytearray(VALUE)
    broken[position] ^= 0x10
    assert reason(bytes(broken)) in (MissReason.CORRUPT, MissReason.FOREIGN, MissReason.TRUNCATED)


@given(st.integers(0, len(VALUE) - 1), st.integers(1, 255))
def test_any_other_byte_anywhere_is_found(position: int, difference: int) -> None:
    broken = bytearray(VALUE)
    broken[position] ^= difference
    reason(bytes(broken))


@given(st.integers(0, len(VALUE) - 1))
def test_a_truncated_value_is_called_truncated(length: int) -> None:
    assert reason(VALUE[:length]) is MissReason.TRUNCATED


@given(st.binary(min_size=1, max_size=700))
def test_an_extended_value_is_corrupt(extra: bytes) -> None:
    assert reason(VALUE + extra) is MissReason.CORRUPT


@given(st.binary(max_size=2 * HEADER_NBYTES))
def test_arbitrary_bytes_are_no_block(value: bytes) -> None:
    reason(value)


@given(st.binary(min_size=500, max_size=600))
def test_arbitrary_bytes_behind_our_magic_are_no_block(tail: bytes) -> None:
    reason(b"WKVB" + tail)


def test_another_block_under_this_name_is_foreign() -> None:
    assert reason(VALUE, expect=BlockHash(b"x" * 32)) is MissReason.FOREIGN


def test_a_block_of_another_layout_of_the_same_size_is_foreign() -> None:
    swapped = KVLayout(layers=2, kv_heads=1, k_dim=2, v_dim=4, dtype="float32", block_size=2)
    assert swapped.block_nbytes == LAYOUT.block_nbytes
    assert reason(VALUE, layout=swapped) is MissReason.FOREIGN


def test_a_value_with_another_magic_is_foreign() -> None:
    assert reason(b"PNG!" + VALUE[4:]) is MissReason.FOREIGN


def test_a_payload_of_another_length_is_refused_when_it_is_written() -> None:
    with pytest.raises(LayoutError):
        encode_header(META, LAYOUT, PAYLOAD[:-1], 0.0)


def test_one_payload_under_another_header_is_corrupt() -> None:
    other = hashlib.shake_128(b"other").digest(len(PAYLOAD))
    assert reason(VALUE[:HEADER_NBYTES] + other) is MissReason.CORRUPT
