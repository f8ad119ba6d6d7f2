"""Sphinx: the guide's pages, and a page for every public object from its docstring. Built by ``make docs``."""

import inspect
from pathlib import Path
from typing import Any

from docutils.nodes import Element, TextElement, document, entry, table
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import fastattn

project = "fastattn"
author = "fastattn developers"
copyright = author
version = release = fastattn.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_parser"]
# Other libraries, each with a page of its own.
ADAPTERS = ["torch", "transformers", "jax", "onnx", "dask", "mpi", "scale"]

# Whose objects are described without them, wherever the pages are built.
autodoc_mock_imports = ["torch", "transformers", "jax", "onnx", "dask", "mpi4py"]

templates_path = ["_templates"]
exclude_patterns = ["_templates"]
nitpicky = True
# A parameter that is called as a module is.
nitpick_ignore = [("py:obj", "cache")]
# Other libraries' names are found, as they are mocked, but have no page here.
nitpick_ignore_regex = [("py:obj", rf"({'|'.join(autodoc_mock_imports)})\..*")]

# In docstrings a name in single backticks is a link where it names something public, and emphasised where it does not.
default_role = "autolink"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "attrs_inline"]

html_theme = "pydata_sphinx_theme"
html_title = "fastattn"
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["fastattn.css"]
html_theme_options: dict[str, Any] = {
    "github_url": "https://github.com/fastattn/fastattn",
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}


def shown_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Leave types out of signatures: the entries of the parameters say them in words."""
    if what not in ("function", "method", "class") or thing is fastattn.attention:
        return None
    try:
        whole = inspect.signature(thing)
    except (TypeError, ValueError):
        return None
    parameters = [p.replace(annotation=p.empty) for p in whole.parameters.values() if p.name != "self"]
    return str(whole.replace(parameters=parameters, return_annotation=whole.empty)), None


def exported(app: Sphinx, env: BuildEnvironment, node: Element, content: TextElement) -> Element | None:
    """Find a name that a docstring of another module gives as `fastattn` exports it."""
    if node.get("refdomain") != "py":
        return None
    name = f"fastattn.{node['reftarget']}"
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)


def list_adapters(app: Sphinx, name: str, content: list[str]) -> None:
    """List the adapters' pages that there are; of a pattern that matches nothing, Sphinx warns."""
    names = [f"../{page}" for page in ADAPTERS if (Path(app.srcdir) / f"{page}.md").exists()]
    if name == "guide/index" and names:
        content[0] += "\n".join(["", "Other libraries:", "", "```{toctree}", ":maxdepth: 1", "", *names, "```", ""])


def mark_prose(app: Sphinx, tree: document) -> None:
    """Tell tables of sentences, whose cells may be broken into lines, from tables of figures."""
    for each in tree.findall(table):
        if max(len(cell.astext()) for cell in each.findall(entry)) > 40:
            each["classes"].append("prose")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", shown_signature)
    app.connect("missing-reference", exported)
    app.connect("source-read", list_adapters)
    app.connect("doctree-read", mark_prose)
