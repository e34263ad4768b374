"""What a tier promises that honours quotas: each root its share when room is short, and the unused rest to all."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.events import RemovalCause
from kvstore.tier import Tier
from tests.contract.conftest import CAPACITY_BLOCKS, HARNESSES, WITH_QUOTAS, Harness
from tests.kvstore.blocks_for_tests import OTHER_ROOT, ROOT, chain, names, payloads

NOBODYS_ROOT = BlockHash(b"x" * 32)
SHARES = {ROOT: 4, OTHER_ROOT: 2}  # of eight


@contextlib.contextmanager
def tier_with_quotas(kind: str) -> Iterator[Tier]:
    with tempfile.TemporaryDirectory() as folder, WITH_QUOTAS[kind](Path(folder), SHARES) as harness:
        yield harness.tier
        harness.tier.check()
        harness.tier.close()


def write(tier: Tier, root: BlockHash, *numbers: int) -> list[BlockHash]:
    """One-block chains; what the tier took."""
    taken = []
    for number in numbers:
        metas = chain(1, root=root, first_token=number)
        if tier.write(metas, payloads(metas)):
            taken += names(metas)
    return taken


def held(tier: Tier) -> dict[BlockHash, BlockHash]:
    """Root by block."""
    return {meta.hash: meta.root for meta in tier.metas()}  # type: ignore[attr-defined]


def test_a_tier_says_that_it_honours_quotas_if_and_only_if_it_is_tested_here(harness: Harness) -> None:
    assert harness.tier.honours.quota == (harness.tier.name in WITH_QUOTAS)
    assert WITH_QUOTAS.items() <= HARNESSES.items()


@pytest.mark.parametrize("kind", WITH_QUOTAS)
def test_a_root_gets_its_share_back_from_those_who_borrowed_it_oldest_first(kind: str) -> None:
    with tier_with_quotas(kind) as tier:
        borrowed = write(tier, OTHER_ROOT, *range(CAPACITY_BLOCKS))
        assert len(held(tier)) == CAPACITY_BLOCKS
        own = write(tier, ROOT, *range(4))
        assert set(held(tier)) == {*borrowed[4:], *own}


@pytest.mark.parametrize("kind", WITH_QUOTAS)
def test_within_its_share_a_root_loses_nothing_to_others(kind: str) -> None:
    with tier_with_quotas(kind) as tier:
        own = write(tier, ROOT, *range(4))
        for number in range(30):
            write(tier, NOBODYS_ROOT if number % 3 else OTHER_ROOT, 100 + number)
        assert set(own) <= set(held(tier))
        assert len(held(tier)) == CAPACITY_BLOCKS


@pytest.mark.parametrize("kind", WITH_QUOTAS)
def test_who_is_over_its_share_makes_room_of_its_own_blocks_when_nobody_else_is(kind: str) -> None:
    with tier_with_quotas(kind) as tier:
        own, other = write(tier, ROOT, *range(4)), write(tier, OTHER_ROOT, 0, 1)
        first, second = write(tier, NOBODYS_ROOT, 0, 1)
        third = write(tier, NOBODYS_ROOT, 2)
        assert set(held(tier)) == {*own, *other, second, *third}
        assert first not in held(tier)


@pytest.mark.parametrize("kind", WITH_QUOTAS)
@settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(
        st.tuples(st.sampled_from([ROOT, OTHER_ROOT, NOBODYS_ROOT]), st.integers(0, 9), st.booleans()), max_size=40
    )
)
def test_shares_hold_whatever_is_written_and_removed(kind: str, moves: list[tuple[BlockHash, int, bool]]) -> None:
    with tier_with_quotas(kind) as tier:
        for root, number, removes in moves:
            before = held(tier)
            (name,) = names(chain(1, root=root, first_token=number))
            if removes:
                assert tier.remove([name], RemovalCause.INVALID) == (name in before)
                continue
            assert write(tier, root, number) == [name], "nothing is in use, so there is room"
            lost = set(before) - set(held(tier))
            assert len(lost) == (len(before) == CAPACITY_BLOCKS and name not in before)
            counts = Counter(before.values())
            for gone in lost:
                is_over = counts[before[gone]] > SHARES.get(before[gone], CAPACITY_BLOCKS - sum(SHARES.values()))
                assert is_over or before[gone] == root
