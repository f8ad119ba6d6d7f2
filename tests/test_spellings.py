"""Arguments as other libraries spell them: the TypeError names ours, and what is different about it."""

import contextlib
import gc
import inspect
import pickle
import re
import sys

import numpy as np
import pytest
from oracle import F32

import fastattn
from fastattn import reference

X = np.ones((2, 4, 6, 8), F32)
ROWS = np.ones((6, 4, 8), F32)
LENGTHS = [0, 2, 6]


def step(*args, **keywords):
    cache = fastattn.KVCache(4, 8, num_pages=1)
    cache.add(X[0], X[0])
    return cache.attention(X[:1], [0], *args, **keywords)


def layer(*args, **keywords):
    return fastattn.MultiHeadAttention(*np.ones((4, 8, 8), F32), num_heads=2)(ROWS[0], None, None, *args, **keywords)


CALLS = {
    "attention": lambda *args, **keywords: fastattn.attention(X, X, X, *args, **keywords),
    "plan": lambda *args, **keywords: fastattn.plan(X, X, X, *args, **keywords),
    "top_keys": lambda *args, **keywords: fastattn.top_keys(X, X, 2, *args, **keywords),
    "attention_varlen": lambda *args, **keywords: fastattn.attention_varlen(
        ROWS, ROWS, ROWS, LENGTHS, LENGTHS, *args, **keywords
    ),
    "KVCache.attention": step,
    "MultiHeadAttention.__call__": layer,
    "reference.attention": lambda *args, **keywords: reference.attention(X, X, X, *args, **keywords),
    "reference.attention_varlen": lambda *args, **keywords: reference.attention_varlen(
        ROWS, ROWS, ROWS, LENGTHS, LENGTHS, *args, **keywords
    ),
    "reference.attention_backward": lambda *args, **keywords: reference.attention_backward(
        X, X, X, X, X, X[..., 0], *args, **keywords
    ),
    "reference.attention_varlen_backward": lambda *args, **keywords: reference.attention_varlen_backward(
        ROWS, ROWS, ROWS, ROWS, ROWS, ROWS[..., 0], LENGTHS, LENGTHS, *args, **keywords
    ),
    "reference.top_keys": lambda *args, **keywords: reference.top_keys(X, X, 2, *args, **keywords),
}
WITH_MASK = (
    "attention",
    "plan",
    "top_keys",
    "MultiHeadAttention.__call__",
    "reference.attention",
    "reference.attention_backward",
    "reference.top_keys",
)

# What the message about it must say, wherever it is given.
SPELLINGS = {
    "is_causal": ["causal=", "query_offset=0", "the last query sees the last key"],
    "attn_mask": ["mask=", "True means attend", "bias="],
    "key_padding_mask": ["mask=", "True means attend", "key_lengths="],
    "dropout_p": ["dropout="],
    "enable_gqa": ["not needed", "fewer heads"],
    "softmax_scale": ["scale="],
    "sm_scale": ["scale="],
    "window_size": ["window=", "None, not -1"],
    "sliding_window": ["window=(sliding_window - 1, 0)"],
    "logits_soft_cap": ["softcap=", "None, not 0"],
    "s_aux": ["sinks="],
    "need_weights": ["return_weights="],
    "max_seqlen_q": ["not needed"],
}


def complaint(call, *args, **keywords):
    with pytest.raises(TypeError) as caught:
        CALLS[call](*args, **keywords)
    return str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_the_good_call(call):
    CALLS[call]()
    CALLS[call](scale=0.5)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("call", CALLS)
def test_the_message_names_ours_and_the_difference(call, name):
    said = complaint(call, **{name: None})
    assert said.startswith(f"{call.removeprefix('reference.')}() got an unexpected keyword argument {name!r}: ")
    assert not [words for words in SPELLINGS[name] if words not in said], said


@pytest.mark.parametrize("call", [call for call in CALLS if call not in WITH_MASK])
def test_it_says_where_ours_is_not_there_either(call):
    said = complaint(call, attn_mask=None)
    assert "fastattn.attention has mask=" in said
    assert re.search("but here accepted are (grad_out, )?query", said)


@pytest.mark.parametrize("call", CALLS)
def test_one_more_positional_argument(call):
    said = complaint(call, np.ones((6, 6), bool))
    assert re.search(r"positional arguments \((grad_out, )?query", said)
    assert "by keyword" in said
    assert ("mask=, where True means attend" in said) == (call in WITH_MASK)


@pytest.mark.parametrize("call", CALLS)
def test_a_slip_and_what_nobody_has(call):
    assert "did you mean 'causal'?" in complaint(call, cuasal=True)
    said = complaint(call, no_such_keyword=1)
    assert "'no_such_keyword'" in said
    assert "causal" in said


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_arrays_by_other_names(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': here it is .*="):
        fastattn.attention(**{name: X})


def test_other_type_errors_are_as_they_were():
    assert complaint("attention", scale="big") == "scale must be a real number, not 'big'"


@pytest.mark.parametrize(
    ("arrays", "keywords", "missing"),
    [
        ((), {}, "query and key and value"),
        ((X,), {}, "key and value"),
        ((X, X), {}, "value"),
        ((X, X), {"causal": True}, "value"),
        ((X,), {"value": X}, "key"),
    ],
)
def test_an_array_that_is_missing_is_named(arrays, keywords, missing):
    with pytest.raises(TypeError, match=rf"^attention\(\) misses {missing}; it takes query, key, value"):
        fastattn.attention(*arrays, **keywords)


@pytest.mark.parametrize(
    "function",
    [
        fastattn.attention,
        fastattn.plan,
        fastattn.top_keys,
        fastattn.attention_varlen,
        fastattn.KVCache.attention,
        fastattn.MultiHeadAttention.__call__,
        reference.attention,
    ],
)
def test_signatures_show_what_is_accepted(function):
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_attention_is_of_the_package():
    assert fastattn.attention.__module__ == "fastattn"
    assert fastattn.attention.__name__ == fastattn.attention.__qualname__ == "attention"
    assert pickle.loads(pickle.dumps(fastattn.attention)) is fastattn.attention


def refused_keyword(x):
    with contextlib.suppress(TypeError):
        fastattn.attention(X, X, X, is_causal=x)


def refused_positional(x):
    with contextlib.suppress(TypeError):
        fastattn.attention(X, X, X, x)


def refused_value(x):
    with contextlib.suppress(TypeError):
        fastattn.attention(X, X, X, scale=x)


@pytest.mark.parametrize("call", [refused_keyword, refused_positional, refused_value])
def test_a_refused_call_leaks_nothing(call):
    """Errors are exchanged by hand: neither the arguments nor the first error may stay."""
    marker = X.copy()
    call(marker)
    before = sys.getrefcount(marker), sys.getrefcount(TypeError)
    for _ in range(100):
        call(marker)
    gc.collect()
    assert sys.getrefcount(marker) - before[0] < 50
    assert sys.getrefcount(TypeError) - before[1] < 50
