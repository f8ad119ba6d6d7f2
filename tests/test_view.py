"""Attention weights to look at: what the table, the figures, the page and the plot say, against known answers."""

import html
import importlib.resources
import re
import sys
import types

import numpy as np
import pytest
from oracle import make_rng
from pages import data_of, decoded, saved

import fastattn
from fastattn import AttentionView
from fastattn._page import SCRIPTS

TOKENS = ["[CLS]", "the", "tiger", "it"]
# Head (0, 0) looks ahead; (0, 1) is certain of a special token; (1, 0) of the word itself; (1, 1) takes "it" for
# "tiger".
WEIGHTS = np.array(
    [
        [
            [[0, 1, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]],
            [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]],
        ],
        [
            [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
            [[0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0], [0.05, 0.05, 0.85, 0.05]],
        ],
    ]
)
NASTY = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\"quoted'", "&amp;", "<!--", "\n", "é"]


def view_of(weights=WEIGHTS, tokens=TOKENS, **keywords):
    return AttentionView(weights, tokens, **keywords)


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


# --- the table ------------------------------------------------------------------------------------


def test_print_shows_the_most_certain_head():
    assert str(view_of()) == (
        'Layer 1, head 1: "it" attends to\n'
        "  tiger  0.850  *****\n"
        "  [CLS]  0.050  *\n"
        "  the    0.050  *\n"
        "  it     0.050  *"
    )
    assert repr(view_of()) == "<AttentionView: layers=2, heads=2, queries=4, keys=4>"


def test_table_of_a_head_by_number():
    expected = 'Layer 0, head 0: "the" attends to\n  tiger  0.750  *****\n  the    0.250  ***'
    assert view_of().table("the", layer=0, head=0) == expected
    assert view_of().table(1, layer=0, head=0) == expected


def test_table_of_the_mean():
    assert view_of().table("it", layer=1, head="mean", count=1) == (
        'Layer 1, mean over heads: "it" attends to\n  it          0.525  *****\n  other keys  0.475'
    )
    assert view_of().table("tiger", head="mean", count=9).splitlines() == [
        'Mean over all layers and heads: "tiger" attends to',
        "  tiger  0.438  ***",
        "  [CLS]  0.375  ***",
        "  it     0.125  ***",
        "  the    0.062  *",
    ]


@pytest.mark.parametrize(
    ("weight", "count"), [(0.0078125, 0), (0.0234375, 1), (0.09375, 1), (0.125, 3), (0.4375, 3), (0.5, 5), (1.0, 5)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stars(weight, count, dtype):
    view = view_of(np.array([[weight, 1 - weight], [1, 0]], dtype), ["a", "b"])
    row = next(line for line in view.table("a", head=0).splitlines() if line.startswith("  a"))
    assert row.split()[2:] == ["*" * count] * (count > 0)


def test_first_occurrence_of_a_word():
    view = view_of(np.eye(3), ["a", "b", "a"])
    assert view.table("a", head=0) == 'Head 0: "a" attends to\n  a  1.000  *****'
    assert view.most_certain("a").query == 0


def test_query_without_keys():
    assert view_of().table("[CLS]", layer=1, head=1) == 'Layer 1, head 1: "[CLS]" attends to\n  nothing'


def test_table_keeps_to_its_lines():
    text = view_of(np.eye(3), ["\n", "\x1b[31m", " "]).table(0, head=0)
    assert text == "Head 0: \"'\\n'\" attends to\n  '\\n'  1.000  *****"


# --- the most certain head ------------------------------------------------------------------------


def test_most_certain_passes_over_what_a_head_does_by_position():
    tokens = ["a", "b", "c", "d", "e", "f"]
    weights = np.full((2, 6, 6), 0.02)
    weights[0] += 0.88 * np.roll(np.eye(6), -1, axis=0)  # the word after, whichever it is
    weights[1] += 0.88 / 6
    weights[1, 4] = [0.02, 0.7, 0.02, 0.22, 0.02, 0.02]
    view = fastattn.AttentionView(weights, tokens)
    assert view.most_certain("e") == (0, 1, 4, 1, 0.7)
    # Where there is nothing else to tell, it counts.
    assert fastattn.AttentionView(np.roll(np.eye(6), -1, axis=0), tokens).most_certain("e") == (0, 0, 4, 5, 1.0)


def test_most_certain_leaves_out_special_tokens_and_the_word_itself():
    assert view_of().most_certain("it") == (1, 1, 3, 2, 0.85)
    assert view_of().most_certain() == (1, 1, 3, 2, 0.85)
    assert view_of().most_certain("the") == (0, 0, 1, 2, 0.75)
    assert view_of().most_certain("it", layer=0) == (0, 0, 3, 1, 0.25)
    assert view_of(special_tokens=()).most_certain("it") == (0, 1, 3, 0, 1.0)


def test_most_certain_where_all_tokens_are_special():
    assert view_of(np.eye(2), ["[CLS]", "[SEP]"]).most_certain() == (0, 0, 0, 0, 1.0)


def test_most_certain_of_cross_attention_counts_the_same_position():
    view = view_of(np.array([[0.9, 0.1, 0.0]]), ["one"], key_tokens=["un", "deux", "trois"])
    assert view.most_certain() == (0, 0, 0, 0, 0.9)
    assert view.table() == 'Head 0: "one" attends to\n  un    0.900  *****\n  deux  0.100  ***'


# --- figures of heads -----------------------------------------------------------------------------


def test_figures_of_heads():
    figures = np.array([summary[2:] for summary in view_of().heads()])
    quarters = 0.75 * np.log2(4 / 3) + 0.25 * 2
    certain = -(3 * 0.05 * np.log2(0.05) + 0.85 * np.log2(0.85))
    expected = [
        [(0 + quarters + 1 + 2) / 4, (1 + 0.75 + 0.5 + 1.5) / 4, (1 + 1 + 1 + 0.5) / 4, 0.25 / 4],
        [0, (0 + 1 + 2 + 3) / 4, (1 + 1 + 0 + 0) / 4, 1],
        [0, 0, 1, 0.25],
        # The first query sees no key: the mean is over three.
        [(1 + 1.5 + certain) / 3, (0.5 + 1.25 + 1.1) / 3, (1 + 0.5 + 0.9) / 3, (0.5 + 0.5 + 0.05) / 3],
    ]
    assert np.allclose(figures, expected, rtol=0, atol=1e-12)
    assert [summary[:2] for summary in view_of().heads()] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def shown_by_ipython(x):
    """Return what IPython prints of an object, and check that print does alike."""
    printed = []
    printer = types.SimpleNamespace(text=printed.append)
    x._repr_pretty_(printer, cycle=False)
    assert printed == [str(x)]
    return printed[0]


def test_heads_as_text():
    lines = shown_by_ipython(view_of().heads()).splitlines()
    assert lines[0] == "layer  head  entropy (bits)  distance  diagonal  special"
    assert lines[2].split() == ["0", "1", "0.00", "1.50", "0.50", "1.00"]
    assert len(lines) == 5


def test_figures_of_cross_attention():
    (summary,) = view_of(np.array([[0.5, 0.5]]), ["one"], key_tokens=["un", "</s>"]).heads()
    assert summary.entropy == 1
    assert summary.special == 0.5
    assert np.isnan([summary.distance, summary.diagonal]).all()


# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_of_attention_are_accepted(dtype):
    query, key, value = make_rng().standard_normal((3, 4, 300, 16)).astype(dtype)
    _, weights = fastattn.attention(3 * query, key, value, causal=True, query_offset=-1, return_weights=True)
    assert view_of(weights, [str(i) for i in range(300)]).table(0, head=0).endswith("nothing")


def test_bfloat16_is_accepted():
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    weights = softmax(make_rng().standard_normal((2, 50, 50))).astype(dtype)
    assert view_of(weights, ["a"] * 50).heads()[0].entropy > 1


def test_the_view_keeps_a_copy():
    weights = np.eye(2)
    view = view_of(weights, ["a", "b"])
    weights[:] = np.nan
    assert view.most_certain("a").weight == 0


@pytest.mark.parametrize("tokens", [5, None])
def test_tokens_must_be_str(tokens):
    with pytest.raises(TypeError, match=r"tokens\[1\] must be a str, not 7"):
        view_of(np.eye(2), ["a", 7])
    with pytest.raises(TypeError, match="not the one str 'ab'"):
        view_of(np.eye(2), "ab")
    with pytest.raises(TypeError, match=f"tokens must be a sequence of str, one for each token, not {tokens}"):
        view_of(np.eye(2), tokens)
    with pytest.raises(TypeError, match=r"key_tokens\[0\] must be a str, not None"):
        view_of(np.eye(2), ["a", "b"], key_tokens=[None, "b"])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.eye(2), "Sk is 2, but tokens are 4"),
        (np.eye(4)[:3], "Sq is 3, but tokens are 4"),
        (np.ones(4), r"shape \(4,\); accepted are \(Sq, Sk\)"),
        (np.zeros((1, 1, 1, 1, 4, 4)), r"shape \(1, 1, 1, 1, 4, 4\); accepted are [^;]*$"),
        (np.zeros((6, 1, 2, 4, 4)), r"batch, give one item, as weights\[:, 0\], or as \[layer\[0\] for layer in w"),
        ([np.zeros((1, 2, 4, 4))] * 6, r"shape \(6, 1, 2, 4, 4\); .*batch, give one item"),
        (np.zeros((0, 4, 4)), "at least one of everything"),
        (WEIGHTS * 0.5, r"weights\[0, 0, 0\] sums to 0.5; a row must sum to 1, or 0 where no key is seen"),
        (WEIGHTS * [[1], [1.1], [1], [1]], r"weights\[0, 0, 1\] sums to 1.1;"),
        (np.where(WEIGHTS == 0.85, np.nan, WEIGHTS), r"weights\[1, 1, 3, 2\] is nan"),
        (WEIGHTS - np.array([0, 0, 0.5, -0.5]), r"weights\[0, 0, 0, 2\] is -0.5; weights must be 0 or more"),
    ],
)
def test_weights_that_are_not_accepted(weights, words):
    with pytest.raises(ValueError, match=words):
        view_of(weights)


def test_dtypes_that_are_not_accepted():
    with pytest.raises(TypeError, match="weights has dtype int64; accepted are float32, float64, float16, bfloat16"):
        view_of(np.eye(4, dtype=np.int64))


HALF = ["float16", "bfloat16"]


def rounded_softmax(half, num_keys, seed=0):
    """Rows of few and of many keys that count, rounded to a half type."""
    scores = make_rng(seed).standard_normal((200, num_keys)) * np.geomspace(0.1, 8, 200)[:, None]
    return softmax(scores).astype(half)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("to", ["float16", "float32", "float64"])
@pytest.mark.parametrize("num_keys", [2, 7, 64, 1000, 20000])
def test_half_weights_may_be_cast(half, to, num_keys):
    half = pytest.importorskip("ml_dtypes").bfloat16 if half == "bfloat16" else np.dtype(half)
    weights = rounded_softmax(half, num_keys).astype(to)
    view_of(weights, ["a"] * 200, key_tokens=["b"] * num_keys)


@pytest.mark.parametrize("half", HALF)
def test_a_softmax_whose_steps_are_all_rounded(half):
    half = pytest.importorskip("ml_dtypes").bfloat16 if half == "bfloat16" else np.dtype(half)
    scores = make_rng().standard_normal((200, 300)).astype(half)
    powers = np.exp(scores.astype(np.float32)).astype(half).astype(np.float32)
    weights = (powers / powers.sum(axis=-1, keepdims=True).astype(half).astype(np.float32)).astype(half)
    view_of(weights.astype(np.float32), ["a"] * 200, key_tokens=["b"] * 300)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_half_weights_that_are_no_distribution(half, factor):
    half = pytest.importorskip("ml_dtypes").bfloat16 if half == "bfloat16" else np.dtype(half)
    weights = (softmax(make_rng().standard_normal((50, 64))) * factor).astype(half).astype(np.float32)
    with pytest.raises(ValueError, match="a row must sum to 1"):
        view_of(weights, ["a"] * 50, key_tokens=["b"] * 64)


@pytest.mark.parametrize("factor", [0.9995, 1.0005])
def test_weights_of_full_precision_are_held_to_it(factor):
    """What half weights may do is not granted to all."""
    weights = (softmax(make_rng(1).standard_normal((50, 64))) * factor).astype(np.float32)
    with pytest.raises(ValueError, match=r"weights\[0\] sums to (0\.999|1\.000).*a row must sum to 1"):
        view_of(weights, ["a"] * 50, key_tokens=["b"] * 64)


def test_tolerance_follows_the_dtype():
    rounded = np.full((1, 3), 1 / 3, np.float16)
    assert float(rounded.sum(dtype=np.float64)) != 1
    view_of(rounded, ["a"], key_tokens=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"sums to 0\.999"):
        view_of(rounded.astype(np.float64) * 0.9995, ["a"], key_tokens=["a", "b", "c"])


def test_case_is_not_minded_where_no_token_is_spelled_so():
    view = view_of(np.eye(4), ["The", "tiger", "the", "Tree"])
    chosen = {"the": 2, "The": 0, "THE": 0, "tree": 3}
    assert {word: view.most_certain(word).query for word in chosen} == chosen


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"word": "lion"}, ValueError, "word is 'lion', which is none of the tokens"),
        ({"word": 4}, ValueError, "word must be from 0 to 3, but is 4"),
        ({"word": 1.0}, TypeError, "word must be an int"),
        ({"layer": 2}, ValueError, "layer must be from 0 to 1, but is 2"),
        ({"head": 2, "layer": 0}, ValueError, "head must be from 0 to 1, but is 2"),
        ({"head": 0}, ValueError, "layer must be given with head 0: there are 2 layers"),
        ({"head": "best"}, ValueError, 'head must be an int, "mean" or "certain", not \'best\''),
        ({"head": None}, TypeError, "head must be an int"),
        ({"count": 0}, ValueError, "count must be at least 1"),
    ],
)
def test_choices_that_are_not_accepted(keywords, error, words):
    with pytest.raises(error, match=words):
        view_of().table(**keywords)


# --- from the top keys ----------------------------------------------------------------------------


def top_view(k, causal=True):
    query, key, value = make_rng().standard_normal((3, 2, 3, 20, 8))
    tokens = ["[CLS]", *(f"word{i}" for i in range(19))]
    _, weights = fastattn.attention(query, key, value, causal=causal, return_weights=True)
    sparse = AttentionView.from_top_keys(*fastattn.top_keys(query, key, k, causal=causal), tokens)
    return sparse, AttentionView(weights, tokens)


def test_all_keys_from_top_keys_are_the_full_view():
    sparse, full = top_view(k=20)
    assert sparse.table(count=20) == full.table(count=20)
    assert sparse.table(7, head="mean", count=20) == full.table(7, head="mean", count=20)
    assert np.allclose(sparse.heads(), full.heads(), rtol=0, atol=1e-12)


def test_some_keys_from_top_keys(tmp_path):
    sparse, full = top_view(k=3)
    assert sparse.most_certain("word9") == pytest.approx(full.most_certain("word9"))
    assert sparse.table("word9", count=3) == full.table("word9", count=3)
    for some, every in zip(sparse.heads(), full.heads(), strict=True):
        assert all(a <= b + 1e-12 for a, b in zip(some, every, strict=True))
    weights = decoded(data_of(saved(sparse, tmp_path)))
    assert np.allclose(weights.sum(axis=-1), 1, rtol=0, atol=21 / 2 / 4095)
    assert weights[..., -1].max() > 0.1


def test_a_sink_is_shown_as_a_key_and_not_as_other_keys():
    query, key, value = make_rng().standard_normal((3, 2, 6, 8))
    sinks = np.array([1.0, 2.0])
    tokens = ["a", "b", "c", "d", "e", "f"]
    indices, weights = fastattn.top_keys(query, key, 6, causal=True, sinks=sinks)
    for k in (6, 3):  # of three, the first rows list all keys that they see
        some = fastattn.top_keys(query, key, k, causal=True, sinks=sinks)
        with pytest.raises(ValueError, match=r"weights\[0, 0\] sums to .* give a sink's share as one more key"):
            AttentionView.from_top_keys(*some, tokens)
    _, lse = fastattn.attention(query, key, value, causal=True, sinks=sinks, return_lse=True)
    share = np.exp(sinks[:, None] - lse)
    indices = np.concatenate([indices, np.full((2, 6, 1), 6)], axis=-1)
    weights = np.concatenate([weights, share[..., None]], axis=-1)
    view = AttentionView.from_top_keys(indices, weights, tokens, key_tokens=[*tokens, "sink"])
    table = view.table("a", head=1)
    assert f"sink  {share[1, 0]:.3f}" in table
    assert "other keys" not in table


def test_long_sequences_are_not_made_dense(tmp_path):
    size = 200_000  # whose square would be 320 GB
    keys = np.arange(size)[:, None]
    view = AttentionView.from_top_keys(keys, np.full((size, 1), 0.5, np.float32), ["a"] * size)
    assert view.table(5) == 'Head 0: "a" attends to\n  a           0.500  *****\n  other keys  0.500'
    assert view.heads()[0][2:] == (1, 0, 0.5, 0)
    assert data_of(saved(view, tmp_path, word=5))["part"]["of"] == {"queries": size, "keys": size}
    with pytest.raises(ValueError, match="tokens are 200000; at most 1024 can be drawn"):
        view.plot()


@pytest.mark.parametrize(
    ("indices", "weights", "error", "words"),
    [
        ([[0, 4]], [[0.5, 0.5]], ValueError, "indices must be from -1 to 1, but are 0 to 4"),
        ([[0, -1]], [[0.5, 0.5]], ValueError, "weights must be 0 where indices are -1"),
        ([[1, 1]], [[0.5, 0.5]], ValueError, "at most once"),
        ([[0, 1]], [[0.5, 0.6]], ValueError, r"weights\[0\] sums to 1.1; a row must sum to at most 1"),
        ([[0]], [[0.5, 0.5]], ValueError, r"have \(1, 1\) and \(1, 2\)"),
        ([[0.0, 1.0]], [[0.5, 0.5]], TypeError, "indices has dtype float64"),
    ],
)
def test_top_keys_that_are_not_accepted(indices, weights, error, words):
    with pytest.raises(error, match=words):
        AttentionView.from_top_keys(indices, weights, ["a"], key_tokens=["a", "b"])


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_one_file_without_links(tmp_path):
    page = saved(view_of(), tmp_path, title="A tiger")
    assert "<title>A tiger</title>" in page
    # The name of SVG's namespace is no address that a browser would ask.
    links = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest", links)
    assert re.findall(r'(?:src|href)="(.*?)"', page) == ["data:,"]
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_the_page_shows_first(tmp_path):
    first = [data_of(saved(view_of(), tmp_path, **choice)) for choice in ({}, {"word": "the", "layer": 1, "head": 0})]
    assert [(data["layer"], data["head"], data["query"]) for data in first] == [(1, 1, 3), (1, 0, 1)]
    mean = data_of(saved(view_of(), tmp_path, head="mean"))
    assert (mean["layer"], mean["head"]) == (1, "mean")


def test_nothing_in_tokens_or_title_is_markup(tmp_path):
    view = view_of(np.eye(len(NASTY)), NASTY)
    page = saved(view, tmp_path, title="</title><script>alert(3)</script>")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page.split('id="data">')[1].split("</script>")[0]
    assert data_of(page)["tokens"] == [*NASTY[:5], "'\\n'", "é"]


def test_placeholders_in_tokens_stay_text(tmp_path):
    assert data_of(saved(view_of(np.eye(2), ["$script", "${title}"]), tmp_path))["tokens"] == ["$script", "${title}"]


def test_tokens_that_utf8_cannot_hold(tmp_path):
    page = saved(view_of(np.eye(2), ["\ud800", "b"]), tmp_path, title="\ud800")
    assert len(data_of(page)["tokens"]) == 2


DENSE = {
    "random": lambda shape: softmax(make_rng().standard_normal(shape)),
    "even": lambda shape: np.full(shape, 1 / shape[-1]),
    # Each of these is rounded up to a 255th, or to two.
    "rounded up": lambda shape: np.resize([1.5 / 255] * 63 + [1 - 63 * 1.5 / 255], shape),
    "one": lambda shape: np.broadcast_to(np.eye(shape[-1]), shape),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DENSE)
def test_size_of_the_page_and_its_rounding(kind, tmp_path):
    weights = DENSE[kind]((12, 12, 64, 64))
    page = saved(view_of(weights.astype(np.float32), [f"word{i}" for i in range(64)]), tmp_path)
    assert len(page.encode()) < 500_000
    data = data_of(page)
    assert np.abs(decoded(data) - weights).max() <= 0.5 / data["steps"] + 1e-7
    assert len(data["code"]) <= 406_000


def test_small_pages_are_finer(tmp_path):
    data = data_of(saved(view_of(), tmp_path))
    assert data["steps"] == 4095
    assert np.abs(decoded(data) - WEIGHTS).max() <= 0.5 / 4095


@pytest.mark.parametrize("old", [None, "old"])
def test_failure_leaves_nothing_half_written(old, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    if old:
        target.write_text(old)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        view_of().save(target)
    assert [path.read_text() for path in tmp_path.iterdir()] == [old] * bool(old)


def test_a_title_that_is_no_text(tmp_path):
    with pytest.raises(TypeError, match="title must be a str, not 5"):
        view_of().save(tmp_path / "page.html", title=5)


def test_a_folder_that_is_not_there(tmp_path):
    target = tmp_path / "nowhere" / "page.html"
    with pytest.raises(FileNotFoundError) as caught:
        view_of().save(target)
    assert str(caught.value) == f"[Errno 2] No such file or directory: {str(target)!r}"
    target.mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        view_of().save(target)
    assert str(caught.value) == f"[Errno 21] Is a directory: {str(target)!r}"
    assert not list(target.iterdir())
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_page_files_are_installed():
    folder = importlib.resources.files("fastattn").joinpath("html")
    assert all(folder.joinpath(name).is_file() for name in ("page.html", "page.css", *SCRIPTS))


def test_notebooks_show_the_page_in_a_frame(tmp_path):
    shown = view_of(np.eye(len(NASTY)), NASTY)._repr_html_()
    assert re.fullmatch(r'<iframe [^<>]*srcdoc="[^<>"]*"></iframe>', shown)
    assert html.unescape(shown.split('srcdoc="')[1][: -len('"></iframe>')]) == saved(
        view_of(np.eye(len(NASTY)), NASTY), tmp_path
    )
    sparse = AttentionView.from_top_keys(np.zeros((2000, 1), int), np.ones((2000, 1)), ["<b>"] * 2000)
    assert "holds a part" in (frame := sparse._repr_html_())
    assert re.fullmatch(r'<iframe [^<>]*srcdoc="[^<>"]*"></iframe>', frame)


# --- the plot -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert view_of().plot(ax) is ax
    assert ax.get_title() == "Layer 1, head 1"
    assert np.allclose(ax.images[0].get_array(), WEIGHTS[1, 1])
    assert [label.get_text() for label in ax.get_xticklabels()] == TOKENS
    assert [label.get_text() for label in ax.get_yticklabels()] == TOKENS

    from matplotlib import pyplot

    made = view_of().plot(layer=0, head="mean")
    assert np.allclose(made.images[0].get_array(), WEIGHTS[0].mean(axis=0))
    pyplot.close(made.figure)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        view_of().plot()


# --- which heads ----------------------------------------------------------------------------------


def test_certain_heads_are_ranked():
    ranked = view_of().certain_heads("it")
    assert [(c.layer, c.head, c.key) for c in ranked] == [(1, 1, 2), (0, 0, 1), (0, 1, 1), (1, 0, 1)]
    assert view_of().most_certain("it") == ranked[0]
    assert view_of().count_telling("it") == 2
    assert [c.layer for c in view_of().certain_heads("it", layer=1)] == [1, 1]


def test_punctuation_is_no_word():
    weights = np.array([[[0.1, 0.1, 0.8], [0.6, 0.2, 0.2], [0.4, 0.3, 0.3]]])
    view = AttentionView(weights, ["it", "bank", "."])
    assert view.most_certain("it").key == 1
    assert view.most_certain().query == 1
    assert [c.key for c in view.over_heads("it")] == [1]


def test_over_heads_lists_each_key_once():
    found = view_of().over_heads("it")
    assert [(c.layer, c.head, c.key, round(c.weight, 3)) for c in found] == [(1, 1, 2, 0.85), (0, 0, 1, 0.25)]
    assert view_of().over_heads("[CLS]") == []


def test_a_row_and_a_choice():
    view = view_of()
    np.testing.assert_allclose(view.row("it", 1, 1), [0.05, 0.05, 0.85, 0.05])
    np.testing.assert_allclose(view.row(3, 1), WEIGHTS[1, :, 3].mean(axis=0))
    np.testing.assert_allclose(view.row(3), WEIGHTS[:, :, 3].mean(axis=(0, 1)))
    assert view.choice("it") == (3, 1, 1)
    assert view.choice("it", head="mean") == (3, None, None)
    assert (view.tokens, view.key_tokens) == (TOKENS, TOKENS)
    with pytest.raises(ValueError, match="head"):
        view.row("it", 0, 2)


# --- rollout --------------------------------------------------------------------------------------


def test_rollout_is_the_product_of_halves():
    weights = softmax(make_rng().standard_normal((3, 2, 5, 5)))
    words = list("abcde")
    expected = np.eye(5)
    for layer in weights:
        expected = (layer.mean(axis=0) + np.eye(5)) / 2 @ expected
    view = AttentionView(weights, words).rollout()
    for query, row in enumerate(expected):
        np.testing.assert_allclose(view.row(query), row, rtol=1e-6)
    assert view.table("a").startswith('Rollout over 3 layers: "a" attends to')


def test_rollout_of_a_word_that_sees_nothing_stays_with_it():
    view = AttentionView(np.array([[[0.0, 0.0], [0.5, 0.5]]]), ["a", "b"])
    np.testing.assert_allclose(view.rollout().row("a"), [1, 0])


def test_rollout_needs_all_weights():
    crossed = AttentionView(np.eye(2), ["a", "b"], key_tokens=["c", "d"])
    with pytest.raises(ValueError, match="a view of cross attention"):
        crossed.rollout()
    listed = AttentionView.from_top_keys(np.array([[0], [1]]), np.ones((2, 1)), ["a", "b"])
    with pytest.raises(ValueError, match="a view from_top_keys"):
        listed.rollout()


# --- subwords, and other libraries ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["[CLS]", "un", "##believ", "##able", ".", "[SEP]"], ["[CLS]", "unbelievable", ".", "[SEP]"]),
        (["The", "Ġti", "ger", ".", "ĠIt"], ["The", "tiger", ".", "It"]),
        (["<s>", "▁The", "▁ti", "ger", "'", "s", "</s>"], ["<s>", "The", "tiger", "'", "s", "</s>"]),
        (["don", "'t", "Ġgo"], ["don't", "go"]),
        (["Ġcaf", "Ã©", "ĠÃ", "¼ber"], ["café", "über"]),
        (["<|endoftext|>", "a", "Ġb"], ["<|endoftext|>", "a", "b"]),
        (["plain", "words"], ["plain", "words"]),
        (["▁", "▁a"], [" ", "a"]),
    ],
)
def test_words_of_tokens(tokens, words):
    view = AttentionView(np.eye(len(tokens)), tokens, merge_subwords=True)
    assert view.tokens == words


def test_weights_of_subwords_are_summed_over_keys_and_averaged_over_queries():
    weights = softmax(make_rng().standard_normal((2, 3, 4, 4)))
    view = AttentionView(weights, ["The", "Ġti", "ger", "Ġran"], merge_subwords=True)
    tiger = weights[1, 2, 1:3].mean(axis=0)
    np.testing.assert_allclose(view.row("tiger", 1, 2), [tiger[0], tiger[1] + tiger[2], tiger[3]], rtol=1e-6)
    np.testing.assert_allclose(view.row("ran", 0, 0).sum(), 1)


def test_subwords_of_cross_attention():
    weights = softmax(make_rng().standard_normal((1, 2, 4)))
    view = AttentionView(weights, ["Ġa", "b"], key_tokens=["the", "ti", "##ger", "ran"], merge_subwords=True)
    assert (view.tokens, view.key_tokens) == (["ab"], ["the", "tiger", "ran"])
    mean = weights[0].mean(axis=0)
    np.testing.assert_allclose(view.row(0), [mean[0], mean[1] + mean[2], mean[3]], rtol=1e-6)


def test_from_transformers():
    layers = tuple(softmax(make_rng(n).standard_normal((2, 3, 4, 4))) for n in range(2))
    view = AttentionView.from_transformers(layers, list("abcd"), item=1)
    np.testing.assert_allclose(view.row("c", 1, 2), layers[1][1, 2, 2])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_from_tensors(dtype):
    torch = pytest.importorskip("torch")
    layer = torch.full((1, 2, 4, 4), 0.25, dtype=getattr(torch, dtype)).requires_grad_()
    view = AttentionView.from_transformers((layer,), list("abcd"))
    np.testing.assert_array_equal(view.row("c", 0, 1), 0.25)


@pytest.mark.parametrize(
    ("attentions", "keywords", "words"),
    [
        ((), {}, "attentions is empty"),
        ((None,), {}, 'attentions\\[0\\] is None: .* attn_implementation="eager"'),
        ((np.eye(2),), {}, r"attentions\[0\] has shape \(2, 2\); accepted is \(batch, heads, Sq, Sk\)"),
        ((np.eye(2)[None, None],), {"item": 1}, "item"),
        ((np.eye(2)[None, None], np.eye(3)[None, None]), {}, r"attentions\[1\] has shape .*: give layers of one shape"),
    ],
)
def test_what_transformers_cannot_have_meant(attentions, keywords, words):
    with pytest.raises(ValueError, match=words):
        AttentionView.from_transformers(attentions, ["a", "b"], **keywords)


# --- queries and keys -----------------------------------------------------------------------------

EVEN = np.full((2, 3, 3), 1 / 3)
VECTORS = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"queries": VECTORS}, "keys must be given, too"),
        ({"keys": VECTORS}, "queries must be given, too"),
        ({"queries": VECTORS[0], "keys": VECTORS}, r"queries has shape \(3, 4\); accepted is \(2, 3, D\)"),
        ({"queries": VECTORS[:1], "keys": VECTORS}, r"queries has shape \(1, 3, 4\)"),
        (
            {"queries": VECTORS, "keys": VECTORS[:, :2]},
            r"keys has shape \(2, 2, 4\); accepted is \(2, 3, D\), or with fewer",
        ),
        ({"queries": VECTORS, "keys": VECTORS[..., :3]}, "their last axes must be alike"),
        ({"queries": VECTORS, "keys": VECTORS * np.nan}, "keys must be finite"),
        ({"queries": VECTORS, "keys": VECTORS, "merge_subwords": True}, "not with merge_subwords"),
    ],
)
def test_queries_and_keys_that_are_not_accepted(keywords, words):
    with pytest.raises(ValueError, match=words):
        view_of(EVEN, ["a", "b", "c"], **keywords)


def test_size_of_a_page_with_queries_and_keys(tmp_path):
    weights, vectors = np.full((12, 12, 64, 64), 1 / 64, np.float32), np.ones((12, 12, 64, 64), np.float32)
    view = view_of(weights, ["a"] * 64, queries=vectors, keys=vectors)
    assert len(saved(view, tmp_path)) < 2_100_000
