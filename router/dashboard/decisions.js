// Why requests went where they went: counts by reason, what workers did for one another, and the last decisions with
// what was predicted and what came.

import { byId, h, keyed, setAttribute, setShare, setText } from "/static/dom.js";
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
    renderTogether(stats);
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

// Prefills by outcome: `failed` and `lost` ones the answering worker made up for, `cancelled` ones nobody needed any more.
function renderTogether({ handovers, handover_pause: pause, prefill_jobs: prefills }) {
  const begun = sum(prefills), done = prefills.done ?? 0;
  setText(byId("prefilled"), done < begun ? `${format.count(done)} of ${format.count(begun)}` : format.count(begun));
  setAttribute(byId("prefilled"), "title", listed(prefills));
  setText(byId("handovers"), format.count(sum(handovers)));
  setAttribute(byId("handovers"), "title", listed(handovers));
  const measured = pause.count > 0;
  setText(byId("handover-pause"), measured ? `${format.milliseconds(pause.p50_ms)} / ${format.milliseconds(pause.p99_ms)}` : format.DASH);
}

const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
const listed = (counts) => Object.entries(counts).sort(([one], [other]) => one.localeCompare(other)).map(([name, count]) => `${name} ${format.count(count)}`).join(", ") || null;

function createReason([reason]) {
  return h("li", { title: MEANINGS[reason] ?? null, "data-reason": reason },
    h("span", { class: "name" }, reason), h("span", { class: "bar", "aria-hidden": "true" }, h("span")), h("b"), h("span", { class: "total" }));
}

const COLUMNS = [
  textColumn("time", "Time", ({ time_ms: time }) => format.clockTime(time), { class: "muted" }),
  textColumn("request", "Request", ({ request_id: id }) => id.slice(0, 8), { class: "code", hover: ({ request_id: id, tenant }) => `${id} (tenant ${tenant})` }),
  textColumn("worker", "Worker", path, { heads: true, hover: pathInWords }),
  textColumn("reason", "Reason", ({ reason }) => reason, { hover: ({ policy, reason }) => `${policy}: ${MEANINGS[reason] ?? reason}` }),
  textColumn("prompt", "Prompt", ({ prompt_tokens: tokens }) => format.count(tokens), { class: "number", title: "Prompt tokens" }),
  textColumn("reuse", "Reuse, tokens", (one) => arrow(format.count(one.predicted_cached_tokens), format.count(one.reused_tokens)), { class: "number" }),
  textColumn("ttft", "TTFT", (one) => arrow(format.milliseconds(one.predicted_ttft_ms), format.milliseconds(one.ttft_ms)), { class: "number" }),
  textColumn("runner", "Runner-up", runnerUp, { class: "muted after" }),
];

const arrow = (predicted, real) => `${predicted} → ${real === format.DASH ? "…" : real}`;

// `w0 ✕ w1 ⇢ w2`: w0 was lost before a token came, w1 began the answer, w2 went on with it. `d0 ← p0`: p0 prefilled.
function path({ tried, worker, went_on_at: next, prefill_worker: maker }) {
  return [...tried.map((name) => `${name} ✕ `), worker, maker === "" ? "" : ` ← ${maker}`, ...next.map((name) => ` ⇢ ${name}`)].join("");
}

function pathInWords({ tried, went_on_at: next, prefill_worker: maker }) {
  const words = [tried.length > 0 ? `no token came from ${tried.join(", ")}` : "", maker === "" ? "" : `prefilled by ${maker}`,
    next.length > 0 ? `handed over to ${next.join(", then to ")}` : ""].filter(Boolean);
  return words.length > 0 ? words.join("; ") : null;
}

function runnerUp({ runner_up: worker, runner_up_extra_ms: extra }) {
  return worker === "" ? "" : `${worker} +${format.milliseconds(extra)}`;
}
