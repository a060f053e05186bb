// Wires the page: who looks, what the stream says, and whether that can be believed.

import { forgetChat, offerChat, startChat } from "./chat.js";
import { byId, mark, say } from "./dom.js";
import { showDecisions, startDecisions } from "./decisions.js";
import { LiveStream } from "./events.js";
import { showFleet, showHeat, showModels } from "./fleet.js";
import { lapse } from "./format.js";
import { enter, leave, session, takeTicket } from "./session.js";
import { startTheme } from "./theme.js";
import { showTiles } from "./tiles.js";
import { offerWhatIf, startWhatIf } from "./what_if.js";

const STALE_SECONDS = 3;
const TURN_STALE_SECONDS = 5;

let stream = null;
let state = null;
let heardAt = 0;
let problem = null;
let today = null;

/** The controller's clock, by what it said last: this machine's may differ. */
const nowSeconds = () => state.at_s + silence();
const silence = () => (performance.now() - heardAt) / 1000;

function onEvent(name, value) {
  if (name === "state") {
    state = value;
    heardAt = performance.now();
    problem = null;
    show();
  } else if (name === "heat") showHeat(value);
  else if (name === "decisions") showDecisions(value);
  else if (name === "today") {
    today = value;
    show();
  }
}

function show() {
  if (state === null) return;
  byId("view").hidden = false;
  say(byId("platform"), state.platform);
  document.title = `${state.platform} – ExpertMesh`;
  if (state.picture) {
    showTiles(state.picture, today, state.at_s);
    showFleet(state.picture, state.at_s);
    showModels(state.picture);
    offerWhatIf(state.picture);
    offerChat(state);
  }
  judge();
}

/** How the controller fares, in one line that is always there. */
function judge() {
  if (stream === null) return;
  const age = state === null ? null : silence();
  const turned = state?.picture ? nowSeconds() - state.picture.turned_at_s : 0;
  const failing = Object.entries(state?.problems ?? {});
  let level = "good";
  let text = "Live";
  let stale = false;
  if (state === null) {
    [level, text] = problem === null ? ["wait", "Loading…"] : ["bad", `${problem}; trying again`];
  } else if (problem !== null || age > STALE_SECONDS) {
    stale = true;
    [level, text] = ["bad", `${problem ?? "no answer from the controller"}; this is ${lapse(age)} old; trying again`];
  } else if (state.stuck || (state.leads && turned > TURN_STALE_SECONDS)) {
    stale = true;
    [level, text] = ["bad", `the control loop stands still; this is ${lapse(turned)} old`];
  } else if (!state.leads) {
    const leader = state.leader_url ? `; ask the leader, ${state.leader_url}/console/` : "";
    stale = state.picture === null;
    [level, text] = ["warn", `This controller follows${leader}`];
  } else if (failing.length) {
    [level, text] = ["bad", `Failing: ${failing.map(([step, why]) => `${step} (${why})`).join("; ")}`];
  } else if (state.picture === null) {
    [level, text] = ["warn", "No decision has been made yet"];
  }
  say(byId("health"), text[0].toUpperCase() + text.slice(1));
  mark(byId("health"), "data-level", level);
  mark(document.body, "data-stale", stale ? "" : null);
}

function look() {
  byId("enter").hidden = true;
  byId("sections").hidden = byId("leave").hidden = false;
  stream = new LiveStream("api/stream", session(), {
    event: onEvent,
    down: (text) => { problem = text; judge(); },
    refused: () => { leave(); askWho("Your session has ended; sign in again."); },
  });
  judge();
  stream.run();
}

function askWho(why = "") {
  stream?.close();
  stream = state = problem = today = null;
  forgetChat();
  byId("view").hidden = byId("sections").hidden = byId("leave").hidden = true;
  byId("enter").hidden = false;
  say(byId("enter-error"), why);
  say(byId("health"), "Signed out");
  mark(byId("health"), "data-level", "wait");
  mark(document.body, "data-stale", null);
  byId("secret").focus();
}

async function tryEnter(secret) {
  try {
    await enter(secret);
  } catch (error) {
    if (session()) look();
    else askWho(error instanceof TypeError ? "No answer from the controller." : error.message);
    return;
  }
  byId("secret").value = "";
  look();
  byId("main").focus();
}

startTheme();
startDecisions();
startWhatIf();
startChat();
byId("enter-form").addEventListener("submit", (event) => {
  event.preventDefault();
  tryEnter(byId("secret").value);
});
byId("leave").addEventListener("click", () => { leave(); askWho(); });
setInterval(judge, 500);

const ticket = takeTicket();
if (ticket) tryEnter(ticket);
else if (session()) look();
else askWho();
