// Why requests went where they went: counts by reason, and the last decisions with what was predicted and what came.

import { byId, h, keyed, setShare, setText } from "/static/dom.js";
import * as format from "/static/format.js";
import { Table, textColumn } from "/static/table.js";

const SHOWN = 12;
const MEANINGS = {
  prefix: "it holds the longest useful prefix",
  balance: "others were too busy",
  affinity: "the request's affinity key",
  no_hit: "nobody holds its prefix",
  only_one: "no other worker was ready",
  order: "it was its turn",
  hash: "the prompt's beginning hashes to it",
};

export class Decisions {
  #reasonsEmpty = h("p", { class: "empty" }, "No decisions yet.");
  #reasons = h("ul", { class: "reasons" });
  #table = new Table(byId("recent"), {
    caption: "Last decisions, newest first",
    empty: ["No decisions yet. Ask what one would be: ", h("code", {}, "warmkv explain \"Tell me a story\"")],
    key: ({ request_id: id, time_ms: time }) => `${id}/${time}`,
    columns: () => COLUMNS,
  });

  constructor() {
    byId("reasons").append(this.#reasons, this.#reasonsEmpty);
  }

  render(stats) {
    this.#renderReasons(stats.decisions);
    this.#table.render(stats.recent.slice(0, SHOWN), null);
    setText(byId("predicted"), format.count(stats.predicted_cached_tokens));
    setText(byId("reused"), format.count(stats.reused_tokens));
    const ratio = stats.predicted_cached_tokens > 0 ? stats.reused_tokens / stats.predicted_cached_tokens : null;
    setText(byId("predicted-ratio"), format.percent(ratio));
  }

  #renderReasons(decisions) {
    const rows = Object.entries(decisions).sort(([a, m], [b, n]) => n - m || a.localeCompare(b));
    const total = rows.reduce((sum, [, count]) => sum + count, 0);
    this.#reasonsEmpty.hidden = total > 0;
    keyed(this.#reasons, rows, ([reason]) => reason, createReason, (element, [, count]) => {
      const [, bar, number, share] = element.children;
      setShare(bar, "--share", total > 0 ? count / total : 0);
      setText(number, format.count(count));
      setText(share, format.percent(total > 0 ? count / total : null));
    });
  }
}

function createReason([reason]) {
  return h("li", { title: MEANINGS[reason] ?? null, "data-reason": reason },
    h("span", { class: "name" }, reason), h("span", { class: "bar", "aria-hidden": "true" }, h("span")), h("b"), h("span", { class: "total" }));
}

const COLUMNS = [
  textColumn("time", "Time", ({ time_ms: time }) => format.clockTime(time), { class: "muted" }),
  textColumn("request", "Request", ({ request_id: id }) => id.slice(0, 8), { class: "code", hover: ({ request_id: id, tenant }) => `${id} (tenant ${tenant})` }),
  textColumn("worker", "Worker", ({ worker }) => worker, { heads: true }),
  textColumn("reason", "Reason", ({ reason }) => reason, { hover: ({ policy, reason }) => `${policy}: ${MEANINGS[reason] ?? reason}` }),
  textColumn("prompt", "Prompt", ({ prompt_tokens: tokens }) => format.count(tokens), { class: "number", title: "Prompt tokens" }),
  textColumn("reuse", "Reuse, tokens", (one) => arrow(format.count(one.predicted_cached_tokens), format.count(one.reused_tokens)), { class: "number" }),
  textColumn("ttft", "TTFT", (one) => arrow(format.milliseconds(one.predicted_ttft_ms), format.milliseconds(one.ttft_ms)), { class: "number" }),
  textColumn("runner", "Runner-up", runnerUp, { class: "muted after" }),
];

const arrow = (predicted, real) => `${predicted} → ${real === format.DASH ? "…" : real}`;

function runnerUp({ runner_up: worker, runner_up_extra_ms: extra }) {
  return worker === "" ? "" : `${worker} +${format.milliseconds(extra)}`;
}
