"""What `warmkv doctor` says about the shared tier: every server of it, how it is set up, and its clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deploy.finding import Finding
from deploy.quantities import format_size
from deploy.settings import Settings
from kvstore.redis.address import is_cluster, mask_url, parse_address, server_urls

_CLOCK_TOLERANCE_S = 1.0
_REDIS_TIMEOUT_S = 3.0


def check_redis(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """The shared tier: reachable, how it is set up, and whether its clock agrees with ours."""
    if settings.redis.url is None:
        yield Finding("ok", "redis", "none named (--redis URL): workers share no tier, and read one another's RAM")
        return
    import redis

    url = settings.redis.url.get_secret_value()
    try:
        servers = server_urls(url, _REDIS_TIMEOUT_S)
    except redis.RedisError as error:  # no sentinel names the primary
        yield _redis_failure(mask_url(url), error, str(error))
        return
    for server in servers:
        yield from _redis_findings(server, settings, in_cluster=is_cluster(url))


def _redis_findings(url: str, settings: Settings, *, in_cluster: bool) -> Iterator[Finding]:
    import redis

    from kvstore.redis.inspection import inspect
    from kvstore.redis.judgement import judge, judge_events

    try:
        server = inspect(url, _REDIS_TIMEOUT_S)
    except (redis.RedisError, OSError) as error:
        yield _redis_failure(mask_url(url), error, parse_address(url).masked(str(error)))
        return
    facts = server.facts
    yield Finding("ok", "redis", f"{mask_url(url)}: {server.version}, holds {format_size(facts.used_memory)}")
    if facts.maxmemory and facts.policy != "noeviction":
        limit, share = format_size(facts.maxmemory), facts.used_memory / facts.maxmemory
        yield Finding("ok", "redis", f"limit {limit}, {share:.0%} of it in use, evicts by {facts.policy}")
    advice = judge(facts, in_cluster=in_cluster)
    if settings.redis.watch == "listen" and server.events is not None:
        advice += judge_events(server.events)
    for each in advice:
        yield Finding("warn", "redis", each.found, each.remedy)
    yield _clock_finding(server.clock_s)


def _redis_failure(shown: str, error: Exception, said: str) -> Finding:
    from kvstore.redis.facts import remedy

    found, _, what_to_do = remedy(error, shown, said).rpartition("; ")
    return Finding("fail", "redis", found, f"{what_to_do}; until then requests go on without the shared tier")


def _clock_finding(clock_s: float | None) -> Finding:
    import time

    if clock_s is None:
        return Finding("ok", "clock", "not compared with that of Redis: this login may not ask for its TIME")
    skew = abs(time.time() - clock_s)
    if skew > _CLOCK_TOLERANCE_S:
        return Finding("warn", "clock", f"differs from that of Redis by {skew:.1f} s", "let NTP set both clocks")
    return Finding("ok", "clock", f"agrees with that of Redis within {skew:.2f} s")
