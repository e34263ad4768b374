// Puts the page together: the feed brings history and frames, every frame is drawn by the panels.

import { forgetKey, storeKey, storedKey, takeKeyFromLink } from "/static/api.js";
import { Charts } from "/static/charts.js";
import { Decisions } from "/static/decisions.js";
import { byId, setText } from "/static/dom.js";
import { Feed } from "/static/feed.js";
import { History } from "/static/history.js";
import { PolicyForm } from "/static/policy.js";
import { PrefixMap } from "/static/prefixes.js";
import { Store } from "/static/store.js";
import { renderTiles } from "/static/tiles.js";
import { Workers } from "/static/workers.js";

const WORDS = {
  connecting: "Connecting",
  live: "Live",
  stale: "No news for some seconds",
  lost: "Connection lost, trying again",
  locked: "Needs an API key",
};

const feed = new Feed();
const history = new History();
const charts = new Charts(history);
const workers = new Workers();
const prefixMap = new PrefixMap();
const decisions = new Decisions();
const store = new Store();
const policyForm = new PolicyForm();
let stats = null;
let scheduled = false;

feed.addEventListener("history", ({ detail }) => {
  history.reset(detail);
  policyForm.distrust();
  setText(byId("model"), detail.model);
  setText(byId("router"), detail.router);
  document.title = `${detail.model} · warmkv`;
  schedule();
});

feed.addEventListener("stats", ({ detail }) => {
  history.add(detail.point);
  stats = detail.stats;
  policyForm.follow(stats);
  store.follow(schedule);
  schedule();
});

feed.addEventListener("state", ({ detail }) => {
  document.body.dataset.connection = detail.state;
  setText(byId("connection"), WORDS[detail.state]);
  byId("connection").title = detail.reason;
  byId("forget-key").hidden = storedKey() === null;
  if (detail.state === "locked") askForKey(detail.reason);
});

byId("key-form").addEventListener("submit", () => {
  storeKey(byId("key").value.trim());
  byId("key").value = "";
  feed.retry();
});

byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());

byId("forget-key").addEventListener("click", () => {
  forgetKey();
  location.reload();
});

addEventListener("online", () => feed.retry());
document.addEventListener("visibilitychange", schedule);

// Animation frames do not run in a hidden tab, so it costs nothing there and is drawn once when it comes back.
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    render();
  });
}

function render() {
  charts.render();
  if (stats === null) return;
  setText(byId("policy-now"), stats.policy.name);
  renderTiles(stats, history);
  workers.render(stats);
  prefixMap.render(stats);
  decisions.render(stats);
  store.render();
}

function askForKey(reason) {
  setText(byId("key-problem"), storedKey() === null ? "" : reason);
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

takeKeyFromLink();
feed.run();
