"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { tokens, keys, layers, heads } = data;
// Where not every key is listed, the last column is the share of the others.
const columns = keys.length + (data.complete ? 0 : 1);
const MEAN = heads; // the choice that follows the last head
const choices = heads > 1 ? heads + 1 : 1;
const LISTED = 12;
const FAINT = 0.005; // shares below it would read 0.00
const dark = matchMedia("(prefers-color-scheme: dark)");

const counts = decode(data.code, data.rice, layers * heads * tokens.length * columns);
const state = {
  layer: data.layer,
  head: data.head === "mean" ? MEAN : data.head,
  chosen: { side: "queries", index: data.query },
  pointed: null,
  weights: null, // of the head that is shown: a row for each query
};

// Each count is a quotient by 2**k in unary, ended by a 0, and a remainder of k bits: see rice_code in view.py.
function decode(code, k, size) {
  const bytes = Uint8Array.from(atob(code), (c) => c.charCodeAt(0));
  let at = 0;
  const bit = () => {
    const value = (bytes[at >> 3] >> (7 - (at & 7))) & 1;
    at += 1;
    return value;
  };
  return Uint16Array.from({ length: size }, () => {
    let count = 0;
    while (bit()) count += 1;
    for (let i = 0; i < k; i += 1) count = 2 * count + bit();
    return count;
  });
}

function weightsOf(layer, head) {
  const size = tokens.length * columns;
  const weights = new Float32Array(size);
  const first = head === MEAN ? 0 : head;
  const last = head === MEAN ? heads : head + 1;
  for (let h = first; h < last; h += 1) {
    const start = (layer * heads + h) * size;
    for (let i = 0; i < size; i += 1) weights[i] += counts[start + i];
  }
  return weights.map((sum) => sum / (data.steps * (last - first)));
}

const weight = (query, key) => state.weights[query * columns + key];
const wordsOf = (side) => (side === "queries" ? tokens : keys);
const otherSide = (side) => (side === "queries" ? "keys" : "queries");
const sharesOf = ({ side, index }) =>
  wordsOf(otherSide(side)).map((_, i) => (side === "queries" ? weight(index, i) : weight(i, index)));
const headName = (head) => (head === MEAN && heads > 1 ? "mean over heads" : `head ${head}`);
const fullName = (layer, head) => (layers > 1 ? `Layer ${layer}, ` : "") + headName(head);
const capital = (text) => text[0].toUpperCase() + text.slice(1);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// --- the parts that stay -------------------------------------------------------------------------

function fillSelect(select, names, choose) {
  select.append(...names.map((name, i) => element("option", { value: i, textContent: name })));
  select.addEventListener("change", () => choose(Number(select.value)));
}

function makeWord(side, text, index) {
  const button = element("button", { type: "button", className: "word", title: text, tabIndex: -1 },
    element("span", { className: "text", textContent: text }), element("span", { className: "share" }));
  const here = { side, index };
  button.addEventListener("pointerenter", () => point(here));
  button.addEventListener("pointerleave", () => point(null));
  button.addEventListener("focus", () => choose(here));
  button.addEventListener("click", () => choose(here));
  return button;
}

function makeHead(layer, head) {
  const canvas = element("canvas", { width: keys.length, height: tokens.length });
  // Enlarged, cells keep their edges; made smaller they are averaged, or single columns would be lost.
  canvas.style.imageRendering = keys.length > 40 ? "auto" : "pixelated";
  const button = element("button", { type: "button", tabIndex: -1, title: capital(fullName(layer, head)) }, canvas);
  button.setAttribute("aria-label", fullName(layer, head));
  button.addEventListener("click", () => chooseHead(layer, head));
  return button;
}

// One of a group can be reached by Tab; arrow keys move within it.
function moveFocus(event, items, steps) {
  const at = items.indexOf(event.target);
  const to = { Home: 0, End: items.length - 1 }[event.key] ?? at + steps[event.key];
  if (at < 0 || !(to in items)) return;
  event.preventDefault();
  items[at].tabIndex = -1;
  items[to].tabIndex = 0;
  items[to].focus();
}

const buttons = {
  queries: tokens.map((text, i) => makeWord("queries", text, i)),
  keys: keys.map((text, i) => makeWord("keys", text, i)),
};
const headButtons = [];

function makePage() {
  for (const side of ["queries", "keys"]) {
    byId(side).append(...buttons[side]);
    buttons[side][0].tabIndex = 0;
    byId(side).addEventListener("keydown", (event) => moveFocus(event, buttons[side], { ArrowDown: 1, ArrowUp: -1 }));
  }
  const headNames = Array.from({ length: choices }, (_, i) => (i === MEAN && heads > 1 ? "mean" : String(i)));
  fillSelect(byId("layer"), Array.from({ length: layers }, (_, i) => String(i)), (i) => chooseHead(i, state.head));
  fillSelect(byId("head"), headNames, (i) => chooseHead(state.layer, i));
  byId("layer").parentElement.hidden = layers === 1;
  byId("all").addEventListener("click", () => choose(null));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());

  const grid = byId("grid");
  grid.style.gridTemplateColumns = `auto repeat(${choices}, minmax(2.75rem, 6rem))`;
  grid.append(element("span"), ...headNames.map((name) => element("span", { textContent: name })));
  for (let layer = 0; layer < layers; layer += 1) {
    const row = Array.from({ length: choices }, (_, head) => makeHead(layer, head));
    grid.append(element("span", { className: "row-title", textContent: layers > 1 ? `Layer ${layer}` : "Head" }), ...row);
    headButtons.push(...row);
  }
  grid.addEventListener("keydown", (event) =>
    moveFocus(event, headButtons, { ArrowRight: 1, ArrowLeft: -1, ArrowDown: choices, ArrowUp: -choices }));
  byId("precision").textContent = `Shares on this page are rounded to 1/${data.steps}. Positions count from 0.`;
}

// --- what changes --------------------------------------------------------------------------------

function choose(word) {
  // What was chosen last wins over a pointer that rests on some word.
  Object.assign(state, { chosen: word, pointed: null });
  if (word) {
    for (const button of buttons[word.side]) button.tabIndex = -1;
    buttons[word.side][word.index].tabIndex = 0;
  }
  showWords();
  announce();
}

function point(word) {
  state.pointed = word;
  showWords();
}

function chooseHead(layer, head) {
  Object.assign(state, { layer, head, weights: weightsOf(layer, head) });
  byId("layer").value = layer;
  byId("head").value = head;
  headButtons.forEach((button, i) => {
    const pressed = i === layer * choices + head;
    button.setAttribute("aria-pressed", pressed);
    button.tabIndex = pressed ? 0 : -1;
  });
  showWords();
  announce();
}

function showWords() {
  const word = state.pointed ?? state.chosen;
  const shares = word && sharesOf(word);
  for (const side of ["queries", "keys"]) {
    buttons[side].forEach((button, i) => {
      const mine = word && word.side === side;
      const share = word && !mine ? shares[i] : 0;
      button.classList.toggle("shown", Boolean(mine && word.index === i));
      button.classList.toggle("faded", Boolean(word && !(mine && word.index === i) && share < 0.05));
      button.setAttribute("aria-pressed", state.chosen?.side === side && state.chosen.index === i);
      button.style.backgroundColor = share ? `color-mix(in srgb, var(--line) ${40 * share}%, transparent)` : "";
      button.lastChild.textContent = share >= FAINT ? share.toFixed(2) : "";
    });
  }
  byId("all").setAttribute("aria-pressed", !word);
  if (word) showTable(word, shares);
  drawLines(word);
}

function showTable({ side, index }, shares) {
  const looking = side === "queries";
  const listed = shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, LISTED)
    .filter(([share]) => share > 0);
  const digits = data.steps > 500 ? 3 : 2;
  const row = (name, position, share) => element("tr", {}, element("th", { scope: "row", textContent: name }),
    element("td", { textContent: position }), element("td", { textContent: share.toFixed(digits) }));
  const rows = listed.map(([share, i]) => row(wordsOf(otherSide(side))[i], i, share));
  const others = shares.reduce((sum, share) => sum + share, 0) - listed.reduce((sum, [share]) => sum + share, 0)
    + (looking && !data.complete ? weight(index, keys.length) : 0);
  if (looking && others >= 10 ** -digits) rows.push(row("other words", "", others));
  byId("rows").replaceChildren(...rows);
  const name = `“${wordsOf(side)[index]}” (position ${index})`;
  const asked = looking ? `what ${name} looks at` : `which words look at ${name}`;
  byId("caption").textContent = capital(`${fullName(state.layer, state.head)}: ${asked}`);
}

function announce() {
  const place = capital(fullName(state.layer, state.head));
  byId("status").textContent = state.chosen ? `${place}: ${finding(state.chosen)}.` : `${place}: all words.`;
}

function finding(word) {
  const shares = sharesOf(word);
  const best = shares.indexOf(Math.max(...shares));
  const name = `“${wordsOf(word.side)[word.index]}”`;
  const passive = word.side === "keys";
  if (!shares[best]) return passive ? `no word looks at ${name}` : `${name} looks at nothing`;
  const other = `“${wordsOf(otherSide(word.side))[best]}”, ${shares[best].toFixed(2)}`;
  return passive ? `${name} is looked at most by ${other}` : `${name} looks most at ${other}`;
}

// --- drawing -------------------------------------------------------------------------------------

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawLines(word) {
  const canvas = byId("lines");
  const box = byId("words").getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(box.width * ratio);
  canvas.height = Math.round(box.height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.strokeStyle = colour("--line");
  const left = byId("queries").getBoundingClientRect().right - box.left + 2;
  const right = byId("keys").getBoundingClientRect().left - box.left - 2;
  const heights = (side) => buttons[side].map((button) => {
    const place = button.getBoundingClientRect();
    return (place.top + place.bottom) / 2 - box.top;
  });
  const from = heights("queries");
  const to = heights("keys");
  const middle = (left + right) / 2;
  for (let i = 0; i < tokens.length; i += 1) {
    for (let j = 0; j < keys.length; j += 1) {
      const share = weight(i, j);
      if (share < FAINT) continue;
      const its = !word || (word.side === "queries" ? i : j) === word.index;
      pen.globalAlpha = share ** 0.6 * (its ? 1 : 0.07);
      pen.lineWidth = 1 + 4 * share;
      pen.beginPath();
      pen.moveTo(left, from[i]);
      pen.bezierCurveTo(middle, from[i], middle, to[j], right, to[j]);
      pen.stroke();
    }
  }
}

// 256 colours along the ramp. The square root of a weight makes small ones visible; the legend has the same scale.
function ramp() {
  const stops = ["--ramp-0", "--ramp-1", "--ramp-2"].map(colour)
    .map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (2 * i) / 255;
    const low = Math.min(1, Math.floor(at));
    return stops[low].map((value, c) => value + (at - low) * (stops[low + 1][c] - value));
  });
}

function drawHeads() {
  const colours = ramp();
  headButtons.forEach((button, number) => {
    const weights = weightsOf(Math.floor(number / choices), number % choices);
    const pen = button.firstChild.getContext("2d");
    const image = pen.createImageData(keys.length, tokens.length);
    for (let i = 0; i < tokens.length; i += 1) {
      for (let j = 0; j < keys.length; j += 1) {
        const shade = colours[Math.min(255, Math.round(255 * Math.sqrt(weights[i * columns + j])))];
        image.data.set([...shade, 255], 4 * (i * keys.length + j));
      }
    }
    pen.putImageData(image, 0, 0);
  });
}

makePage();
drawHeads();
chooseHead(state.layer, state.head);
choose(state.chosen);
new ResizeObserver(() => drawLines(state.pointed ?? state.chosen)).observe(byId("words"));
dark.addEventListener("change", () => {
  drawHeads();
  showWords();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") choose(null);
});
