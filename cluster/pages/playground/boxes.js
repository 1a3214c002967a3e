// Boxes as models write them, in thousandths of a picture's sides; the same reading as cluster/boxes.py.

export const SCALE = 1000;
const LARGEST = 1e6;
const MAX_DEPTH = 20;
const MAX_UNREADABLE = 500;
const BOX_KEYS = ["bbox_2d", "bbox", "box_2d", "box"];
const LABEL_KEYS = ["label", "name", "text", "text_content", "class", "category", "object", "description"];

/** All boxes in an answer, in their order: {corners: [x1, y1, x2, y2], label}. */
export function findBoxes(text) {
  const found = [];
  for (const value of jsonValues(text)) collect(value, "", 0, found);
  return found.map(shaped).filter(Boolean);
}

/** Four numbers, or null. */
export function fourNumbers(value) {
  if (!Array.isArray(value) || value.length !== 4) return null;
  return value.every((n) => typeof n === "number" && Math.abs(n) <= LARGEST) ? value : null;
}

export const clamp = (n) => Math.min(SCALE, Math.max(0, n));

/** Every outermost JSON object or list that can be read. One that cannot be is entered, for what it holds. */
function* jsonValues(text) {
  let at = 0;
  let unreadable = 0;
  while (unreadable < MAX_UNREADABLE && (at = nextBracket(text, at)) >= 0) {
    const end = closing(text, at);
    let value;
    try {
      value = end > 0 ? JSON.parse(text.slice(at, end)) : undefined;
    } catch {
      value = undefined;
    }
    if (value === undefined) {
      at += 1;
      unreadable += 1;
    } else {
      yield value;
      at = end;
    }
  }
}

function nextBracket(text, from) {
  for (let at = from; at < text.length; at++) if (text[at] === "{" || text[at] === "[") return at;
  return -1;
}

/** The place behind the bracket that closes the one at `start`; 0 where none does. */
function closing(text, start) {
  let depth = 0;
  let quoted = false;
  for (let at = start; at < text.length; at++) {
    const letter = text[at];
    if (quoted) {
      if (letter === "\\") at += 1;
      else if (letter === '"') quoted = false;
    } else if (letter === '"') quoted = true;
    else if (letter === "{" || letter === "[") depth += 1;
    else if ((letter === "}" || letter === "]") && --depth === 0) return at + 1;
  }
  return 0;
}

function collect(value, label, depth, found) {
  if (depth > MAX_DEPTH || value === null || typeof value !== "object") return;
  const corners = fourNumbers(value);
  if (corners) {
    found.push({ corners, label });
  } else if (Array.isArray(value)) {
    for (const item of value) collect(item, label, depth + 1, found);
  } else {
    const own = LABEL_KEYS.map((key) => value[key]).find((name) => typeof name === "string");
    const key = BOX_KEYS.find((name) => name in value);
    if (key) collect(value[key], own ?? label, depth + 1, found);
    else for (const [name, item] of Object.entries(value)) collect(item, own ?? name, depth + 1, found);
  }
}

/** In order and inside; null where nothing is left. */
function shaped({ corners, label }) {
  const [a, b, c, d] = corners.map(clamp);
  const [x1, y1, x2, y2] = [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)];
  return x1 < x2 && y1 < y2 ? { corners: [x1, y1, x2, y2], label } : null;
}
