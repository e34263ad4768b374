// The stream of numbers. EventSource cannot send a key, so the stream is read with fetch; it reconnects by itself.
//
// Events: "state" (detail: connecting, live, stale, lost, locked), "history", "stats" (detail: the data).

import { ApiError, call } from "/static/api.js";

const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5_000;
const STALE_PERIODS = 4;
const SHORTEST_PERIOD_MS = 500;

export class Feed extends EventTarget {
  #state = "";
  #periodMs = 1_000;
  #wake = () => {};
  #heard = 0;

  /** Runs for as long as the page lives. */
  async run() {
    let retryMs = FIRST_RETRY_MS;
    for (;;) {
      if (this.#state !== "lost") this.#enter("connecting");
      try {
        await this.#read(() => { retryMs = FIRST_RETRY_MS; });
        this.#enter("lost");
      } catch (error) {
        this.#enter(error instanceof ApiError && error.status === 401 ? "locked" : "lost", error.message);
      }
      await this.#pause(this.#state === "locked" ? Infinity : retryMs);
      retryMs = Math.min(retryMs * 2, LAST_RETRY_MS);
    }
  }

  /** Try again at once: a key was given, or the machine is back on the network. */
  retry() {
    this.#wake();
  }

  async #read(onOpen) {
    const abort = new AbortController();
    const response = await call("/events?show_prompts=1", { signal: abort.signal });
    onOpen();
    this.#heard = performance.now();
    const watchdog = setInterval(() => this.#watch(abort), this.#periodMs);
    try {
      await this.#consume(response.body.pipeThrough(new TextDecoderStream()).getReader());
    } finally {
      clearInterval(watchdog);
    }
  }

  async #consume(reader) {
    let pending = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      this.#heard = performance.now();
      const events = (pending + value).split("\n\n");
      pending = events.pop();
      events.forEach((event) => this.#dispatch(event));
    }
  }

  #dispatch(event) {
    const lines = Object.fromEntries(event.split("\n").map((line) => line.split(/: (.*)/s, 2)));
    const detail = JSON.parse(lines.data);
    if (lines.event === "history") this.#periodMs = Math.max(detail.period_ms, SHORTEST_PERIOD_MS);
    this.#enter("live");
    this.dispatchEvent(new CustomEvent(lines.event, { detail }));
  }

  // A connection can die without a word (a laptop that slept): silence first shows, then reconnects.
  #watch(abort) {
    const silentMs = performance.now() - this.#heard;
    if (silentMs > 4 * STALE_PERIODS * this.#periodMs) abort.abort(new Error("The router has gone silent."));
    else if (silentMs > STALE_PERIODS * this.#periodMs) this.#enter("stale");
  }

  #enter(state, reason = "") {
    if (state === this.#state) return;
    this.#state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: { state, reason } }));
  }

  #pause(milliseconds) {
    return new Promise((resolve) => {
      this.#wake = resolve;
      if (Number.isFinite(milliseconds)) setTimeout(resolve, milliseconds);
    });
  }
}
