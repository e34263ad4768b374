"""What `warmkv replay` prints: one line a policy, with the spread over seeds. Pure but for the progress line."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from deploy.quantities import format_duration
from deploy.render import table
from replay.comparison import Fleet, Result, Source, Spread, spread
from replay.engine_choice import DEFAULT_ENGINE, ENGINES
from replay.outcome import Figures, quantile
from replay.traces import Request, Trace, load, shipped

_HEADER = ("policy", "hit rate", "TTFT mean", "p50", "p99", "busiest", "utilisation", "unanswered", "simulated")
WARM_UP = 0.1
SATURATED = 0.95  # share of the workers' time, warm-up and the end of the last answers included
QUEUES = (
    "Workers are busy all the time, so requests queue without end, and times to the first token mean little. Give more "
    "--workers, or a lower --speed."
)
OPEN_AFTER_ALL = (
    "--closed-loop changed nothing: the trace does not tell which requests wait for which answers. `warmkv record` "
    "writes it for requests with an affinity key."
)
_TOKENS_HEADER = ("policy", "TPOT p50", "TPOT p99", "ITL p99", "tokens/s")
_MEANING = "hit rate: share of prompt tokens found in a cache. busiest: the busiest worker's prefill by the mean."


def replay_text(trace: Trace, results: Sequence[Result]) -> str:
    """The table, what it was made of, and what its columns mean."""
    groups = by_configuration(results)
    run = results[0].run
    fleet = run.fleet
    lines = [trace_line(trace), fleet_line(results), ""]
    rows = [_row(name, group) for name, group in groups.items()]
    happened = happened_row(trace)
    lines.append(table(_HEADER, [*([happened] if happened else []), *rows]))
    if fleet.roles:
        lines += ["", table(_TOKENS_HEADER, [_tokens_row(name, group) for name, group in groups.items()])]
    lines += ["", _MEANING]
    if len({result.run.seed for result in results}) > 1:
        lines.append("±: half of the range over seeds.")
    if any(group[0].figures.utilisation > SATURATED for group in groups.values()):
        lines.append(QUEUES)
    if happened:
        lines.append("as recorded: what the live fleet made of the same requests, on its own hardware and caches.")
    lines += too_long_lines(trace, fleet)
    if run.source.closed_loop and not any(request.think_s is not None for request in trace.requests):
        lines.append(OPEN_AFTER_ALL)
    if fleet.failures:
        failed = statistics.fmean(result.figures.failed for result in results)
        lines.append(f"Answers cut off by failures: {failed:.0f} a replay.")
    return "\n".join(lines)


def replay_json(trace: Trace, results: Sequence[Result]) -> str:
    """Every figure of every seed."""
    policies = [
        {
            "policy": group[0].run.configuration.policy,
            "weights": dict(group[0].run.configuration.weights),
            "seeds": [
                {"seed": result.run.seed, **plain(result.figures), "simulated_per_s": per_second(result)}
                for result in group
            ],
            "mean": {name: none_of_nan(spread(values).mean) for name, values in _columns(group).items()},
        }
        for group in by_configuration(results).values()
    ]
    fleet = asdict(results[0].run.fleet)
    whole = {"trace": trace.name, "requests": results[0].requests, "fleet": fleet, "policies": policies}
    figures = happened_figures(trace)
    if figures is not None:
        whole["as_recorded"] = figures
    return json.dumps(whole)


def shipped_text() -> str:
    """The shipped traces with what is in them, and the engines."""
    rows = []
    for name, facts in _shipped_facts().items():
        span = format_duration(float(round(facts["seconds"])))
        tokens = f"{facts['prompt_tokens'] / 1e6:.1f}M"
        rows.append((name, f"{facts['requests']:,}", tokens, str(facts["block_size"]), span))
    engines = ", ".join(f"{name} (default)" if name == DEFAULT_ENGINE else name for name in ENGINES)
    return table(("trace", "requests", "prompt tokens", "block", "span"), rows) + f"\n\nengines: {engines}"


def shipped_json() -> str:
    """The same."""
    return json.dumps({"traces": _shipped_facts(), "engines": sorted(ENGINES)})


def progress_to(runs: int | None) -> Callable[[Result], None]:
    """Counts replays on standard error while a person watches; `runs` None: nobody knows how many there will be."""
    done = 0

    def told(_result: Result) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            of = "" if runs is None else f" of {runs}"
            sys.stderr.write(f"\r{done}{of} replays" + ("\r\033[K" if done == runs else ""))
            sys.stderr.flush()

    return told


def by_configuration(results: Sequence[Result]) -> dict[str, list[Result]]:
    """In the order in which they were asked for."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.run.configuration.text, []).append(result)
    return groups


def trace_line(trace: Trace) -> str:
    """What was replayed."""
    span_s = trace.requests[-1].time_s - trace.requests[0].time_s
    tokens = sum(request.input_length for request in trace.requests)
    text = f"trace   {trace.name}: {len(trace.requests):,} requests, {tokens / 1e6:.1f}M prompt tokens"
    text += f" in {format_duration(float(round(span_s)))}, blocks of {trace.block_size}"
    return text + ("; its file is cut off, so its last line was left out" if trace.cut_off else "")


def fleet_line(results: Sequence[Result]) -> str:
    """What it was replayed on."""
    run, seeds = results[0].run, len({result.run.seed for result in results})
    return f"fleet   {fleet_text(run.fleet, run.source)}; {seeds} seed{'s' if seeds > 1 else ''}"


def fleet_text(fleet: Fleet, source: Source) -> str:
    """Everything that was told of it, but the policy."""
    plural = "s" if fleet.workers > 1 else ""
    parts = [f"{fleet.workers} worker{plural} of {fleet.capacity_tokens:,} tokens"]
    parts += [f"{fleet.host_tokens:,} in host RAM"] if fleet.host_tokens else []
    parts += [f"{fleet.redis_tokens:,} in a shared tier"] if fleet.redis_tokens else []
    parts += [fleet.roles] if fleet.roles else []
    parts += [f"engine {fleet.engine}"]
    parts += [f"{fleet.prefill_tokens_per_s:,.0f} tokens/s prefill"] if fleet.prefill_tokens_per_s else []
    parts += [f"{fleet.routers} routers"] if fleet.routers > 1 else []
    parts += [f"events {format_duration(fleet.delay_s)} late"] if fleet.delay_s else []
    parts += [f"{source.speed:g} times as fast"] if source.speed != 1 else []
    parts += ["closed loop"] if source.closed_loop else []
    parts += ["sessions told"] if fleet.tells_sessions else []
    for one in fleet.failures:
        parts.append(f"worker {one.worker} down {format_duration(one.down_s)} from {format_duration(one.at_s)}")
    return ", ".join(parts)


def too_long_lines(trace: Trace, fleet: Fleet) -> list[str]:
    """What to think of prompts that no worker has room for; nothing if there are none."""
    count = sum(request.input_length > fleet.capacity_tokens for request in trace.requests)
    if not count:
        return []
    longest = max(request.input_length for request in trace.requests)
    return [
        f"{count:,} of {len(trace.requests):,} prompts are longer than --capacity (up to {longest:,} tokens), and a "
        "real worker refuses those: give more --capacity, or leave them out by --longest."
    ]


def seconds_text(seconds: float) -> str:
    """`1.23 s`, `45 ms`, or a dash for nan."""
    if math.isnan(seconds):
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def with_spread(value: Spread, show: Callable[[float], str], *, nothing: float) -> str:
    """`0.137 ±0.002`; a spread below `nothing` is left out."""
    return show(value.mean) + (f" ±{show(value.half).strip()}" if value.half >= nothing else "")


def share_text(share: float) -> str:
    """Three digits."""
    return f"{share:.3f}"


def per_second(result: Result) -> float:
    """Requests simulated in a second of one core."""
    return result.requests / result.cpu_s if result.cpu_s else float("inf")


def plain(figures: Figures) -> dict[str, object]:
    """For JSON, which has no nan."""
    fields = {name: getattr(figures, name) for name in Figures.__slots__}
    return {name: dict(v) if isinstance(v, Mapping) else none_of_nan(v) for name, v in fields.items()}


def none_of_nan(value: float) -> float | None:
    """None for what is no number."""
    return None if isinstance(value, float) and math.isnan(value) else value


def happened_figures(trace: Trace) -> dict[str, object] | None:
    """What the live fleet made of the requests that would count; None where the trace does not say."""
    counted = [request for request in trace.requests[int(WARM_UP * len(trace.requests)) :] if request.happened]
    if not counted:
        return None
    told = [happened for request in counted if (happened := request.happened) is not None]
    times = [one.ttft_s for one in told if one.ttft_s is not None]
    tokens = sum(one.cached + one.computed for one in told)
    return {
        "requests": len(told),
        "hit": sum(one.cached for one in told) / tokens if tokens else 0.0,
        "ttft_mean_s": none_of_nan(statistics.fmean(times) if times else float("nan")),
        "ttft_p50_s": none_of_nan(quantile(times, 0.5)),
        "ttft_p99_s": none_of_nan(quantile(times, 0.99)),
        "busiest": _busiest(counted),
        "unanswered": sum(one.ttft_s is None for one in told),
    }


def happened_row(trace: Trace) -> tuple[str, ...] | None:
    """The same as a line of the table."""
    told = happened_figures(trace)
    if told is None:
        return None
    times = [seconds_text(nan if (nan := told[name]) is not None else float("nan")) for name in _TIMES]  # type: ignore[arg-type]
    return ("as recorded", f"{told['hit']:.3f}", *times, f"{told['busiest']:.2f}", "-", str(told["unanswered"]), "-")


_TIMES = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s")


def _busiest(requests: Sequence[Request]) -> float:
    """The busiest worker's computed tokens by the mean of those that ran anything."""
    computed: dict[str, int] = {}
    for request in requests:
        if request.happened is not None and request.happened.worker:
            worker = request.happened.worker
            computed[worker] = computed.get(worker, 0) + request.happened.computed
    return max(computed.values()) / statistics.fmean(computed.values()) if any(computed.values()) else 1.0


def _columns(group: Sequence[Result]) -> dict[str, list[float]]:
    names = ("hit", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "busiest", "utilisation", "unanswered")
    columns = {name: [float(getattr(result.figures, name)) for result in group] for name in names}
    return {**columns, "simulated_per_s": [per_second(result) for result in group]}


def _row(name: str, group: Sequence[Result]) -> tuple[str, ...]:
    of = {column: spread(values) for column, values in _columns(group).items()}
    return (
        name,
        with_spread(of["hit"], share_text, nothing=0.0005),
        *(with_spread(of[column], seconds_text, nothing=0.0005) for column in _TIMES),
        with_spread(of["busiest"], lambda value: f"{value:.2f}", nothing=0.005),
        f"{of['utilisation'].mean:.0%}",
        f"{of['unanswered'].mean:.0f}",
        f"{of['simulated_per_s'].mean:,.0f}/s",
    )


def _tokens_row(name: str, group: Sequence[Result]) -> tuple[str, ...]:
    """Between two tokens of an answer: the mean of each request, and all gaps."""
    names = ("tpot_p50_s", "tpot_p99_s", "itl_p99_s")
    of = {column: spread([float(getattr(result.figures, column)) for result in group]) for column in names}
    each = (with_spread(of[column], _fine_seconds, nothing=0.00005) for column in names)
    return (name, *each, f"{statistics.fmean(result.figures.tokens_per_s for result in group):,.0f}")


def _fine_seconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:.1f} ms"


def _shipped_facts() -> dict[str, dict[str, float]]:
    facts = {}
    for name, path in shipped().items():
        trace = load(path)
        facts[name] = {
            "requests": len(trace.requests),
            "prompt_tokens": sum(request.input_length for request in trace.requests),
            "block_size": trace.block_size or 0,
            "seconds": trace.requests[-1].time_s - trace.requests[0].time_s,
        }
    return facts
