// The fleet as a picture: pools, their nodes with the ranks on them, and each group's experts.

import { byId, drawing, element, keep, mark, say } from "./dom.js";
import { count, dollars, lapse, latency, NOTHING, percent } from "./format.js";

const OPEN_AT_MOST = 6;
const CELLS_AT_MOST = 512;

export function showFleet(picture, nowSeconds) {
  byId("fleet-empty").hidden = picture.pools.length > 0;
  const openAtFirst = picture.groups.length <= OPEN_AT_MOST;
  keep(byId("pools"), picture.pools, (pool) => pool.name, makePool, (node, pool) => {
    updatePool(node, pool, picture.groups.filter((group) => group.pool === pool.name), nowSeconds, openAtFirst);
  });
}

function makePool() {
  const pool = element("article", { class: "pool" });
  pool.parts = {
    name: element("h3"), price: element("span", { class: "quiet" }), use: element("p", { class: "quiet" }),
    nodes: element("ul", { class: "nodes" }), groups: element("div", { class: "groups" }),
  };
  pool.append(
    element("div", { class: "pool-head" }, pool.parts.name, pool.parts.price),
    pool.parts.use, pool.parts.nodes, pool.parts.groups,
  );
  return pool;
}

function updatePool(node, pool, groups, nowSeconds, openAtFirst) {
  const { name, price, use, nodes, groups: list } = node.parts;
  node.dataset.pool = pool.name;
  say(name, pool.name);
  say(price, `${pool.accelerator ?? "CPU"}, ${pool.market}, ${dollars(pool.usd_per_node_hour)} a node-hour`);
  const live = pool.nodes === null ? "nodes not known" : `${pool.nodes.length} of at most ${pool.max_nodes} nodes`;
  say(use, `${live} · groups ${dollars(pool.groups_usd_per_hour)}/h · idle ${dollars(pool.idle_usd_per_hour)}/h`);
  const placed = groups.flatMap((group) => group.ranks.map((rank) => ({ group, rank })));
  const known = new Set((pool.nodes ?? []).map((one) => one.id));
  const homeless = placed.filter(({ rank }) => !known.has(rank.node));
  const shown = (pool.nodes ?? []).map((one) => ({
    ...one, ranks: placed.filter(({ rank }) => rank.node === one.id),
  }));
  const where = pool.nodes === null ? "somewhere" : "not placed yet";
  if (homeless.length) shown.push({ id: "", name: where, workers: 0, ranks: homeless });
  keep(nodes, shown, (one) => one.id, makeNode, updateNode);
  keep(list, groups, (group) => group.name, (group) => makeGroup(openAtFirst, group),
    (one, group) => updateGroup(one, group, nowSeconds));
}

function makeNode() {
  const node = element("li", { class: "node" });
  node.parts = { name: element("p", { class: "node-name" }), cells: element("ul", { class: "cells" }) };
  node.append(node.parts.name, node.parts.cells);
  return node;
}

function updateNode(node, shown) {
  const label = shown.name || shown.id.slice(0, 12);
  say(node.parts.name, label);
  node.parts.name.title = shown.id;
  const used = shown.ranks.reduce((sum, { group }) => sum + group.tensor, 0);
  const free = Math.max(0, Math.round(shown.workers - used));
  const cells = [
    ...shown.ranks.map(({ group, rank }) => ({ key: `${group.name}/${rank.index}`, group, rank })),
    ...Array.from({ length: free }, (_, index) => ({ key: `free/${index}` })),
  ];
  keep(node.parts.cells, cells, (cell) => cell.key, () => element("li", { class: "cell" }), updateCell);
}

function updateCell(node, { group, rank }) {
  if (!group) {
    mark(node, "data-state", "free");
    mark(node, "title", "free");
    say(node, "free");
    return;
  }
  mark(node, "data-state", group.state);
  const share = rank.max_running ? rank.running / rank.max_running : 0;
  node.style.setProperty("--fill", Math.min(1, Math.max(share, rank.kv_usage)).toFixed(3));
  const text = `${group.name} rank ${rank.index}, ${group.state}: ${rank.running} running, ` +
    `${rank.waiting} waiting, KV cache ${percent(rank.kv_usage)}`;
  mark(node, "title", text);
  mark(node, "aria-label", text);
  say(node, `${group.name.split("-").at(-1)}·r${rank.index}`);
}

function makeGroup(open) {
  const group = element("details", { class: "group" });
  group.open = open;
  group.parts = {
    name: element("span", { class: "group-name" }), state: element("span", { class: "group-state" }),
    note: element("span", { class: "note" }), message: element("p"), ranks: element("ul", { class: "ranks" }),
    heat: element("p", { class: "heat-note" }),
  };
  group.append(
    element("summary", {}, group.parts.name, group.parts.state, group.parts.note),
    element("div", { class: "group-body" }, group.parts.message, group.parts.ranks, group.parts.heat),
  );
  group.addEventListener("toggle", () => drawHeat(group));
  return group;
}

function updateGroup(node, group, nowSeconds) {
  const { name, state, note, message, ranks } = node.parts;
  node.dataset.group = group.name;
  mark(node, "data-state", group.state);
  say(name, group.name);
  const waits = group.state === "starting" && group.expected_ready_at_s !== null;
  const eta = waits ? `, ready in about ${lapse(group.expected_ready_at_s - nowSeconds)}` : "";
  say(state, group.state);
  say(note, `for ${lapse(nowSeconds - group.since_s)}${eta} · ${dollars(group.usd_per_hour)}/h · ` +
    `TP${group.tensor} DP${group.data} EP${group.expert}`);
  say(message, group.message);
  const serves = group.ranks.some((rank) => rank.answered_at_s !== null);
  ranks.hidden = !serves;
  keep(ranks, group.ranks, (rank) => rank.index, makeRank, (one, rank) => {
    const about = rank.answered_at_s === null ? "no answer" :
      `${count(rank.running)} running, ${count(rank.waiting)} waiting, KV ${percent(rank.kv_usage)}`;
    say(one.parts.name, `r${rank.index}`);
    say(one.parts.text, about);
  });
}

function makeRank() {
  const row = element("li", { class: "rank-row" });
  row.parts = {
    name: element("b"), text: element("span"),
    heat: drawing("svg", { class: "heat", preserveAspectRatio: "none", role: "img" }),
  };
  row.parts.heat.setAttribute("hidden", "");
  row.append(row.parts.name, row.parts.text, row.parts.heat);
  return row;
}

export function showHeat(heats) {
  for (const group of document.querySelectorAll(".group")) {
    group.heat = heats[group.dataset.group];
    drawHeat(group);
  }
}

function drawHeat(group) {
  const heat = group.heat;
  const { ranks, heat: note } = group.parts;
  if (!heat) {
    say(note, group.dataset.state === "ready" ? "The engine does not count what its experts do." : "");
    for (const row of ranks.children) row.parts.heat.setAttribute("hidden", "");
    return;
  }
  const span = heat.lately ? "last 10 s" : "since the start";
  say(note, heat.imbalance === null ? "Experts: nothing routed yet." :
    `Experts, ${span}: heaviest rank ${heat.imbalance.toFixed(2)} × the mean.`);
  if (!group.open) return;
  const all = Object.values(heat.ranks).flatMap((experts) => Object.values(experts));
  const hottest = Math.max(1, ...all);
  for (const row of ranks.children) {
    const index = row.parts.name.textContent.slice(1);
    drawRow(row.parts.heat, heat.ranks[index] ?? {}, hottest, index);
  }
}

function drawRow(svg, experts, hottest, index) {
  const cells = Object.entries(experts).map(([id, tokens]) => [Number(id), tokens])
    .sort((one, other) => one[0] - other[0]).slice(0, CELLS_AT_MOST)
    .map(([id, tokens], place) => [id, tokens, place]);
  svg.toggleAttribute("hidden", cells.length === 0);
  if (!cells.length) return;
  svg.setAttribute("viewBox", `0 0 ${cells.length} 1`);
  keep(svg, cells, ([id]) => id, ([id]) => {
    const cell = drawing("rect", { y: 0, height: 1, width: 0.9, "data-expert": id });
    cell.append(drawing("title"));
    return cell;
  }, (cell, [id, tokens, place]) => {
    cell.setAttribute("x", place);
    cell.setAttribute("fill-opacity", (0.06 + 0.94 * (tokens / hottest)).toFixed(3));
    say(cell.firstChild, `expert ${id}: ${count(tokens)} tokens`);
  });
  const [id, tokens] = cells.reduce((most, one) => (one[1] > most[1] ? one : most));
  mark(svg, "aria-label", `rank ${index}: ${cells.length} experts, the busiest is ${id} with ${count(tokens)} tokens`);
}

const HINDSIGHT = 9;

export function showModels(picture) {
  keep(byId("model-rows"), picture.models, (model) => model.name, makeModel, (row, model) => {
    row.dataset.model = model.name;
    const spend = picture.groups.filter((group) => group.model === model.name)
      .reduce((sum, group) => sum + group.usd_per_hour, 0);
    const budget = model.budget_usd_per_hour === null ? "none" : dollars(model.budget_usd_per_hour);
    const past = model.hindsight;
    const cells = [
      model.mode === "act" ? model.name : `${model.name} (${model.mode})`,
      `${model.ready} / ${model.wanted}`,
      `${count(model.load, 2)} / ${count(model.load_ready, 2)}`,
      count(model.queued), count(model.running),
      model.wait_s === null ? "falls behind" : lapse(model.wait_s),
      `${latency(model.ttft_s)} / ${latency(model.ttft_target_s)}`,
      `${latency(model.tpot_s)} / ${latency(model.tpot_target_s)}`,
      `${dollars(spend)} / ${budget}`,
      past === null ? NOTHING : `${dollars(past.spent_usd)} / ${dollars(past.least_usd)}`,
      model.binding.replaceAll("_", " "),
    ];
    cells.forEach((text, index) => say(row.children[index], text));
    row.children[HINDSIGHT].title = past === null ? "not known yet" : `over ${lapse(past.span_s)}`;
  });
}

function makeModel() {
  return element("tr", {}, element("th", { scope: "row" }), ...Array.from({ length: 10 }, () => element("td")));
}
