"""Draw the pictures of the documentation anew, light and dark: ``make pictures``.

Needs matplotlib, playwright with a Chromium, and the model that ``fastattn explain`` shows.
"""

import shutil
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from fastattn.explain import view_sentence
from fastattn.view import AttentionView

DOCS = Path(__file__).parent
SENTENCE = "The tiger jumped out of a tree to get a drink because it was thirsty."
INK = {"light": "#1f2328", "dark": "#e6edf3"}
# Of each mode: queries, keys, values, results; as far apart in lightness as in hue.
COLOURS = {"light": ("#0b6fb8", "#b35c00", "#4d7c0f", "#6b7280"), "dark": ("#7cc0ff", "#ffb066", "#a3d977", "#9aa4b0")}
PARTS = ("query", "key", "value", "result")

# --- the layer ------------------------------------------------------------------------------------


def draw_matrix(ax: Axes, left: float, bottom: float, shape: tuple[int, int], colour: str, name: str) -> None:
    """Draw a matrix of cells, rows upwards, with its name below."""
    rows, columns = shape
    for row, column in np.ndindex(rows, columns):
        place = left + 0.2 * column, bottom + 0.2 * row
        ax.add_patch(Rectangle(place, 0.2, 0.2, facecolor=colour, edgecolor=ax.get_facecolor(), linewidth=0.8))
    ax.text(left + 0.1 * columns, bottom - 0.12, name, ha="center", va="top", size=9)


def draw_arrow(ax: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    ink = matplotlib.rcParams["text.color"]
    ax.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=9, color=ink, linewidth=0.8))


def draw_layer(mode: str) -> pyplot.Figure:
    """Draw three words that go through two heads, whose results are put side by side and joined."""
    figure, ax = pyplot.subplots(figsize=(7.2, 5.2), layout="constrained")
    ax.set(xlim=(0, 7.2), ylim=(-0.5, 5.1), aspect="equal")
    ax.axis("off")
    colours = COLOURS[mode]
    draw_matrix(ax, 2.8, 0, (3, 8), INK[mode] + "55", "words: a row each")
    for head, left in enumerate((0.3, 4.1)):
        draw_arrow(ax, (3.6, 0.65), (left + 1.4, 1.2))
        for part in range(3):
            draw_matrix(ax, left + 1.0 * part, 1.5, (3, 4), colours[part], PARTS[part])
        ax.text(left + 1.4, 2.22, f"head {head}", ha="center", size=10, weight="bold")
        draw_arrow(ax, (left + 1.4, 2.45), (left + 1.4, 2.85))
        ax.text(left + 1.5, 2.62, "attention", va="center", size=9)
        draw_matrix(ax, left + 1.0, 3.1, (3, 4), colours[3], "")
        draw_arrow(ax, (left + 1.4, 3.75), (3.2 if head == 0 else 4.0, 4.15))
    draw_matrix(ax, 2.8, 4.25, (3, 8), colours[3], "")
    ax.text(2.7, 4.55, "side by side", ha="right", va="center", size=9)
    draw_arrow(ax, (4.5, 4.55), (5.0, 4.55))
    ax.text(5.1, 4.55, "× the matrix that joins\n= a new vector for each word", va="center", size=9)
    return figure


# --- a head, and the page -------------------------------------------------------------------------


def draw_head(view: AttentionView) -> pyplot.Figure:
    figure, ax = pyplot.subplots(figsize=(6, 5.4), layout="constrained")
    view.plot(ax, layer=3, head=1)
    return figure


def photograph(view: AttentionView) -> None:
    """Save the page as a browser shows it."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "page.html"
        view.save(page_file, title=SENTENCE, word="it", layer=3, head=1)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for mode in INK:
            page = browser.new_page(viewport={"width": 1100, "height": 1000}, color_scheme=mode)
            page.goto(page_file.as_uri())
            page.screenshot(path=DOCS / "pictures" / f"page-{mode}.png")
        browser.close()


def main() -> None:
    """Write all pictures."""
    matplotlib.use("Agg")
    # Text stays text, ids are the same each time, and nothing tells the date.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastattn"})
    view = view_sentence(SENTENCE)
    for mode, ink in INK.items():
        names = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
        with matplotlib.rc_context(dict.fromkeys(names, ink)):
            for name, figure in (("heads", draw_layer(mode)), ("head", draw_head(view))):
                path = DOCS / "pictures" / f"{name}-{mode}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
                if (name, mode) == ("head", "light"):  # for the README, on pages whose ground may be either
                    figure.savefig(DOCS / "head.png", dpi=110, facecolor="white", metadata={"Software": None})
                pyplot.close(figure)
    photograph(view)


if __name__ == "__main__":
    main()
