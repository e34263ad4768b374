"""Every tier with blocks of a quantised layout: to a tier they are bytes like any others, of a length of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.codec import BlockCodec
from kvstore.layout import KVLayout
from kvstore.tier import Tier
from tests.contract import conftest as contract
from tests.contract.peer_for_contract import PeerAndItsOwner
from tests.kvstore.blocks_for_tests import LAYOUT, buffers, chain, names, payloads, read_verified
from tests.kvstore.peer.peers_for_tests import NAMESPACE, worker

# Its areas are padded: 8 bytes of K codes, 4 of scales, 4 of V codes, each up to 16.
LAYOUTS = [replace(LAYOUT, kv_dtype="int8"), KVLayout(2, 3, 20, 7, "bfloat16", 2, "fp8_e4m3")]


@pytest.fixture(params=LAYOUTS, ids=KVLayout.describe)
def layout(request: pytest.FixtureRequest) -> KVLayout:
    return request.param


@pytest.fixture(params=contract.HARNESSES)
def quantised(
    request: pytest.FixtureRequest, layout: KVLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tier]:
    if request.param == "peer":
        codec = BlockCodec(layout, NAMESPACE)
        with worker(layout=layout, slots=contract.CAPACITY_BLOCKS, codec=codec) as owner:
            tier = PeerAndItsOwner(owner.server.address, owner.host, codec)
            yield tier
            tier.close()
        return
    monkeypatch.setattr(contract, "LAYOUT", layout)
    with contract.HARNESSES[request.param](tmp_path) as made:
        yield made.tier
        made.tier.check()
        made.tier.close()


def test_blocks_come_back_byte_for_byte_and_a_read_ends_where_one_is_missing(quantised: Tier, layout: KVLayout) -> None:
    metas = chain(6)
    present = metas[:4] + metas[5:]
    assert quantised.write(present, payloads(present, layout)) == 5
    assert quantised.match(names(metas)) == 4
    assert read_verified(quantised, names(metas), layout=layout) == 4
    assert read_verified(quantised, names(metas[5:]), layout=layout) == 1
    assert quantised.read(names(metas[:2]), buffers(2, layout)).count == 2
