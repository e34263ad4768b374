// Speaks with the router: JSON in and out, the API key of this tab, errors with the router's own words.

const KEY = "warmkv-api-key";

export class ApiError extends Error {
  constructor(status, reason, message) {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

export const storedKey = () => sessionStorage.getItem(KEY);
export const storeKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

/** Take the key from a link that ends in `#key=...`, and out of the address bar. Browsers send no fragment to servers. */
export function takeKeyFromLink() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (key === null) return;
  storeKey(key);
  history.replaceState(null, "", location.pathname + location.search);
}

/** `fetch` with this tab's key. Raises ApiError for every answer but a success. */
export async function call(path, options = {}) {
  const key = storedKey();
  const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { cache: "no-store", credentials: "same-origin", ...options, headers });
  if (!response.ok) throw await errorOf(response);
  return response;
}

export const getCache = async () => (await call("/api/cache")).json();
export const getPolicy = async () => (await call("/api/policy")).json();

export async function setPolicy(change, csrfToken) {
  const headers = { "Content-Type": "application/json", "x-warmkv-csrf": csrfToken };
  const response = await call("/api/policy", { method: "POST", headers, body: JSON.stringify(change) });
  return response.json();
}

async function errorOf(response) {
  const text = await response.text();
  try {
    const { reason, message } = JSON.parse(text).error;
    return new ApiError(response.status, reason, message);
  } catch {
    return new ApiError(response.status, "UNKNOWN", `The router answered ${response.status}.`);
  }
}
