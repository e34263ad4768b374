// One row a tier, all workers together: how full it is, what was found, what was not and why, and what is wrong with it.

import { getCache } from "/static/api.js";
import { byId, h, keyed, setAttribute, setShare, setText } from "/static/dom.js";
import * as format from "/static/format.js";
import { Table, textColumn } from "/static/table.js";

const PERIOD_MS = 2_000;
const TITLES = { TIER_DEVICE: "Device", TIER_HOST: "Host RAM", TIER_DISK: "Disk", TIER_PEER: "Peers", TIER_REDIS: "Redis" };
// Its bytes and blocks are those of one server that all workers share; the others' add up.
const SHARED = "TIER_REDIS";
const SUMS = ["pinned", "hits", "stores", "loads", "bad_hits", "load_ms", "compute_ms"];
const COUNTS = ["misses", "store_failures", "removals"];
// Values that were there and were wrong. Each was computed instead, but disks and networks should not do that.
const WRONG = ["corrupt", "truncated", "foreign"];

export class Store {
  #workers = null;
  #asked = -Infinity;
  #asking = false;
  #table = new Table(byId("store"), {
    caption: "Store: tiers of all workers",
    empty: ["No worker has reported yet."],
    key: ({ tier }) => tier,
    columns: () => COLUMNS,
  });

  /** Fetches the numbers when they are old; calls `changed` when new ones are there. What fails is tried again. */
  async follow(changed) {
    if (this.#asking || document.hidden || performance.now() - this.#asked < PERIOD_MS) return;
    this.#asking = true;
    this.#asked = performance.now();
    try {
      this.#workers = (await getCache()).workers;
      changed();
    } catch {
      // The feed tells whether the router can be reached; the last numbers stay until then.
    } finally {
      this.#asking = false;
    }
  }

  render() {
    if (this.#workers === null) return;
    this.#table.render(byTier(this.#workers));
    keyed(byId("store-problems"), problems(this.#workers), ({ text }) => text, () => h("li", {}, h("b"), " ", h("span")),
      (element, { who, text }) => {
        setText(element.firstElementChild, who);
        setText(element.lastElementChild, text);
      });
  }
}

/** The tiers of all workers added up, from fast to slow. */
export function byTier(workers) {
  const found = new Map();
  for (const { worker, tiers } of workers) {
    for (const tier of tiers) {
      if (!found.has(tier.tier)) found.set(tier.tier, empty(tier.tier));
      add(found.get(tier.tier), tier, worker);
    }
  }
  return [...found.values()].sort((one, other) => order(one) - order(other));
}

const order = ({ tier }) => Object.keys(TITLES).indexOf(tier);
const empty = (tier) => ({ tier, workers: 0, cutOff: [], troubled: 0, used_bytes: 0, capacity_bytes: 0, blocks: 0,
  ...Object.fromEntries(SUMS.map((name) => [name, 0])), ...Object.fromEntries(COUNTS.map((name) => [name, {}])) });

function add(sum, tier, worker) {
  const join = sum.tier === SHARED ? Math.max : (one, other) => one + other;
  for (const name of ["used_bytes", "capacity_bytes", "blocks"]) sum[name] = join(sum[name], tier[name]);
  for (const name of SUMS) sum[name] += tier[name];
  for (const name of COUNTS) for (const [key, count] of Object.entries(tier[name])) sum[name][key] = (sum[name][key] ?? 0) + count;
  sum.workers += 1;
  if (!tier.healthy) sum.cutOff.push(worker);
  else if (tier.problem !== "") sum.troubled += 1;
}

/** Each problem once, with those who have it: a server that is down is one problem, not one a worker. */
function problems(workers) {
  const found = new Map();
  for (const { worker, tiers } of workers) {
    for (const { tier, problem } of tiers) {
      if (problem === "") continue;
      if (!found.has(problem)) found.set(problem, { tier, workers: [] });
      found.get(problem).workers.push(worker);
    }
  }
  return [...found].map(([text, { tier, workers: who }]) => ({ text, who: `${TITLES[tier] ?? tier} of ${who.join(", ")}` }));
}

const COLUMNS = [
  textColumn("tier", "Tier", ({ tier }) => TITLES[tier] ?? format.enumWord(tier, "TIER_"), { heads: true }),
  { key: "state", label: "State", update: updateState },
  { key: "fill", label: "Fill", class: "fill-cell", update: updateFill },
  number("blocks", "Blocks"),
  number("pinned", "Pinned", "Blocks that neither eviction nor their time to live drops"),
  number("hits", "Hits", "Blocks read and found whole"),
  { key: "misses", label: "Misses by reason", class: "wrap", update: (cell, { misses }) => updateCounts(cell, misses, WRONG) },
  { key: "failures", label: "Not stored", class: "wrap", update: (cell, { store_failures: failed }) => updateCounts(cell, failed, Object.keys(failed)) },
  textColumn("removals", "Removed", ({ removals }) => counts(removals), { class: "wrap" }),
  textColumn("loads", "Loads", loads, { class: "number", title: "Reads for requests: how many, and how long one took on average against computing the same blocks" }),
  { key: "bad", label: "Bad hits", class: "number", title: "Loads that took longer than computing would have", update: updateBad },
];

function number(key, label, title) {
  return textColumn(key, label, (row) => format.count(row[key]), { class: "number", title });
}

function updateState(cell, { cutOff, troubled, workers }) {
  if (cell.firstElementChild === null) cell.append(h("span", {}, h("i", { "aria-hidden": "true" }), h("span")));
  const [sign, text] = cell.firstElementChild.children;
  const [kind, mark, words] = cutOff.length > 0 ? ["lost", "✕", `cut off (${cutOff.length} of ${workers})`]
    : troubled > 0 ? ["suspect", "!", `has a problem (${troubled} of ${workers})`] : ["ready", "●", "works"];
  setAttribute(cell.firstElementChild, "class", `state ${kind}`);
  setText(sign, mark);
  setText(text, words);
  setAttribute(cell, "title", cutOff.length > 0 ? `Cut off after errors on ${cutOff.join(", ")}` : null);
}

function updateFill(cell, { tier, used_bytes: used, capacity_bytes: capacity, cutOff }) {
  if (cell.firstElementChild === null) {
    cell.append(h("div", { class: "fill" }, h("div", { class: "bar", "aria-hidden": "true" }, h("span")), h("span", { class: "amount" })));
  }
  const [bar, amount] = cell.firstElementChild.children;
  setAttribute(bar, "class", `bar ${format.enumWord(tier, "TIER_")}${cutOff.length > 0 ? " broken" : ""}`);
  setShare(bar, "--share", capacity > 0 ? used / capacity : 0);
  setText(amount, capacity > 0 ? `${format.bytes(used)} of ${format.bytes(capacity)}` : format.bytes(used));
}

function updateCounts(cell, found, alarming) {
  setText(cell, counts(found));
  cell.classList.toggle("bad", alarming.some((reason) => found[reason] > 0));
}

function updateBad(cell, { bad_hits: bad }) {
  setText(cell, format.count(bad));
  cell.classList.toggle("bad", bad > 0);
}

function counts(found) {
  const parts = Object.entries(found).filter(([, count]) => count > 0).sort(([one], [other]) => one.localeCompare(other));
  return parts.length > 0 ? parts.map(([name, count]) => `${name} ${format.count(count)}`).join(", ") : format.DASH;
}

function loads({ loads: count, load_ms: took, compute_ms: computing }) {
  if (count === 0) return format.DASH;
  return `${format.count(count)} · ${format.milliseconds(took / count)} (computing ${format.milliseconds(computing / count)})`;
}
