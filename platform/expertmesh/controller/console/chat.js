// A conversation with a served model, straight through the gateway with the person's own key.

import { byId, choices, element } from "./dom.js";
import { eventsOf } from "./events.js";
import { count, latency } from "./format.js";

let gateway = null;
let messages = [];
let stop = null;

export function offerChat(state) {
  gateway = state.gateway_url;
  byId("chat-off").hidden = gateway !== null;
  byId("chat-form").hidden = byId("chat-log").hidden = gateway === null;
  choices(byId("chat-model"), state.picture.models.map((model) => model.name));
}

export function startChat() {
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (stop === null) send();
  });
  byId("chat-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("chat-form").requestSubmit();
    }
  });
  byId("chat-stop").addEventListener("click", () => stop?.abort());
  byId("chat-clear").addEventListener("click", forget);
}

function forget() {
  stop?.abort();
  messages = [];
  byId("chat-log").replaceChildren();
  byId("chat-note").textContent = "";
}

export function forgetChat() {
  forget();
  byId("chat-key").value = "";
}

function write(who) {
  const text = element("span");
  byId("chat-log").append(element("p", { class: "said", "data-who": who }, element("b", {}, who), text));
  return (more) => {
    const log = byId("chat-log");
    text.append(more);
    log.scrollTop = log.scrollHeight;
  };
}

async function send() {
  const content = byId("chat-text").value.trim();
  const key = byId("chat-key").value.trim();
  const model = byId("chat-model").value;
  if (!content || !key || !model) return;
  byId("chat-text").value = "";
  write("you")(content);
  const asked = [...messages, { role: "user", content }];
  stop = new AbortController();
  busy(true);
  let said = "";
  try {
    const answer = write(model);
    const began = performance.now();
    const response = await fetch(`${gateway}/v1/chat/completions`, {
      method: "POST", signal: stop.signal, credentials: "omit", referrerPolicy: "no-referrer",
      headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
      body: JSON.stringify({ model, messages: asked, stream: true, stream_options: { include_usage: true } }),
    });
    if (!response.ok) {
      const body = await response.json().catch(() => ({}));
      throw new Refused(body.error?.message ?? `the gateway answered ${response.status}`);
    }
    let first = null;
    let usage = null;
    for await (const [, data] of eventsOf(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message);
      usage = chunk.usage ?? usage;
      const piece = chunk.choices?.[0]?.delta?.content ?? "";
      if (piece && first === null) first = performance.now() - began;
      said += piece;
      answer(piece);
    }
    messages = [...asked, { role: "assistant", content: said }];
    note(`first token after ${latency(first === null ? null : first / 1000)}` +
      (usage ? `, ${count(usage.prompt_tokens)} tokens in, ${count(usage.completion_tokens)} out` : ""));
  } catch (error) {
    if (error.name === "AbortError") note("stopped");
    else if (error instanceof Refused) note(error.message);
    else note(`no answer from ${gateway}: it is down, or it does not allow this page; ` +
      `then add ${location.origin} to gateway.cors_origins of the platform file`);
  } finally {
    stop = null;
    busy(false);
  }
}

class Refused extends Error {}

const note = (text) => { byId("chat-note").textContent = text; };

function busy(is) {
  byId("chat-send").disabled = is;
  byId("chat-stop").disabled = !is;
  if (is) note("…");
}
