"""The part of a long text that a page holds: which queries and keys, at which positions, and that it stays small."""

import tracemalloc

import numpy as np
import pytest
from oracle import make_rng
from pages import data_of, decoded, saved

from fastattn import AttentionView, attention, top_keys


def named(count):
    return [f"word{i}" for i in range(count)]


def full_view(shape, seed=0, **keywords):
    """A view of all weights, and the weights (layers, heads, queries, keys)."""
    weights = make_rng(seed).dirichlet(np.full(shape[-1], 0.02), shape[:-1])
    return AttentionView(weights, named(shape[-1]), **keywords), weights.reshape(*(1,) * (4 - len(shape)), *shape)


def listed_keys(layers, heads, count, k, seed=0):
    """Indices of k different keys of each of count tokens, near and far, and weights that leave something to others."""
    rng = make_rng(seed)
    steps = np.cumsum(rng.integers(1, count // k, (layers, heads, count, k)), axis=-1)
    return (np.arange(count)[:, None] + steps) % count, rng.dirichlet(np.full(k + 1, 0.5), (layers, heads, count))[
        ..., :k
    ]


def check_part(data, row_of):
    """The weights of the page are those at its positions, and its last column is all that is missing."""
    part, rows = data["part"], decoded(data)
    assert data["tokens"] == [f"word{at}" for at in part["queries"]]
    assert data["keys"] == [f"word{at}" for at in part["keys"]]
    assert part["keys"] == sorted(set(part["keys"]))
    assert part["queries"] == list(range(part["queries"][0], part["queries"][-1] + 1))
    for layer, head, query in np.ndindex(rows.shape[:3]):
        row = row_of(part["queries"][query], layer, head)
        expected = [*row[part["keys"]], 1 - row[part["keys"]].sum()]
        assert np.allclose(rows[layer, head, query], expected, rtol=0, atol=0.5 / data["steps"] + 1e-6)


@pytest.mark.parametrize("word", [0, 3, 700, 1099])
@pytest.mark.parametrize("shape", [(1100, 1100), (2, 2, 1100, 1100)])
def test_a_part_of_a_full_view(shape, word, tmp_path):
    view, weights = full_view(shape)
    data = data_of(saved(view, tmp_path, word=word))
    check_part(data, lambda query, layer, head: weights[layer, head, query])
    assert (len(data["tokens"]), len(data["keys"])) == (64, 128)
    assert data["part"]["of"] == {"queries": 1100, "keys": 1100}
    assert data["part"]["queries"][data["query"]] == word


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3), (3, 16)])
def test_a_part_of_the_top_keys(layers, heads, tmp_path):
    indices, weights = listed_keys(layers, heads, 5000, 6)
    view = AttentionView.from_top_keys(indices, weights, named(5000))
    data = data_of(saved(view, tmp_path, word=1234))
    check_part(data, view.row)
    # The strongest of the chosen word in any head are there.
    chosen = np.argsort(-weights[:, :, 1234].reshape(-1))[:24]
    assert set(indices[:, :, 1234].reshape(-1)[chosen].tolist()) <= set(data["part"]["keys"])


def test_each_query_has_its_strongest_key(tmp_path):
    view, weights = full_view((1100, 1100))
    part = data_of(saved(view, tmp_path, word=500))["part"]
    assert set(weights[0, 0, part["queries"]].argmax(axis=-1).tolist()) <= set(part["keys"])


KINDS = {
    "even": lambda shape: np.full(shape, 1 / 160),
    "random": lambda shape: make_rng().dirichlet(np.ones(160), shape[:-1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (6, 12), (12, 12), (32, 32)])
def test_a_part_stays_small(layers, heads, kind, tmp_path):
    """Of many heads it has fewer words."""
    shape = (layers, heads, 16, 160)
    weights = KINDS[kind](shape).astype(np.float32)
    indices = np.broadcast_to(np.arange(160) * 10, shape)
    view = AttentionView.from_top_keys(indices, weights, named(16), key_tokens=named(1600))
    page = saved(view, tmp_path, word=8, layer=0, head=0)
    data = data_of(page)
    assert len(page.encode()) < 500_000
    assert len(data["code"]) <= 400_000
    assert len(data["keys"]) >= 48
    check_part(data, view.row)


@pytest.mark.slow
def test_many_heads_of_few_tokens_are_a_part_too(tmp_path):
    """Fewer weights than there may be characters, but each of them takes three bits."""
    view = AttentionView(np.full((512, 128, 128), 1 / 128, np.float32), named(128))
    data = data_of(saved(view, tmp_path, word=64, head=3))
    assert data["part"]["of"] == {"queries": 128, "keys": 128}
    assert np.allclose(decoded(data)[..., :-1], 1 / 128, rtol=0, atol=0.5 / data["steps"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "dim", "most"),
    [(1, 1, 1, 64, 500_000), (6, 12, 12, 32, 500_000), (12, 12, 12, 64, 2_100_000), (32, 32, 8, 128, 2_100_000)],
)
def test_queries_and_keys_of_a_part_stay_small(layers, heads, kv_heads, dim, most, tmp_path):
    indices = np.broadcast_to(np.arange(160) * 6, (layers, heads, 16, 160))
    weights = make_rng().dirichlet(np.ones(160), indices.shape[:-1]).astype(np.float32)
    queries = make_rng(1).standard_normal((layers, heads, 16, dim), np.float32)
    keys = make_rng(2).standard_normal((layers, kv_heads, 1100, dim), np.float32)
    view = AttentionView.from_top_keys(indices, weights, named(16), key_tokens=named(1100), queries=queries, keys=keys)
    page = saved(view, tmp_path, word=8, layer=0, head=0)
    assert len(page) < most
    check_part(data_of(page), view.row)


def test_vectors_that_would_be_too_large_make_a_part(tmp_path):
    weights = np.full((12, 12, 64, 64), 1 / 64, np.float32)
    vectors = np.ones((12, 12, 64, 192), np.float32)
    data = data_of(saved(AttentionView(weights, named(64), queries=vectors, keys=vectors), tmp_path, word=60))
    assert data["part"]["queries"][data["query"]] == 60
    assert len(data["keys"]) < 64


@pytest.mark.slow
def test_a_long_text_takes_little_memory(tmp_path):
    count = 65_536  # whose square would be 17 GB for each head
    indices, weights = listed_keys(2, 2, count, 8)
    queries, keys = make_rng().standard_normal((2, 2, 2, count, 4), np.float32)
    view = AttentionView.from_top_keys(indices, weights, named(count), queries=queries, keys=keys)
    tracemalloc.start()
    page = saved(view, tmp_path, word=40_000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check_part(data_of(page), view.row)
    assert len(page) < 500_000
    assert most < 100e6


def test_top_keys_of_attention(tmp_path):
    query, key = make_rng().standard_normal((2, 3, 1200, 16))
    view = AttentionView.from_top_keys(*top_keys(2 * query, key, 5, causal=True), named(1200))
    _, weights = attention(2 * query, key, key, causal=True, return_weights=True)
    data = data_of(saved(view, tmp_path, word=900, head=1))
    shown = decoded(data)[0, 1, data["query"]]
    strongest = np.argsort(-weights[1, 900])[:5]
    columns = [data["part"]["keys"].index(key) for key in strongest]
    assert np.allclose(shown[columns], weights[1, 900, strongest], rtol=0, atol=1 / data["steps"])


def test_one_query_of_many_keys(tmp_path):
    weights = make_rng().dirichlet(np.full(3000, 0.01), 1)
    data = data_of(saved(AttentionView(weights, ["one"], key_tokens=named(3000)), tmp_path))
    assert data["tokens"] == ["one"]
    assert set(np.argsort(-weights[0])[:20].tolist()) <= set(data["part"]["keys"])


def test_many_queries_of_few_keys_keep_all_keys(tmp_path):
    weights = np.full((3000, 3), 1 / 3)
    data = data_of(saved(AttentionView(weights, named(3000), key_tokens=["a", "b", "c"]), tmp_path, word=7))
    assert data["complete"]
    assert np.allclose(decoded(data), 1 / 3, rtol=0, atol=1 / 4095)


def test_queries_that_see_nothing(tmp_path):
    view = AttentionView.from_top_keys(np.full((2000, 1), -1), np.zeros((2000, 1)), named(2000))
    data = data_of(saved(view, tmp_path, word=3))
    assert data["part"]["keys"] == [0]
    assert not decoded(data).any()


def test_queries_and_keys_of_top_keys_that_are_not_accepted():
    with pytest.raises(ValueError, match=r"keys has shape \(3, 4\); accepted is \(5, D\)"):
        AttentionView.from_top_keys(
            [[0]], [[1.0]], ["a"], key_tokens=named(5), queries=np.ones((1, 4)), keys=np.ones((3, 4))
        )
