// The six numbers at the top.

import { byId, setAttribute, setText } from "/static/dom.js";
import * as format from "/static/format.js";

const HIT_WINDOW_MS = 60_000;
const RATE_WINDOW_MS = 10_000;

export function renderTiles(stats, history) {
  renderHitRate(stats, history);
  renderLatency(stats);
  renderRates(stats, history);
  renderWorkers(stats);
}

function renderHitRate(stats, history) {
  tile("hit-rate", format.percent(history.lastWindow(HIT_WINDOW_MS)?.hitRate() ?? null));
  const total = Object.values(stats.prompt_tokens).reduce((sum, tokens) => sum + tokens, 0);
  setText(byId("hit-rate-sub"), total > 0 ? `${format.percent(1 - stats.prompt_tokens.computed / total)} since start` : "no prompts yet");
}

function renderLatency({ ttft, window_seconds: seconds }) {
  const measured = ttft.count > 0;
  tile("ttft-p50", measured ? format.milliseconds(ttft.p50_ms) : format.DASH);
  tile("ttft-p95", measured ? format.milliseconds(ttft.p95_ms) : format.DASH);
  setText(byId("ttft-p50-sub"), `${format.count(ttft.count)} in the last ${format.count(seconds)} s`);
  setText(byId("ttft-p95-sub"), measured ? `p99 ${format.milliseconds(ttft.p99_ms)}` : "p99 –");
}

function renderRates(stats, history) {
  const window = history.lastWindow(RATE_WINDOW_MS);
  tile("request-rate", perSecond(window?.perSecond("requests")));
  tile("token-rate", perSecond(window?.perSecond("generated")));
  const failed = history.length > 0 ? history.value(history.length - 1, "failed") : 0;
  const sub = byId("request-rate-sub");
  const queued = stats.queued ? ` (${format.count(stats.queued)} queued)` : "";
  setText(sub, `${format.count(stats.in_flight)} in flight${queued} · ${format.count(failed)} failed`);
  setAttribute(sub, "class", failed > 0 ? "sub bad" : "sub");
  setAttribute(sub, "title", Object.entries(stats.requests).map(([code, count]) => `${code} ${format.count(count)}`).join(", "));
  setText(byId("token-rate-sub"), `${format.count(stats.generated_tokens)} since start`);
}

function renderWorkers({ workers }) {
  const ready = workers.filter(({ state }) => state === "WORKER_STATE_READY").length;
  const total = (field) => format.count(workers.reduce((sum, worker) => sum + worker[field], 0));
  tile("workers-ready", `${ready} / ${workers.length}`);
  setAttribute(byId("workers-ready").parentElement, "data-alarm", ready === 0);
  setText(byId("workers-ready-sub"), `${total("running")} running · ${total("waiting")} waiting`);
}

const perSecond = (value) => (format.known(value) ? `${format.rate(value)} /s` : format.DASH);

const tile = (id, text) => setText(byId(id), text);
