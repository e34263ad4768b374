"""What the `warmkv cache` commands print for people: tables on standard output, what went wrong below them."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.quantities import format_duration, size_text
from deploy.render import tier_name
from warmkv.v1 import admin_pb2, common_pb2

_HASH_HEX = 12
_STATS = ("worker", "tier", "fill", "blocks", "pinned", "hits", "misses", "stored", "not stored", "removed", "loads")
_WIDTH_WITHOUT_TERMINAL = 200  # so that what is piped is not cut


def print_blocks(found: admin_pb2.ListBlocksResponse) -> None:
    """One line a block; chains stand together, from their first block on."""
    if found.HasField("prompt_held"):
        _print(_held_table(found.prompt_held))
    if found.blocks:
        _print(_blocks_table(in_chains(found.blocks)))
    copies = _counts((tier, 1) for block in found.blocks for tier in block.tiers)
    count = "1 block" if len(found.blocks) == 1 else f"{len(found.blocks)} blocks"
    _print(f"{count} ({copies})" if found.blocks else "no such blocks")
    if found.next_page_token:
        _print(f"more follow: raise --limit, or go on with --page-token {found.next_page_token}")
    _print_problems((each.worker, each.problem) for each in found.problems)


def print_stats(answer: admin_pb2.GetCacheStatsResponse) -> None:
    """One line a tier."""
    table = _table(*_STATS)
    for cache in answer.workers:
        for tier in cache.tiers:
            table.add_row(cache.worker, *_tier_row(tier))
    _print(table if table.row_count else "no worker has reported yet")
    _print_problems((each.worker, _state(each)) for each in answer.workers)
    of_tiers = (
        (f"{each.worker} {tier_name(tier.tier)}", tier.problem) for each in answer.workers for tier in each.tiers
    )
    _print_problems(of_tiers)


def print_warmed(answer: admin_pb2.WarmResponse) -> None:
    """One line a worker."""
    _print(f"{answer.prompt_tokens} tokens, {answer.blocks} full blocks")
    for each in answer.workers:
        if each.problem:
            continue
        if each.HasField("fates"):
            _print(f"{each.worker}: {_fates(each.fates)}")
        else:
            _print(f"{each.worker}: {_looking(each.started)}")
    _print_problems((each.worker, each.problem) for each in answer.workers)


def print_pinned(answer: admin_pb2.PinResponse) -> None:
    """One line a worker, and what to do where nothing was there to be pinned."""
    for each in answer.workers:
        _print(f"{each.worker}: pinned {_tier_counts(each.pinned)}")
    if not any(count.blocks for each in answer.workers for count in each.pinned):
        _print("nothing that could be pinned is held; bring it there by `warmkv cache warm --compute`, then pin it")
    _print_problems((each.worker, each.problem) for each in answer.workers)


def print_unpinned(answer: admin_pb2.UnpinResponse) -> None:
    """One line a worker."""
    for each in answer.workers:
        _print(f"{each.worker}: unpinned {_tier_counts(each.unpinned)}")
    _print_problems((each.worker, each.problem) for each in answer.workers)


def print_cleared(answer: admin_pb2.ClearCacheResponse) -> None:
    """One line a worker."""
    for each in answer.workers:
        _print(f"{each.worker}: dropped {_tier_counts(each.dropped)}")
    if not answer.workers:
        _print("no workers")


def print_checked(answer: admin_pb2.CheckStoreResponse) -> None:
    """One line a worker."""
    for each in answer.workers:
        if not each.problem:
            _print(f"{each.worker}: {f'WRONG: {each.wrong}; report this' if each.wrong else 'OK'}")
    _print_problems((each.worker, each.problem) for each in answer.workers)


def in_chains(blocks: Sequence[admin_pb2.CachedBlock]) -> list[admin_pb2.CachedBlock]:
    """By worker and tenant, every block behind the one before it, as far as that is among them."""
    known = {(block.worker, block.hash) for block in blocks}
    following: dict[tuple[str, str], list[admin_pb2.CachedBlock]] = defaultdict(list)
    starts = []
    for block in blocks:
        if (block.worker, block.parent) in known:
            following[block.worker, block.parent].append(block)
        else:
            starts.append(block)
    starts.sort(key=lambda block: (block.worker, block.tenant, block.first_token, block.hash), reverse=True)
    ordered = []
    while starts:
        ordered.append(block := starts.pop())
        behind = following[block.worker, block.hash]
        starts += reversed([_placed_behind(block, each) for each in behind])
    return ordered


def _placed_behind(block: admin_pb2.CachedBlock, following: admin_pb2.CachedBlock) -> admin_pb2.CachedBlock:
    """The following block with its place in the prompt, where that of the one before it is known."""
    if following.HasField("first_token") or not block.HasField("first_token"):
        return following
    placed = admin_pb2.CachedBlock(first_token=block.first_token + block.tokens)
    placed.MergeFrom(following)
    return placed


def _blocks_table(blocks: Sequence[admin_pb2.CachedBlock]) -> Table:
    table = _table("worker", "block", "after", "tokens", "tenant", "tiers", "TTL", "left", "pinned", "prio", "size")
    for block in blocks:
        first = block.first_token
        table.add_row(
            block.worker,
            block.hash[:_HASH_HEX],
            block.parent[:_HASH_HEX] or "-",
            f"{first}-{first + block.tokens - 1}" if block.HasField("first_token") else "?",
            block.tenant or "?",
            " ".join(tier_name(tier) for tier in block.tiers),
            _ttl(block),
            _duration(block.ttl_left_seconds) if block.HasField("ttl_left_seconds") else "-",
            "yes" if block.pinned else "-",
            str(block.priority),
            size_text(block.bytes),
        )
    return table


def _ttl(block: admin_pb2.CachedBlock) -> str:
    if not block.HasField("ttl_seconds"):
        return "until evicted"
    return _duration(block.ttl_seconds) if block.ttl_seconds else "fixed"


def _held_table(held: admin_pb2.PrefixHolding) -> Table:
    table = _table("worker", f"of the prompt's {held.tokens} tokens: on the device", "on device or host")
    for each in held.held:
        table.add_row(each.worker, str(each.device_tokens), str(each.host_tokens))
    if held.redis_tokens:
        table.add_row("redis", "-", str(held.redis_tokens))
    return table


def _tier_row(tier: admin_pb2.TierCache) -> Sequence[str]:
    share = f" ({tier.used_bytes / tier.capacity_bytes:.0%})" if tier.capacity_bytes else ""
    return (
        tier_name(tier.tier) + ("" if tier.healthy else " (cut off)"),
        size_text(tier.used_bytes) + share,
        str(tier.blocks),
        str(tier.pinned),
        str(tier.hits),
        _reasons(tier.misses),
        str(tier.stores),
        _reasons(tier.store_failures),
        _reasons(tier.removals),
        _loads(tier),
    )


def _loads(tier: admin_pb2.TierCache) -> str:
    """`7 in 12 ms (computing: 90 ms), 1 slower than computing`."""
    if not tier.loads:
        return "-"
    bad = f", {tier.bad_hits} slower than computing" if tier.bad_hits else ""
    return f"{tier.loads} in {tier.load_ms:.0f} ms (computing: {tier.compute_ms:.0f} ms){bad}"


def _looking(blocks: int) -> str:
    if not blocks:
        return "nothing to look for: it is in RAM already, or no slower tier can have it (--compute computes it)"
    counted = f"{blocks} {'block' if blocks == 1 else 'blocks'}"
    return f"looks for {counted} in slower tiers, and brings up what is there, as far as a quarter of host RAM holds it"


def _state(cache: admin_pb2.WorkerCache) -> str:
    state = admin_pb2.WorkerState.Name(cache.state).removeprefix("WORKER_STATE_").lower()
    if cache.problem:
        return f"{state}: {cache.problem}"
    return "" if cache.tiers else f"{state}, and has not reported yet"


def _fates(fates: common_pb2.TokensByFate) -> str:
    found = [(name.name, value) for name, value in fates.ListFields()]
    return ", ".join(
        f"{count} tokens {'computed' if name == 'computed' else 'found on ' + name}" for name, count in found
    )


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()) if count) or "-"


def _tier_counts(counts: Iterable[admin_pb2.ClearCacheResponse.TierCount]) -> str:
    return _counts((each.tier, each.blocks) for each in counts) or "nothing"


def _counts(blocks: Iterable[tuple[int, int]]) -> str:
    """`device 3, host 5`."""
    sums: dict[int, int] = defaultdict(int)
    for tier, count in blocks:
        sums[tier] += count
    return ", ".join(f"{tier_name(tier)} {count}" for tier, count in sorted(sums.items()) if count)


def _duration(seconds: float) -> str:
    return format_duration(round(seconds) if seconds >= 1 else round(seconds, 3))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _print(what: RenderableType) -> None:
    """To a terminal as wide as it is; else in full, without the blanks that fill up a table's last column."""
    text = Text(what) if isinstance(what, str) else what  # texts from outside are no markup
    if sys.stdout.isatty():
        Console(highlight=False).print(text, soft_wrap=isinstance(what, str))
        return
    console = Console(width=_WIDTH_WITHOUT_TERMINAL, highlight=False)
    with console.capture() as captured:
        console.print(text, soft_wrap=isinstance(what, str))
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _print_problems(problems: Iterable[tuple[str, str]]) -> None:
    for who, problem in problems:
        if problem:
            sys.stderr.write(f"{who}: {problem}\n")
