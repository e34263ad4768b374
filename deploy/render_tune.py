"""What `warmkv tune` prints: the finalists on the held-out part, the verdict, the command. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict

from deploy.render import table
from deploy.render_replay import (
    QUEUES,
    SATURATED,
    fleet_text,
    none_of_nan,
    seconds_text,
    share_text,
    too_long_lines,
    trace_line,
    with_spread,
)
from replay.front import OBJECTIVES, Finalist
from replay.traces import Trace
from replay.tuning import Tuned

HEADER = ("", "policy", "hit rate", "TTFT mean", "p99", "busiest", "front")


def tune_text(trace: Trace, tuned: Tuned) -> str:
    """What was searched, the table, whether it is worth it, and how to set it."""
    search = tuned.search
    tried = len({trial.configuration.text for trial in tuned.trials})
    lines = [trace_line(trace), f"fleet   {fleet_text(search.fleet, search.source)}"]
    lines.append(
        f"search  {tried} configurations for {_label(tuned)}, "
        f"{tuned.replays} replays; searched on {search.trained:,} requests, table of the {held_out(tuned):,} behind"
    )
    lines += ["", table(HEADER, (row(tuned, each) for each in ordered(tuned))), ""]
    lines.append("*: in force. >: found. front: no other line is as good in everything and better in something.")
    lines.append(f"±: half of the range over {search.seeds} seeds.")
    if any(one.utilisation > SATURATED for one in tuned.finalist(search.present).figures):
        lines.append(QUEUES)
    lines += too_long_lines(trace, search.fleet)
    return "\n".join([*lines, "", verdict(tuned), *command_lines(tuned)])


def tune_json(trace: Trace, tuned: Tuned) -> str:
    """All finalists and trials."""
    whole = {
        "trace": trace.name,
        "objective": tuned.search.objective,
        "trained": tuned.search.trained,
        "held_out": held_out(tuned),
        "replays": tuned.replays,
        "present": tuned.search.present.text,
        "winner": tuned.winner.text,
        "better": bool(tuned.difference and tuned.difference.certain),
        "difference": None if tuned.difference is None else asdict(tuned.difference),
        "command": tuned.winner.command if tuned.difference and tuned.difference.certain else None,
        "finalists": [
            {
                "policy": each.configuration.policy,
                "weights": dict(each.configuration.weights),
                "front": each.on_front,
                **{
                    name: {"mean": none_of_nan(each.spread(name).mean), "half_range": each.spread(name).half}
                    for name in OBJECTIVES
                },
            }
            for each in ordered(tuned)
        ],
        "trials": [
            {
                "policy": trial.configuration.text,
                "rung": trial.rung,
                "requests": trial.requests,
                "relative": trial.relative,
                "kept": trial.kept,
            }
            for trial in tuned.trials
        ],
    }
    return json.dumps(whole)


def ordered(tuned: Tuned) -> list[Finalist]:
    """The best by the objective first."""
    objective = OBJECTIVES[tuned.search.objective]
    return sorted(tuned.finalists, key=lambda each: objective.cost(each.figures))


def row(tuned: Tuned, each: Finalist) -> tuple[str, ...]:
    """One line of the table."""
    return (
        mark(tuned, each),
        each.configuration.text,
        with_spread(each.spread("hit"), share_text, nothing=0.0005),
        with_spread(each.spread("ttft_mean"), seconds_text, nothing=0.0005),
        with_spread(each.spread("ttft_p99"), seconds_text, nothing=0.0005),
        with_spread(each.spread("busiest"), lambda value: f"{value:.2f}", nothing=0.005),
        "yes" if each.on_front else "",
    )


def mark(tuned: Tuned, each: Finalist) -> str:
    """`*` for what is in force, `>` for what was found."""
    present = "*" if each.configuration.text == tuned.search.present.text else ""
    return present + (">" if each.configuration.text == tuned.winner.text else "")


def held_out(tuned: Tuned) -> int:
    """Requests of the table."""
    return tuned.search.requests - tuned.search.trained


def verdict(tuned: Tuned) -> str:
    """Whether to change anything, and how sure that is."""
    present, apart = tuned.search.present.text, tuned.difference
    if apart is None:
        return f"Nothing that was tried beats {present} in {_label(tuned)}: leave it as it is."
    show = share_text if tuned.search.objective in ("hit", "busiest") else seconds_text
    sign = "-" if apart.mean * OBJECTIVES[tuned.search.objective].sign < 0 else "+"
    size = f"{sign}{show(abs(apart.mean))} ({sign}{abs(apart.relative):.1%}), 95 % interval ±{_half(apart.half, show)}"
    told = f"{tuned.winner.text} against {present} on the held-out requests: {_label(tuned)} {size}."
    if apart.certain:
        return f"{told}\nThat is beyond noise."
    return f"{told}\nThat is within noise, or less than 1 %: nothing that was tried beats {present} for sure. Leave it."


def command_lines(tuned: Tuned) -> list[str]:
    """What sets it, if it is worth it."""
    if tuned.difference is None or not tuned.difference.certain:
        return []
    return ["", f"  {tuned.winner.command}"]


def _half(half: float, show: object) -> str:
    return "unknown" if half == float("inf") else show(half)  # type: ignore[operator]


def _label(tuned: Tuned) -> str:
    return OBJECTIVES[tuned.search.objective].label
