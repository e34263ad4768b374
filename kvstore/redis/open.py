"""Which kind of Redis tier a URL asks for."""

from __future__ import annotations

from kvstore.codec import BlockCodec
from kvstore.redis.address import is_cluster
from kvstore.redis.cluster import RedisClusterTier
from kvstore.redis.tier import DEFAULT_TIMEOUT_S, RedisTier
from kvstore.redis.watch import Watching


def open_redis(
    url: str, *, codec: BlockCodec, timeout_s: float = DEFAULT_TIMEOUT_S, watching: Watching = Watching.LISTEN
) -> RedisTier | RedisClusterTier:
    """The shared tier that a URL names: one server, the primary behind Sentinel, or a cluster.

    Args:
        url: see `address.URL_FORMS`.
        codec, timeout_s, watching: as in `RedisTier`.

    Raises:
        TierError: the URL cannot be used.
    """
    kind = RedisClusterTier if is_cluster(url) else RedisTier
    return kind(url, codec=codec, timeout_s=timeout_s, watching=watching)
