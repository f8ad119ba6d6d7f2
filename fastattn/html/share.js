// --- pictures of the figure ----------------------------------------------------------------------

const escaped = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function curvesOf(figure) {
  return linesOf(state.chosen, figure).map(({ left, right, from, to, opacity, width }) => {
    const middle = (left + right) / 2;
    return `<path d="M${left} ${from}C${middle} ${from} ${middle} ${to} ${right} ${to}" stroke-opacity="${opacity.toFixed(3)}"`
      + ` stroke-width="${width.toFixed(2)}"/>`;
  }).join("");
}

function wordsAsSvg(figure, side) {
  const box = figure.words.getBoundingClientRect();
  const { chosen } = state;
  return figure.buttons[side].map((button, i) => {
    const place = button.getBoundingClientRect();
    const end = side === "queries";
    const x = (end ? place.right : place.left) - box.left + (end ? -8 : 8);
    const mark = chosen?.side === side && chosen.index === i ? ` fill="${colour("--mark")}" font-weight="600"` : "";
    return `<text x="${x}" y="${(place.top + place.bottom) / 2 - box.top}" text-anchor="${end ? "end" : "start"}"${mark}>`
      + `${escaped(part ? placed(side, i) : shown(wordsOf(side)[i]))}</text>`;
  }).join("");
}

// The heads that are shown, where they are on the page, each below a sentence.
function figureAsSvg() {
  const all = byId("pair").getBoundingClientRect();
  const groups = figuresShown().map((figure) => {
    const box = figure.words.getBoundingClientRect();
    const title = `${capital(fullName(figure.layer, figure.head))}: ${state.chosen ? finding(figure, state.chosen) : "all words"}.`;
    return `<g transform="translate(${box.left - all.left} ${box.top - all.top + 28})" dominant-baseline="central">`
      + `<text x="8" y="-14">${escaped(title)}</text><g fill="none" stroke="${colour("--line")}">${curvesOf(figure)}</g>`
      + `${wordsAsSvg(figure, "queries")}${wordsAsSvg(figure, "keys")}</g>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${Math.ceil(all.width)}" height="${Math.ceil(all.height) + 28}"`
    + ` font-family="sans-serif" font-size="15" fill="${colour("--ink")}">`
    + `<rect width="100%" height="100%" fill="${colour("--ground")}"/>${groups.join("")}</svg>`;
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

const headInAddress = ({ head }) => (head === MEAN && heads > 1 ? "mean" : head);

function toAddress() {
  const { chosen, threshold, strongest } = state;
  const [first, second] = figures;
  const parts = { layer: first.layer, head: headInAddress(first) };
  if (second.weights) parts.beside = `${second.layer}.${headInAddress(second)}`;
  if (chosen) parts[chosen.side === "queries" ? "query" : "key"] = positionOf(chosen.side, chosen.index);
  else parts.query = "all";
  if (threshold) parts.threshold = threshold;
  if (strongest !== Infinity) parts.strongest = strongest;
  return `#${new URLSearchParams(parts)}`;
}

function keepAddress() {
  // Where a page has no address of its own, as in a frame of a notebook, there is nothing to share.
  if (location.protocol !== "about:") history.replaceState(null, "", toAddress());
}

// Takes over what the address says, of what there is; all else is as the page was saved. Returns the number of the head
// that is to stand beside the first, or -1.
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (text, size) => (/^\d+$/.test(text) && Number(text) < size ? Number(text) : undefined);
  const headOf = (text) => (text === "mean" && heads > 1 ? MEAN : number(text, heads));
  const [first] = figures;
  first.layer = number(asked.get("layer"), layers) ?? first.layer;
  first.head = headOf(asked.get("head")) ?? first.head;
  let beside = -1;
  const [layer, head] = (asked.get("beside") ?? "").split(".");
  if (number(layer, layers) !== undefined && headOf(head) !== undefined) beside = numberOf({ layer: Number(layer), head: headOf(head) });
  if (asked.get("query") === "all") state.chosen = null;
  for (const [side, name] of [["queries", "query"], ["keys", "key"]]) {
    const index = wordsOf(side).findIndex((_, i) => String(positionOf(side, i)) === asked.get(name));
    if (index >= 0) state.chosen = { side, index };
  }
  const threshold = Number(asked.get("threshold"));
  if (threshold > 0 && threshold <= 0.5) state.threshold = threshold;
  state.strongest = STRONGEST.find((count) => String(count) === asked.get("strongest")) ?? Infinity;
  byId("threshold").value = state.threshold;
  byId("strongest").value = STRONGEST.indexOf(state.strongest);
  return beside;
}
