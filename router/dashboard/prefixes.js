// The prefix map: a row a prefix, a column a worker; a cell fills by the share of the prefix that the worker holds.

import { byId, h, setAttribute, setShare } from "/static/dom.js";
import * as format from "/static/format.js";
import { Table, textColumn } from "/static/table.js";

export class PrefixMap {
  #table = new Table(byId("prefixes"), {
    caption: "Most used prefixes, and the share of each that every worker holds",
    empty: ["No prefix is in use yet. Send a prompt: ", h("code", {}, "warmkv generate \"Tell me a story\"")],
    key: ({ tenant, label, tokens }) => `${tenant}/${label}/${tokens}`,
    columns,
  });

  render({ workers, prefixes }) {
    const names = new Set([...workers.map(({ name }) => name), ...prefixes.flatMap(({ held }) => held.map(({ worker }) => worker))]);
    const tenants = new Set(prefixes.map(({ tenant }) => tenant));
    const rows = prefixes.map((prefix) => ({ ...prefix, byWorker: new Map(prefix.held.map((held) => [held.worker, held])) }));
    this.#table.render(rows, { workers: [...names].sort(byNumber), showTenant: tenants.size > 1 });
  }
}

const byNumber = new Intl.Collator("en", { numeric: true }).compare;

function columns({ workers, showTenant }) {
  return [
    textColumn("label", "Prefix", ({ label }) => label, { heads: true, class: "label", hover: ({ label, tenant }) => `${label} (tenant ${tenant})` }),
    ...(showTenant ? [textColumn("tenant", "Tenant", ({ tenant }) => tenant, { class: "tenant muted" })] : []),
    textColumn("tokens", "Tokens", ({ tokens }) => format.count(tokens), { class: "number" }),
    textColumn("requests", "Requests", ({ requests }) => format.count(requests), { class: "number requests" }),
    ...workers.map((worker) => ({ key: `worker ${worker}`, label: worker, class: "hold-cell", update: (cell, prefix) => updateHeld(cell, prefix, worker) })),
    { key: "redis", label: "redis", class: "hold-cell", update: updateRedis },
  ];
}

function updateHeld(cell, prefix, worker) {
  const held = prefix.byWorker.get(worker) ?? { device_tokens: 0, host_tokens: 0 };
  // host_tokens counts device or host; only what host adds is drawn in its shade.
  const more = Math.max(0, held.host_tokens - held.device_tokens);
  const [device, host] = holding(cell, ["device", "host"], `${worker}: ${format.count(held.device_tokens)} of ${format.count(prefix.tokens)} tokens on the device, ${format.count(more)} more in host RAM`);
  setShare(device, "--share", held.device_tokens / prefix.tokens);
  setShare(host, "--share", more / prefix.tokens);
}

function updateRedis(cell, prefix) {
  const [redis] = holding(cell, ["redis"], `redis: ${format.count(prefix.redis_tokens)} of ${format.count(prefix.tokens)} tokens`);
  setShare(redis, "--share", prefix.redis_tokens / prefix.tokens);
}

function holding(cell, shades, words) {
  if (cell.firstElementChild === null) {
    cell.append(h("div", { class: "hold", role: "img" }, ...shades.map((shade) => h("span", { class: shade }))));
  }
  setAttribute(cell.firstElementChild, "aria-label", words);
  setAttribute(cell, "title", words);
  return cell.firstElementChild.children;
}
