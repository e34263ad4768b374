"""Block identity: golden vectors, so that no change of the rules goes unseen, and what must make two blocks differ.

The vectors were made once and are never to be made again: who changes them makes every stored block unreachable, and
has to raise SCHEME_VERSION.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import blocks
from kvstore.blocks import SCHEME_VERSION, BlockHash, HashScheme, block_hashes, short

SCHEME = HashScheme(hashlib.sha256(b"weights").digest(), "L8 KVH4 K64 V64 float32 B16", 16)

# scheme, its digest, its root without a salt, its root with the salt b"tenant a"
SCHEMES = [
    (
        SCHEME,
        "9bede949586c2643cc40d86803ce9718376999a306baa6d3821f2d8efc929de1",
        "c2c8307d3a01b66ac16219b8f133a0dcaabc4e7bd4620bdde4e1f3e750d2ea53",
        "51781bc2591f4787f3cf3ff8d55146b2ac6516d4168e056082eb0745e2777150",
    ),
    (
        replace(SCHEME, adapter=b"a" * 32),
        "deb6130e5d16cbffcf6fc2d250e56cd2a552afdc06f376301df4420644b77001",
        "54b4bddafb2d9185d3703afe3c5fd6d72eaadd485786c3128bd121143252b0a4",
        "d15495a77a8607b02d1c47e9e6e13dfdb2c4858c52fa823dee4ee27db07f1c1e",
    ),
    (
        replace(SCHEME, canonical=True),
        "64744336c1a3448f326a1c246b93706643e4dc3ad9aac85a83f528daf563e7e5",
        "43bb883a77ea13690579078d6e92c671b176088453aec86248bc9819c597baec",
        "16caff028693daac0a0cea6ba75f5397d387ee083323986ceb63d3b57e1b0d3d",
    ),
    (
        replace(SCHEME, tp_size=2),
        "1d22436e2d5ee12a7ae9f716be4b85519246cc61c48790520da21754d1b95bfd",
        "b8c9054153b502071c8c253b1e178e4350a912906d4f5d633e11d31fa07999aa",
        "9c9eac90e4c7401480ac3d16026a7e2c34f7d6024c5c0b361deccb7aed70e536",
    ),
    (
        replace(SCHEME, tp_size=2, tp_rank=1),
        "7d7f1a69858672272a71a42736c10e5a491d13bf5ae69e74c5b550d3f32ba31a",
        "81a45bae8fcfc595467b7fd7bea632c1d49836ab490ebc60957ad595eb73e16d",
        "9cba3fe58afa86b9f17d4a552ca17e34bc5075cb3ceb5781f35ee2bac41d8c26",
    ),
    (
        replace(SCHEME, version=2),
        "01cf1258ed7b3b85b8b5b2c750f1175be1e6d9e97a172416e38258bd9aad5374",
        "9a344d47de4c577cc11d4b028cd481385fedc40216b7cafc04f4cc499748b703",
        "dae2b37f86a2e1912f83225463196b29bd4919c8e027eb64694a9a95f12bd37e",
    ),
    (
        replace(SCHEME, block_size=32),
        "5b29f3a590329f323f23725002c7e884a7917519e842c97810a72cbe463356d3",
        "219df75c0937b75670681cd3a50a18b8bdf8e1824e58896c79d41fd97f74372b",
        "4751b73bbc287263a31bc8b4250e49af1e10492711ac766e2914eb9aea9e3940",
    ),
]
ROOT = BlockHash(bytes.fromhex(SCHEMES[0][3]))
TOKENS = [0, 1, 255, 256, 65535, 65536, 2**31, 2**32 - 1]
CHAIN = [
    "a2265ade8a091bd2b16c497e47c7b1738ec026216bfde81245fed767ce7804a1",
    "72c5bb79fdc96af9cb7fbb921ee8cef2334c83f269f85ab7d383e46eb91f58cb",
    "ae9f0c3ff66a5885ee23d0ee4cbd6658c5bb0df7c9e6cc4813d8344a228d2f10",
    "c85014765a6d1facd704578e4f610379777bff5e32b21310a50781e5ec6692fd",
]
LAST_OF_SINGLES = "92b78a5bfdb104319fd2b4c17ed61f5ca7d4078055d868679dfdebaaac599d84"
LAST_OF_32K = "a371f372e68064a09f218a6177fb23231d0325eb81b85393ccac8684ed93bf75"


def by_hand(tokens: list[int], root: bytes, size: int) -> list[bytes]:
    """The rule of the documentation, written out."""
    names = []
    for start in range(0, len(tokens) // size * size, size):
        root = hashlib.sha256(root + b"".join(struct.pack("<I", t) for t in tokens[start : start + size])).digest()
        names.append(root)
    return names


@pytest.mark.parametrize(("scheme", "digest", "bare_root", "salted_root"), SCHEMES)
def test_schemes_and_roots_are_what_they_always_were(
    scheme: HashScheme, digest: str, bare_root: str, salted_root: str
) -> None:
    assert scheme.digest().hex() == digest
    assert scheme.root(b"").hex() == bare_root
    assert scheme.root(b"tenant a").hex() == salted_root


def test_chains_are_what_they_always_were() -> None:
    assert SCHEME_VERSION == 1
    assert [name.hex() for name in block_hashes(TOKENS * 8, ROOT, 16)] == CHAIN
    assert block_hashes(TOKENS, ROOT, 1)[-1].hex() == LAST_OF_SINGLES
    assert block_hashes(range(32768), ROOT, 16)[-1].hex() == LAST_OF_32K


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_with_another_hash_seed_gives_the_same_names(hash_seed: str) -> None:
    scheme = f"HashScheme(bytes.fromhex({SCHEME.model_fingerprint.hex()!r}), {SCHEME.layout!r}, 16)"
    names = f"block_hashes({TOKENS} * 8, {scheme}.root(b'tenant a'), 16)"
    program = f"from kvstore.blocks import HashScheme, block_hashes; print({names}[-1].hex())"
    root = Path(blocks.__file__).parents[1]
    command = [sys.executable, "-c", program]
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
    assert (
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip() == CHAIN[-1]
    )


class _BigEndianArray:
    """`array.array` as it is on a machine of the other byte order."""

    def __init__(self, code: str, values: Iterable[int]) -> None:
        self._array = array(code, values)
        self._array.byteswap()
        self.itemsize = self._array.itemsize

    def byteswap(self) -> None:
        self._array.byteswap()

    def tobytes(self) -> bytes:
        return self._array.tobytes()


@pytest.mark.skipif(sys.byteorder != "little", reason="stands in for the other byte order")
def test_a_big_endian_machine_gives_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "array", _BigEndianArray)
    assert [name.hex() for name in block_hashes(TOKENS * 8, ROOT, 16)] == CHAIN


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 9))
def test_names_follow_the_documented_rule(tokens: list[int], size: int) -> None:
    assert block_hashes(tokens, ROOT, size) == by_hand(tokens, ROOT, size)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_a_name_covers_every_token_before_it(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
    same = [a == b for a, b in zip(block_hashes(tokens, ROOT, 2), block_hashes(changed, ROOT, 2), strict=True)]
    assert same == [number < place // 2 for number in range(len(tokens) // 2)]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_u32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes([1, token], ROOT, 1)


def test_every_field_of_a_scheme_counts() -> None:
    others = {
        "model_fingerprint": b"x" * 32,
        "layout": "L8 KVH4 K64 V64 float32 B32",
        "block_size": 8,
        "adapter": b"x",
        "canonical": True,
        "tp_size": 4,
        "tp_rank": 3,
        "version": 9,
    }
    assert set(others) == {field.name for field in fields(HashScheme)}
    changed = [replace(SCHEME, **{name: value}) for name, value in others.items()]  # type: ignore[arg-type]
    assert len({scheme.digest() for scheme in [SCHEME, *changed]}) == len(changed) + 1
    assert [SCHEME.differences(scheme) for scheme in changed] == [[name] for name in others]
    assert SCHEME.differences(replace(SCHEME)) == []


def test_a_block_made_under_one_adapter_is_never_found_under_another() -> None:
    tokens, salt = list(range(160)), b"tenant a"
    schemes = [replace(SCHEME, adapter=adapter) for adapter in (b"", b"a" * 32, b"b" * 32, b"a" * 31)]
    chains = [block_hashes(tokens, scheme.root(salt), SCHEME.block_size) for scheme in schemes]
    names = [name for chain in chains for name in chain]
    assert len(names) == 40
    assert len(set(names)) == len({short(name) for name in names}) == 40
    roots = {scheme.root(tenant) for scheme in schemes for tenant in (b"", b"tenant a", b"tenant b")}
    assert len(roots) == 12  # neither does a tenant's salt make up for an adapter


def test_bytes_cannot_move_from_one_field_to_the_next() -> None:
    moved = replace(SCHEME, model_fingerprint=SCHEME.model_fingerprint + b"L", layout=SCHEME.layout[1:])
    assert moved.digest() != SCHEME.digest()


def test_tenants_share_no_block() -> None:
    names = [block_hashes(TOKENS, SCHEME.root(salt), 2) for salt in (b"", b"a", b"b", b"ab")]
    assert len({name for chain in names for name in chain}) == 16


def test_a_short_name_is_the_beginning_of_the_full_one() -> None:
    assert short(ROOT) == ROOT[:16]
