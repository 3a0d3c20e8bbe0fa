// Three small charts on canvas, in the colours of the style sheet, redrawn whole: a few hundred points cost a millisecond.

import { seconds } from "./words.js";

const LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 20;
export const SPAN_S = 180;

function prepared(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  pen.font = `11px ${style.fontFamily}`;
  return { pen, width, height, colour };
}

/** A round number not below `value`, and how far apart its grid lines are. */
function scale(value) {
  const top = Math.max(value, 1e-3) * 1.1;
  const power = 10 ** Math.floor(Math.log10(top));
  const step = [0.2, 0.5, 1, 2].map((part) => part * power).find((each) => top / each <= 5);
  return { top: Math.ceil(top / step) * step, step };
}

function grid({ pen, width, height, colour }, top, step, y) {
  pen.strokeStyle = colour("grid");
  pen.fillStyle = colour("quiet");
  pen.lineWidth = 1;
  pen.setLineDash([]);
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (let value = 0; value <= top * 1.0001; value += step) {
    pen.beginPath();
    pen.moveTo(LEFT, Math.round(y(value)) + 0.5);
    pen.lineTo(width - RIGHT, Math.round(y(value)) + 0.5);
    pen.stroke();
    pen.fillText(value === 0 ? "0" : seconds(value), LEFT - 6, y(value));
  }
}

/** A line through the points that are there; a gap where the gateway was away or nothing was measured for long. */
function line(pen, points, colour, dash, widthPx) {
  pen.strokeStyle = colour;
  pen.lineWidth = widthPx;
  pen.lineJoin = "round";
  pen.setLineDash(dash);
  pen.beginPath();
  let before = null;
  for (const [x, y, at] of points) {
    if (before === null || at - before > 8) pen.moveTo(x, y);
    else pen.lineTo(x, y);
    before = at;
  }
  pen.stroke();
}

/** Median, 90th percentile and bound over the last minutes. */
export function overTime(canvas, history, name, bound) {
  const drawing = prepared(canvas);
  const { pen, width, height, colour } = drawing;
  const now = history.length ? history[history.length - 1].at : 0;
  const seen = history.filter((tick) => tick.at >= now - SPAN_S);
  const bounds = seen.map((tick) => tick.slo[bound]).filter((value) => value !== null);
  const highest = Math.max(0, ...seen.map((tick) => tick[name]?.[1] ?? 0), ...bounds.slice(-1));
  const { top, step } = scale(highest);
  const x = (at) => width - RIGHT - ((now - at) / SPAN_S) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - (value / top) * (height - TOP - BOTTOM);
  grid(drawing, top, step, y);
  pen.textAlign = "center";
  for (const back of [180, 120, 60, 0]) {
    pen.textAlign = back === 180 ? "left" : back === 0 ? "right" : "center";
    pen.fillText(back ? `${back / 60} min ago` : "now", x(now - back), height - 8);
  }
  const points = (index) => seen.filter((tick) => tick[name]).map((tick) => [x(tick.at), y(tick[name][index]), tick.at]);
  if (bounds.length) {
    const limit = bounds[bounds.length - 1];
    line(pen, [[LEFT, y(limit), 0], [width - RIGHT, y(limit), 0]], colour("slo"), [2, 4], 1.5);
  }
  line(pen, points(1), colour("p90"), [5, 3], 1.5);
  line(pen, points(0), colour("p50"), [], 2);
  const last = seen.findLast((tick) => tick[name]);
  canvas.setAttribute("aria-label", last
    ? `Median ${seconds(last[name][0])}, 90th percentile ${seconds(last[name][1])}`
    : "Nothing measured yet");
}

/** One mark per request: where it was predicted to be, and where it came out. Both axes alike, logarithmic. */
export function scatter(canvas, points) {
  const drawing = prepared(canvas);
  const { pen, width, height, colour } = drawing;
  const values = points.flatMap(([predicted, actual]) => [predicted, actual]).filter((value) => value > 0);
  const low = 10 ** Math.floor(Math.log10(Math.max(1e-3, Math.min(...values, 0.05))));
  const high = 10 ** Math.ceil(Math.log10(Math.max(...values, 1)));
  const share = (value) => Math.log(Math.max(value, low) / low) / Math.log(high / low);
  const x = (value) => LEFT + share(value) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - share(value) * (height - TOP - BOTTOM);
  pen.strokeStyle = colour("grid");
  pen.fillStyle = colour("quiet");
  pen.setLineDash([]);
  pen.lineWidth = 1;
  for (let edge = low; edge <= high * 1.01; edge *= 10) {
    pen.beginPath();
    pen.moveTo(Math.round(x(edge)) + 0.5, TOP);
    pen.lineTo(Math.round(x(edge)) + 0.5, height - BOTTOM);
    pen.moveTo(LEFT, Math.round(y(edge)) + 0.5);
    pen.lineTo(width - RIGHT, Math.round(y(edge)) + 0.5);
    pen.stroke();
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillText(seconds(edge), LEFT - 6, y(edge));
    pen.textAlign = edge >= high * 0.99 ? "right" : "center";
    pen.fillText(seconds(edge), x(edge), height - 8);
  }
  pen.strokeStyle = colour("quiet");
  pen.beginPath();
  pen.moveTo(x(low), y(low));
  pen.lineTo(x(high), y(high));
  pen.stroke();
  let late = 0;
  pen.globalAlpha = 0.75;
  for (const [predicted, actual, bound] of points) {
    const isLate = bound !== null && actual > bound;
    late += isLate;
    pen.fillStyle = pen.strokeStyle = colour(isLate ? "late" : "kept");
    pen.beginPath();
    if (isLate) {
      pen.moveTo(x(predicted), y(actual) - 4);
      pen.lineTo(x(predicted) + 3.6, y(actual) + 3);
      pen.lineTo(x(predicted) - 3.6, y(actual) + 3);
      pen.closePath();
    } else {
      pen.arc(x(predicted), y(actual), 2.4, 0, 2 * Math.PI);
    }
    pen.fill();
  }
  pen.globalAlpha = 1;
  canvas.setAttribute("aria-label", points.length
    ? `Predicted (across) against actual (up) time to first token of ${points.length} requests, ${late} past their bound`
    : "Nothing measured yet");
}
