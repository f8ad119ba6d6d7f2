"""plan says what a call would do, without doing it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from oracle import DTYPE_IDS, DTYPES, F32, F64, make_rng, qkv, run_script
from strategies import cases

import fastattn
from fastattn import reference

CONFIG = fastattn.show_config(mode="dicts")
ISAS = {*CONFIG["isas"], CONFIG["isa"]}  # an emulated one is not listed


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 2, 2, 300, 300, 64), (3, 8, 2, 1, 2000, 128), (0, 2, 2, 3, 4, 5)], ids=str)
def test_fields(dtypes, shape):
    plan = fastattn.plan(*qkv(make_rng(), shape, dtypes), num_threads=2)
    assert plan.isa in ISAS
    assert isinstance(plan.path, str)
    assert plan.path
    rows, keys = plan.tile
    assert rows >= 1
    assert keys >= 1
    assert plan.items >= (1 if shape[0] else 0)
    assert 1 <= plan.threads <= 2
    assert 0 <= plan.scratch_bytes <= 2**20


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 2, 2, 300, 300, 64), (3, 8, 2, 1, 2000, 128), (0, 2, 2, 3, 4, 5)], ids=str)
def test_fields_of_backward(dtypes, shape):
    plan = fastattn.plan(*qkv(make_rng(), shape, dtypes), num_threads=2, backward=True)
    assert plan.isa in ISAS
    assert plan.path in ("float32", "float64", "bf16dot", "bf16tile")
    assert plan.tile[1] == 64
    assert plan.items >= (1 if shape[0] else 0)
    assert 1 <= plan.threads <= 2
    assert plan.query.seqlen == shape[3]


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("head_dims", "most"),
    [((64, 64), 2**20), ((128, 80), 2**20), ((256, 256), 2**20), ((512, 512), 1.3 * 2**20)],
    ids=["64", "128, 80", "256", "512"],
)
@pytest.mark.parametrize("seqlen_k", [1, 1000, 2**17])
@pytest.mark.parametrize("keywords", [{}, {"dropout": 0.1, "seed": 1, "softcap": 3.0}], ids=["plain", "all"])
def test_scratch_of_backward_is_a_mebibyte_and_sums(dtypes, head_dims, most, seqlen_k, keywords):
    """Twice the gradients of a head's keys and values, in the precision of sums, for blocks and vectors that are whole
    and a few rows behind each block."""
    head_dim, head_dim_v = head_dims
    row = np.zeros((1, head_dim), dtypes[1]), np.zeros((1, head_dim_v), dtypes[1])
    key, value = (np.broadcast_to(x, (seqlen_k, x.shape[1])) for x in row)
    query = np.broadcast_to(np.zeros((1, head_dim), dtypes[0]), (4000, head_dim))
    plan = fastattn.plan(query, key, value, backward=True, **keywords)
    whole = sum(-(-dim // 32) * 32 for dim in head_dims)
    sums = 2 * (-(-seqlen_k // 64) * 72) * whole * (8 if dtypes[0] == F64 else 4)
    assert plan.scratch_bytes <= most + sums


def test_splits_of_backward_are_of_rows_and_of_the_shape_alone():
    arrays = qkv(make_rng(), (1, 1, 1, 3000, 300, 64))
    one, two = (fastattn.plan(*arrays, num_threads=n, backward=True) for n in (1, 2))
    assert one.splits == two.splits > 1
    assert (one.items, one.shared_bytes) == (1, 0)
    assert two.items == two.splits
    assert two.shared_bytes > 0


def test_frozen():
    plan = fastattn.plan(*qkv(make_rng(), (1, 1, 1, 3, 4, 8)))
    assert dataclasses.is_dataclass(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.threads = 7


@settings(max_examples=100)
@given(case=cases(dtypes=((F64, F64),)))
def test_flops_count_what_is_visible(case):
    """Two flops a multiply-add, over D and Dv, for each score that the mask, causal, window and lengths leave."""
    hiding = ("causal", "window", "query_offset", "key_lengths", "mask")
    keywords = {k: v for k, v in case.keywords.items() if k in hiding}
    _, weights = reference.attention(
        # Equal scores, so that no visible weight underflows to 0.
        np.zeros_like(case.query), np.zeros_like(case.key), case.value, **keywords, return_weights=True
    )  # fmt: skip
    seen, dim, dim_v = np.count_nonzero(weights), case.query.shape[-1], case.value.shape[-1]
    arrays = case.query, case.key, case.value
    assert fastattn.plan(*arrays, **keywords).flops == 2 * (dim + dim_v) * seen
    assert fastattn.plan(*arrays, **keywords, backward=True).flops == 2 * (3 * dim + 2 * dim_v) * seen


def test_flops_of_a_plain_call():
    query, key, value = qkv(make_rng(), (2, 4, 2, 5, 7, 8), head_dim_v=3)
    assert fastattn.plan(query, key, value).flops == 2 * 4 * 5 * 7 * 2 * (8 + 3)
    assert fastattn.plan(query, key, value, backward=True).flops == 2 * 4 * 5 * 7 * 2 * (3 * 8 + 2 * 3)


@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (0, 7)])
def test_flops_of_no_scores_under_a_mask(shape):
    query, key, value = qkv(make_rng(), (1, 1, 1, *shape, 8))
    assert fastattn.plan(query, key, value, mask=np.ones(shape, bool)).flops == 0


def test_plan_is_quick_and_writes_nothing():
    """A call on these shapes would take hours, and its result more memory than there is."""
    row = np.broadcast_to(np.zeros((1, 64), F32), (64, 2**24, 64))
    plan = fastattn.plan(row, row, row)
    assert plan.flops == 64 * 2**48 * 2 * 128


def test_tile_does_not_depend_on_threads():
    arrays = qkv(make_rng(), (2, 8, 2, 100, 1000, 64))
    one, two = (fastattn.plan(*arrays, num_threads=n) for n in (1, 2))
    assert (one.tile, one.path) == (two.tile, two.path)
    assert one.threads == 1


def test_a_few_rows_take_more_keys_at_once():
    few, many = (fastattn.plan(*qkv(make_rng(), (1, 8, 8, rows, 1000, 64))) for rows in (1, 100))
    assert few.path.endswith("-decode")
    assert not many.path.endswith("-decode")
    assert few.tile[1] > many.tile[1]


def test_dropout_of_few_rows_is_not_decoding():
    query, key, value = qkv(make_rng(), (1, 8, 8, 1, 1000, 64))
    assert not fastattn.plan(query, key, value, dropout=0.1, seed=1).path.endswith("-decode")
    with pytest.raises(ValueError, match="seed"):
        fastattn.plan(query, key, value, dropout=0.1)


def test_small_work_stays_on_one_thread():
    assert fastattn.plan(*qkv(make_rng(), (1, 4, 4, 8, 8, 16)), num_threads=2).threads == 1


def test_it_shows_what_each_axis_is_taken_for():
    arrays = qkv(make_rng(), (3, 8, 2, 5, 7, 16), head_dim_v=4)
    printed = repr(fastattn.plan(*arrays))
    assert "query=Axes(batch=(3,), heads=8, seqlen=5, head_dim=16)" in printed
    assert "key=Axes(batch=(3,), heads=2, seqlen=7, head_dim=16)" in printed
    assert "value=Axes(batch=(3,), heads=2, seqlen=7, head_dim=4)" in printed
    assert fastattn.plan(*(x[0, 0] for x in arrays)).query == ((), 1, 5, 16)
    assert fastattn.plan(*(x[:, None] for x in arrays)).key.batch == (3, 1)


def test_it_shows_a_wrong_order_of_axes():
    """(batch, seqlen, heads, head_dim) fits, too, where seqlen is no less than heads."""
    x = np.zeros((2, 8, 4, 16), F32)
    assert fastattn.plan(x.swapaxes(1, 2), x.swapaxes(1, 2), x.swapaxes(1, 2)).query.seqlen == 8
    assert "heads=8, seqlen=4" in repr(fastattn.plan(x, x, x))


@pytest.mark.skipif("avx512bf16" not in ISAS, reason="needs AVX512-BF16")
def test_few_rows_of_bfloat16_beside_the_tile_unit():
    """Up to 4 are computed in float32, for dot products of pairs are slower there; up to 16 in the unit."""
    source = (
        "import numpy as np, ml_dtypes, fastattn\n"
        "key = np.zeros((2, 4096, 64), ml_dtypes.bfloat16)\n"
        "print(*(fastattn.plan(np.zeros((8, rows, 64), key.dtype), key, key).path for rows in (1, 2, 4, 5)))"
    )
    tiles = ["float32-decode", "bf16tile-decode", "bf16tile-decode", "bf16tile"]
    assert run_script(source, FASTATTN_ISA="amx-emulated").split() == tiles
    assert run_script(source, FASTATTN_ISA="avx512bf16").split() == [*["bf16dot-decode"] * 2, *["bf16dot"] * 2]


def test_weights_take_the_scores_once_more():
    arrays = qkv(make_rng(), (3, 2, 2, 50, 70, 16), head_dim_v=4)
    scores = 3 * 2 * 50 * 70
    assert fastattn.plan(*arrays).flops == 2 * (16 + 4) * scores
    assert fastattn.plan(*arrays, return_weights=True).flops == 2 * (2 * 16 + 4) * scores
