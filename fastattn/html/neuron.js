// --- how a weight comes about: for layers that were given with their queries and keys ---------------

const vectors = data.vectors && { queries: decodeVectors(data.vectors.queries), keys: decodeVectors(data.vectors.keys) };
const fixed = (value) => value.toFixed(2).replace(/^-(0\.00)$/, "$1");

// Each vector is bytes, and how much 127 of them stands for: see coded_vectors in _page.py.
function decodeVectors({ largest, scales, code }) {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const pairs = bytes(scales);
  const scale = Float32Array.from({ length: pairs.length / 2 }, (_, i) =>
    (largest * (pairs[2 * i] + 256 * pairs[2 * i + 1])) / (65535 * 127));
  return { scale, steps: new Int8Array(bytes(code).buffer) };
}

// Heads may share keys: then several heads in a row have the same.
function vectorOf(side, { layer, head }, index) {
  const { scale, steps } = vectors[side];
  const count = wordsOf(side).length;
  const sharing = Math.floor((layers * heads * count) / scale.length);
  const at = (layer * (heads / sharing) + Math.floor(head / sharing)) * count + index;
  const size = steps.length / scale.length;
  return Array.from(steps.subarray(at * size, (at + 1) * size), (step) => step * scale[at]);
}

const total = (values) => values.reduce((sum, value) => sum + value, 0);
const productOf = (query, key) => query.map((value, d) => value * key[d]);

const isBehind = (query, key) => positionOf("keys", key) > positionOf("queries", query);

// A head that gives no query a key behind it is taken for causal; of a part of the keys that cannot be said.
function isCausal(figure) {
  return everyKey && tokens.length > 1 && tokens.every((_, i) => keys.every((__, j) => !isBehind(i, j) || !weight(figure, i, j)));
}

// The steps from a query and a key to a weight, by queries and keys alone.
function stepsOf(figure, query, key) {
  const asking = vectorOf("queries", figure, query);
  const root = Math.sqrt(asking.length);
  const causal = isCausal(figure);
  const scores = keys.map((_, j) =>
    (causal && isBehind(query, j) ? -Infinity : total(productOf(asking, vectorOf("keys", figure, j))) / root));
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - largest));
  const answering = vectorOf("keys", figure, key);
  return {
    rows: { query: asking, key: answering, product: productOf(asking, answering) },
    score: scores[key],
    largest,
    power: powers[key],
    powers: total(powers),
  };
}

// The pair: of the word that is shown, and the one that was chosen for it, or else the strongest.
function pairOf(word) {
  const values = weightsOfWord(figures[0], word);
  const other = state.partner ?? values.indexOf(Math.max(...values));
  return word.side === "queries" ? [word.index, other] : [other, word.index];
}

function stepsTold({ rows, score, largest, power, powers }, query, key) {
  const given = weight(figures[0], query, key);
  if (score === -Infinity) return [["This key comes after the query: it is masked", "0"]];
  const computed = power / powers;
  const scored = [
    ["Sum of the products", fixed(total(rows.product))],
    [`… divided by √${rows.query.length}: the score`, fixed(score)],
  ];
  // A weight that was not listed is 0 here, and not known.
  const isKnown = given > 0 || data.complete;
  if (!everyKey) {
    return [...scored, ["The weight needs the scores of all keys, of which this page holds a part; it was given as",
      isKnown ? given.toFixed(3) : "next to nothing, or not at all"]];
  }
  const steps = [
    ...scored,
    [`… less the largest score of this query, ${fixed(largest)}`, fixed(score - largest)],
    ["… e to that", power.toPrecision(3)],
    [`… divided by the sum over all keys, ${powers.toPrecision(3)}: the weight`, computed.toFixed(3)],
  ];
  if (isKnown && Math.abs(computed - given) > 0.02) {
    steps.push(["The weight that was given differs: by a mask, a bias or another scale", given.toFixed(3)]);
  }
  return steps;
}

function showNeuron(word) {
  if (!vectors) return;
  const figure = figures[0];
  const tellable = word && figure.head !== MEAN;
  byId("neuron-parts").hidden = !tellable;
  byId("neuron-none").hidden = Boolean(tellable);
  if (!tellable) return;
  const [query, key] = pairOf(word);
  const steps = stepsOf(figure, query, key);
  byId("neuron-title").textContent = `${capital(fullName(figure.layer, figure.head))}: the weight that ${nameOf("queries", query)} `
    + `gives ${nameOf("keys", key)}`;
  byId("steps").replaceChildren(...stepsTold(steps, query, key).map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: value }))));
  showPartner(word);
  showDimensions(steps.rows);
  drawBars(steps.rows);
}

function showPartner({ side }) {
  const names = wordsOf(otherSide(side)).map((_, i) => placed(otherSide(side), i));
  byId("partner-side").textContent = side === "queries" ? "Key" : "Query";
  const options = ["the strongest", ...names].map((textContent, i) => element("option", { value: i - 1, textContent }));
  if (byId("partner").dataset.names !== names.join()) byId("partner").replaceChildren(...options);
  byId("partner").dataset.names = names.join();
  byId("partner").value = state.partner ?? -1;
}

function showDimensions(rows) {
  if (!byId("dimensions").parentElement.parentElement.open) return;
  byId("dimensions").replaceChildren(...rows.query.map((_, d) => element("tr", {},
    element("th", { scope: "row", textContent: d }),
    ...["query", "key", "product"].map((name) => element("td", { textContent: fixed(rows[name][d]) })))));
}

// A bar for each dimension: up and blue where it is above 0, down and orange where it is below.
function drawBars(rows) {
  for (const name of ["query", "key", "product"]) {
    const canvas = byId(`bars-${name}`);
    const box = canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    Object.assign(canvas, { width: Math.round(box.width * ratio), height: Math.round(box.height * ratio) });
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const values = rows[name];
    const largest = Math.max(...values.map(Math.abs)) || 1;
    const step = box.width / values.length;
    pen.fillStyle = colour("--rule");
    pen.fillRect(0, box.height / 2 - 0.5, box.width, 1);
    values.forEach((value, d) => {
      const height = (value / largest) * (box.height / 2 - 1);
      pen.fillStyle = colour(value < 0 ? "--mark" : "--line");
      pen.fillRect(d * step + step / 10, box.height / 2 - Math.max(height, 0), step * 0.8, Math.abs(height));
    });
    canvas.setAttribute("aria-label", `${capital(name)}: ${values.length} dimensions, from `
      + `${fixed(Math.min(...values))} to ${fixed(Math.max(...values))}`);
  }
}

function makeNeuron() {
  byId("neuron").hidden = !vectors;
  if (!vectors) return;
  const again = () => showNeuron(state.pointed ?? state.chosen);
  byId("partner").addEventListener("change", (event) => {
    const at = Number(event.target.value);
    state.partner = at < 0 ? null : at;
    again();
  });
  byId("dimensions").parentElement.parentElement.addEventListener("toggle", again);
  new ResizeObserver(again).observe(byId("neuron"));
  byId("precision").textContent += " Each query and key is rounded to 127ths of its largest component, so that scores"
    + " may be off in the second decimal, and weights that are computed from them in the third.";
}
