// One chart over time, drawn as SVG: lines or stacked areas, a y axis of round numbers, marks where the policy changed,
// and a cursor that all charts share. Colours come from the style sheet (`.series-NAME`), so both themes look right.

import { setAttribute, svg } from "/static/dom.js";
import { clockTime } from "/static/format.js";

const PAD = { left: 48, right: 12, top: 16, bottom: 20 };
const NARROW = 360;
const MARK_LABEL = 84;

/** The moment that the reader points at; null: now. Charts move it and follow it. */
export class Cursor extends EventTarget {
  time = null;

  set(time) {
    if (time === this.time) return;
    this.time = time;
    this.dispatchEvent(new Event("move"));
  }
}

let charts = 0;

export class TimeChart {
  #host;
  #options;
  #svg;
  #layers;
  #view = null;
  #size = { width: 0, height: 0 };

  /**
   * @param host element to fill; its size is the chart's
   * @param options `{label, series: [names], stacked, filled, format(value), ceiling, cursor, empty}`
   */
  constructor(host, options) {
    this.#host = host;
    this.#options = options;
    const clip = `chart-clip-${(charts += 1)}`;
    this.#layers = Object.fromEntries(["grid", "marks", "data", "cursor"].map((name) => [name, svg("g", { class: name })]));
    this.#layers.clip = svg("rect");
    this.#layers.empty = svg("text", { class: "empty", "text-anchor": "middle" }, options.empty);
    this.#layers.data.setAttribute("clip-path", `url(#${clip})`);
    this.#svg = svg("svg", { role: "img", tabindex: 0, focusable: "true", "aria-label": options.label },
      svg("defs", {}, svg("clipPath", { id: clip }, this.#layers.clip)),
      this.#layers.grid, this.#layers.marks, this.#layers.data, this.#layers.cursor, this.#layers.empty);
    this.#makeSeries();
    host.append(this.#svg);
    this.#listen();
  }

  /** @param view `{times, columns: {name: values}, seconds, marks: [{time, policy}], summary}`; drawn at once. */
  update(view) {
    this.#view = view;
    this.#draw();
  }

  #makeSeries() {
    const { series, stacked, filled } = this.#options;
    this.#layers.paths = Object.fromEntries(series.map((name) => [name, {
      area: stacked || filled ? svg("path", { class: `area series-${name}` }) : null,
      line: stacked ? null : svg("path", { class: `line series-${name}` }),
    }]));
    for (const { area, line } of Object.values(this.#layers.paths)) {
      this.#layers.data.append(...[area, line].filter((path) => path !== null));
    }
  }

  #listen() {
    const { cursor } = this.#options;
    this.#svg.addEventListener("pointermove", (event) => cursor.set(this.#timeAt(event.offsetX)));
    this.#svg.addEventListener("pointerleave", () => cursor.set(null));
    this.#svg.addEventListener("blur", () => cursor.set(null));
    this.#svg.addEventListener("keydown", (event) => this.#onKey(event));
    cursor.addEventListener("move", () => this.#drawCursor());
    new ResizeObserver(() => this.#draw()).observe(this.#host);
  }

  #onKey(event) {
    const { times } = this.#view ?? { times: [] };
    if (times.length === 0) return;
    const at = nearest(times, this.#options.cursor.time ?? times.at(-1));
    const step = event.shiftKey ? 10 : 1;
    const target = { ArrowLeft: at - step, ArrowRight: at + step, Home: 0, End: times.length - 1 }[event.key];
    if (event.key === "Escape") this.#options.cursor.set(null);
    if (target === undefined) return;
    event.preventDefault();
    this.#options.cursor.set(times[Math.min(times.length - 1, Math.max(0, target))]);
  }

  #timeAt(x) {
    const { times } = this.#view ?? { times: [] };
    return times.length === 0 ? null : times[nearest(times, this.#from() + ((x - PAD.left) / this.#plotWidth()) * this.#spanMs())];
  }

  #draw() {
    if (this.#view === null) return;
    this.#size = { width: this.#host.clientWidth, height: this.#host.clientHeight };
    if (this.#plotWidth() <= 0) return;
    setAttribute(this.#svg, "viewBox", `0 0 ${this.#size.width} ${this.#size.height}`);
    const clip = { x: PAD.left, y: 0, width: this.#plotWidth(), height: this.#size.height };
    Object.entries(clip).forEach(([name, value]) => setAttribute(this.#layers.clip, name, value));
    const layers = this.#layered();
    const empty = layers.every(({ upper }) => upper.every((value) => value === null));
    const { ceiling } = this.#options;
    const scale = yScale(ceiling ?? highest(layers), ceiling === undefined);
    this.#drawGrid(scale, empty && ceiling === undefined);
    this.#drawMarks();
    this.#drawSeries(layers, scale);
    this.#drawEmpty(empty);
    this.#drawCursor();
    setAttribute(this.#svg, "aria-label", `${this.#options.label}. ${this.#view.summary}`);
  }

  // For each series [lower, upper] edges; the lower edge of a line is zero.
  #layered() {
    const { series, stacked } = this.#options;
    const base = this.#view.times.map(() => 0);
    return series.map((name) => {
      const lower = [...base];
      const upper = this.#view.columns[name].map((value, index) => (value === null ? null : value + lower[index]));
      if (stacked) upper.forEach((value, index) => { base[index] = value ?? base[index]; });
      return { name, lower, upper };
    });
  }

  #drawGrid({ top, ticks }, unlabelled) {
    const { width, height } = this.#size;
    const labels = ticks.flatMap((tick) => {
      const y = this.#y(tick, top);
      return [
        svg("line", { x1: PAD.left, x2: width - PAD.right, y1: y, y2: y, class: tick === 0 ? "base" : "rule" }),
        svg("text", { x: PAD.left - 8, y: y + 3.5, "text-anchor": "end" }, unlabelled ? "" : this.#options.format(tick)),
      ];
    });
    const count = width < NARROW ? 2 : 4;
    const steps = Array.from({ length: count + 1 }, (_, step) => svg("text", {
      x: PAD.left + (this.#plotWidth() * step) / count,
      y: height - 5,
      "text-anchor": step === 0 ? "start" : step === count ? "end" : "middle",
    }, ago(this.#view.seconds * (1 - step / count))));
    this.#layers.grid.replaceChildren(...labels, ...steps);
  }

  #drawMarks() {
    const shown = this.#view.marks.filter(({ time }) => time > this.#from());
    this.#layers.marks.replaceChildren(...shown.flatMap(({ time, policy }, index) => {
      const x = this.#x(time);
      const next = shown[index + 1];
      // Where marks crowd, the later one keeps its word.
      const word = next !== undefined && this.#x(next.time) - x < MARK_LABEL ? "" : policy;
      const right = x > this.#size.width * 0.65;
      return [
        svg("line", { x1: x, x2: x, y1: PAD.top - 8, y2: this.#size.height - PAD.bottom }),
        svg("text", { x: right ? x - 4 : x + 4, y: PAD.top - 4, "text-anchor": right ? "end" : "start" }, word),
      ];
    }));
  }

  #drawSeries(layers, { top }) {
    for (const { name, lower, upper } of layers) {
      const { area, line } = this.#layers.paths[name];
      const runs = unbroken(upper);
      const point = (edge) => (index) => `${this.#x(this.#view.times[index]).toFixed(1)} ${this.#y(edge[index], top).toFixed(1)}`;
      if (line !== null) setAttribute(line, "d", runs.map((run) => `M${run.map(point(upper)).join("L")}`).join(""));
      if (area !== null) {
        setAttribute(area, "d", runs.map((run) => (
          `M${run.map(point(upper)).join("L")}L${[...run].reverse().map(point(lower)).join("L")}Z`)).join(""));
      }
    }
  }

  #drawEmpty(empty) {
    setAttribute(this.#layers.empty, "x", PAD.left + this.#plotWidth() / 2);
    setAttribute(this.#layers.empty, "y", this.#size.height / 2);
    setAttribute(this.#layers.empty, "visibility", empty ? "visible" : "hidden");
  }

  #drawCursor() {
    const { time } = this.#options.cursor;
    const times = this.#view?.times ?? [];
    const shown = time !== null && times.length > 0 && time >= this.#from();
    if (!shown) {
      this.#layers.cursor.replaceChildren();
      return;
    }
    const at = times[nearest(times, time)];
    const x = this.#x(at);
    const right = x > this.#size.width * 0.8;
    this.#layers.cursor.replaceChildren(
      svg("line", { x1: x, x2: x, y1: PAD.top, y2: this.#size.height - PAD.bottom }),
      svg("text", { x: right ? x - 5 : x + 5, y: this.#size.height - PAD.bottom - 5, "text-anchor": right ? "end" : "start" }, clockTime(at)),
    );
  }

  #plotWidth() {
    return this.#size.width - PAD.left - PAD.right;
  }

  #spanMs() {
    return this.#view.seconds * 1000;
  }

  #from() {
    return (this.#view.times.at(-1) ?? 0) - this.#spanMs();
  }

  #x(time) {
    return PAD.left + ((time - this.#from()) / this.#spanMs()) * this.#plotWidth();
  }

  #y(value, top) {
    return PAD.top + (1 - value / top) * (this.#size.height - PAD.top - PAD.bottom);
  }
}

/** Index of the time nearest to the one given; `times` ascend. */
export function nearest(times, time) {
  let low = 0;
  let high = times.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] < time) low = middle + 1;
    else high = middle;
  }
  return low > 0 && time - times[low - 1] < times[low] - time ? low - 1 : low;
}

// Round numbers: steps of 1, 2, 2.5 or 5 times a power of ten, about four; `roomy` keeps lines off the upper edge.
function yScale(wanted, roomy) {
  const highestValue = wanted * (roomy ? 1.05 : 1);
  const rough = (highestValue > 0 ? highestValue : 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const steps = Math.ceil(highestValue / step - 0.001) || 4;
  return { top: step * steps, ticks: Array.from({ length: steps + 1 }, (_, index) => index * step) };
}

function highest(layers) {
  return layers.reduce((most, { upper }) => upper.reduce((top, value) => Math.max(top, value ?? 0), most), 0);
}

// Runs of indexes without a gap; a lone point becomes a run of its own, which a round line cap makes visible.
function unbroken(values) {
  const runs = [];
  values.forEach((value, index) => {
    if (value === null) return;
    if (index > 0 && values[index - 1] !== null) runs.at(-1).push(index);
    else runs.push([index]);
  });
  return runs;
}

function ago(seconds) {
  if (seconds === 0) return "now";
  return seconds < 60 ? `−${seconds} s` : `−${Number((seconds / 60).toFixed(2))} min`;
}
