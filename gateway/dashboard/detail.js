// One decision in a dialog: what happened in a sentence, its stages on a line, and every candidate it was chosen from.

import { NONE, OUTCOMES, clock, count, element, marked, plain, seconds } from "./words.js";

const STAGES = [["gather", "gather"], ["wait", "wait"], ["prefill", "prefill"], ["hand_off", "hand-off"], ["decode", "decode"]];

/** Opens the dialog and fills it; says so when the gateway no longer knows that request. */
export async function open(dialog, id) {
  dialog.replaceChildren(element("p", "…", "quiet"));
  if (!dialog.open) dialog.showModal();
  try {
    const answer = await fetch(`/v1/sluice/decisions/${encodeURIComponent(id)}`);
    const told = await answer.json();
    dialog.replaceChildren(...(answer.ok ? described(told) : missing(id, told.error?.message)), closer(dialog));
  } catch {
    dialog.replaceChildren(...missing(id, "The gateway cannot be reached."), closer(dialog));
  }
  dialog.querySelector(".close").focus();
}

function closer(dialog) {
  const button = element("button", "Close", "close");
  button.type = "button";
  button.addEventListener("click", () => dialog.close());
  return button;
}

function missing(id, why) {
  const title = element("h2", "This decision is not kept any more");
  title.id = "detail-title";
  return [title, element("p", why ?? ""), element("p", id, "id")];
}

function described(told) {
  const title = element("h2");
  title.id = "detail-title";
  title.append(marked(OUTCOMES, told.outcome, told.reason ? `: ${plain(told.reason)}` : ""));
  const parts = [title, element("p", sentence(told), "sentence"), facts(told)];
  told.tries.forEach((attempt, index) => {
    parts.push(element("h3", told.tries.length > 1 ? `Attempt ${attempt.attempt}` : "Stages"));
    if (attempt.failure) parts.push(element("p", `${plain(attempt.failure)} at ${attempt.engine_at_fault ?? "no engine"}`, "failure"));
    parts.push(stages(told, attempt, index));
    if (attempt.candidates?.length) parts.push(...candidates(attempt, told));
  });
  parts.push(element("p", `request ${told.id}${told.trace_id ? `, trace ${told.trace_id}` : ""}`, "id"));
  return parts;
}

/** What an operator would say on the phone. */
export function sentence(told) {
  const said = [];
  if (told.outcome === "refused") {
    said.push(told.message ? `Refused: ${told.message}.` : "Refused.");
    if (told.predicted_ttft_s !== undefined && told.slo_ttft_s !== undefined) {
      said.push(`The best pair was predicted to give its first token after ${seconds(told.predicted_ttft_s)}; the bound is ${seconds(told.slo_ttft_s)}.`);
    }
    if (told.retry_after_s !== undefined) said.push(`It was told to come back after ${Math.ceil(told.retry_after_s)} s.`);
  } else {
    if (told.ttft_s !== undefined) said.push(`First token after ${seconds(told.ttft_s)}; predicted were ${seconds(told.predicted_ttft_s)}.`);
    if (told.tbt_s !== undefined) said.push(`Tokens every ${seconds(told.tbt_s)} at the slow end; predicted were ${seconds(told.predicted_tbt_s)}.`);
    if (told.attempts > 1) said.push(`It took ${told.attempts} attempts.`);
  }
  return said.join(" ") || `It ended after ${seconds(told.duration_s)}.`;
}

function facts(told) {
  const list = element("dl", null, "facts");
  const cached = told.reported_cached_tokens === undefined ? count(told.cached_tokens)
    : `${count(told.cached_tokens)} believed, ${count(told.reported_cached_tokens)} reported`;
  const rows = [
    ["at", clock(told.at)], ["model", told.model ?? NONE], ["tenant", told.tenant], ["status", told.status ?? NONE],
    ["prefill", told.prefill ?? NONE], ["decode", told.decode ?? NONE],
    ["prompt", told.prompt_tokens === undefined ? NONE : `${count(told.prompt_tokens)} tokens${told.is_prompt_exact ? "" : ", estimated"}`],
    ["cached", cached], ["output", told.output_tokens === undefined ? NONE : `${count(told.output_tokens)} tokens`],
    ["TTFT", seconds(told.ttft_s)], ["TTFT predicted", seconds(told.predicted_ttft_s)], ["TTFT bound", seconds(told.slo_ttft_s)],
    ["TTFT headroom", seconds(told.ttft_headroom_s)],
    ["TBT", seconds(told.tbt_s)], ["TBT predicted", seconds(told.predicted_tbt_s)], ["TBT bound", seconds(told.slo_tbt_s)],
    ["TBT headroom", seconds(told.tbt_headroom_s)],
    ["waited", seconds(told.wait_s)], ["decided in", `${Math.round(told.decision_us)} µs`],
    ["come back after", told.retry_after_s === undefined ? NONE : `${Math.ceil(told.retry_after_s)} s`],
  ];
  for (const [name, value] of rows) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", String(value)));
    list.append(pair);
  }
  return list;
}

/** The attempt's stages, each as long as it took, with its length written beside its name. */
function stages(told, attempt, index) {
  const end = attempt.ended_s ?? told.duration_s;
  const sent = attempt.sent_s ?? end;
  const isHandOff = attempt.chosen && attempt.chosen.prefill !== attempt.chosen.decode;
  const prefilled = isHandOff ? attempt.prefilled_s ?? end : sent;
  const first = attempt.first_token_s ?? prefilled;
  const lengths = {
    gather: index === 0 ? told.gather_s ?? 0 : 0,
    wait: sent - attempt.decided_s,
    prefill: isHandOff ? prefilled - sent : 0,
    hand_off: isHandOff ? first - prefilled : 0,
    decode: attempt.sent_s === undefined ? 0 : end - (isHandOff ? first : sent),
  };
  const total = Math.max(1e-9, ...[Object.values(lengths).reduce((sum, value) => sum + Math.max(0, value), 0)]);
  const list = element("ol", null, "stages");
  for (const [name, words] of STAGES) {
    if (!(lengths[name] > 0)) continue;
    const item = element("li", null, name);
    item.style.flexGrow = String(Math.max(0.02, lengths[name] / total));
    item.append(element("span", words), element("b", seconds(lengths[name])));
    list.append(item);
  }
  return list.childElementCount ? list : element("p", "It was never sent.", "quiet");
}

function candidates(attempt, told) {
  const shown = attempt.candidates.length;
  const title = element("h3", `Candidates: ${shown === attempt.pair_count ? `all ${shown}` : `the best ${shown} of ${attempt.pair_count}`}`);
  const table = element("table", null, "candidates");
  const head = element("tr");
  for (const name of ["", "prefill", "decode", "TTFT", "of it wait", "TBT", "cached", "cost"]) head.append(element("th", name, name && name !== "prefill" && name !== "decode" ? "number" : ""));
  table.append(element("thead"));
  table.tHead.append(head);
  const body = table.createTBody();
  const bound = told.slo_ttft_s;
  for (const pair of attempt.candidates) {
    const isChosen = attempt.chosen && pair.prefill === attempt.chosen.prefill && pair.decode === attempt.chosen.decode
      && pair.cached_tokens === attempt.chosen.cached_tokens;
    const row = body.insertRow();
    row.className = isChosen ? "chosen" : "";
    const cells = [
      isChosen ? "✓ chosen" : "", pair.prefill, pair.decode, seconds(pair.ttft_s), seconds(pair.wait_s), seconds(pair.tbt_s),
      count(pair.cached_tokens), pair.cost === undefined ? "not allowed" : pair.cost.toPrecision(3),
    ];
    cells.forEach((value, column) => {
      const cell = row.insertCell();
      cell.textContent = value;
      if (column > 2) cell.className = "number";
    });
    if (bound !== undefined && pair.ttft_s > bound) row.cells[3].classList.add("past");
  }
  const scroll = element("div", null, "scroll");
  scroll.append(table);
  return [title, scroll];
}
