// Numbers and outcomes in words. Every outcome has a shape besides its colour, and its name beside both.

export const OUTCOMES = {
  served: { shape: "●", words: "served" },
  refused: { shape: "▲", words: "refused" },
  broken: { shape: "✕", words: "broken" },
  client_left: { shape: "○", words: "client left" },
  bad_request: { shape: "■", words: "bad request" },
  error: { shape: "✖", words: "error" },
};

export const ROLES = {
  prefill: { shape: "▶", words: "prefill" },
  decode: { shape: "◆", words: "decode" },
  both: { shape: "⬢", words: "both stages" },
};

export const NONE = "–";

/** Seconds as a person says them: three digits, s or ms. */
export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  if (size >= 100) return `${value.toFixed(0)} s`;
  if (size >= 10) return `${value.toFixed(1)} s`;
  if (size >= 1) return `${value.toFixed(2)} s`;
  if (size >= 0.1) return `${(value * 1e3).toFixed(0)} ms`;
  if (size >= 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  return `${(value * 1e3).toFixed(2)} ms`;
}

export function count(value) {
  return value === null || value === undefined ? NONE : value.toLocaleString("en");
}

export function percent(value) {
  return value === null || value === undefined ? NONE : `${Math.round(value * 100)} %`;
}

export function clock(unix) {
  return new Date(unix * 1e3).toLocaleTimeString("en-GB");
}

/** An element with text, never with markup: what clients send cannot become part of the page. */
export function element(name, text, classes) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

/** A word with its shape in front, which screen readers skip. */
export function marked(kind, key, suffix = "") {
  const known = kind[key] ?? { shape: "?", words: key };
  const made = element("span", null, `mark ${key}`);
  const shape = element("span", known.shape, "shape");
  shape.setAttribute("aria-hidden", "true");
  made.append(shape, ` ${known.words}${suffix}`);
  return made;
}

/** `queue_full` as `queue full`. */
export function plain(word) {
  return (word ?? "").replaceAll("_", " ");
}
