// The numbers that people look at first, with the last minutes of some of them.

import { byId, drawing, element, keep, mark, say } from "./dom.js";
import { count, dollars, lapse, latency, NOTHING } from "./format.js";

const KEPT_SECONDS = 300;
const history = new Map();

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
const slowest = (items, of) => items.map(of).filter((one) => one !== null)
  .reduce((most, one) => (most === null ? one : Math.max(most, one)), null);

export function showTiles(picture, today, nowSeconds) {
  const { models, groups } = picture;
  const queued = sum(models, (model) => model.queued);
  const wanted = sum(models, (model) => model.wanted);
  const ready = groups.filter((group) => group.state === "ready").length;
  const lost = groups.filter((group) => group.state === "lost").length;
  const unseen = picture.pools.some((pool) => pool.idle_usd_per_hour === null);
  const idle = sum(picture.pools, (pool) => pool.idle_usd_per_hour ?? 0);
  const silent = sum(models, (model) => model.stale_gateways);
  const late = models.filter((model) => model.ttft_s !== null && model.ttft_s > model.ttft_target_s);
  const slow = models.filter((model) => model.tpot_s !== null && model.tpot_s > model.tpot_target_s);
  const behind = models.find((model) => model.wait_s === null);
  const known = today && today.error === undefined ? today : null;
  const missing = today && today.error !== undefined ? "the ledger does not answer" : "";
  remember("queue", nowSeconds, queued);
  remember("cost", nowSeconds, picture.usd_per_hour);
  const tiles = [
    { id: "queued", name: "Queued requests", value: count(queued), line: "queue",
      note: `oldest waits ${lapse(slowest(models, (model) => model.oldest_wait_s) ?? 0)}` },
    { id: "running", name: "Running requests", value: count(sum(models, (model) => model.running)),
      note: `${count(sum(models, (model) => model.arrivals_per_s), 1)} arrive a second` },
    { id: "wait", name: "Predicted wait", value: behind ? "grows" : lapse(slowest(models, (model) => model.wait_s) ?? 0),
      note: behind ? `${behind.name} falls behind` : "for a request that comes now", level: behind ? "bad" : null },
    { id: "ttft", name: "Time to first token", value: latency(slowest(models, (model) => model.ttft_s)),
      note: late.length ? `over the target: ${late[0].name}` : "of the slowest group",
      level: late.length ? "warn" : null },
    { id: "tpot", name: "Time per token", value: latency(slowest(models, (model) => model.tpot_s)),
      note: slow.length ? `over the target: ${slow[0].name}` : "of the slowest group",
      level: slow.length ? "warn" : null },
    { id: "tokens", name: "Tokens out a second", value: count(sum(models, (model) => model.output_tokens_per_s), 1),
      note: silent ? `${silent} gateways are silent` : "by the gateways", level: silent ? "warn" : null },
    { id: "groups", name: "Groups ready / wanted", value: `${ready} / ${wanted}`,
      note: lost ? `${lost} lost` : `${groups.length} in all`, level: lost ? "bad" : null },
    { id: "cost-now", name: "Cost now, an hour", value: dollars(picture.usd_per_hour), line: "cost",
      note: unseen ? "idle nodes not known" : `idle nodes ${dollars(idle)}` },
    { id: "cost-today", name: "Capacity today", value: known ? dollars(known.capacity_usd) : NOTHING,
      note: known ? `idle nodes ${dollars(known.idle_nodes_usd)}` : missing },
    { id: "tariff-today", name: "Revenue today", value: known ? dollars(known.tariff_usd) : NOTHING,
      note: known ? "by tariff, since 0:00 UTC" : missing },
  ];
  keep(byId("tiles"), tiles, (tile) => tile.id, makeTile, updateTile);
}

function makeTile(tile) {
  const node = element("div", { class: "tile", id: `tile-${tile.id}` });
  node.parts = { value: element("dd", { class: "value" }), note: element("dd", { class: "note" }) };
  node.append(element("dt", {}, tile.name), node.parts.value, node.parts.note);
  if (tile.line) {
    node.parts.path = drawing("path");
    const svg = drawing("svg", { class: "spark", viewBox: "0 0 300 30", preserveAspectRatio: "none", "aria-hidden": "true" });
    svg.append(node.parts.path);
    node.append(element("dd", {}, svg));
  }
  return node;
}

function updateTile(node, tile) {
  say(node.parts.value, tile.value);
  say(node.parts.note, tile.note);
  node.parts.note.title = tile.note;
  mark(node, "data-level", tile.level);
  if (tile.line) node.parts.path.setAttribute("d", line(history.get(tile.line)));
}

function remember(name, at, value) {
  const points = (history.get(name) ?? []).filter((point) => point.at > at - KEPT_SECONDS && point.at < at);
  history.set(name, [...points, { at, value }]);
}

function line(points) {
  const last = points.at(-1).at;
  const top = Math.max(1e-9, ...points.map((point) => point.value));
  return points.map((point, index) => {
    const x = KEPT_SECONDS - (last - point.at);
    const y = 28 - 26 * (point.value / top);
    return `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
  }).join("");
}
