"""The kind of Redis tier that a URL asks for."""

from __future__ import annotations

import pytest

from kvstore.codec import BlockCodec
from kvstore.errors import TierError
from kvstore.redis.cluster import RedisClusterTier
from kvstore.redis.open import open_redis
from kvstore.redis.tier import RedisTier
from tests.kvstore.blocks_for_tests import LAYOUT
from tests.kvstore.redis.redis_fleets_for_tests import free_ports
from tests.kvstore.redis.redis_for_tests import NAMESPACE


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://127.0.0.1:{}", RedisTier),
        ("unix:///no/such/socket{}", RedisTier),
        ("redis+sentinel://127.0.0.1:{}/blocks", RedisTier),
        ("redis+cluster://127.0.0.1:{}", RedisClusterTier),
    ],
)
def test_a_server_that_is_down_is_a_problem_and_no_error(url: str, kind: type) -> None:
    tier = open_redis(url.format(free_ports(1)[0]), codec=BlockCodec(LAYOUT, NAMESPACE))
    assert type(tier) is kind
    assert "start the server" in tier.stats().problem
    tier.close()


@pytest.mark.parametrize("url", ["http://x", "redis+cluster://", "redis+sentinel://x"])
def test_an_unusable_url_is_refused(url: str) -> None:
    with pytest.raises(TierError, match="write redis://"):
        open_redis(url, codec=BlockCodec(LAYOUT, NAMESPACE))
