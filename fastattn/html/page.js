"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { tokens, keys, layers, heads } = data;
// Where not every key is listed, the last column is the share of the others.
const columns = keys.length + (data.complete ? 0 : 1);
const MEAN = heads; // the choice that follows the last head
const choices = heads > 1 ? heads + 1 : 1;
const LISTED = 12;
const FAINT = 0.005; // weights below it would read 0.00
const STRONGEST = [Infinity, 1, 2, 3, 5, 10]; // how many lines of a word there may be
const BLANKS = /[Ġ▁]/g; // by which tokenizers mark a blank before a word
const dark = matchMedia("(prefers-color-scheme: dark)");

const counts = decode(data.code, data.rice, layers * heads * tokens.length * columns);
const state = {
  layer: data.layer,
  head: data.head === "mean" ? MEAN : data.head,
  chosen: { side: "queries", index: data.query },
  pointed: null,
  weights: null, // of the head that is shown: a row for each query
  threshold: 0, // of lines
  strongest: Infinity, // lines of a word, at most
  marks: false, // whether marks of blanks are shown as they are
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
const shown = (text) => (state.marks ? text : text.replace(BLANKS, " ").trim() || text);
const nameOf = (side, index) => `“${shown(wordsOf(side)[index])}”`;
const weightsOfWord = ({ side, index }) =>
  wordsOf(otherSide(side)).map((_, i) => (side === "queries" ? weight(index, i) : weight(i, index)));
const starsOf = (value) => "★".repeat(data.stars.find(([least]) => value >= least)?.[1] ?? 0);
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
    element("span", { className: "text", textContent: shown(text) }), element("span", { className: "weight" }));
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
  makeControls();
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
  byId("precision").textContent = `Weights on this page are rounded to 1/${data.steps}. Positions count from 0.`;
  byId("stars-note").textContent =
    data.stars.map(([least, count]) => `${"★".repeat(count)} from ${least}`).join(", ") + ".";
}

function makeControls() {
  fillSelect(byId("strongest"), STRONGEST.map((count) => (count === Infinity ? "all" : String(count))), (i) => {
    state.strongest = STRONGEST[i];
    render();
    keepAddress();
  });
  byId("threshold").addEventListener("input", (event) => {
    state.threshold = Number(event.target.value);
    render();
    keepAddress();
  });
  byId("find").addEventListener("input", () => find(0));
  byId("find").addEventListener("keydown", (event) => {
    if (event.key === "Enter") find(1);
  });
  byId("marks-label").hidden = ![...tokens, ...keys].some((text) => /[Ġ▁]/.test(text));
  byId("marks").addEventListener("change", (event) => {
    state.marks = event.target.checked;
    for (const side of ["queries", "keys"]) {
      buttons[side].forEach((button, i) => { button.firstChild.textContent = shown(wordsOf(side)[i]); });
    }
    render();
  });
  const tellOfScrolling = () => { byId("scrolls").hidden = byId("scroll").scrollWidth <= byId("scroll").clientWidth; };
  new ResizeObserver(tellOfScrolling).observe(byId("scroll"));
}

// Chooses the first query that holds the text, from the one that is chosen on, or behind it.
function find(behind) {
  const text = byId("find").value.trim().toLowerCase();
  const from = (state.chosen?.side === "queries" ? state.chosen.index : 0) + behind;
  const holds = (i) => shown(tokens[i]).toLowerCase().includes(text);
  const order = tokens.map((_, i) => (from + i) % tokens.length);
  const found = text ? order.find(holds) : undefined;
  byId("find").setAttribute("aria-invalid", String(Boolean(text) && found === undefined));
  if (found === undefined) return;
  choose({ side: "queries", index: found });
  buttons.queries[found].scrollIntoView({ block: "nearest" });
}

// --- what changes --------------------------------------------------------------------------------

function choose(word) {
  // What was chosen last wins over a pointer that rests on some word.
  Object.assign(state, { chosen: word, pointed: null });
  if (word) {
    for (const button of buttons[word.side]) button.tabIndex = -1;
    buttons[word.side][word.index].tabIndex = 0;
  }
  render();
  announce();
}

function point(word) {
  state.pointed = word;
  render();
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
  render();
  announce();
}

// All parts of the page tell of the same word: the one that is pointed at, or else the one that is chosen.
function render() {
  const word = state.pointed ?? state.chosen;
  showWords(word);
  showTable(word);
  byId("status").textContent = told(word);
  drawLines(word);
}

function showWords(word) {
  const weights = word && weightsOfWord(word);
  for (const side of ["queries", "keys"]) {
    buttons[side].forEach((button, i) => {
      const mine = word && word.side === side;
      const share = word && !mine ? weights[i] : 0;
      button.classList.toggle("shown", Boolean(mine && word.index === i));
      button.classList.toggle("faded", Boolean(word && !(mine && word.index === i) && share < 0.05));
      button.setAttribute("aria-pressed", state.chosen?.side === side && state.chosen.index === i);
      button.style.backgroundColor = share ? `color-mix(in srgb, var(--line) ${40 * share}%, transparent)` : "";
      button.lastChild.textContent = share >= FAINT ? share.toFixed(2) : "";
    });
  }
  byId("all").setAttribute("aria-pressed", !word);
}

const digits = data.steps > 500 ? 3 : 2;
const tableRow = (name, position, value, stars = "") => element("tr", {},
  element("th", { scope: "row", textContent: name }), element("td", { textContent: position }),
  element("td", { textContent: value.toFixed(digits) }), element("td", { className: "stars", textContent: stars }));

// The largest first, and what is left.
function listed(values) {
  const order = values.map((value, i) => [value, i]).sort((a, b) => b[0] - a[0]);
  return order.slice(0, LISTED).filter(([value]) => value > 0);
}

function showTable(word) {
  const place = fullName(state.layer, state.head);
  if (!word) {
    const pairs = listed(Array.from({ length: tokens.length * keys.length },
      (_, at) => weight(Math.floor(at / keys.length), at % keys.length)));
    byId("rows").replaceChildren(...pairs.map(([value, at]) => {
      const [query, key] = [Math.floor(at / keys.length), at % keys.length];
      return tableRow(`${shown(tokens[query])} → ${shown(keys[key])}`, `${query} → ${key}`, value, starsOf(value));
    }));
    byId("caption").textContent = capital(`${place}: the largest weights of all words`);
    return;
  }
  const { side, index } = word;
  const looking = side === "queries";
  const values = weightsOfWord(word);
  const found = listed(values);
  const rows = found.map(([value, i]) => tableRow(shown(wordsOf(otherSide(side))[i]), i, value, starsOf(value)));
  const others = values.reduce((sum, value) => sum + value, 0) - found.reduce((sum, [value]) => sum + value, 0)
    + (looking && !data.complete ? weight(index, keys.length) : 0);
  if (looking && others >= 10 ** -digits) rows.push(tableRow("other words", "", others));
  byId("rows").replaceChildren(...rows);
  const name = `${nameOf(side, index)} (position ${index})`;
  const asked = looking ? `what ${name} looks at` : `which words look at ${name}`;
  byId("caption").textContent = capital(`${place}: ${asked}`);
}

const told = (word) =>
  `${capital(fullName(state.layer, state.head))}: ${word ? finding(word) : "all words"}.`;

// To those who cannot see the page: what is chosen, and not what a pointer passes over.
function announce() {
  byId("announced").textContent = told(state.chosen);
  keepAddress();
}

function finding(word) {
  const values = weightsOfWord(word);
  const best = values.indexOf(Math.max(...values));
  const name = nameOf(word.side, word.index);
  const passive = word.side === "keys";
  if (!values[best]) return passive ? `no word looks at ${name}` : `${name} looks at nothing`;
  const other = `${nameOf(otherSide(word.side), best)}, ${values[best].toFixed(2)}`;
  return passive ? `${name} is looked at most by ${other}` : `${name} looks most at ${other}`;
}

// --- drawing -------------------------------------------------------------------------------------

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The lines of the figure as it is now: ends, opacity and width, the fainter ones first.
function linesOf(word) {
  const box = byId("words").getBoundingClientRect();
  const left = byId("queries").getBoundingClientRect().right - box.left + 2;
  const right = byId("keys").getBoundingClientRect().left - box.left - 2;
  const heights = (side) => buttons[side].map((button) => {
    const place = button.getBoundingClientRect();
    return (place.top + place.bottom) / 2 - box.top;
  });
  const from = heights("queries");
  const to = heights("keys");
  const least = Math.max(FAINT, state.threshold);
  const found = [];
  for (let i = 0; i < tokens.length; i += 1) {
    const weakest = strongestOf(i);
    for (let j = 0; j < keys.length; j += 1) {
      const value = weight(i, j);
      if (value < Math.max(least, weakest)) continue;
      const its = !word || (word.side === "queries" ? i : j) === word.index;
      found.push({ left, right, from: from[i], to: to[j], opacity: value ** 0.6 * (its ? 1 : 0.07), width: 1 + 4 * value });
    }
  }
  return found;
}

function drawLines(word) {
  const canvas = byId("lines");
  const box = byId("words").getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(box.width * ratio);
  canvas.height = Math.round(box.height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.strokeStyle = colour("--line");
  for (const { left, right, from, to, opacity, width } of linesOf(word)) {
    const middle = (left + right) / 2;
    pen.globalAlpha = opacity;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(left, from);
    pen.bezierCurveTo(middle, from, middle, to, right, to);
    pen.stroke();
  }
}

// The weight of the last of a query's lines, of which there are as many as were asked for.
function strongestOf(query) {
  if (state.strongest >= keys.length) return 0;
  const row = Array.from({ length: keys.length }, (_, key) => weight(query, key)).sort((a, b) => b - a);
  return row[state.strongest - 1];
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

// --- pictures of the figure ----------------------------------------------------------------------

const escaped = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function figureAsSvg() {
  const box = byId("words").getBoundingClientRect();
  const word = state.chosen;
  const curves = linesOf(word).map(({ left, right, from, to, opacity, width }) => {
    const middle = (left + right) / 2;
    return `<path d="M${left} ${from}C${middle} ${from} ${middle} ${to} ${right} ${to}" stroke-opacity="${opacity.toFixed(3)}"`
      + ` stroke-width="${width.toFixed(2)}"/>`;
  });
  const texts = ["queries", "keys"].flatMap((side) => buttons[side].map((button, i) => {
    const place = button.getBoundingClientRect();
    const end = side === "queries";
    const x = (end ? place.right : place.left) - box.left + (end ? -8 : 8);
    const mark = word?.side === side && word.index === i ? ` fill="${colour("--mark")}" font-weight="600"` : "";
    return `<text x="${x}" y="${(place.top + place.bottom) / 2 - box.top}" text-anchor="${end ? "end" : "start"}"${mark}>`
      + `${escaped(shown(wordsOf(side)[i]))}</text>`;
  }));
  const [width, height] = [Math.ceil(box.width), Math.ceil(box.height) + 28];
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="sans-serif" font-size="15"`
    + ` fill="${colour("--ink")}"><rect width="100%" height="100%" fill="${colour("--ground")}"/>`
    + `<text x="8" y="18">${escaped(told(word))}</text><g transform="translate(0 28)" dominant-baseline="central">`
    + `<g fill="none" stroke="${colour("--line")}">${curves.join("")}</g>${texts.join("")}</g></svg>`;
}

function saveAs(name, blob) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

// By way of a data: address, the one kind of picture that the page may load.
async function figureAsPng() {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(figureAsSvg())}`;
  await image.decode();
  const canvas = element("canvas", { width: 2 * image.width, height: 2 * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => { canvas.toBlob(done, "image/png"); });
}

function makePictures() {
  byId("svg").addEventListener("click", () => saveAs("attention.svg", new Blob([figureAsSvg()], { type: "image/svg+xml" })));
  byId("png").addEventListener("click", async () => saveAs("attention.png", await figureAsPng()));
}

// --- the state in the page's address, to be shared -----------------------------------------------

function toAddress() {
  const { layer, head, chosen, threshold, strongest } = state;
  const parts = { layer, head: head === MEAN && heads > 1 ? "mean" : head };
  if (chosen) parts[chosen.side === "queries" ? "query" : "key"] = chosen.index;
  if (threshold) parts.threshold = threshold;
  if (strongest !== Infinity) parts.strongest = strongest;
  return `#${new URLSearchParams(parts)}`;
}

function keepAddress() {
  // Where a page has no address of its own, as in a frame of a notebook, there is nothing to share.
  if (location.protocol !== "about:") history.replaceState(null, "", toAddress());
}

// What the address says, of what there is; all else is as the page was saved.
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (name, size) => {
    const value = asked.has(name) ? Number(asked.get(name)) : NaN;
    return Number.isInteger(value) && value >= 0 && value < size ? value : undefined;
  };
  const mean = asked.get("head") === "mean" && heads > 1 ? MEAN : undefined;
  Object.assign(state, { layer: number("layer", layers) ?? state.layer, head: mean ?? number("head", heads) ?? state.head });
  for (const [side, name] of [["queries", "query"], ["keys", "key"]]) {
    const index = number(name, wordsOf(side).length);
    if (index !== undefined) state.chosen = { side, index };
  }
  const threshold = Number(asked.get("threshold"));
  if (threshold > 0 && threshold <= 0.5) state.threshold = threshold;
  state.strongest = STRONGEST.find((count) => String(count) === asked.get("strongest")) ?? Infinity;
  byId("threshold").value = state.threshold;
  byId("strongest").value = STRONGEST.indexOf(state.strongest);
}

makePage();
makePictures();
drawHeads();
fromAddress();
chooseHead(state.layer, state.head);
choose(state.chosen);
new ResizeObserver(() => drawLines(state.pointed ?? state.chosen)).observe(byId("words"));
dark.addEventListener("change", () => {
  drawHeads();
  render();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") choose(null);
});
