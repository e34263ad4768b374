// One row a worker: state, role, how it computes and stores, load, speed, how full its tiers are, and what is wrong with
// it. The shared tier comes last.

import { byId, h, keyed, setAttribute, setShare, setText } from "/static/dom.js";
import * as format from "/static/format.js";
import { Table, textColumn } from "/static/table.js";

const ALWAYS = ["TIER_DEVICE", "TIER_HOST"];
const SHARED = "TIER_REDIS";
const SIGNS = { ready: "●", joining: "◌", drained: "‖", suspect: "?", lost: "✕", refused: "⊘", "in use": "●", "cut off": "✕", none: "–" };
const CLASSES = { "in use": "ready", "cut off": "lost", none: "joining" };
const TITLES = { TIER_DEVICE: "Device", TIER_HOST: "Host RAM", TIER_DISK: "Disk", TIER_PEER: "Peer" };

export class Workers {
  #table = new Table(byId("workers"), {
    caption: "Workers: state, load and tiers",
    empty: ["No workers yet. Start some: ", h("code", {}, "warmkv scale --workers 2")],
    key: ({ name }) => name,
    columns,
  });

  render({ workers, shared_tier: shared, shared_tier_reads: reads }) {
    const own = workers.flatMap(({ tiers }) => tiers.map(({ tier }) => tier));
    const tiers = [...new Set([...ALWAYS, ...own])].filter((tier) => tier !== SHARED);
    const rows = workers.map((worker) => ({ ...worker, byTier: new Map(worker.tiers.map((usage) => [usage.tier, usage])) }));
    this.#table.render(rows, { tiers });
    renderProblems(workers.filter(({ problem }) => problem !== ""));
    renderShared(shared, reads);
  }
}

function columns({ tiers }) {
  return [
    textColumn("name", "Worker", ({ name }) => name, { heads: true, hover: hoverOf }),
    { key: "state", label: "State", update: (cell, { state }) => updateState(cell, format.enumWord(state, "WORKER_STATE_")) },
    textColumn("role", "Role", ({ role }) => role || format.DASH, { title: "What it is there for: whole requests, or prefills for others, or answers" }),
    textColumn("kv", "K/V", stored, { title: "What K/V is stored as; ranks that share out the model; deterministic: canonical mode" }),
    textColumn("running", "Running", ({ running }) => format.count(running), { class: "number" }),
    textColumn("waiting", "Waiting", ({ waiting }) => format.count(waiting), { class: "number" }),
    textColumn("prefill", "Prefill", prefill, { class: "number", title: "Milliseconds to prefill 1,000 tokens, as measured" }),
    ...tiers.map((tier) => ({ key: tier, label: TITLES[tier] ?? tierWord(tier), class: "fill-cell", update: (cell, { byTier }) => updateTier(cell, byTier.get(tier)) })),
  ];
}

const hoverOf = ({ address, device, model, incarnation }) => `${address}, ${device}, ${model}, incarnation ${incarnation}`;

function renderProblems(workers) {
  keyed(byId("problems"), workers, ({ name }) => name, ({ name }) => h("li", {}, h("b", {}, name), " ", h("span")),
    (element, { problem }) => setText(element.lastElementChild, problem));
}

// A router without a shared tier sends none, or one that is empty in every respect.
function renderShared(shared, reads) {
  const exists = shared !== undefined && (shared.used_bytes > 0 || shared.capacity_bytes > 0 || shared.blocks > 0);
  updateState(byId("shared-state"), exists ? (shared.healthy ? "in use" : "cut off") : "none");
  updateTier(byId("shared-fill"), exists ? shared : undefined);
  const blocks = exists ? `${format.count(shared.blocks)} blocks · ${reads ? "read by workers" : "reads are off"}` : "start with --redis URL to have one";
  setText(byId("shared-reads-now"), blocks);
}

function updateState(cell, state) {
  if (cell.firstElementChild === null) cell.append(h("span", {}, h("i", { "aria-hidden": "true" }), h("span")));
  const [sign, text] = cell.firstElementChild.children;
  setAttribute(cell.firstElementChild, "class", `state ${CLASSES[state] ?? state}`);
  setText(sign, SIGNS[state] ?? "?");
  setText(text, state);
}

function updateTier(cell, usage) {
  if (cell.firstElementChild === null) {
    cell.append(h("div", { class: "fill" }, h("div", { class: "bar", "aria-hidden": "true" }, h("span")), h("span", { class: "amount" })));
  }
  const [bar, amount] = cell.firstElementChild.children;
  const bounded = usage !== undefined && usage.capacity_bytes > 0;
  setAttribute(bar, "class", usage === undefined ? "bar none" : `bar ${tierWord(usage.tier)}${usage.healthy ? "" : " broken"}`);
  setShare(bar, "--share", bounded ? usage.used_bytes / usage.capacity_bytes : 0);
  setText(amount, usage === undefined ? "" : amountOf(usage, bounded));
  setAttribute(cell, "title", usage === undefined ? null : `${tierWord(usage.tier)}: ${format.count(usage.blocks)} blocks${usage.healthy ? "" : "; cut off after errors"}`);
}

function amountOf({ used_bytes: used, capacity_bytes: capacity, healthy }, bounded) {
  const text = bounded ? `${format.bytes(used)} of ${format.bytes(capacity)}` : format.bytes(used);
  return healthy ? text : `${text} · cut off`;
}

function stored({ kv_dtype: dtype, ranks, deterministic }) {
  if (ranks === 0) return format.DASH;
  return [dtype || format.DASH, ranks > 1 ? `${ranks} ranks` : "", deterministic ? "deterministic" : ""].filter(Boolean).join(" · ");
}

const tierWord = (tier) => format.enumWord(tier, "TIER_");
const prefill = ({ prefill_ms_per_1k: ms }) => (ms > 0 ? `${format.milliseconds(ms)}/1k` : format.DASH);
