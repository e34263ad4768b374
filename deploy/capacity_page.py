"""The picture of `warmkv capacity`: hit rate against size, one line a time to live, as a page that stands alone."""

from __future__ import annotations

import html
import math
from pathlib import Path

from deploy import svg_chart
from deploy.capacity_answers import Answers
from deploy.quantities import size_text as bytes_text
from deploy.render_capacity import amount_text, capacity_text, split_title, tokens_text, ttl_text
from deploy.svg_chart import Axis, Chart, Dot, page
from replay.traces import Trace

_KINDS = ("fourth", "fifth", "best", "trial")
_STEPS = 400


def write_page(folder: Path, trace: Trace, answers: Answers) -> Path:
    """Write `capacity.html` into the folder. Raises OSError."""
    return svg_chart.write_page(folder, "capacity", capacity_page(trace, answers))


def capacity_page(trace: Trace, answers: Answers) -> str:
    """The page."""
    body = [f"<h1>Hit rate against cache size: {html.escape(trace.name)}</h1>"]
    body.append('<p class="soft">One LRU cache that all requests share, exactly; dots: the same memory split over ')
    body.append("workers, replayed. The first tenth of the requests fills the cache and does not count.</p>")
    body.append(f'<div class="charts"><figure>{curve_chart(answers).svg()}</figure></div>')
    body.append(f"<h2>In numbers</h2><pre>{html.escape(capacity_text(trace, answers))}</pre>")
    return page(f"warmkv capacity: {trace.name}", body)


def curve_chart(answers: Answers) -> Chart:
    """Hit rate over size on a logarithmic axis."""
    per_token = answers.bytes_per_token
    low, high = answers.sizes[0], answers.sizes[-1] * 1.5

    def show(tokens: float) -> str:
        return bytes_text(tokens * per_token).replace(".0", "") if per_token else tokens_text(tokens)

    name = f"cache of the whole fleet ({'bytes' if per_token else 'tokens'}, logarithmic)"
    x = Axis(name, low, high, show, log=True, marks=_powers_of_two(per_token) if per_token else ())
    top = max(0.05, answers.endless.most * 1.12)
    y = Axis("hit rate (share of prompt tokens)", 0.0, min(1.0, top), lambda value: f"{value:.2f}")
    finite = [ttl_s for ttl_s in answers.curves if ttl_s != math.inf]
    kinds = {math.inf: "front", **{ttl_s: _KINDS[n % len(_KINDS)] for n, ttl_s in enumerate(reversed(finite))}}
    legend = [(kinds[ttl_s], ttl_text(ttl_s)) for ttl_s in reversed(list(answers.curves))]
    legend += [("present", split_title(answers))] if answers.split else []
    chart = Chart("Hit rate against size", x, y, legend, width=1080, height=460)
    for ttl_s, curve in answers.curves.items():
        sizes = [low * (high / low) ** (step / _STEPS) for step in range(_STEPS + 1)]
        style = "" if ttl_s == math.inf else "dashed"
        chart.line([(size, curve.hit_rate(size)) for size in sizes], kinds[ttl_s], style=style)
    for size in answers.sizes:
        rates = ", ".join(f"{ttl_text(ttl_s)} {curve.hit_rate(size):.3f}" for ttl_s, curve in answers.curves.items())
        title = f"{amount_text(answers, size)}: {rates}"
        chart.dot(Dot(size, answers.endless.hit_rate(size), "front", title), radius=4)
    for size, hit in answers.split.items():
        title = f"{amount_text(answers, size)} split over {answers.fleet.workers} workers: {hit:.3f}"
        chart.dot(Dot(size, hit, "present", title))
    return chart


def _powers_of_two(per_token: int) -> tuple[float, ...]:
    """Tokens of 1 KiB, 4 KiB, ... 1 EiB."""
    return tuple(4.0**power / per_token for power in range(5, 31))
