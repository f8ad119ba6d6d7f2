"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { tokens, keys, layers, heads, part } = data; // part: null, or the positions in the text of what is here of it
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
  chosen: { side: "queries", index: data.query },
  pointed: null,
  partner: null, // the other word of a pair whose weight is told of; null for the strongest
  threshold: 0, // of lines
  strongest: Infinity, // lines of a word, at most
  marks: false, // whether marks of blanks are shown as they are
};

// Each count is a quotient by 2**k in unary, ended by a 0, and a remainder of k bits: see rice_code in _page.py.
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

const weight = (figure, query, key) => figure.weights[query * columns + key];
const wordsOf = (side) => (side === "queries" ? tokens : keys);
const otherSide = (side) => (side === "queries" ? "keys" : "queries");
const shown = (text) => (state.marks ? text : text.replace(BLANKS, " ").trim() || text);
const positionOf = (side, index) => (part ? part[side][index] : index);
const placed = (side, index) => `${shown(wordsOf(side)[index])} (${positionOf(side, index)})`;
const quoted = (side, index) => `“${shown(wordsOf(side)[index])}”`;
const withPosition = (side, index) => `${quoted(side, index)} (position ${positionOf(side, index)})`;
// Where words of a part stand is told with each of them.
const nameOf = part ? withPosition : quoted;
const ofPart = part ? " of this part" : "";
const everyKey = !part || part.of.keys === keys.length;
const weightsOfWord = (figure, { side, index }) =>
  wordsOf(otherSide(side)).map((_, i) => (side === "queries" ? weight(figure, index, i) : weight(figure, i, index)));
const starsOf = (value) => "★".repeat(data.stars.find(([least]) => value >= least)?.[1] ?? 0);
const headName = (head) => (head === MEAN && heads > 1 ? "mean over heads" : `head ${head}`);
const fullName = (layer, head) => (layers > 1 ? `Layer ${layer}, ` : "") + headName(head);
const headAt = (number) => [Math.floor(number / choices), number % choices];
const numberOf = ({ layer, head }) => layer * choices + head;
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
    element("span", { className: "text", textContent: shown(text) }),
    ...(part ? [element("span", { className: "at", textContent: positionOf(side, index) })] : []),
    element("span", { className: "weight" }));
  const here = { side, index };
  button.addEventListener("pointerenter", () => point(here));
  button.addEventListener("pointerleave", () => point(null));
  button.addEventListener("click", () => choose(here));
  return button;
}

function makeHead(layer, head) {
  const canvas = element("canvas", { width: keys.length, height: tokens.length });
  // Enlarged, cells keep their edges; made smaller they are averaged, or single columns would be lost.
  canvas.style.imageRendering = keys.length > 40 ? "auto" : "pixelated";
  const button = element("button", { type: "button", tabIndex: -1, title: capital(fullName(layer, head)) }, canvas);
  button.setAttribute("aria-label", fullName(layer, head));
  button.addEventListener("click", (event) => {
    if (event.shiftKey) chooseBeside(numberOf({ layer, head }));
    else chooseHead(layer, head);
  });
  return button;
}

// One of a group can be reached by Tab, which changes nothing; arrow keys move within it.
function moveFocus(event, items, steps, arrived = () => {}) {
  const at = items.indexOf(event.target);
  const to = { Home: 0, End: items.length - 1 }[event.key] ?? at + steps[event.key];
  if (at < 0 || !(to in items)) return;
  event.preventDefault();
  items[at].tabIndex = -1;
  items[to].tabIndex = 0;
  items[to].focus();
  arrived(to);
}

// A figure of one head: its words, and the lines between them.
function makeFigure(id) {
  const figure = { layer: data.layer, head: data.head === "mean" ? MEAN : data.head, weights: null, buttons: {} };
  for (const part of ["figure", "title", "words", "queries", "keys", "lines"]) figure[part] = byId(part + id);
  for (const side of ["queries", "keys"]) {
    const words = wordsOf(side).map((text, i) => makeWord(side, text, i));
    figure.buttons[side] = words;
    figure[side].append(...words);
    figure[side].addEventListener("keydown", (event) =>
      moveFocus(event, words, { ArrowDown: 1, ArrowUp: -1 }, (index) => choose({ side, index })));
    words[0].tabIndex = 0;
  }
  return figure;
}

const figures = [makeFigure(""), makeFigure("-2")]; // the second is shown once it has weights
const figuresShown = () => figures.filter(({ weights }) => weights);
const headButtons = [];

function makePage() {
  const headNames = Array.from({ length: choices }, (_, i) => (i === MEAN && heads > 1 ? "mean" : String(i)));
  fillSelect(byId("layer"), Array.from({ length: layers }, (_, i) => String(i)), (i) => chooseHead(i, figures[0].head));
  fillSelect(byId("head"), headNames, (i) => chooseHead(figures[0].layer, i));
  const all = Array.from({ length: layers * choices }, (_, i) => capital(fullName(...headAt(i))));
  fillSelect(byId("beside"), ["none", ...all], (i) => chooseBeside(i - 1));
  byId("beside").parentElement.hidden = all.length === 1;
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
  byId("part").hidden = !part;
  byId("part").textContent = part && partTold();
  byId("stars-note").textContent =
    data.stars.map(([least, count]) => `${"★".repeat(count)} from ${least}`).join(", ") + ".";
}

function partTold() {
  const last = positionOf("queries", tokens.length - 1);
  return `This page holds a part of the text: ${tokens.length} of ${part.of.queries} queries, at positions `
    + `${positionOf("queries", 0)} to ${last}, and ${keys.length} of ${part.of.keys} keys, those that get most from them. `
    + "Beside each word is its position. What all other keys get counts as “other words”.";
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
    for (const { buttons } of figures) {
      for (const side of ["queries", "keys"]) {
        buttons[side].forEach((button, i) => { button.firstChild.textContent = shown(wordsOf(side)[i]); });
      }
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
  if (found === undefined) {
    for (const id of text ? ["status", "announced"] : []) byId(id).textContent = `No query${ofPart} holds “${text}”.`;
    return;
  }
  choose({ side: "queries", index: found });
  figures[0].buttons.queries[found].scrollIntoView({ block: "nearest" });
}

// --- what changes --------------------------------------------------------------------------------

function choose(word) {
  // What was chosen last wins over a pointer that rests on some word.
  if (word?.side !== state.chosen?.side) state.partner = null;
  Object.assign(state, { chosen: word, pointed: null });
  for (const { buttons } of word ? figures : []) {
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
  Object.assign(figures[0], { layer, head, weights: weightsOf(layer, head) });
  byId("layer").value = layer;
  byId("head").value = head;
  headButtons.forEach((button, i) => { button.tabIndex = i === numberOf(figures[0]) ? 0 : -1; });
  headsChanged();
}

// Shows a second head beside the first; number -1 takes it away.
function chooseBeside(number) {
  const [layer, head] = headAt(number);
  Object.assign(figures[1], number < 0 ? { weights: null } : { layer, head, weights: weightsOf(layer, head) });
  byId("beside").value = number + 1;
  figures[1].figure.hidden = number < 0;
  state.pointed = null; // for a word that goes away, a pointer no longer leaves it
  byId("columns").classList.toggle("two", number >= 0);
  headsChanged();
}

function headsChanged() {
  const pressed = figuresShown().map(numberOf);
  headButtons.forEach((button, i) => {
    button.setAttribute("aria-pressed", pressed.includes(i));
    button.classList.toggle("second", pressed[0] !== i && pressed[1] === i);
  });
  for (const figure of figures) {
    figure.title.textContent = capital(fullName(figure.layer, figure.head));
    figure.title.hidden = pressed.length < 2;
  }
  render();
  announce();
}

// All parts of the page tell of the same word: the one that is pointed at, or else the one that is chosen.
function render() {
  const word = state.pointed ?? state.chosen;
  for (const figure of figuresShown()) showWords(figure, word);
  byId("all").setAttribute("aria-pressed", !word);
  showTable(word);
  showNeuron(state.chosen && word?.side !== state.chosen.side ? state.chosen : word);
  byId("status").textContent = told(word);
  byId("threshold-told").textContent = state.threshold.toFixed(2);
  drawLines(word);
}

function showWords(figure, word) {
  const weights = word && weightsOfWord(figure, word);
  for (const side of ["queries", "keys"]) {
    figure.buttons[side].forEach((button, i) => {
      const mine = word && word.side === side;
      const share = word && !mine ? weights[i] : 0;
      button.classList.toggle("shown", Boolean(mine && word.index === i));
      button.classList.toggle("faded", Boolean(word && !(mine && word.index === i) && share < 0.05));
      button.setAttribute("aria-pressed", state.chosen?.side === side && state.chosen.index === i);
      button.style.backgroundColor = share ? `color-mix(in srgb, var(--line) ${40 * share}%, transparent)` : "";
      button.lastChild.textContent = share >= FAINT ? share.toFixed(2) : "";
    });
  }
}

// --- the table -----------------------------------------------------------------------------------

const digits = data.steps > 500 ? 3 : 2;

// Of one head, stars say how large a weight is; of two, the other one stands beside it.
function tableRow(name, position, [value, second], stars) {
  const cell = (textContent, className = "") => element("td", { textContent, className });
  const last = second === undefined ? cell(stars, "stars") : cell(second.toFixed(digits));
  return element("tr", {}, element("th", { scope: "row", textContent: name }), cell(position),
    cell(value.toFixed(digits)), last);
}

// What the table tells of: the weights of a word, or those of all words, each named.
function tableOf(word) {
  if (word) {
    const names = wordsOf(otherSide(word.side));
    const place = (i) => positionOf(otherSide(word.side), i);
    return { name: (i) => shown(names[i]), place, values: (figure) => weightsOfWord(figure, word) };
  }
  const pair = (at) => [Math.floor(at / keys.length), at % keys.length];
  return {
    name: (at) => `${shown(tokens[pair(at)[0]])} → ${shown(keys[pair(at)[1]])}`,
    place: (at) => pair(at).map((i, n) => positionOf(n ? "keys" : "queries", i)).join(" → "),
    values: (figure) => Array.from({ length: tokens.length * keys.length }, (_, at) => weight(figure, ...pair(at))),
  };
}

// The largest in any of the heads first.
function largestFirst(values) {
  const order = values[0].map((value, i) => [Math.max(...values.map((of) => of[i])), i]).sort((a, b) => b[0] - a[0]);
  return order.slice(0, LISTED).filter(([value]) => value > 0).map(([, i]) => i);
}

// The share of the keys that are not in the table.
function othersOf(figure, word, values, order) {
  const sum = (list) => list.reduce((total, value) => total + value, 0);
  return sum(values) - sum(order.map((i) => values[i])) + (data.complete ? 0 : weight(figure, word.index, keys.length));
}

function showTable(word) {
  const shownNow = figuresShown();
  const { name, place, values } = tableOf(word);
  const weights = shownNow.map(values);
  const order = largestFirst(weights);
  const rows = order.map((i) => tableRow(name(i), place(i), weights.map((of) => of[i]), starsOf(weights[0][i])));
  if (word?.side === "queries") {
    const others = shownNow.map((figure, n) => othersOf(figure, word, weights[n], order));
    if (Math.max(...others) >= 10 ** -digits) rows.push(tableRow("other words", "", others, ""));
  }
  byId("rows").replaceChildren(...rows);
  const names = shownNow.map(({ layer, head }) => capital(fullName(layer, head)));
  byId("weight-title").textContent = names.length > 1 ? names[0] : "Weight";
  byId("stars-title").textContent = names[1] ?? "Stars";
  byId("stars-note").hidden = names.length > 1;
  byId("caption").textContent = `${names.join("; ")}: ${asked(word)}`;
}

function asked(word) {
  if (!word) return `the largest weights of all words${ofPart}`;
  const name = withPosition(word.side, word.index);
  return word.side === "queries" ? `what ${name} looks at` : `which words${ofPart} look at ${name}`;
}

// --- the sentence above the figure ---------------------------------------------------------------

const told = (word) => figuresShown()
  .map((figure) => `${capital(fullName(figure.layer, figure.head))}: ${word ? finding(figure, word) : "all words"}.`).join(" ");

// To those who cannot see the page: what is chosen, and not what a pointer passes over.
function announce() {
  byId("announced").textContent = told(state.chosen);
  keepAddress();
}

function finding(figure, word) {
  const values = weightsOfWord(figure, word);
  const best = values.indexOf(Math.max(...values));
  const name = nameOf(word.side, word.index);
  const passive = word.side === "keys";
  const others = passive || data.complete ? 0 : weight(figure, word.index, keys.length);
  if (!values[best] && passive) return `no word${ofPart} looks at ${name}`;
  if (!values[best]) return `${name} looks at ${others ? "no key that is on this page" : "nothing"}`;
  const other = `${nameOf(otherSide(word.side), best)}, ${values[best].toFixed(2)}`;
  // A word that is left out of a part may have more.
  const here = part && (passive || others > values[best]) ? `, of the ${otherSide(word.side)} on this page` : "";
  return (passive ? `${name} is looked at most by ${other}` : `${name} looks most at ${other}`) + here;
}
