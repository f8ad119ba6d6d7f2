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
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") choose(null);
});
