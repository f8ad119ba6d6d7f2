// --- drawing -------------------------------------------------------------------------------------

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The lines of the figure as it is now: ends, opacity and width, the fainter ones first.
function linesOf(word, figure = figures[0]) {
  const box = figure.words.getBoundingClientRect();
  const left = figure.queries.getBoundingClientRect().right - box.left + 2;
  const right = figure.keys.getBoundingClientRect().left - box.left - 2;
  const heights = (side) => figure.buttons[side].map((button) => {
    const place = button.getBoundingClientRect();
    return (place.top + place.bottom) / 2 - box.top;
  });
  const from = heights("queries");
  const to = heights("keys");
  const least = Math.max(FAINT, state.threshold);
  const found = [];
  for (let i = 0; i < tokens.length; i += 1) {
    const weakest = strongestOf(figure, i);
    for (let j = 0; j < keys.length; j += 1) {
      const value = weight(figure, i, j);
      if (value < Math.max(least, weakest)) continue;
      const its = !word || (word.side === "queries" ? i : j) === word.index;
      found.push({ left, right, from: from[i], to: to[j], opacity: value ** 0.6 * (its ? 1 : 0.07), width: 1 + 4 * value });
    }
  }
  return found;
}

function drawLines(word) {
  for (const figure of figuresShown()) drawFigure(figure, word);
}

function drawFigure(figure, word) {
  const canvas = figure.lines;
  const box = figure.words.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(box.width * ratio);
  canvas.height = Math.round(box.height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.strokeStyle = colour("--line");
  for (const { left, right, from, to, opacity, width } of linesOf(word, figure)) {
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
function strongestOf(figure, query) {
  if (state.strongest >= keys.length) return 0;
  const row = Array.from({ length: keys.length }, (_, key) => weight(figure, query, key)).sort((a, b) => b - a);
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
    const weights = weightsOf(...headAt(number));
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
