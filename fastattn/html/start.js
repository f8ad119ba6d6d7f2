// --- the start, once all parts of the script are there --------------------------------------------

makePage();
makePictures();
makeNeuron();
drawHeads();
const beside = fromAddress();
chooseHead(figures[0].layer, figures[0].head);
chooseBeside(beside);
choose(state.chosen);
new ResizeObserver(() => drawLines(state.pointed ?? state.chosen)).observe(byId("pair"));
dark.addEventListener("change", () => {
  drawHeads();
  render();
});
// An address that is pasted into an open page; the page's own changes of it raise no event.
addEventListener("hashchange", () => location.reload());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") choose(null);
});

// In a frame of a notebook: the height is told to whoever holds the frame, when asked and whenever it changes.
if (parent !== window) {
  const tellHeight = () => parent.postMessage({ pageHeight: Math.ceil(document.documentElement.getBoundingClientRect().height) }, "*");
  addEventListener("message", (event) => {
    if (event.source === parent) tellHeight();
  });
  new ResizeObserver(tellHeight).observe(document.documentElement);
}
