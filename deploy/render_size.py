"""What `warmkv size` prints: a table for people, one object for programs. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from deploy.quantities import size_text as bytes_text
from deploy.render import table
from deploy.size import SizedTier, SizePlan
from kvstore.layout import UNQUANTISED, KVLayout


def size_text(plan: SizePlan) -> str:
    """The layout, one line a tier, and what the numbers mean."""
    layout = plan.layout
    lines = [
        f"layout      {layout.describe()}",
        f"token       {bytes_text(layout.token_nbytes)} of K/V{_against_unquantised(layout)}",
        f"block       {layout.block_size} tokens, {bytes_text(layout.block_nbytes)}",
    ]
    if plan.break_even_bytes_per_s is not None:
        needed = f"{speed_text(plan.break_even_bytes_per_s)}: a tier that is slower is beaten by computing"
        lines.append(f"break-even  {needed} {plan.prefill_tokens_per_s:,.0f} tokens/s")
    header = ["tier", "capacity", "stored block", "blocks", "tokens", f"{plan.conversation_tokens:,}-token chats"]
    header += ["bandwidth", "against computing"] if _shows_speed(plan) else []
    lines += ["", table(header, (_row(plan, tier) for tier in plan.tiers)) if plan.tiers else "no tiers"]
    lines += ["", *_notes(plan)]
    return "\n".join(lines)


def size_json(plan: SizePlan) -> str:
    """All of it; bytes as numbers, nothing rounded."""
    layout = plan.layout
    whole = {
        "layout": {**asdict(layout), "token_bytes": layout.token_nbytes, "block_bytes": layout.block_nbytes},
        "workers": plan.workers,
        "conversation_tokens": plan.conversation_tokens,
        "prefill_tokens_per_s": plan.prefill_tokens_per_s,
        "break_even_bytes_per_s": plan.break_even_bytes_per_s,
        "tiers": [
            {
                "tier": tier.name,
                "of": "fleet" if tier.shared else "worker",
                "capacity_bytes": tier.capacity_bytes,
                **asdict(tier.size),
                "conversations": tier.conversations,
                "bytes_per_s": tier.bytes_per_s or None,
            }
            for tier in plan.tiers
        ],
    }
    return json.dumps(whole)


def speed_text(bytes_per_s: float) -> str:
    """`4.23 GB/s`, in the units of networks and disks."""
    for unit, factor in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_s >= factor:
            return f"{bytes_per_s / factor:.3g} {unit}"
    return f"{bytes_per_s / 1e3:.3g} kB/s"


def _against_unquantised(layout: KVLayout) -> str:
    plain = replace(layout, kv_dtype=UNQUANTISED).token_nbytes
    return f" as {layout.kv_dtype}; {bytes_text(plain)} as {layout.dtype}" if layout.quantised else ""


def _shows_speed(plan: SizePlan) -> bool:
    return any(tier.bytes_per_s for tier in plan.tiers)


def _row(plan: SizePlan, tier: SizedTier) -> list[str]:
    size = tier.size
    row = [tier.name, bytes_text(tier.capacity_bytes), bytes_text(size.stored_block_bytes), f"{size.blocks:,}"]
    row += [f"{size.tokens:,}", f"{tier.conversations:,}"]
    if _shows_speed(plan):
        row += [speed_text(tier.bytes_per_s) if tier.bytes_per_s else "-", _verdict(size.speedup)]
    return row


def _verdict(speedup: float | None) -> str:
    if speedup is None:
        return "-"
    return f"{speedup:.1f} times as fast" if speedup > 1 else f"slower ({speedup:.2f}): blocks are computed"


def _notes(plan: SizePlan) -> list[str]:
    own = [tier for tier in plan.tiers if not tier.shared]
    notes = ["Tiers hold copies: what lies in a fast tier is usually in the slower ones too."]
    if own and plan.workers > 1:
        notes.append(f"{', '.join(tier.name for tier in own)}: of one worker; the fleet has {plan.workers} of them.")
    if plan.break_even_bytes_per_s is None:
        notes.append("For break-even bandwidth give --prefill-tokens-per-s.")
    if any(tier.shared for tier in plan.tiers):
        notes.append("redis: of the whole fleet; the server's allocator rounds up, so its numbers are near ones.")
    return notes
