"""Quotas of the disk tier where a disk differs from RAM: after a restart, and in a folder that it shares."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.disk import index as index_module
from kvstore.disk import space as space_module
from kvstore.disk.tier import DiskTier
from kvstore.tier import Tier
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ROOT, ManualClock, chain, names, payloads
from tests.kvstore.disk.disk_for_tests import SLOT, Place, capacity

BLOCKS = 8


def write(tier: Tier, root: BlockHash, *numbers: int) -> list[BlockHash]:
    """One-block chains."""
    written = []
    for number in numbers:
        metas = chain(1, root=root, first_token=number)
        assert tier.write(metas, payloads(metas)) == 1
        written += names(metas)
    return written


def held(tier: DiskTier) -> set[BlockHash]:
    return {meta.hash for meta in tier.metas()}


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("is_lazy", [False, True])
def test_shares_hold_for_blocks_that_an_earlier_process_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lazy: bool, crashes: bool
) -> None:
    if is_lazy:  # nothing is loaded unless it must be
        monkeypatch.setattr(space_module, "LOADED_BY_STARTER", 0)
        monkeypatch.setattr(index_module, "LONG_LOAD_PAUSE_S", 3600.0)
    place = Place(tmp_path / "blocks", BLOCKS, options={"shares": {ROOT: 3 * capacity(BLOCKS) // BLOCKS}})
    own, borrowed = write(place.tier, ROOT, 0, 1, 2), write(place.tier, OTHER_ROOT, *range(5))
    tier = place.crash() if crashes else place.restart()
    assert tier._books.is_loading == is_lazy
    more = write(tier, OTHER_ROOT, 50, 51)
    assert held(tier) == {*own, *borrowed[2:], *more}, "the oldest of all are within their share"
    tier.check()
    tier = place.restart()
    more_of_own = write(tier, ROOT, 60)
    assert held(tier) == {*own[1:], *borrowed[2:], *more, *more_of_own}, "nobody else is over its share"
    tier.close()


def test_where_another_model_takes_room_each_share_is_as_much_smaller(tmp_path: Path) -> None:
    with_other = DiskTier(tmp_path / "blocks", capacity(4), codec=BlockCodec(LAYOUT, b"m" * 32), clock=ManualClock())
    with_other.close()
    whole = capacity(3 * BLOCKS)
    shares = {ROOT: whole // 2, OTHER_ROOT: whole // 2}
    tier = Place(tmp_path / "blocks", 3 * BLOCKS, wall=ManualClock(time.time()), options={"shares": shares}).tier
    half = tier.num_slots // 2
    assert tier.num_slots < 3 * BLOCKS
    own = write(tier, ROOT, *range(half))
    write(tier, OTHER_ROOT, *range(3 * BLOCKS))
    assert set(own) <= held(tier)
    tier.close()


def test_shares_that_do_not_fit_are_refused_and_the_folder_is_free_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Place(tmp_path / "blocks", BLOCKS, options={"shares": {ROOT: capacity(BLOCKS), OTHER_ROOT: 2 * SLOT}})
    Place(tmp_path / "blocks", BLOCKS).tier.close()
