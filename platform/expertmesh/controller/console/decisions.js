// The log of decisions, newest first, each with its reason; more is asked for when one is opened.

import { byId, choices, element, keep, mark, say } from "./dom.js";
import { clock, count, dollars, lapse, NOTHING } from "./format.js";
import { ask } from "./session.js";

let all = [];

export function showDecisions(decisions) {
  if (decisions.error !== undefined) {
    byId("decisions-empty").hidden = false;
    say(byId("decisions-empty"), `The journal does not answer: ${decisions.error}`);
    return;
  }
  all = decisions;
  choices(byId("decision-model"), [...new Set(all.map((one) => one.model))].sort(), "all models");
  draw();
}

export function startDecisions() {
  byId("decision-model").addEventListener("change", draw);
}

function draw() {
  const model = byId("decision-model").value;
  const shown = all.filter((one) => model === "" || one.model === model);
  byId("decisions-empty").hidden = shown.length > 0;
  if (!shown.length) say(byId("decisions-empty"), "No decision yet.");
  keep(byId("decision-list"), shown, (one) => one.seq, make, () => {});
}

function make(decision) {
  const acts = (decision.actions ?? []).map((action) => `${action.kind} ${action.group}`).join(", ");
  const body = element("div", { class: "decision-body" });
  const details = element("details", {},
    element("summary", {},
      element("span", { class: "when" }, `#${decision.seq} ${clock(decision.at_s)} ${decision.model}`),
      ...(acts ? [element("span", { class: "acts" }, acts)] : []),
      element("span", { class: "reason" }, decision.reason)),
    body);
  details.addEventListener("toggle", () => {
    if (details.open) explain(body, decision.seq);
  });
  const item = element("li", { class: "decision", "data-seq": decision.seq }, details);
  mark(item, "data-acts", acts ? "" : null);
  return item;
}

async function explain(body, seq) {
  if (!body.childElementCount) body.append(element("p", { class: "quiet" }, "Asking…"));
  try {
    body.replaceChildren(...explanation(await ask(`decisions/${seq}`)));
  } catch (error) {
    body.replaceChildren(element("p", { class: "error" }, error.message));
  }
}

function explanation(found) {
  const demand = found.demand;
  const parts = [
    element("p", {}, `${count(demand.queued)} queued, the oldest for ${lapse(demand.oldest_wait_s)}; ` +
      `${count(demand.running)} running. ${found.need} groups needed, ${found.wanted} wanted. ` +
      `Bound by ${found.binding_words}.`),
    list("It does", found.actions.map((action) => `${action.kind} ${action.group}: ${action.why}`)),
    list("It would", found.advice.map((action) => `${action.kind} ${action.group}: ${action.why}`)),
    list("It saw", found.inputs.map((one) =>
      `${one.source}${one.age_s === null ? "" : `, ${lapse(one.age_s)} ago`}: ${one.says}${one.is_believed ? "" : " (not believed)"}`)),
    candidates(found.candidates),
    list("It would have been otherwise", found.counterfactuals.map((one) => one.text)),
    list("It expected", [expected(found.expected)]),
    list("It came to", found.happened ? happened(found.happened) : []),
  ];
  if (!found.replays) {
    parts.push(element("p", { class: "error" }, "Another version of the policy made it: candidates are of this one."));
  }
  return parts.filter((part) => part !== null);
}

function list(title, lines) {
  if (!lines.length) return null;
  return element("div", {}, element("b", {}, title), element("ul", { class: "lines" }, ...lines.map((line) => element("li", {}, line))));
}

const wait = (seconds) => (seconds === null ? NOTHING : lapse(seconds));

function candidates(found) {
  const heads = ["choice", "$/h", "capacity", "wait now", "wait then", "more, $", "why"];
  const rows = found.map((one) => {
    const row = element("tr", {}, element("th", { scope: "row" }, one.is_chosen ? `${one.name} ✓` : one.name),
      ...[dollars(one.usd_per_hour), count(one.capacity, 2), wait(one.wait_now_s), wait(one.wait_then_s),
        one.is_chosen ? "chosen" : dollars(one.more_usd)].map((text) => element("td", {}, text)),
      element("td", { class: "why" }, one.why));
    return row;
  });
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Candidates" },
    element("table", { class: "candidates" },
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
      element("tbody", {}, ...rows)));
}

function expected(one) {
  const starts = one.starts.map((start) =>
    `${start.group} ready in ${wait(start.ready_in_s)}`).join(", ");
  return `${starts ? `${starts}; ` : ""}a load of ${count(one.load, 2)} in ${lapse(one.horizon_s)}, ` +
    `${one.wait_s === null ? "a wait that is not known" : `a wait of ${lapse(one.wait_s)}`}, ${dollars(one.usd_per_hour)}/h`;
}

function happened(one) {
  return [
    ...one.starts.map((start) => `${start.group}: ${start.fate}${start.ready_in_s === null ? "" : ` after ${lapse(start.ready_in_s)}`}`),
    `longest wait ${lapse(one.most_wait_s)}${one.load === null ? "" : `, load ${count(one.load, 2)}`}, over ${lapse(one.until_s)}`,
  ];
}
