"""The page by the accessibility rules of axe-core, which npm fetches."""

import shutil
import subprocess
import tarfile

import pytest
from oracle import HANG_SECONDS, make_rng

from fastattn import AttentionView, attention


def view_of(count):
    """A view of two heads, with their queries and keys."""
    queries, keys = make_rng().standard_normal((2, 2, count, 16))
    _, weights = attention(queries, keys, keys, return_weights=True)
    return AttentionView(weights, ["[CLS]", "tiger", "it", "ran"] * (count // 4), queries=queries, keys=keys)


VIEWS = {
    "words": "() => {}",
    "a part": "() => {}",
    "all words": "() => document.getElementById('all').click()",
    "two heads": "() => chooseBeside(1)",
    "dimensions": "() => { document.querySelector('details').open = true; }",
    "mean": "() => chooseHead(0, MEAN)",
}


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axe")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm, which fetches axe-core")
    fetched = subprocess.run([npm, "pack", "axe-core@4"], cwd=folder, capture_output=True, timeout=HANG_SECONDS)
    if fetched.returncode:
        pytest.skip("npm cannot fetch axe-core")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as files:
        return files.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_no_rule_is_violated(width, scheme, view, axe, browser, tmp_path):
    page_file = tmp_path / "page.html"
    view_of(1600 if view == "a part" else 4).save(page_file, word=2)
    # What is changing has not yet the colours that are meant.
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
    page.goto(page_file.as_uri())
    page.evaluate(axe)
    page.evaluate(VIEWS[view])
    found = page.evaluate("axe.run()")
    page.close()
    assert len(found["passes"]) > 10
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []
