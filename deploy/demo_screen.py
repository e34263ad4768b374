"""What the demo shows in a terminal, drawn anew from the router's own statistics a few times a second.

Covers: turning numbers into rich renderables. Does not cover: where they come from (`deploy.demo`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.summary import Act, shown_fates
from warmkv.v1 import admin_pb2

SPARKS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 48
CELL_WIDTH = 8
PREFIX_ROWS = 8
DECISION_ROWS = 5
# Okabe and Ito's palette: told apart with any colour vision; the glyphs differ too.
FATE_STYLE = {
    "computed": "#D55E00",
    "device": "#009E73",
    "host": "#56B4E9",
    "disk": "#0072B2",
    "redis": "#CC79A7",
    "peer": "#E69F00",
}
FATE_GLYPH = {"computed": "░", "device": "█", "host": "▓", "disk": "▚", "redis": "▒", "peer": "▞"}


@dataclass(slots=True)
class Screen:
    """What is on the screen. The demo fills it in; `render` draws it.

    Attributes:
        steps: the start-up's lines. act, note: what is going on. acts: finished acts; live: the running one so far.
        stats: the router's latest. hit_history: hit rate of each of the last seconds.
    """

    dashboard: str = ""
    grpc: str = ""
    steps: list[str] = field(default_factory=list)
    act: str = "starting"
    note: str = ""
    acts: list[Act] = field(default_factory=list)
    live: Act | None = None
    stats: admin_pb2.WatchStatsResponse | None = None
    hit_history: deque[float] = field(default_factory=lambda: deque(maxlen=BAR_WIDTH))

    def render(self) -> RenderableType:
        """The whole screen."""
        parts: list[RenderableType] = [self._heading()]
        if self.stats is None:
            parts += [Text(line) for line in self.steps]
        else:
            parts += [self._rates(), self._latencies(), self._prefixes(self.stats), self._decisions(self.stats)]
        return Panel(Group(*parts), title="warmkv demo", subtitle=self.act, border_style="dim")

    def _heading(self) -> Text:
        text = Text()
        if self.dashboard:
            text.append("dashboard ").append(self.dashboard, style="bold underline").append(f"   gRPC {self.grpc}\n")
        return text.append(self.note, style="italic")

    def _rates(self) -> Table:
        act = self.live or (self.acts[-1] if self.acts else Act("", (), 0.0))
        grid = Table.grid(padding=(0, 2))
        grid.add_row("hit rate", sparkline(self.hit_history), f"{act.hit_rate:.0%} of this act's prompt tokens")
        shares = {fate: act.share(fate) for fate in shown_fates([act])}
        legend = Text("  ").join(Text(f"{fate} {share:.0%}", FATE_STYLE[fate]) for fate, share in shares.items())
        grid.add_row("tokens", fate_bar(shares), legend)
        return grid

    def _latencies(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        for act in [*self.acts, *([self.live] if self.live else [])]:
            p50, p95 = act.ttft_ms(0.5), act.ttft_ms(0.95)
            rate = f"{act.requests_per_s:.1f} requests/s"
            grid.add_row("TTFT", act.name, f"p50 {p50:5.0f} ms", f"p95 {p95:5.0f} ms", rate)
        return grid

    def _prefixes(self, stats: admin_pb2.WatchStatsResponse) -> Table:
        workers = [worker.name for worker in stats.workers]
        table = Table(title="who holds which prefix: █ device  ▓ host  ▒ redis", title_justify="left", box=None)
        table.add_column("prefix", no_wrap=True, max_width=34)
        table.add_column("tokens", justify="right")
        for name in [*workers, "redis"]:
            table.add_column(name)
        for prefix in list(stats.prefixes)[:PREFIX_ROWS]:
            held = {entry.worker: entry for entry in prefix.held}
            cells = [holding(held.get(name), prefix.tokens) for name in workers]
            redis = Text("▒" * _cells(prefix.redis_tokens, prefix.tokens), FATE_STYLE["redis"])
            table.add_row(f"{prefix.tenant}: {prefix.label}", str(prefix.tokens), *cells, redis)
        return table

    def _decisions(self, stats: admin_pb2.WatchStatsResponse) -> Table:
        table = Table(title="last decisions", title_justify="left", box=None, show_header=False)
        for record in list(stats.recent)[:DECISION_ROWS]:
            overlap = f"overlap {record.predicted_cached_tokens}/{record.prompt_tokens} tokens"
            runner_up = f"{record.runner_up} would cost {record.runner_up_extra_ms:+.0f} ms" if record.runner_up else ""
            real = f", was {record.ttft_ms:.0f} ms" if record.HasField("ttft_ms") else ""
            predicted = f"first token in {record.predicted_ttft_ms:.0f} ms{real}" if record.predicted_ttft_ms else ""
            reason = Text(record.reason, "bold")
            table.add_row(record.request_id[:8], f"→ {record.worker}", reason, overlap, predicted, runner_up)
        return table


def sparkline(values: deque[float]) -> Text:
    """One glyph a value, 0 to 1."""
    glyphs = (SPARKS[min(len(SPARKS) - 1, int(value * len(SPARKS)))] for value in values)
    return Text("".join(glyphs).rjust(BAR_WIDTH), FATE_STYLE["device"])


def fate_bar(shares: dict[str, float]) -> Text:
    """A bar cut into the fates' shares."""
    bar = Text()
    for fate, share in shares.items():
        bar.append(FATE_GLYPH[fate] * round(share * BAR_WIDTH), FATE_STYLE[fate])
    bar.truncate(BAR_WIDTH, pad=True)
    return bar


def holding(held: admin_pb2.PrefixHolding.Held | None, tokens: int) -> Text:
    """What one worker holds of a prefix: device part solid, host part shaded, a dot for nothing."""
    if held is None or not (held.device_tokens or held.host_tokens):
        return Text("·", "dim")
    device = _cells(held.device_tokens, tokens)
    host = max(0, _cells(held.host_tokens, tokens) - device)
    return Text("█" * device, FATE_STYLE["device"]).append("▓" * host, FATE_STYLE["host"])


def _cells(part: int, whole: int) -> int:
    return -(-part * CELL_WIDTH // whole) if whole else 0
