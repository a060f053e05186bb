// The session of this tab. The secret that opened it is kept nowhere.

const KEPT = "expertmesh session";

export const session = () => sessionStorage.getItem(KEPT);
export const leave = () => sessionStorage.removeItem(KEPT);

/** Raises an Error whose message is for the person. */
export async function enter(secret) {
  const response = await fetch("api/session", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ secret }),
  });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error?.message ?? `the controller answered ${response.status}`);
  sessionStorage.setItem(KEPT, body.session);
}

/** The ticket of a link, which leaves the address bar and the history at once. */
export function takeTicket() {
  const found = /^#ticket=([^&]+)/.exec(location.hash);
  if (!found) return null;
  history.replaceState(null, "", location.pathname);
  return decodeURIComponent(found[1]);
}

/** JSON of the console's API, with this tab's session. */
export async function ask(path, body) {
  const response = await fetch(`api/${path}`, {
    method: body === undefined ? "GET" : "POST",
    headers: { Authorization: `Bearer ${session()}`, "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error?.message ?? `the controller answered ${response.status}`);
  return answer;
}
