"""The model of scale in bench/model_scale.py: what it counts is what rings compute and send."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fastattn._shards import LAYOUTS, Shards

SOURCE = Path(os.environ.get("FASTATTN_SOURCE", Path(__file__).parent.parent)) / "bench" / "model_scale.py"
if not SOURCE.exists():
    pytest.skip("bench/ is not beside the tests", allow_module_level=True)
spec = importlib.util.spec_from_file_location("model_scale", SOURCE)
model = sys.modules["model_scale"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)

WORK = model.Work(tokens=4096, heads=8, kv_heads=2, head_dim=64)
FAST = model.Machine(rate=1e12, bandwidth=1e12, latency=0.0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_a_step(layout, ranks, causal):
    """Against pairs of tokens counted one by one; the model leaves out half of a diagonal."""
    shards = Shards(layout, ranks, [0, WORK.tokens])
    where = [shards.positions(rank) for rank in range(ranks)]
    own = WORK.tokens // ranks
    for step in range(ranks):
        counted = [
            np.searchsorted(where[(rank - step) % ranks], where[rank], "right").sum() if causal else own**2
            for rank in range(ranks)
        ]
        np.testing.assert_allclose(
            model.scores(layout, WORK._replace(causal=causal), ranks, step), counted, atol=2 * own
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_all_ranks_are_those_of_one(layout, backward):
    work = WORK._replace(backward=backward)
    assert model.flops(layout, work, 8).sum() == pytest.approx(model.flops(layout, work, 1)[0])
    products = 5 if backward else 2
    assert model.flops(layout, work, 1)[0] == products * 2 * 64 * 8 * 4096**2 / 2


def test_contiguous_parts_are_as_unequal_as_the_page_says():
    flops = model.flops("contiguous", WORK, 4)
    assert flops.max() / flops.mean() == 2 - 1 / 4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_messages_are_hidden_from_as_many_tokens_as_the_formula_says(share, backward, causal):
    """Below, a ring takes as long as its messages, beyond, as its computing; here with one sequence on 16 ranks."""
    machine = model.Machine(rate=1e12, bandwidth=1e9, latency=0.0)
    work = WORK._replace(causal=causal, backward=backward)
    work = work._replace(tokens=round(16 * share * model.tokens_that_hide(work, machine)))
    seconds, computing = model.simulate("zigzag", work, 16, machine)
    if share > 1:
        assert seconds == pytest.approx(computing, rel=0.1)
    else:
        assert seconds > 1.5 * computing


def test_without_messages_a_ring_takes_as_long_as_it_computes():
    machine = FAST._replace(bandwidth=1e30)
    seconds, computing = model.simulate("striped", WORK, 1024, machine)
    assert seconds == pytest.approx(computing)
    assert computing == pytest.approx(model.flops("striped", WORK, 1)[0] / 1024 / machine.rate)


def test_one_rank_sends_nothing():
    assert model.ring_bytes(WORK, 1) == model.ulysses_bytes(WORK, 1) == 0


def test_the_largest_table_comes_at_once():
    lines = model.table(WORK._replace(tokens=10_000_000), FAST, [1, 1024])
    assert lines[-1].startswith("| 1024 | 9765 |")
