// The last ten minutes of totals, and what follows from them: rates and ratios over a window. Nothing here draws.

export const FATES = ["device", "host", "disk", "redis", "peer", "computed"];

const HORIZON_MS = 600_000;

export class History {
  #at = {};
  #points = [];

  /** Takes the router's own history: `fields` names the values of a point, `points` are oldest first. */
  reset({ fields, points }) {
    this.#at = Object.fromEntries(fields.map((name, index) => [name, index]));
    this.#points = [];
    points.forEach((point) => this.add(point));
  }

  /** Appends a point, so that times ascend: one that is not newer than the last was brought by the history already. */
  add(point) {
    const time = point[this.#at.time_ms];
    if (this.length > 0 && time <= this.value(this.length - 1, "time_ms")) return;
    this.#points.push(point);
    while (time - this.value(0, "time_ms") > HORIZON_MS) this.#points.shift();
  }

  get length() {
    return this.#points.length;
  }

  value(index, field) {
    return this.#points[index][this.#at[field]];
  }

  column(field) {
    return this.#points.map((point) => point[this.#at[field]]);
  }

  /** Seconds that a chart should show: the data's span, rounded up, so that the axis rarely changes. */
  span() {
    if (this.length === 0) return 60;
    const seconds = (this.value(this.length - 1, "time_ms") - this.value(0, "time_ms")) / 1000;
    return [60, 120, 300].find((step) => seconds <= step) ?? 600;
  }

  /** For each point, the window of at most `windowMs` that ends there; null for the first point. */
  windows(windowMs) {
    let start = 0;
    return this.#points.map((_, end) => {
      const from = this.value(end, "time_ms") - windowMs;
      while (start + 1 < end && this.value(start + 1, "time_ms") <= from) start += 1;
      return end === 0 ? null : new Window(this, start, end);
    });
  }

  /** The window that ends now; null while there are fewer than two points. */
  lastWindow(windowMs) {
    if (this.length < 2) return null;
    const end = this.length - 1;
    const from = this.value(end, "time_ms") - windowMs;
    let start = end - 1;
    while (start > 0 && this.value(start, "time_ms") > from) start -= 1;
    return new Window(this, start, end);
  }

  /** Where the policy changed: `[{time, policy}]`. */
  policyChanges() {
    const changes = [];
    for (let index = 1; index < this.length; index += 1) {
      const policy = this.value(index, "policy");
      if (policy !== this.value(index - 1, "policy")) changes.push({ time: this.value(index, "time_ms"), policy });
    }
    return changes;
  }
}

/** The difference of two points. Totals never fall within a history; a router that restarts brings a new history. */
class Window {
  #history;
  #start;
  #end;

  constructor(history, start, end) {
    this.#history = history;
    this.#start = start;
    this.#end = end;
  }

  get seconds() {
    return this.gain("time_ms") / 1000;
  }

  gain(field) {
    return this.#history.value(this.#end, field) - this.#history.value(this.#start, field);
  }

  /** Null where no time passed. */
  perSecond(field) {
    return this.seconds > 0 ? this.gain(field) / this.seconds : null;
  }

  promptTokens() {
    return FATES.reduce((sum, fate) => sum + this.gain(fate), 0);
  }

  /** Share of prompt tokens with this fate; null where there were none. */
  share(fate) {
    const tokens = this.promptTokens();
    return tokens > 0 ? this.gain(fate) / tokens : null;
  }

  /** Share of prompt tokens that were not computed; null where there were none. */
  hitRate() {
    const computed = this.share("computed");
    return computed === null ? null : 1 - computed;
  }
}
