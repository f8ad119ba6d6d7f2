"""AttentionView in notebooks: run by nbclient, and looked at in Chromium as nbconvert writes them."""

import base64
import sys

import numpy as np
import pytest
from oracle import HANG_SECONDS

from fastattn import AttentionView

SETUP = """
import numpy as np
from fastattn import AttentionView
even = AttentionView(np.full((2, 2, 3, 3), 1 / 3), ["a", "red", "tree"])
long = AttentionView(np.eye(60), ["word"] * 60)
"""


# Once a frame is as high as its page. (Waiting by playwright's own function needs eval, which the page forbids.)
FITS = """new Promise((done) => {
    const fits = () => Math.abs(document.querySelector("main").getBoundingClientRect().height - innerHeight) < 2;
    const check = () => (fits() ? done() : requestAnimationFrame(check));
    check();
})"""


@pytest.fixture(scope="module")
def notebook():
    """A notebook that shows two views, of which one is long, as it is after it has run."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(text) for text in (SETUP, "even", "long")]
    run = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(run, kernel_name="python3", timeout=HANG_SECONDS).execute()
    return run


def output(notebook, cell):
    (shown,) = notebook.cells[cell].outputs
    return shown.data


@pytest.mark.parametrize("cell", [1, 2])
def test_each_view_is_a_page_a_picture_and_text(cell, notebook):
    data = output(notebook, cell)
    assert data["text/html"].startswith("<iframe")
    assert data["text/plain"].startswith("Head 0: " if cell == 2 else "Layer ")
    pytest.importorskip("matplotlib")
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bundle = AttentionView(np.eye(2), ["a", "b"])._repr_mimebundle_()
    assert sorted(bundle) == ["text/html", "text/plain"]


def test_the_picture_is_no_figure_of_pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    assert "image/png" in AttentionView(np.eye(2), ["a", "b"])._repr_mimebundle_()
    assert pyplot.get_fignums() == before


def test_several_views_in_a_notebook_are_sized_each_and_do_not_interfere(notebook, browser):
    nbconvert = pytest.importorskip("nbconvert")
    page = browser.new_page(viewport={"width": 800, "height": 900})
    page.set_default_timeout(1e3 * HANG_SECONDS)
    page.set_content(nbconvert.HTMLExporter(template_name="basic").from_notebook_node(notebook)[0])
    frames = page.locator("iframe")
    assert frames.count() == 2
    page.wait_for_function("[...document.querySelectorAll('iframe')].every((one) => one.style.height.endsWith('px'))")
    sizes = []
    for frame in page.frames[1:]:
        frame.wait_for_selector("tbody tr")
        frame.evaluate(FITS)
        sizes.append(frame.evaluate("innerHeight"))
    assert sizes[1] > sizes[0] + 500
    first, second = page.frames[1:]
    first.click("#queries .word >> nth=2")
    assert "“tree”" in first.inner_text("#status")
    assert "“word”" in second.inner_text("#status")


def test_a_renderer_without_scripts_shows_the_picture(notebook):
    nbconvert = pytest.importorskip("nbconvert")
    pytest.importorskip("matplotlib")
    _, resources = nbconvert.LatexExporter().from_notebook_node(notebook)
    assert sum(name.endswith(".png") for name in resources["outputs"]) == 2
