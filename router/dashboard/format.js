// Numbers as people read them. A value that is not known (null, NaN) is a dash everywhere.

const DASH = "–";
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

const known = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  if (!known(value)) return DASH;
  return Math.abs(value) < 100_000 ? grouped.format(value) : compact.format(value);
}

/** A rate: one decimal below ten. */
export function rate(value) {
  if (!known(value)) return DASH;
  return value < 10 ? value.toFixed(1) : count(value);
}

export function percent(share) {
  return known(share) ? `${(share * 100).toFixed(1)} %` : DASH;
}

export function milliseconds(value) {
  if (!known(value)) return DASH;
  if (value >= 10_000) return `${(value / 1000).toFixed(1)} s`;
  return value < 10 && value > 0 ? `${value.toFixed(1)} ms` : `${grouped.format(value)} ms`;
}

export function bytes(value) {
  if (!known(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit += 1) value /= 1024;
  return `${value < 10 && unit > 0 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export const clockTime = (timeMs) => clock.format(new Date(timeMs));

/** `WORKER_STATE_READY` → `ready`. */
export const enumWord = (name, prefix) => name.replace(prefix, "").toLowerCase();

/** A setting as typed: up to four significant digits, no exponent, no trailing zeros. */
export const setting = (value) => String(Number(Number(value).toPrecision(4)));

export { DASH, known };
