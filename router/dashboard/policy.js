// The policy form. It shows what is in force until somebody edits it; then it keeps the edit and says when the policy
// changed elsewhere. Applying sends the chosen policy with all its weights.

import { getPolicy, setPolicy } from "/static/api.js";
import { byId, h, keyed, setAttribute, setText } from "/static/dom.js";
import { setting } from "/static/format.js";

const SLIDER_STEPS = 200;
// A linear slider whose default sits in its first twentieth cannot be aimed; such a one gets a curve.
const CURVED_BELOW = 0.05;

export class PolicyForm {
  #inForce = null;
  #outdated = false;
  #draft = null;
  #fetching = false;
  #sending = false;

  constructor() {
    byId("policy").addEventListener("submit", (event) => { event.preventDefault(); this.#apply(); });
    byId("policy-name").addEventListener("change", (event) => this.#choose(event.target.value));
    byId("shared-reads").addEventListener("change", (event) => this.#edit(() => { this.#draft.shared = event.target.checked; }));
    byId("revert").addEventListener("click", () => this.#revert());
  }

  /** Follows the policy that the numbers tell of; asks for the rest when it is not the one shown. */
  async follow(stats) {
    if (this.#fetching || this.#sending || (!this.#outdated && this.#inForce !== null && this.#agrees(stats))) return;
    this.#fetching = true;
    try {
      this.#take(await getPolicy());
    } catch (error) {
      this.#say(error.message, "bad");
    } finally {
      this.#fetching = false;
    }
  }

  /** After a reconnect everything may be different: another process, another token, another key. */
  distrust() {
    this.#outdated = true;
  }

  #agrees({ policy, shared_tier_reads: shared }) {
    const known = this.#inForce.policy;
    return policy.name === known.name && shared === this.#inForce.shared_tier_reads
      && Object.entries(policy.weights).every(([name, value]) => known.weights[name] === value);
  }

  #take(answer) {
    const edited = this.#draft !== null && this.#isEdited();
    const changed = this.#inForce === null || answer.policy.name !== this.#inForce.policy.name;
    this.#inForce = answer;
    this.#outdated = false;
    if (edited && changed) this.#say(`The policy in force is now ${answer.policy.name}. Apply replaces it, Revert shows it.`, "warn");
    else if (!edited) this.#draft = draftOf(answer);
    this.#render();
  }

  #choose(name) {
    const { policy } = this.#inForce;
    const chosen = this.#inForce.available.find((one) => one.name === name);
    const defaults = Object.fromEntries(chosen.weights.map((weight) => [weight.name, weight.default_value]));
    this.#edit(() => { this.#draft = { ...this.#draft, name, weights: name === policy.name ? { ...defaults, ...policy.weights } : defaults }; });
  }

  #edit(change) {
    change();
    const wrong = this.#chosen().weights.find((weight) => !this.#fits(weight));
    if (wrong === undefined) this.#say("", "");
    else this.#say(`${wrong.name} goes from ${setting(wrong.min)} to ${setting(wrong.max)}.`, "bad");
    this.#render();
  }

  #revert() {
    this.#edit(() => { this.#draft = draftOf(this.#inForce); });
  }

  async #apply() {
    const { name, weights, shared } = this.#draft;
    this.#sending = true;
    this.#say("Applying …", "");
    this.#render();
    try {
      const change = { policy: { name, weights }, shared_tier_reads: shared };
      const { policy, version } = await setPolicy(change, this.#inForce.csrf_token);
      this.#inForce = { ...this.#inForce, policy, version, shared_tier_reads: shared };
      this.#draft = draftOf(this.#inForce);
      this.#say(`${policy.name} is in force from the next request on.`, "good");
    } catch (error) {
      this.#say(error.message, "bad");
    } finally {
      this.#sending = false;
      this.#render();
    }
  }

  #isEdited() {
    const { name, weights, shared } = draftOf(this.#inForce);
    const draft = this.#draft;
    return draft.name !== name || draft.shared !== shared
      || Object.entries(draft.weights).some(([key, value]) => weights[key] !== value);
  }

  #fits({ name, min, max }) {
    const value = this.#draft.weights[name];
    return Number.isFinite(value) && value >= min && value <= max;
  }

  #chosen() {
    return this.#inForce.available.find(({ name }) => name === this.#draft.name) ?? { name: this.#draft.name, help: "", weights: [] };
  }

  #render() {
    const { available, version, role } = this.#inForce;
    const mayChange = role === "admin";
    const select = byId("policy-name");
    keyed(select, available, ({ name }) => name, ({ name }) => h("option", { value: name }, name), () => {});
    select.value = this.#draft.name;
    select.disabled = !mayChange;
    byId("shared-reads").checked = this.#draft.shared;
    byId("shared-reads").disabled = !mayChange;
    setText(byId("policy-version"), mayChange ? `version ${version}` : `version ${version} · changing it needs an admin's key`);
    setText(byId("policy-help"), this.#chosen().help);
    this.#renderWeights(mayChange);
    const edited = this.#isEdited();
    byId("apply").disabled = !mayChange || !edited || this.#sending || !this.#chosen().weights.every((weight) => this.#fits(weight));
    byId("revert").disabled = !edited || this.#sending;
  }

  #renderWeights(mayChange) {
    const { name: policy, weights } = this.#chosen();
    keyed(byId("weights"), weights, ({ name }) => `${policy}.${name}`, (weight) => this.#createWeight(weight), (element, weight) => {
      const { slider, number, reset } = element.parts;
      const value = this.#draft.weights[weight.name];
      if (document.activeElement !== number) number.value = Number.isFinite(value) ? setting(value) : "";
      const valid = this.#fits(weight);
      setAttribute(number, "aria-invalid", valid ? null : "true");
      if (document.activeElement !== slider && valid) slider.value = positionOf(weight, value);
      setAttribute(slider, "aria-valuetext", `${setting(value)} ${weight.unit}`.trim());
      number.disabled = slider.disabled = !mayChange;
      reset.disabled = !mayChange || value === weight.default_value;
    });
  }

  #createWeight(weight) {
    const id = `weight-${weight.name}`;
    const range = `${setting(weight.min)} to ${setting(weight.max)} ${weight.unit}`.trim();
    const number = h("input", { id, type: "number", step: "any", min: weight.min, max: weight.max, inputmode: "decimal", title: range, "aria-describedby": `${id}-help` });
    const slider = h("input", { type: "range", min: 0, max: SLIDER_STEPS, step: 1, title: range, "aria-label": weight.name });
    const reset = h("button", { type: "button", class: "plain tiny", title: `Back to ${setting(weight.default_value)}`, "aria-label": `${weight.name}: back to ${setting(weight.default_value)}` }, "↺");
    const set = (value) => this.#edit(() => { this.#draft.weights[weight.name] = value; });
    number.addEventListener("input", () => set(number.value === "" ? NaN : Number(number.value)));
    slider.addEventListener("input", () => { number.value = setting(valueAt(weight, Number(slider.value))); set(Number(number.value)); });
    reset.addEventListener("click", () => set(weight.default_value));
    const element = h("div", { class: "weight", "data-weight": weight.name },
      h("label", { for: id }, weight.name), slider,
      h("span", { class: "entry" }, number, h("span", { class: "unit" }, weight.unit)), reset,
      h("p", { class: "help", id: `${id}-help` }, weight.help));
    element.parts = { number, slider, reset };
    return element;
  }

  #say(text, mood) {
    setText(byId("policy-feedback"), text);
    setAttribute(byId("policy-feedback"), "class", `feedback ${mood}`.trim());
  }
}

function draftOf({ policy, available, shared_tier_reads: shared }) {
  const known = available.find(({ name }) => name === policy.name)?.weights ?? [];
  const defaults = Object.fromEntries(known.map(({ name, default_value: value }) => [name, value]));
  return { name: policy.name, weights: { ...defaults, ...policy.weights }, shared };
}

// Position p in [0, 1] means min + (max - min) * p^k; k puts a default near the low end into the middle.
function exponentOf({ min, max, default_value: value }) {
  const share = (value - min) / (max - min);
  return share > 0 && share < CURVED_BELOW ? Math.log(share) / Math.log(0.5) : 1;
}

export function valueAt(weight, position) {
  const { min, max } = weight;
  return min + (max - min) * (position / SLIDER_STEPS) ** exponentOf(weight);
}

export function positionOf(weight, value) {
  const share = (value - weight.min) / (weight.max - weight.min);
  return Math.round(share ** (1 / exponentOf(weight)) * SLIDER_STEPS);
}
