// The five charts and their readouts: what is drawn over which window, and what the cursor reads.

import { Cursor, TimeChart, nearest } from "/static/chart.js";
import { byId, h, keyed, setAttribute, setText } from "/static/dom.js";
import * as format from "/static/format.js";
import { FATES } from "/static/history.js";

const WINDOW_MS = 15_000;
const NOW_MS = 60_000;
const IDLE = "No requests yet";

export class Charts {
  #history;
  #cursor = new Cursor();
  #charts;
  #view = null;

  constructor(history) {
    this.#history = history;
    const chart = (id, options) => new TimeChart(byId(id), { cursor: this.#cursor, empty: IDLE, ...options });
    this.#charts = {
      hit: chart("chart-hit", { label: "Hit rate over time", series: ["hit"], filled: true, ceiling: 1, format: (share) => `${Math.round(share * 100)} %` }),
      fate: chart("chart-fate", { label: "Prompt tokens per second by fate over time", series: FATES, stacked: true, format: axisRate }),
      ttft: chart("chart-ttft", { label: "Time to first token over time", series: ["p95", "p50"], format: axisMilliseconds }),
      requests: chart("chart-requests", { label: "Requests per second over time", series: ["requests"], filled: true, format: axisRate }),
      tokens: chart("chart-tokens", { label: "Generated tokens per second over time", series: ["tokens"], filled: true, format: axisRate }),
    };
    this.#cursor.addEventListener("move", () => this.#read());
  }

  render() {
    const windows = this.#history.windows(WINDOW_MS);
    const over = (value) => windows.map((window) => (window === null ? null : value(window)));
    this.#view = {
      times: this.#history.column("time_ms"),
      hit: { hit: over((window) => window.hitRate()) },
      fate: Object.fromEntries(FATES.map((fate) => [fate, over((window) => window.perSecond(fate))])),
      ttft: { p95: this.#history.column("ttft_p95_ms"), p50: this.#history.column("ttft_p50_ms") },
      requests: { requests: over((window) => window.perSecond("requests")) },
      tokens: { tokens: over((window) => window.perSecond("generated")) },
    };
    this.#hideIdle();
    this.#read();
    const shared = { times: this.#view.times, seconds: this.#history.span(), marks: this.#history.policyChanges() };
    for (const [name, chart] of Object.entries(this.#charts)) {
      chart.update({ ...shared, columns: this.#view[name], summary: this.#summary(name) });
    }
    this.#renderFates();
  }

  // Before the first request there is nothing to see but zeros: leave the charts empty, with a word.
  #hideIdle() {
    const length = this.#history.length;
    const idle = length === 0 || this.#history.value(length - 1, "requests") + this.#history.value(length - 1, "in_flight") === 0;
    if (!idle) return;
    for (const name of ["fate", "requests", "tokens"]) {
      for (const column of Object.values(this.#view[name])) column.fill(null);
    }
  }

  #read() {
    if (this.#view === null) return;
    const { times } = this.#view;
    const at = this.#cursor.time === null ? times.length - 1 : nearest(times, this.#cursor.time);
    const value = (chart, series) => this.#view[chart][series][at] ?? null;
    setText(byId("read-hit"), format.percent(value("hit", "hit")));
    setText(byId("read-requests"), format.rate(value("requests", "requests")));
    setText(byId("read-tokens"), format.rate(value("tokens", "tokens")));
    setText(byId("read-fate"), format.rate(sum(FATES.map((fate) => value("fate", fate)))));
    const ttft = ["p50", "p95"].flatMap((series) => [
      h("i", { class: `key series-${series}` }), `${series} `, h("b", {}, format.milliseconds(value("ttft", series))), " ",
    ]);
    byId("read-ttft").replaceChildren(...ttft);
  }

  #summary(name) {
    const minutes = this.#history.span() / 60;
    const parts = Object.entries(this.#view[name]).map(([series, values]) => {
      const known = values.filter((value) => value !== null);
      const show = { hit: format.percent, ttft: format.milliseconds }[name] ?? format.rate;
      return known.length === 0 ? `${series}: ${IDLE}` : `${series}: now ${show(values.at(-1))}, lowest ${show(Math.min(...known))}, highest ${show(Math.max(...known))}`;
    });
    return `Last ${minutes} minutes. ${parts.join("; ")}`;
  }

  #renderFates() {
    const window = this.#history.lastWindow(NOW_MS);
    const last = this.#history.length - 1;
    keyed(byId("fates"), FATES, (fate) => fate, createFate, (element, fate) => {
      const [, , share, total] = element.children;
      const tokens = last < 0 ? null : this.#history.value(last, fate);
      setText(share, format.percent(window?.share(fate) ?? null));
      setText(total, format.count(tokens));
      setAttribute(element, "title", `${fate}: ${format.percent(window?.share(fate) ?? null)} of the last 60 s, ${format.count(tokens)} tokens since start`);
    });
  }
}

function createFate(fate) {
  return h("li", { "data-fate": fate },
    h("i", { class: `swatch ${fate}` }), h("span", {}, fate), h("b", { "data-role": "share" }), h("span", { class: "total", "data-role": "total" }));
}

const axisMilliseconds = (value) => (value < 10_000 ? `${Number(value.toPrecision(3))} ms` : `${value / 1000} s`);

const axisRate = (value) => (value !== 0 && value < 10 ? String(Number(value.toFixed(2))) : format.count(value));

const sum = (values) => (values.every((value) => value === null) ? null : values.reduce((total, value) => total + (value ?? 0), 0));
