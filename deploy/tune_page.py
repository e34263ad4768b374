"""The picture of `warmkv tune`, a page that stands alone: the finalists side by side, and how the search went."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from deploy import svg_chart
from deploy.render_tune import HEADER, command_lines, held_out, mark, ordered, row, verdict
from deploy.svg_chart import Axis, Chart, Dot, axis_over, html_table, page
from replay.front import OBJECTIVES, Finalist
from replay.traces import Trace
from replay.tuning import Tuned

_NAMES = {"hit": "hit rate (share of prompt tokens)", "ttft_mean": "TTFT mean", "ttft_p99": "TTFT p99"}
_NAMES["busiest"] = "busiest worker's prefill by the mean"
_WORST = 3.0  # trials that are worse by more than this factor lie at the edge of the chart


def write_page(folder: Path, trace: Trace, tuned: Tuned) -> Path:
    """Write `tune.html` into the folder. Raises OSError."""
    return svg_chart.write_page(folder, "tune", tune_page(trace, tuned))


def tune_page(trace: Trace, tuned: Tuned) -> str:
    """The page."""
    search, fleet = tuned.search, tuned.search.fleet
    about = (
        f"{fleet.workers} workers of {fleet.capacity_tokens:,} tokens, engine {fleet.engine}. Searched on "
        f"{search.trained:,} requests; charts of finalists and table are of the {held_out(tuned):,} behind them, which "
        f"chose nothing. Error bars: half of the range over {search.seeds} seeds. Point at a dot for its numbers."
    )
    charts = [
        finalist_chart(tuned, "hit", "ttft_mean"),
        finalist_chart(tuned, "hit", "ttft_p99"),
        finalist_chart(tuned, "busiest", "ttft_mean"),
        search_chart(tuned),
    ]
    body = [f"<h1>Policies and weights for {html.escape(trace.name)}</h1>", f'<p class="soft">{html.escape(about)}</p>']
    body.append(f"<p><strong>{html.escape(verdict(tuned))}</strong></p>")
    body += [f"<pre>{html.escape(line.strip())}</pre>" for line in command_lines(tuned) if line]
    body.append('<div class="charts">' + "".join(f"<figure>{chart.svg()}</figure>" for chart in charts) + "</div>")
    rows = [(row_kind(tuned, each), row(tuned, each)[1:]) for each in ordered(tuned)]
    body += ["<h2>Finalists on the held-out requests</h2>", html_table(HEADER[1:], rows)]
    return page(f"warmkv tune: {trace.name}", body)


def row_kind(tuned: Tuned, each: Finalist) -> str:
    """Class of a row: what is in force and what was found stand out."""
    return {"*": "present", ">": "best", "*>": "present", "": ""}[mark(tuned, each)]


def finalist_chart(tuned: Tuned, across: str, up: str) -> Chart:
    """Two figures of the finalists, and the Pareto front of these two."""
    points = [(each.spread(across).mean, each.spread(up).mean) for each in tuned.finalists]
    x = axis_over(_NAMES[across], _ends(tuned, across), _plain)
    times = [end for end in _ends(tuned, up) if end > 0]
    wide = bool(times) and max(times) / min(times) > 5
    y = axis_over(_NAMES[up] + (" (logarithmic)" if wide else ""), times, _seconds, log=wide)
    legend = [("present", "in force"), ("best", "found"), ("front", "finalists"), ("trial", "front of these two")]
    chart = Chart(f"{_short(up)} against {_short(across)}", x, y, legend)
    chart.line(_front(points, _sign(across), _sign(up)), "trial", style="dashed")
    present_last = sorted(tuned.finalists, key=lambda each: len(mark(tuned, each)))
    for each in present_last:
        if math.isfinite(each.spread(up).mean):
            chart.dot(_dot(tuned, each, across, up), radius=7 if mark(tuned, each) else 5)
    return chart


def search_chart(tuned: Tuned) -> Chart:
    """Every trial by its rung: its objective by that of what is in force on the same requests."""
    lengths = sorted({trial.requests for trial in tuned.trials})
    values = [min(_WORST, trial.relative) for trial in tuned.trials]
    marks = tuple(float(n + 1) for n in range(len(lengths)))
    name = "requests of the part that was replayed"
    x = Axis(name, 0.5, len(lengths) + 0.5, lambda n: f"{lengths[round(n) - 1]:,}", marks=marks)
    y = axis_over(f"{OBJECTIVES[tuned.search.objective].label} by that in force", values, _plain)
    legend = [("present", "in force"), ("front", "went on"), ("trial", "left out")]
    chart = Chart("The search", x, y, legend)
    chart.line([(x.low, 1.0), (x.high, 1.0)], "present", style="dashed")
    for length in lengths:
        trials = [trial for trial in tuned.trials if trial.requests == length]
        for place, trial in enumerate(trials):
            is_present = trial.configuration.text == tuned.search.present.text
            kind = "present" if is_present else "front" if trial.kept else "trial"
            at = lengths.index(length) + 1 + 0.7 * ((place + 0.5) / len(trials) - 0.5)
            title = f"{trial.configuration.text}: {trial.relative:.3f} on {length:,} requests"
            chart.dot(Dot(at, min(_WORST, trial.relative), kind, title), radius=5 if is_present else 4)
    return chart


def _dot(tuned: Tuned, each: Finalist, across: str, up: str) -> Dot:
    marks = mark(tuned, each)
    kind = {"*": "present", ">": "best", "*>": "present", "": "front"}[marks]
    numbers = ", ".join(f"{label} {text}" for label, text in zip(HEADER[2:6], row(tuned, each)[2:6], strict=True))
    name = {"*": "in force", ">": "found", "*>": "in force, best found", "": ""}[marks]
    return Dot(
        each.spread(across).mean,
        each.spread(up).mean,
        kind,
        f"{each.configuration.text}: {numbers}",
        name,
        each.spread(across).half,
        each.spread(up).half,
    )


def _front(points: Sequence[tuple[float, float]], x_sign: int, y_sign: int) -> list[tuple[float, float]]:
    """Points that no other one beats in both, along x."""
    real = [point for point in points if all(math.isfinite(value) for value in point)]
    best = [
        (x, y)
        for x, y in real
        if not any((x_sign * a <= x_sign * x and y_sign * b <= y_sign * y) and (a, b) != (x, y) for a, b in real)
    ]
    return sorted(set(best))


def _sign(objective: str) -> int:
    return OBJECTIVES[objective].sign


def _short(objective: str) -> str:
    return OBJECTIVES[objective].label


def _ends(tuned: Tuned, objective: str) -> list[float]:
    """Where the error bars end."""
    spreads = [each.spread(objective) for each in tuned.finalists]
    return [end for one in spreads for end in (one.mean - one.half, one.mean + one.half) if math.isfinite(end)]


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _seconds(value: float) -> str:
    return f"{value:.4g} s" if value >= 1 else f"{value * 1e3:.4g} ms"
