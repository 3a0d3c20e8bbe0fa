// The live page. One message each half second is all it gets, whatever the load; nothing here grows without a bound.

import { overTime, scatter } from "./charts.js";
import { open } from "./detail.js";
import { NONE, OUTCOMES, ROLES, clock, count, element, marked, percent, plain, seconds } from "./words.js";

const MAX_TICKS = 400, MAX_POINTS = 600, MAX_KEPT = 600, MAX_SHOWN = 100;
const RECENT_S = 10, RETRY_MS = 1000, ASK_EVERY_MS = 2000;
const at = (id) => document.getElementById(id);

const state = {
  boot: null, everyS: 0.5, history: [], points: [], engines: [], rows: new Map(), missed: 0, isPaused: false,
  filter: { outcome: "", model: "", tenant: "" }, models: new Set(), tenants: new Set(),
};

// ---- the stream -----------------------------------------------------------------------------------------------------

function connect() {
  const source = new EventSource("/dashboard/events");
  source.addEventListener("hello", (message) => hello(JSON.parse(message.data)));
  source.addEventListener("tick", (message) => tick(JSON.parse(message.data)));
  source.addEventListener("error", () => {
    say("away", "reconnecting");
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, RETRY_MS);
  });
}

function say(name, words) {
  at("link").dataset.state = name;
  at("link").textContent = words;
}

/** The first message of a connection. After a restart of the gateway what was seen before stays, with a gap. */
function hello(told) {
  const last = state.history.at(-1)?.at ?? 0;
  state.history.push(...told.history.filter((each) => each.at > last));
  if (told.boot !== state.boot) state.points.push(...told.points);
  state.boot = told.boot;
  state.everyS = told.every_s;
  state.engines = told.engines;
  keep(told.rows);
  say("live", "live");
  draw();
}

function tick(told) {
  state.history.push(told);
  state.points.push(...told.points);
  state.engines = told.engines;
  state.missed += told.total - told.rows.length;
  keep(told.rows);
  say("live", "live");
  draw();
}

function keep(rows) {
  for (const row of rows) {
    state.rows.set(row.id, row);
    if (row.model && state.models.size < 100) state.models.add(row.model);
    if (state.tenants.size < 100) state.tenants.add(row.tenant);
  }
  const over = state.rows.size - MAX_KEPT;
  if (over > 0) {
    const oldest = [...state.rows.values()].sort((one, other) => one.at - other.at).slice(0, over);
    for (const row of oldest) state.rows.delete(row.id);
  }
  state.history.splice(0, state.history.length - MAX_TICKS);
  state.points.splice(0, state.points.length - MAX_POINTS);
}

// ---- drawing: at most once per frame, and only when somebody sees it -------------------------------------------------

let isDue = false;

function draw() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    drawFigures();
    overTime(at("ttft"), state.history, "ttft", 0);
    overTime(at("tbt"), state.history, "tbt", 1);
    scatter(at("scatter"), state.points);
    drawEngines();
    drawRefusals();
    drawRows();
  });
}

/** Sums over the last few seconds. */
function recent() {
  const end = state.history.at(-1)?.at ?? 0;
  const seen = state.history.filter((each) => each.at > end - RECENT_S);
  const sum = (pick) => seen.reduce((total, each) => total + (pick(each) ?? 0), 0);
  const requests = sum((each) => Object.values(each.outcomes).reduce((total, value) => total + value, 0));
  const spanS = Math.max(state.everyS, seen.length * state.everyS);
  const [kept, promised] = [0, 1].map((index) => sum((each) => each.kept[index]));
  const [prompt, cached] = [0, 1].map((index) => sum((each) => each.tokens[index]));
  const last = seen.at(-1);
  const latest = (name) => seen.findLast((each) => each[name])?.[name];
  return { requests, spanS, kept, promised, prompt, cached, last, ttft: latest("ttft"), tbt: latest("tbt"), refused: sum((each) => each.outcomes.refused) };
}

function drawFigures() {
  const now = recent();
  const figures = [
    ["requests", `${(now.requests / now.spanS).toFixed(1)}/s`],
    ["running", count(now.last?.in_flight ?? 0)],
    ["waiting", count(now.last?.waiting ?? 0)],
    ["TTFT", seconds(now.ttft?.[0])],
    ["TBT", seconds(now.tbt?.[0])],
    ["within their bounds", now.promised ? percent(now.kept / now.promised) : NONE],
    ["prefix hits", now.prompt ? percent(now.cached / now.prompt) : NONE],
    ["refused", now.requests ? percent(now.refused / now.requests) : NONE],
  ];
  const list = at("figures");
  while (list.childElementCount < figures.length) {
    const pair = element("div");
    pair.append(element("dt"), element("dd"));
    list.append(pair);
  }
  figures.forEach(([name, value], index) => {
    const [title, number] = list.children[index].children;
    set(title, name);
    set(number, value);
  });
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// ---- engines --------------------------------------------------------------------------------------------------------

function drawEngines() {
  const roles = ["prefill", "decode", "both"].filter((role) => state.engines.some((engine) => engine.role === role));
  const pools = at("pools");
  pools.dataset.count = state.engines.length > 24 ? "many" : "few";
  const wanted = roles.map((role) => `pool-${role}`);
  for (const child of [...pools.children]) if (!wanted.includes(child.id)) child.remove();
  for (const role of roles) drawPool(pools, role, state.engines.filter((engine) => engine.role === role));
}

function drawPool(pools, role, engines) {
  let group = at(`pool-${role}`);
  if (!group) {
    group = element("section", null, "pool");
    group.id = `pool-${role}`;
    group.append(element("h3"), element("ul"));
    pools.append(group);
  }
  const up = engines.filter((engine) => engine.health === "up").length;
  const title = `${up} of ${engines.length} up`;
  if (group.dataset.title !== title) {
    group.dataset.title = title;
    group.firstChild.replaceChildren(marked(ROLES, role), element("small", title));
  }
  const list = group.lastChild;
  while (list.childElementCount > engines.length) list.lastChild.remove();
  while (list.childElementCount < engines.length) list.append(engineRow());
  engines.forEach((engine, index) => fillEngine(list.children[index], engine));
}

function engineRow() {
  const item = element("li");
  item.append(element("span", null, "name"), bar("load"), bar("kv"), element("span", null, "age"));
  return item;
}

function bar(name) {
  const made = element("span", null, `bar ${name}`);
  made.append(element("i"), element("b"));
  return made;
}

function fillEngine(item, engine) {
  const [name, load, kv, age] = item.children;
  const isUp = engine.health === "up";
  item.className = isUp ? "" : "down";
  set(name, `${isUp ? "" : "✕ "}${engine.id}`);
  name.title = isUp ? engine.id : `${engine.id}: ${engine.health}, ${engine.reason}`;
  fill(load, engine.in_flight / Math.max(1, engine.limit), isUp ? `${engine.in_flight} in flight` : engine.health);
  fill(kv, engine.kv ?? 0, engine.kv === null ? "KV –" : `KV ${percent(engine.kv)}`);
  set(age, engine.age === null ? "no report" : engine.age < 10 ? `${engine.age.toFixed(1)} s` : `${Math.round(engine.age)} s`);
  age.title = "age of its last report";
  age.classList.toggle("old", engine.age === null || engine.age > 3);
}

function fill(target, share, words) {
  target.firstChild.style.width = `${Math.min(100, 100 * share).toFixed(1)}%`;
  target.classList.toggle("full", share > 0.9);
  set(target.lastChild, words);
}

// ---- refusals -------------------------------------------------------------------------------------------------------

function drawRefusals() {
  const reasons = new Map();
  let retry = null;
  for (const each of state.history) {
    for (const [reason, times] of Object.entries(each.reasons)) reasons.set(reason, (reasons.get(reason) ?? 0) + times);
    retry = each.retry_after ?? retry;
  }
  const box = at("refusals");
  const key = JSON.stringify([...reasons, retry && Math.ceil(retry)]);
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  if (!reasons.size) return box.replaceChildren(element("p", "None in the last three minutes.", "quiet"));
  const list = element("ul");
  const most = Math.max(...reasons.values());
  for (const [reason, times] of [...reasons].sort((one, other) => other[1] - one[1])) {
    const item = element("li");
    const meter = element("span", null, "bar");
    meter.append(element("i"));
    meter.firstChild.style.width = `${(100 * times) / most}%`;
    item.append(element("span", plain(reason)), meter, element("b", count(times)));
    list.append(item);
  }
  const back = element("p", retry === null ? "Nobody was told when to come back." : `Last told to come back after ${Math.ceil(retry)} s.`, "quiet");
  box.replaceChildren(list, back);
}

// ---- decisions ------------------------------------------------------------------------------------------------------

const isWanted = (row) =>
  (!state.filter.outcome || row.outcome === state.filter.outcome) &&
  (!state.filter.model || row.model === state.filter.model) &&
  (!state.filter.tenant || row.tenant === state.filter.tenant);

function drawRows() {
  for (const [id, values] of [["models", state.models], ["tenants", state.tenants]]) {
    if (at(id).childElementCount !== values.size) at(id).replaceChildren(...[...values].sort().map((value) => {
      const option = element("option");
      option.value = value;
      return option;
    }));
  }
  if (state.isPaused) return;
  const wanted = [...state.rows.values()].filter(isWanted).sort((one, other) => other.at - one.at);
  const shown = wanted.slice(0, MAX_SHOWN);
  const body = at("rows");
  const focused = document.activeElement?.closest?.("#rows tr")?.dataset.id;
  while (body.rows.length > shown.length) body.lastChild.remove();
  while (body.rows.length < shown.length) body.append(emptyRow());
  shown.forEach((row, index) => fillRow(body.rows[index], row));
  if (focused) [...body.rows].find((line) => line.dataset.id === focused)?.focus({ preventScroll: true });
  const few = state.missed ? ` Of ${count(state.missed + state.rows.size)} requests the page was sent those that failed and a share of the rest; a filter asks for all.` : "";
  set(at("shown"), shown.length ? `The last ${shown.length}${wanted.length > shown.length ? ` of ${wanted.length}` : ""}.${few}` : "No request matches.");
}

function emptyRow() {
  const line = element("tr");
  line.tabIndex = 0;
  const wide = [2, 3, 5, 6, 8], numbers = [5, 6, 7, 8, 9];
  for (let column = 0; column < 10; column += 1) {
    const names = [wide.includes(column) ? "wide" : "", numbers.includes(column) ? "number" : ""];
    line.append(element("td", null, names.join(" ").trim()));
  }
  return line;
}

function fillRow(line, row) {
  if (line.dataset.id === row.id) return;
  line.dataset.id = row.id;
  line.className = row.outcome;
  const cells = line.children;
  set(cells[0], clock(row.at));
  cells[1].replaceChildren(marked(OUTCOMES, row.outcome, row.reason ? `: ${plain(row.reason)}` : ""));
  set(cells[2], row.model ?? NONE);
  set(cells[3], row.tenant);
  const pair = row.prefill === row.decode ? row.prefill : `${row.prefill} → ${row.decode}`;
  set(cells[4], row.prefill ? (row.outcome === "refused" ? `best ${pair}` : pair) : NONE);
  set(cells[5], count(row.prompt_tokens));
  set(cells[6], count(row.reported_cached_tokens ?? row.cached_tokens));
  set(cells[7], row.outcome === "refused" && row.retry_after_s !== undefined ? `again in ${Math.ceil(row.retry_after_s)} s` : seconds(row.ttft_s));
  cells[7].classList.toggle("past", row.slo_ttft_s !== undefined && row.ttft_s > row.slo_ttft_s);
  set(cells[8], seconds(row.predicted_ttft_s));
  set(cells[9], seconds(row.tbt_s));
  cells[9].classList.toggle("past", row.slo_tbt_s !== undefined && row.tbt_s > row.slo_tbt_s);
}

/** Of very many requests the stream brings a share: with a filter the gateway is asked for those that match. */
async function ask() {
  const query = new URLSearchParams(Object.entries(state.filter).filter(([, value]) => value));
  if (![...query].length) return;
  query.set("limit", String(MAX_SHOWN));
  try {
    const answer = await fetch(`/v1/sluice/decisions?${query}`);
    if (answer.ok) keep((await answer.json()).decisions);
    draw();
  } catch {
    // The stream says already that the gateway is away.
  }
}

// ---- what a person does ---------------------------------------------------------------------------------------------

at("filter").addEventListener("input", () => {
  const fields = new FormData(at("filter"));
  for (const name of Object.keys(state.filter)) state.filter[name] = fields.get(name).trim();
  draw();
  ask();
});
at("filter").addEventListener("submit", (event) => event.preventDefault());
setInterval(() => { if (!state.isPaused && !document.hidden) ask(); }, ASK_EVERY_MS);

at("pause").addEventListener("click", () => {
  state.isPaused = !state.isPaused;
  at("pause").setAttribute("aria-pressed", String(state.isPaused));
  set(at("pause"), state.isPaused ? "Go on" : "Pause");
  draw();
});

at("rows").addEventListener("click", (event) => {
  const line = event.target.closest("tr");
  if (line) open(at("detail"), line.dataset.id);
});
at("rows").addEventListener("keydown", (event) => {
  const line = event.target.closest("tr");
  const next = { ArrowDown: line?.nextElementSibling, ArrowUp: line?.previousElementSibling }[event.key];
  if (next) next.focus();
  if (event.key === "Enter" || event.key === " ") open(at("detail"), line.dataset.id);
  if (next || event.key === " ") event.preventDefault();
});
at("detail").addEventListener("click", (event) => { if (event.target === at("detail")) at("detail").close(); });

at("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", draw);
connect();
