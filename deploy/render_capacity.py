"""What `warmkv capacity` prints. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from deploy.capacity_answers import Answers, Gain
from deploy.quantities import format_duration
from deploy.quantities import size_text as bytes_text
from deploy.render import table
from deploy.render_replay import none_of_nan, seconds_text, trace_line
from replay.capacity import Timed
from replay.traces import Trace


def capacity_text(trace: Trace, answers: Answers) -> str:
    """The curves, where the fleet stands, and what additions give."""
    header = ["cache of the fleet", *(["bytes"] if answers.bytes_per_token else [])]
    header += [ttl_text(ttl_s) for ttl_s in answers.curves]
    header += [split_title(answers)] if answers.split else []
    lines = [trace_line(trace), "", table(header, (_row(answers, size) for size in answers.sizes)), ""]
    lines.append(_largest(answers))
    if answers.split:
        lines.append(
            f"{split_title(answers)}: the same memory split evenly over workers that {answers.configuration.text} "
            "routes to, replayed; copies of a prefix and imperfect routing cost the difference."
        )
    lines += _fleet_lines(trace, answers)
    return "\n".join(lines)


def capacity_json(trace: Trace, answers: Answers) -> str:
    """All of it; sizes in tokens."""
    whole = {
        "trace": trace.name,
        "bytes_per_token": answers.bytes_per_token,
        "curves": [
            {
                "ttl_s": None if ttl_s == math.inf else ttl_s,
                "points": [{"tokens": size, "hit": curve.hit_rate(size)} for size in answers.sizes],
                "most": curve.most,
                "enough_tokens": curve.enough_tokens,
            }
            for ttl_s, curve in answers.curves.items()
        ],
        "workers": answers.fleet.workers,
        "split": [{"tokens": size, "hit": hit} for size, hit in answers.split.items()],
        "now": None
        if answers.now is None
        else {**asdict(answers.now), "hit": answers.now.all, "replayed": _timed_json(answers.now_timed)},
        "gains": [
            {
                **asdict(gain.addition),
                **asdict(gain.hits),
                "hit": gain.hits.all,
                "saved_prefill": gain.saved,
                "replayed": _timed_json(gain.timed),
            }
            for gain in answers.gains
        ],
    }
    return json.dumps(whole)


def _timed_json(timed: Timed | None) -> dict[str, float | None] | None:
    return None if timed is None else {"hit": timed.hit, "ttft_mean_s": none_of_nan(timed.ttft_mean_s)}


def ttl_text(ttl_s: float) -> str:
    """A column's name."""
    return "no TTL" if ttl_s == math.inf else f"TTL {format_duration(ttl_s)}"


def split_title(answers: Answers) -> str:
    """A column's name."""
    return f"{answers.fleet.workers} workers"


def tokens_text(tokens: float) -> str:
    """`400k`, `3.2M`."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= scale:
            return f"{tokens / scale:.3g}{unit}"
    return f"{tokens:.0f}"


def amount_text(answers: Answers, tokens: float) -> str:
    """Tokens, and bytes where they are known."""
    if not answers.bytes_per_token:
        return f"{tokens_text(tokens)} tokens"
    return f"{bytes_text(tokens * answers.bytes_per_token)} ({tokens_text(tokens)} tokens)"


def gain_text(answers: Answers, gain: Gain) -> str:
    """The answer in words."""
    whose = "" if gain.addition.tier == "redis" or answers.fleet.workers == 1 else " a worker"
    before = answers.now.all if answers.now else 0.0
    unit = "" if answers.bytes_per_token else " tokens"
    change = f"hit rate {before:.3f} -> {gain.hits.all:.3f}, {gain.saved:.1%} less prefill"
    if gain.hits.all <= before + 0.0005:
        change = f"nothing: the hit rate stays {before:.3f}; {_why_nothing(answers, gain)}"
    return f"{gain.addition.asked}{unit} more {gain.addition.tier}{whose}: {change}"


def _why_nothing(answers: Answers, gain: Gain) -> str:
    if answers.endless.most - gain.hits.all < 0.001:
        return "all that this traffic repeats is found already"
    if answers.endless.most - gain.hits.bound < 0.001:
        return "all that repeats would fit, and what is not found was lost by splitting it over the workers"
    own = answers.tiers.own
    larger = next(
        (tier for tier, size in own.items() if size > own.get(gain.addition.tier, 0) + gain.addition.tokens), ""
    )
    if larger and gain.addition.tier != "redis":
        return f"{larger} is larger and has copies of it all (reads would be faster)"
    return "what is missing needs much more, or was never there"


def _row(answers: Answers, size: int) -> list[str]:
    row = [f"{tokens_text(size)} tokens"]
    row += [bytes_text(size * answers.bytes_per_token)] if answers.bytes_per_token else []
    row += [f"{curve.hit_rate(size):.3f}" for curve in answers.curves.values()]
    if answers.split:
        row.append(f"{answers.split[size]:.3f}" if size in answers.split else "-")
    return row


def _largest(answers: Answers) -> str:
    curve = answers.endless
    enough = amount_text(answers, curve.enough_tokens)
    return f"A cache without limit would find {curve.most:.3f} of the prompt tokens; {enough} are enough for that."


def _timed(timed: Timed) -> str:
    return f"hit rate {timed.hit:.3f}, TTFT mean {seconds_text(timed.ttft_mean_s)}"


def _narrow(trace: Trace, answers: Answers) -> list[str]:
    """Prompts that the pool, or where none was named the largest tier, has no room for."""
    room = answers.tiers.own.get("device") or answers.tiers.worker_tokens
    longer = sum(request.input_length > room for request in trace.requests) if room else 0
    if not longer:
        return []
    which = f"{amount_text(answers, room)} of {'device' if answers.tiers.own.get('device') else 'a worker'}"
    return [f"{longer:,} of {len(trace.requests):,} prompts do not fit {which}, and a real worker refuses those."]


def _fleet_lines(trace: Trace, answers: Answers) -> list[str]:
    if answers.now is None:
        return []
    workers, tiers = answers.fleet.workers, answers.tiers
    parts = [f"{name} {amount_text(answers, size)}" for name, size in tiers.own.items()]
    each = f"{workers} worker{'s' if workers > 1 else ''} with {', '.join(parts) or 'nothing'}"
    shared = f", and redis {amount_text(answers, tiers.redis)}" if tiers.redis else ""
    lines = ["", f"now: {each}{shared}: hit rate {answers.now.all:.3f} (one shared cache: {answers.now.bound:.3f})"]
    lines += [f"  replayed on {answers.fleet.engine}: {_timed(answers.now_timed)}"] if answers.now_timed else []
    for gain in answers.gains:
        lines.append(gain_text(answers, gain))
        lines += [f"  replayed on {answers.fleet.engine}: {_timed(gain.timed)}"] if gain.timed else []
    lines += _narrow(trace, answers)
    if len(tiers.own) > 1 or (tiers.own and tiers.redis):
        lines.append("Slower tiers hold copies of what lies in faster ones, so the largest tells what is found.")
    return lines
