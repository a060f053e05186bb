// Asks the policy what it would do with other numbers.

import { byId, choices, element } from "./dom.js";
import { clock } from "./format.js";
import { ask } from "./session.js";

let pools = "";

export function offerWhatIf(picture) {
  choices(byId("wi-model"), picture.models.map((model) => model.name));
  const names = picture.pools.map((pool) => pool.name);
  if (names.join("\n") === pools && byId("wi-fields").childElementCount) return;
  pools = names.join("\n");
  byId("wi-fields").replaceChildren(
    field("queue", "queued requests", "40 or 2x"),
    field("load", "load, how many times", "1.5x"),
    field("max_groups", "groups at most", "4"),
    field("min_groups", "groups at least", "0"),
    field("budget", "budget, $/h", "12.50 or none"),
    ...names.map((name) => field(`price.${name}`, `price of ${name}, $ a node-hour`, "0.5x")),
  );
}

function field(name, label, example) {
  const id = `wi-${name}`;
  return element("p", {}, element("label", { for: id }, label),
    element("input", { id, name, autocomplete: "off", spellcheck: "false", placeholder: example, maxlength: 60 }));
}

export function startWhatIf() {
  byId("what-if-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const settings = [...byId("wi-fields").querySelectorAll("input")]
      .filter((input) => input.value.trim() !== "").map((input) => `${input.name}=${input.value.trim()}`);
    settings.push(...byId("wi-more").value.split(/\s+/).filter((one) => one !== ""));
    try {
      const found = await ask("what-if", { model: byId("wi-model").value, settings });
      byId("what-if-answer").replaceChildren(
        part(`as it was at ${clock(found.at_s)}`, "before", found.before),
        part(settings.length ? `with ${settings.join(", ")}` : "with nothing changed", "after", found.after));
    } catch (error) {
      byId("what-if-answer").replaceChildren(element("pre", { class: "error" }, error.message));
    }
  });
  byId("wi-keys").closest("details").addEventListener("toggle", showKeys);
}

async function showKeys() {
  if (byId("wi-keys").childElementCount) return;
  const { keys } = await ask("what-if");
  byId("wi-keys").append(...Object.entries(keys).flatMap(([key, meaning]) =>
    [element("dt", {}, element("code", {}, key)), element("dd", {}, meaning)]));
}

function part(title, id, decision) {
  const target = Object.entries(decision.target).map(([option, groups]) => `${groups} × ${option}`).join(", ");
  const lines = [
    `wants ${target || "no group"} (${decision.need} needed), bound by ${decision.binding.replaceAll("_", " ")}`,
    ...decision.actions,
    ...decision.advice.map((action) => `advises: ${action}`),
    ...(decision.actions.length + decision.advice.length ? [] : ["nothing to do"]),
    decision.reason,
    ...(decision.pending && !decision.reason.includes(decision.pending) ? [decision.pending] : []),
  ];
  return element("div", { class: "said", id: `what-if-${id}` }, element("b", {}, title),
    element("pre", {}, lines.join("\n")));
}
