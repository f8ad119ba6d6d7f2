"""KVCache: bookkeeping against a plain model, copy on write, all or nothing, files, and attention to the bit."""

import copy
import doctest
import inspect
import io
import os
import pickle
import re
import sys
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from oracle import BF16, F16, F32, F64, assert_close, assert_same_bits, make_rng, normal, run_script, tolerances

import fastattn
from fastattn import cache as cache_module
from fastattn.cache import KVCache

I8 = np.dtype(np.int8)
HEADS, DIM, DIM_V = 2, 8, 6
STORED = [F32, F16, BF16, I8]
each_stored = pytest.mark.parametrize("dtype", STORED, ids=lambda dtype: dtype.name)


def new_cache(num_pages=8, **keywords):
    return KVCache(HEADS, DIM, **{"head_dim_v": DIM_V, "page_size": 64, "num_pages": num_pages, **keywords})


def tokens(rng, count, dtype=F32, batch=()):
    shape = (*batch, HEADS, count)
    return normal(rng, (*shape, DIM), dtype), normal(rng, (*shape, DIM_V), dtype)


def assert_holds(cache, sequence, key, value):
    got = cache.get(sequence)
    assert_same_bits(got[0], key, "key")
    assert_same_bits(got[1], value, "value")


def page_numbers(cache, *sequences):
    """The pages of each sequence, as the kernel is told."""
    table, lengths = cache._table(cache._find(list(sequences)))
    return [row[: -(-length // cache.page_size)].tolist() for row, length in zip(table, lengths, strict=True)]


def state_of(cache):
    """Everything that a failed call must leave as it was."""
    contents = {sequence: [x.tobytes() for x in cache.get(sequence)] for sequence in cache.lengths}
    return cache.lengths, contents, cache.pages_free, page_numbers(cache, *cache.lengths), cache._pages.tobytes()


# --- bookkeeping against a model ------------------------------------------------------------------


class Bookkeeping(RuleBasedStateMachine):
    """The model keeps each sequence's arrays; pages are few, so that they run out."""

    def __init__(self):
        super().__init__()
        self.rng = make_rng()
        self.cache = new_cache(7)
        self.model = {}
        self.ever = set()

    def some(self, data):
        return data.draw(st.sampled_from(sorted(self.model)), "sequence")

    def register(self, sequence, arrays):
        assert sequence not in self.ever
        self.ever.add(sequence)
        self.model[sequence] = arrays

    def attempt(self, call):
        """Return what the call returns; or None if it ran out of pages, and then changed nothing."""
        before = state_of(self.cache)
        try:
            return call() or 0
        except MemoryError:
            assert state_of(self.cache) == before
            return None

    @rule(count=st.integers(0, 200))
    def add(self, count):
        arrays = tokens(self.rng, count)
        sequence = self.attempt(lambda: self.cache.add(*arrays))
        if sequence is not None:
            self.register(sequence, arrays)

    @rule()
    def add_empty(self):
        self.register(self.cache.add(), tokens(self.rng, 0))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 3) | st.sampled_from([60, 64, 65, 130]))
    def append(self, data, count):
        sequence = self.some(data)
        arrays = tokens(self.rng, count)
        if self.attempt(lambda: self.cache.append(sequence, *arrays)) is not None:
            self.extend(sequence, arrays)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 2) | st.sampled_from([63, 64]))
    def append_to_several(self, data, count):
        sequences = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True), "sequences")
        key, value = tokens(self.rng, count, batch=(len(sequences),))
        if self.attempt(lambda: self.cache.append(sequences, key, value)) is not None:
            for index, sequence in enumerate(sequences):
                self.extend(sequence, (key[index], value[index]))

    def extend(self, sequence, arrays):
        self.model[sequence] = tuple(
            np.concatenate(pair, axis=1) for pair in zip(self.model[sequence], arrays, strict=True)
        )

    @precondition(lambda self: self.model)
    @rule(data=st.data(), whole=st.booleans())
    def fork(self, data, whole):
        sequence = self.some(data)
        there = self.model[sequence][0].shape[1]
        length = None if whole else data.draw(st.integers(0, there), "length")
        self.register(self.cache.fork(sequence, length), tuple(x[:, :length] for x in self.model[sequence]))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = self.some(data)
        length = data.draw(st.integers(0, self.model[sequence][0].shape[1]), "length")
        self.cache.truncate(sequence, length)
        self.model[sequence] = tuple(x[:, :length] for x in self.model[sequence])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        sequence = self.some(data)
        self.cache.free(sequence)
        del self.model[sequence]
        assert sequence not in self.cache

    @invariant()
    def holds_what_the_model_holds(self):
        assert self.cache.lengths == {sequence: key.shape[1] for sequence, (key, _) in self.model.items()}
        assert len(self.cache) == len(self.model)
        for sequence, arrays in self.model.items():
            assert sequence in self.cache
            assert_holds(self.cache, sequence, *arrays)

    @invariant()
    def pages_are_in_use_or_free(self):
        used = {page for pages in page_numbers(self.cache, *self.model) for page in pages}
        assert self.cache.pages_free == self.cache.num_pages - len(used)

    def teardown(self):
        for sequence in self.model:
            self.cache.free(sequence)
        assert self.cache.pages_free == self.cache.num_pages
        # Each page can be had again.
        self.cache.add(*tokens(self.rng, self.cache.num_pages * self.cache.page_size))
        assert self.cache.pages_free == 0


Bookkeeping.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
test_bookkeeping = Bookkeeping.TestCase


def test_ids_are_never_used_again():
    cache = new_cache()
    first = cache.add()
    cache.free(first)
    assert cache.add() != first
    assert cache.fork(1) == 2


@pytest.mark.parametrize("sequences", [[0, 1], (1, 0), np.array([1, 0], np.uint8)], ids=str)
def test_kinds_of_ids(sequences):
    cache = new_cache()
    cache.add()
    cache.add()
    key, value = tokens(make_rng(), 3, batch=(2,))
    cache.append(sequences, key, value)
    for index, sequence in enumerate(sequences):
        assert_holds(cache, sequence, key[index], value[index])
    cache.append(np.int64(0), key[0], value[0])
    assert cache.lengths == {0: 6, 1: 3}
    assert np.int64(1) in cache


def test_nothing_for_nobody():
    cache = new_cache()
    cache.append([], *tokens(make_rng(), 5, batch=(0,)))
    sequence = cache.add()
    cache.append(sequence, *tokens(make_rng(), 0))
    cache.append([sequence], *tokens(make_rng(), 0, batch=(1,)))
    assert cache.lengths == {sequence: 0}
    assert cache.pages_free == cache.num_pages


def test_get_copies():
    cache = new_cache()
    arrays = tokens(make_rng(), 10)
    sequence = cache.add(*arrays)
    for x in cache.get(sequence):
        x[...] = 0
    assert_holds(cache, sequence, *arrays)


def test_repr_says_what_is_there():
    cache = new_cache(dtype=BF16)
    cache.add(*tokens(make_rng(), 70))
    said = repr(cache)
    for words in ("num_kv_heads=2", "head_dim=8", "head_dim_v=6", "bfloat16", "1 sequences", "70 tokens", "6 of 8"):
        assert words in said


# --- copy on write --------------------------------------------------------------------------------


def test_a_fork_shares_until_it_appends():
    cache = new_cache()
    rng = make_rng()
    prompt, more, other = tokens(rng, 100), tokens(rng, 1), tokens(rng, 1)
    parent = cache.add(*prompt)
    child = cache.fork(parent)
    assert page_numbers(cache, parent) == page_numbers(cache, child)
    assert cache.pages_free == 6

    cache.append(child, *more)
    (first, last), (child_first, child_last) = page_numbers(cache, parent, child)
    assert first == child_first
    assert last != child_last
    assert cache.pages_free == 5
    assert_holds(cache, parent, *prompt)
    assert_holds(cache, child, *(np.concatenate(pair, axis=1) for pair in zip(prompt, more, strict=True)))

    # Now the parent alone has its last page, and keeps it.
    cache.append(parent, *other)
    assert page_numbers(cache, parent) == [[first, last]]
    assert cache.pages_free == 5


def test_a_full_page_is_never_copied():
    cache = new_cache()
    parent = cache.add(*tokens(make_rng(), 64))
    child = cache.fork(parent)
    cache.append([parent, child], *tokens(make_rng(), 1, batch=(2,)))
    assert cache.pages_free == 5


def test_appending_nothing_copies_nothing():
    cache = new_cache()
    parent = cache.add(*tokens(make_rng(), 10))
    child = cache.fork(parent)
    cache.append([parent, child], *tokens(make_rng(), 0, batch=(2,)))
    assert cache.pages_free == 7


def test_the_last_of_several_sharers_keeps_the_page():
    cache = new_cache(3)
    parent = cache.add(*tokens(make_rng(), 10))
    family = [parent, cache.fork(parent), cache.fork(parent, 5)]
    key, value = tokens(make_rng(1), 1, batch=(3,))
    cache.append(family, key, value)
    assert cache.pages_free == 0
    assert list(cache.lengths.values()) == [11, 11, 6]
    for index, sequence in enumerate(family):
        np.testing.assert_array_equal(cache.get(sequence)[0][:, -1], key[index, :, 0])


def test_a_truncated_sharer_does_not_write_into_the_others_tokens():
    cache = new_cache()
    arrays = tokens(make_rng(), 40)
    parent = cache.add(*arrays)
    child = cache.fork(parent)
    cache.truncate(child, 20)
    cache.append(child, *tokens(make_rng(1), 5))
    assert_holds(cache, parent, *arrays)


# --- all or nothing -------------------------------------------------------------------------------


def test_out_of_pages_changes_nothing():
    cache = new_cache(4)
    rng = make_rng()
    full, part = cache.add(*tokens(rng, 64)), cache.add(*tokens(rng, 60))
    before = state_of(cache)
    with pytest.raises(MemoryError, match=r"3 pages are needed.*only 2 of 4 are free"):
        cache.append([full, part], *tokens(rng, 66, batch=(2,)))
    assert state_of(cache) == before
    with pytest.raises(MemoryError, match="3 pages are needed"):
        cache.add(*tokens(rng, 129))
    assert state_of(cache) == before
    assert cache.add() == 2, "a failed add uses no id"


def test_copies_count_among_the_pages_needed():
    cache = new_cache(1)
    parent = cache.add(*tokens(make_rng(), 10))
    child = cache.fork(parent)
    before = state_of(cache)
    with pytest.raises(MemoryError, match=r"1 pages are needed.*0 of 1"):
        cache.append(child, *tokens(make_rng(), 1))
    assert state_of(cache) == before


def test_an_interrupted_append_changes_nothing(monkeypatch):
    cache = new_cache()
    arrays = tokens(make_rng(), 10)
    sequence = cache.add(*arrays)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append(sequence, *tokens(make_rng(), 100))
    assert cache.lengths == {sequence: 10}
    assert cache.pages_free == 7
    assert_holds(cache, sequence, *arrays)


def lines_traced(call, stop_at=None):
    """Call, with Ctrl-C before a line of the library if one is given; return how many lines were run."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != cache_module.__file__:
            return None
        if event == "line":
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def assert_sound(cache):
    """Each page is free once or in use, with as many references as sequences that have it."""
    pages = [page for each in page_numbers(cache, *cache.lengths) for page in each]
    assert cache._references.tolist() == [pages.count(page) for page in range(cache.num_pages)]
    free = [*cache._returned, *range(cache._first_unused, cache.num_pages)]
    assert sorted([*free, *set(pages)]) == list(range(cache.num_pages))
    assert cache.pages_free == len(free)
    assert all(sequence < cache._next_id for sequence in cache.lengths)


# What is called on a cache of sequences 0 (70 tokens), its fork 1, and 3 (64 tokens).
CHANGES = {
    "add": lambda c: c.add(*tokens(make_rng(1), 70)),
    "add empty": lambda c: c.add(),
    "append": lambda c: c.append(3, *tokens(make_rng(1), 3)),
    "append and copy": lambda c: c.append([0, 1, 3], *tokens(make_rng(1), 70, batch=(3,))),
    "truncate": lambda c: c.truncate(3, 0),
    "truncate shared": lambda c: c.truncate(1, 10),
    "free": lambda c: c.free(3),
    "free shared": lambda c: c.free(0),
    "fork": lambda c: c.fork(0, 65),
}


def shared_cache():
    cache = new_cache(12)
    cache.add(*tokens(make_rng(), 70))
    cache.fork(0)
    cache.free(cache.add(*tokens(make_rng(), 100)))
    cache.fork(0)
    cache.truncate(3, 0)
    cache.append(3, *tokens(make_rng(), 64))
    cache.free(cache.add(*tokens(make_rng(), 64)))
    return cache


def contents(cache):
    return {sequence: [x.tobytes() for x in cache.get(sequence)] for sequence in cache.lengths}


def assert_goes_on_working(cache):
    """Each page can be had again."""
    for sequence in cache.lengths:
        cache.append(sequence, *tokens(make_rng(2), 1))
        cache.free(sequence)
    cache.free(cache.add(*tokens(make_rng(2), 12 * 64)))
    assert_sound(cache)


@pytest.mark.parametrize("change", CHANGES)
def test_interrupted_at_any_line_it_is_whole_or_undone(change):
    call = CHANGES[change]
    cache = shared_cache()
    before = contents(cache)
    last = lines_traced(lambda: call(cache))
    after = contents(cache)
    assert_sound(cache)
    for line in range(1, last + 1):
        cache = shared_cache()
        with pytest.raises(KeyboardInterrupt):
            lines_traced(lambda cache=cache: call(cache), line)
        assert_sound(cache)
        assert contents(cache) in (before, after)
        assert_goes_on_working(cache)


# One thread makes a change; before each line of it another one forks. A child that hangs is ended after two minutes.
FORKED = """
import os, signal, sys, traceback, warnings
from concurrent.futures import ThreadPoolExecutor
import test_cache
from test_cache import CHANGES, assert_goes_on_working, assert_sound, contents, shared_cache

warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of any fork with threads
change = CHANGES[{change!r}]
cache = shared_cache()
before = contents(cache)
change(cache)
after = contents(cache)
cache = shared_cache()

def check_in_child():
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.alarm(3600)  # as oracle.HANG_SECONDS
    try:
        assert contents(cache) in (before, after)
        assert_sound(cache)
        assert_goes_on_working(cache)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def trace(frame, event, _):
    if frame.f_code.co_filename != test_cache.cache_module.__file__:
        return None
    if event == "line":
        assert forker.submit(check_in_child).result() == 0
    return trace

with ThreadPoolExecutor(1) as forker:
    sys.settrace(trace)
    change(cache)
    sys.settrace(None)
assert contents(cache) == after
assert_sound(cache)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("change", CHANGES)
def test_a_child_of_fork_has_a_change_of_another_thread_whole_or_not_at_all(change):
    run_script(FORKED.format(change=change))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_change_goes_on_in_the_child_that_its_own_thread_forked():
    """As a signal handler may do: parent and child both end with the whole change."""
    run_script(
        """
import os, sys
import test_cache
from test_cache import CHANGES, assert_sound, contents, shared_cache

cache = shared_cache()
CHANGES["append and copy"](cache)
after = contents(cache)
cache, children, is_child = shared_cache(), [], False

def trace(frame, event, _):
    global is_child
    if frame.f_code.co_filename != test_cache.cache_module.__file__:
        return None
    if event == "line" and not is_child:
        child = os.fork()
        is_child = child == 0
        children.append(child)
    return trace

sys.settrace(trace)
CHANGES["append and copy"](cache)
sys.settrace(None)
assert contents(cache) == after
assert_sound(cache)
if is_child:
    os._exit(0)
assert children and all(os.waitpid(child, 0)[1] == 0 for child in children)
""",
    )


def test_a_conversion_that_raises_changes_nothing():
    cache = new_cache(dtype=F16)
    sequence = cache.add(*tokens(make_rng(), 10))
    before = state_of(cache)
    key, value = tokens(make_rng(), 3)
    value[1, 2, 3] = 1e30
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        cache.append(sequence, key, value)
    assert state_of(cache) == before


# --- errors ---------------------------------------------------------------------------------------

# What is called on a cache of sequences 0 (10 tokens) and 1 (20 tokens), the exception, words of its message.
ERRORS = {
    "unknown": (lambda c: c.get(7), KeyError, ["7", "[0, 1]"]),
    "unknown negative": (lambda c: c.get(-1), KeyError, ["-1", "[0, 1]"]),
    "unknown in append": (lambda c: c.append([0, 9], *zeros(2)), KeyError, ["9", "[0, 1]"]),
    "unknown in fork": (lambda c: c.fork(2), KeyError, ["2", "[0, 1]"]),
    "unknown in truncate": (lambda c: c.truncate(2, 0), KeyError, ["2", "[0, 1]"]),
    "unknown in free": (lambda c: c.free(2), KeyError, ["2", "[0, 1]"]),
    "ids ragged": (lambda c: c.append([0, [1]], *zeros(2)), TypeError, ["sequences", "[0, [1]]", "ints"]),
    "copied": (copy.copy, TypeError, ["copied", "save and load"]),
    "copied deeply": (copy.deepcopy, TypeError, ["copied", "save and load"]),
    "pickled": (pickle.dumps, TypeError, ["pickled", "save and load"]),
    "unknown in attention": (lambda c: c.attention(np.zeros((2, 2, 1, 8), F32), [0, 5]), KeyError, ["5", "[0, 1]"]),
    "id float": (lambda c: c.get(1.0), TypeError, ["sequence", "1.0", "int"]),
    "id bool": (lambda c: c.free(True), TypeError, ["sequence", "True", "int"]),
    "id text": (lambda c: c.append("0", *zeros()), TypeError, ["sequences", "'0'", "list"]),
    "ids float": (lambda c: c.append([0.0, 1.0], *zeros(2)), TypeError, ["sequences", "[0.0, 1.0]", "ints"]),
    "ids bool": (lambda c: c.append(False, *zeros()), TypeError, ["sequences", "False", "ints"]),
    "ids 2-D": (lambda c: c.append([[0, 1]], *zeros(2)), TypeError, ["sequences", "[[0, 1]]", "1-D"]),
    "ids set": (lambda c: c.append({0, 1}, *zeros(2)), TypeError, ["sequences", "{0, 1}", "list"]),
    "twice": (lambda c: c.append([1, 0, 1], *zeros(3)), ValueError, ["sequences", "[1]", "different"]),
    "key int": (lambda c: c.append(0, np.zeros((2, 1, 8), int), zeros()[1]), TypeError, ["key", "int64", "floats"]),
    "value complex": (lambda c: c.append(0, zeros()[0], 1j * zeros()[1]), TypeError, ["value", "complex", "floats"]),
    "key object": (lambda c: c.add(object(), zeros()[1]), TypeError, ["key", "object"]),
    "key float8": (
        lambda c: c.append(0, zeros()[0].astype(ml_dtypes.float8_e4m3fn), zeros()[1]),
        TypeError,
        ["key", "float8_e4m3fn"],
    ),
    "key heads": (
        lambda c: c.append(0, np.zeros((3, 1, 8)), zeros()[1]),
        ValueError,
        ["key", "(3, 1, 8)", "(2, tokens, 8)"],
    ),
    "key dim": (lambda c: c.append(0, np.zeros((2, 1, 6)), zeros()[1]), ValueError, ["key", "(2, 1, 6)"]),
    "key axes": (lambda c: c.append(0, np.zeros(8), zeros()[1]), ValueError, ["key", "(8,)", "(2, tokens, 8)"]),
    "key of one for several": (
        lambda c: c.append([0, 1], *zeros()),
        ValueError,
        ["key", "(2, 1, 8)", "(2, 2, tokens, 8)"],
    ),
    "key of several for one": (lambda c: c.append(0, *zeros(1)), ValueError, ["key", "(1, 2, 1, 8)", "(2, tokens, 8)"]),
    "key batch": (lambda c: c.append([0, 1], *zeros(3)), ValueError, ["key", "(3, 2, 1, 8)", "(2, 2, tokens, 8)"]),
    "value dim": (lambda c: c.append(0, zeros()[0], np.zeros((2, 1, 8))), ValueError, ["value", "(2, 1, 6)"]),
    "value tokens": (
        lambda c: c.append(0, zeros()[0], np.zeros((2, 4, 6))),
        ValueError,
        ["value", "(2, 4, 6)", "(2, 1, 6)"],
    ),
    "add key alone": (lambda c: c.add(zeros()[0]), ValueError, ["together", "value is None"]),
    "add value alone": (lambda c: c.add(value=zeros()[1]), ValueError, ["together", "key is None"]),
    "fork too long": (lambda c: c.fork(0, 11), ValueError, ["length", "0 to 10", "11"]),
    "fork negative": (lambda c: c.fork(0, -1), ValueError, ["length", "0 to 10", "-1"]),
    "truncate too long": (lambda c: c.truncate(1, 21), ValueError, ["length", "0 to 20", "21"]),
    "truncate float": (lambda c: c.truncate(1, 2.0), TypeError, ["length", "2.0", "int"]),
    "query of one": (lambda c: c.attention(np.zeros((1, 2, 1, 8), F32), 0), ValueError, ["query", "(1, 2, 1, 8)"]),
    "weights of packed": (
        lambda c: c.attention(np.zeros((1, 2, 8), F32), [0], cu_seqlens_q=[0, 1], return_weights=True),
        ValueError,
        ["return_weights and cu_seqlens_q cannot be given together"],
    ),
    "cu_seqlens_q of one": (
        lambda c: c.attention(np.zeros((1, 2, 8), F32), 0, cu_seqlens_q=[0, 1]),
        ValueError,
        ["cu_seqlens_q", "list"],
    ),
    "query batch": (lambda c: c.attention(np.zeros((3, 2, 1, 8), F32), [0, 1]), ValueError, ["query", "3", "2"]),
    "query float64": (lambda c: c.attention(np.zeros((2, 1, 8)), 0), TypeError, ["query", "float64", "float32"]),
    "query dim": (lambda c: c.attention(np.zeros((2, 1, 7), F32), 0), ValueError, ["query", "(2, 1, 7)", "tokens, 8)"]),
    "out shape": (
        lambda c: c.attention(np.zeros((2, 1, 8), F32), 0, out=np.zeros((2, 1, 8), F32)),
        ValueError,
        ["out has shape (2, 1, 8)", "(2, 1, 6)"],
    ),
    "out list": (lambda c: c.attention(np.zeros((2, 1, 8), F32), 0, out=[0.0]), TypeError, ["out", "list"]),
}


def zeros(*batch):
    return np.zeros((*batch, HEADS, 1, DIM), F32), np.zeros((*batch, HEADS, 1, DIM_V), F32)


def assert_raises(exception, words, call):
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value!s} does not say {missing}"


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case):
    call, exception, words = ERRORS[case]
    cache = new_cache()
    for count in (10, 20):
        cache.add(*tokens(make_rng(), count))
    before = state_of(cache)
    assert_raises(exception, words, lambda: call(cache))
    assert state_of(cache) == before


def test_many_sequences_are_not_all_listed():
    cache = new_cache()
    for _ in range(50):
        cache.add()
    assert_raises(KeyError, ["50", "19, ..."], lambda: cache.get(50))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("name", ["key", "value"])
def test_int8_refuses_what_is_not_finite(name, bad):
    cache = new_cache(dtype=I8)
    sequence = cache.add(*tokens(make_rng(), 5))
    before = state_of(cache)
    arrays = dict(zip(("key", "value"), tokens(make_rng(), 5, F64), strict=True))
    arrays[name][1, 2, 3] = bad
    assert_raises(ValueError, [name, "NaN", "int8"], lambda: cache.append(sequence, **arrays))
    assert state_of(cache) == before


def read_only(array):
    array.flags.writeable = False
    return array


NEW_ERRORS = {
    "neither": ({"num_pages": None}, ValueError, ["num_pages", "store"]),
    "both": ({"store": np.zeros(10**5)}, ValueError, ["num_pages", "store"]),
    "no pages": ({"num_pages": 0}, ValueError, ["num_pages", "0"]),
    "pages float": ({"num_pages": 1.0}, TypeError, ["num_pages", "1.0"]),
    "no heads": ({"num_kv_heads": 0}, ValueError, ["num_kv_heads", "0"]),
    "head_dim": ({"head_dim": -1}, ValueError, ["head_dim", "-1"]),
    "head_dim large": ({"head_dim": 513}, ValueError, ["head_dim must be from 1 to 512, but is 513"]),
    "head_dim_v large": ({"head_dim_v": 513}, ValueError, ["head_dim_v must be from 1 to 512, but is 513"]),
    "head_dim float": ({"head_dim": 8.0}, TypeError, ["head_dim", "8.0"]),
    "head_dim_v": ({"head_dim_v": 0}, ValueError, ["head_dim_v", "0"]),
    "page_size zero": ({"page_size": 0}, ValueError, ["page_size", "64", "0"]),
    "page_size": ({"page_size": 96}, ValueError, ["page_size", "64", "96"]),
    "page_size float": ({"page_size": 64.0}, TypeError, ["page_size", "64.0"]),
    "dtype float64": ({"dtype": np.float64}, TypeError, ["dtype", "float64", "bfloat16"]),
    "dtype byte-swapped": ({"dtype": ">f4"}, TypeError, ["dtype", ">f4"]),
    "dtype unknown": ({"dtype": "float7"}, TypeError, ["dtype", "float7", "bfloat16"]),
    "store list": ({"num_pages": None, "store": [0.0]}, TypeError, ["store", "list"]),
    "store object": ({"num_pages": None, "store": np.empty(10**4, object)}, TypeError, ["store", "object"]),
    "store small": ({"num_pages": None, "store": np.zeros(7167, np.uint8)}, ValueError, ["store", "7167", "7168"]),
    "store empty": ({"num_pages": None, "store": np.zeros((0, 5))}, ValueError, ["store", "0 bytes", "7168"]),
    "store strided": ({"num_pages": None, "store": np.zeros((300, 300))[:, ::2]}, ValueError, ["store", "contiguous"]),
    "store read-only": ({"num_pages": None, "store": read_only(np.zeros(10**4))}, ValueError, ["store", "read-only"]),
    "store unaligned": ({"num_pages": None, "store": np.zeros(10**4, np.uint8)[2:]}, ValueError, ["store", "4 bytes"]),
}


@pytest.mark.parametrize("case", NEW_ERRORS)
def test_bad_cache(case):
    spoiled, exception, words = NEW_ERRORS[case]
    arguments = {
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "head_dim_v": DIM_V,
        "page_size": 64,
        "num_pages": 2,
        **spoiled,
    }
    assert_raises(exception, words, lambda: KVCache(**arguments))


def test_bytes_per_page_refuses_the_same():
    with pytest.raises(ValueError, match="page_size"):
        KVCache.bytes_per_page(1, 8, page_size=65)
    with pytest.raises(TypeError, match="dtype"):
        KVCache.bytes_per_page(1, 8, dtype=np.int16)


# --- the store ------------------------------------------------------------------------------------


@each_stored
@pytest.mark.parametrize(("dim", "dim_v", "page_size"), [(1, 1, 64), (7, 3, 64), (64, 128, 128), (5, 5, 192)])
def test_layout(dtype, dim, dim_v, page_size):
    cache = KVCache(3, dim, head_dim_v=dim_v, dtype=dtype, page_size=page_size, num_pages=2)
    geometry = {"head_dim_v": dim_v, "dtype": dtype, "page_size": page_size}
    rows = 3 * page_size
    expected = rows * (dim + dim_v) * dtype.itemsize + (2 * rows * 4 if dtype == I8 else 0)
    assert cache.page_bytes == KVCache.bytes_per_page(3, dim, **geometry) == expected
    assert cache.nbytes == 2 * expected
    assert expected % 64 == 0
    assert cache.key_pages.shape == (2, 3, page_size, dim)
    assert cache.value_pages.shape == (2, 3, page_size, dim_v)
    views = [cache.key_pages, cache.value_pages]
    if dtype == I8:
        assert cache.key_scales.shape == cache.value_scales.shape == (2, 3, page_size)
        assert cache.key_scales.dtype == F32
        views += [cache.key_scales, cache.value_scales]
    else:
        assert cache.key_scales is cache.value_scales is None
    offset = cache.key_pages.ctypes.data
    for view in views:
        assert view.ctypes.data == offset
        assert offset % 64 == 0
        assert view.strides[0] == cache.page_bytes
        assert view[0].flags.c_contiguous
        offset += view[0].nbytes


STORES = [np.float64, np.uint8, BF16, "datetime64[s]", [("a", "u1"), ("b", "f4")]]


@pytest.mark.parametrize("store_dtype", STORES, ids=str)
def test_any_contiguous_store(store_dtype):
    dtype = np.dtype(store_dtype)
    page_bytes = KVCache.bytes_per_page(HEADS, DIM, head_dim_v=DIM_V, page_size=64)
    store = np.empty((2, -(-2 * page_bytes // dtype.itemsize)), dtype)
    cache = new_cache(None, store=store)
    assert cache.num_pages == store.nbytes // page_bytes
    arrays = tokens(make_rng(), cache.num_pages * 64)
    assert_holds(cache, cache.add(*arrays), *arrays)
    assert np.shares_memory(cache.key_pages, store)


@each_stored
def test_memmap(tmp_path, dtype):
    """A store of 64 GiB: what is not in use is never touched, nor are there lists of its pages."""
    path = tmp_path / "pages"
    try:
        store = np.memmap(path, np.uint8, "w+", shape=(2**36,))
    except OSError:
        pytest.skip("no sparse files of this size here")
    cache = KVCache(HEADS, DIM, head_dim_v=DIM_V, dtype=dtype, page_size=64 * 1024, store=store)
    first, second = (cache.add(*tokens(make_rng(i), 100)) for i in range(2))
    third = cache.fork(first)
    cache.append([first, second, third], *tokens(make_rng(), 3, batch=(3,)))
    assert cache.lengths == {0: 103, 1: 103, 2: 103}
    assert cache.pages_free == cache.num_pages - 3
    cache.free(first)
    cache.get(second)
    assert path.stat().st_blocks * 512 <= 4 * cache.page_bytes


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("given_dtype", [F16, BF16, F32, F64, np.dtype(">f4")], ids=str)
def test_converted_as_numpy_converts(dtype, given_dtype):
    cache = new_cache(dtype=dtype)
    rng = make_rng()
    key = normal(rng, (HEADS, 200, 2 * DIM), given_dtype)[:, ::-2, 1::2]
    value = normal(rng, (100, DIM_V, HEADS), given_dtype).transpose(2, 0, 1)
    assert_holds(cache, cache.add(key, value), key.astype(dtype), value.astype(dtype))


def test_lists_are_arrays():
    cache = KVCache(1, 2, num_pages=1)
    sequence = cache.add([[[1.0, 2.0]]], [[[3.0, 4.0]]])
    np.testing.assert_array_equal(cache.get(sequence)[1], [[[3.0, 4.0]]])


# --- int8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_dtype", [F32, F16, BF16, F64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e4])
def test_int8_is_off_by_half_a_step_at_most(given_dtype, magnitude):
    rng = make_rng()
    cache = KVCache(3, 32, dtype=I8, page_size=64, num_pages=4)
    given = [(normal(rng, (3, 150, 32), F64) * magnitude).astype(given_dtype) for _ in range(2)]
    sequence = cache.add(*given)
    for x, got in zip(given, cache.get(sequence), strict=True):
        assert got.dtype == F32
        x = x.astype(F32)
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        bound = scale / 2 + 2**-22 * np.abs(x).max()
        assert (np.abs(x - got) <= bound).all()
        assert np.abs(got).max() == pytest.approx(np.abs(x).max())
    (pages,) = page_numbers(cache, sequence)
    stored = cache.key_pages[pages[0]]
    assert stored.max() == 127 or stored.min() == -127
    assert_same_bits(cache.key_scales[pages[0]], np.abs(given[0].astype(F32)).max(axis=-1)[:, :64] / np.float32(127))


def test_int8_of_zeros_and_of_the_smallest_numbers():
    cache = KVCache(1, 2, dtype=I8, num_pages=1)
    smallest = float(np.finfo(F32).smallest_subnormal)
    key = np.array([[[0.0, -0.0], [smallest, 0.0], [180 * smallest, -180 * smallest]]])
    sequence = cache.add(key, key)
    got = cache.get(sequence)[0]
    np.testing.assert_array_equal(got[0, :2], 0.0)
    np.testing.assert_array_equal(np.sign(got[0, 2]), [1.0, -1.0])


def test_int8_fork_takes_the_scales_along():
    cache = new_cache(dtype=I8)
    parent = cache.add(*tokens(make_rng(), 30))
    before = [x.copy() for x in cache.get(parent)]
    child = cache.fork(parent)
    cache.append(child, *tokens(make_rng(1), 1))
    for got, whole in zip(cache.get(child), before, strict=True):
        np.testing.assert_array_equal(got[:, :30], whole)


# --- files ----------------------------------------------------------------------------------------


def family(dtype, store=None):
    """A cache with a fork, an empty sequence, a gap in ids and pages in use that are not the first ones."""
    cache = new_cache(10 if store is None else None, dtype=dtype, store=store)
    rng = make_rng()
    gone = cache.add(*tokens(rng, 130))
    parent = cache.add(*tokens(rng, 100))
    child = cache.fork(parent, 90)
    cache.add()
    cache.append(child, *tokens(rng, 2))
    cache.free(gone)
    cache.free(cache.add())  # The highest id is one that is gone, too.
    return cache


def assert_same_caches(loaded, cache):
    assert loaded.lengths == cache.lengths
    assert loaded.pages_free - loaded.num_pages == cache.pages_free - cache.num_pages
    assert loaded.dtype == cache.dtype
    for sequence in cache.lengths:
        assert_holds(loaded, sequence, *cache.get(sequence))


@each_stored
def test_save_and_load(tmp_path, dtype):
    cache = family(dtype)
    cache.save(tmp_path / "cache.npz")
    loaded = KVCache.load(tmp_path / "cache.npz")
    assert loaded.num_pages == 10
    assert_same_caches(loaded, cache)

    # Shared pages are shared still, copies are made still, and no id comes again.
    (parent, child, empty) = loaded.lengths
    (parent_first, _), (child_first, _) = page_numbers(loaded, parent, child)
    assert parent_first == child_first
    assert loaded.add() == cache.add()
    before = [x.copy() for x in loaded.get(parent)]
    loaded.truncate(child, 10)
    loaded.append([child, empty], *tokens(make_rng(3), 60, batch=(2,)))
    assert_holds(loaded, parent, *before)
    for sequence in loaded.lengths:
        loaded.free(sequence)
    assert loaded.pages_free == 10


@each_stored
def test_load_into_a_store(tmp_path, dtype):
    cache = family(dtype)
    cache.save(tmp_path / "cache.npz")
    store = np.empty(5 * cache.page_bytes, np.uint8)
    loaded = KVCache.load(tmp_path / "cache.npz", store=store)
    assert loaded.num_pages == 5
    assert np.shares_memory(loaded.key_pages, store)
    assert_same_caches(loaded, cache)
    assert_same_caches(KVCache.load(tmp_path / "cache.npz", num_pages=3), cache)


@each_stored
def test_save_without_the_pages(tmp_path, dtype):
    page_bytes = KVCache.bytes_per_page(HEADS, DIM, head_dim_v=DIM_V, dtype=dtype, page_size=64)
    store = np.memmap(tmp_path / "pages", np.uint8, "w+", shape=(12 * page_bytes,))
    cache = family(dtype, store)
    cache.save(tmp_path / "cache", pages=False)
    store.flush()
    assert (tmp_path / "cache.npz").stat().st_size < 8192

    again = np.memmap(tmp_path / "pages", np.uint8, "r+")
    loaded = KVCache.load(tmp_path / "cache.npz", store=again)
    assert_same_caches(loaded, cache)
    assert page_numbers(loaded, *loaded.lengths) == page_numbers(cache, *cache.lengths)
    # The pages in the gap are free, and can be had.
    loaded.add(*tokens(make_rng(5), loaded.pages_free * 64))
    assert loaded.pages_free == 0
    for sequence in cache.lengths:
        assert_holds(loaded, sequence, *cache.get(sequence))


@pytest.mark.parametrize("pages", [True, False])
def test_save_an_empty_cache(tmp_path, pages):
    cache = new_cache()
    cache.save(tmp_path / "cache.npz", pages=pages)
    loaded = KVCache.load(tmp_path / "cache.npz", store=np.empty(10**5, np.uint8))
    assert len(loaded) == 0
    assert loaded.pages_free == loaded.num_pages


def test_save_to_an_open_file(tmp_path):
    cache = family(F32)
    with open(tmp_path / "cache", "w+b") as file:
        cache.save(file)
        file.seek(0)
        assert_same_caches(KVCache.load(file), cache)


@pytest.mark.parametrize("name", ["plain", "with.dot", "full.npz"])
def test_load_by_the_name_that_save_was_given(tmp_path, name):
    cache = family(F32)
    cache.save(str(tmp_path / name))
    assert_same_caches(KVCache.load(str(tmp_path / name)), cache)


def test_load_of_a_file_that_was_renamed(tmp_path):
    cache = family(F32)
    cache.save(tmp_path / "full.npz")
    (tmp_path / "full.npz").rename(tmp_path / "renamed")
    assert_same_caches(KVCache.load(tmp_path / "renamed"), cache)


def test_a_failed_save_leaves_the_file_before(tmp_path, monkeypatch):
    cache = family(F32)
    cache.save(tmp_path / "cache.npz")

    def fails(stream, **_):
        stream.write(b"PK")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", fails)
        with pytest.raises(OSError, match="No space left"):
            new_cache().save(tmp_path / "cache.npz")
    assert_same_caches(KVCache.load(tmp_path / "cache.npz"), cache)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.npz"]
    with pytest.raises(FileNotFoundError) as caught:
        cache.save(tmp_path / "nowhere" / "cache.npz")
    assert caught.value.filename == str(tmp_path / "nowhere" / "cache.npz")


def damaged(path, **fields):
    with np.load(path) as saved:
        np.savez(path, **{**saved, **fields})


# What is changed in the file of `family`, keywords of load, and words of the ValueError.
LOAD_ERRORS = {
    "pages few": ({}, {"num_pages": 2}, ["pages up to 2", "only 2 pages"]),
    "store small": ({}, {"store": np.zeros(7168, np.uint8)}, ["pages up to 2", "only 1 pages"]),
    "both": ({}, {"num_pages": 9, "store": np.zeros(7168)}, ["num_pages", "store"]),
    "lengths": ({"lengths": np.array([100, 92, 64])}, {}, ["damaged", "lengths"]),
    "lengths dtype": ({"lengths": np.array([100.0, 92.0, 0.0])}, {}, ["damaged", "lengths"]),
    "lengths negative": ({"lengths": np.array([100, 92, -1])}, {}, ["damaged", "lengths"]),
    "ids twice": ({"ids": np.array([1, 1, 3])}, {}, ["damaged", "ids"]),
    "ids negative": ({"ids": np.array([-1, 1, 3])}, {}, ["damaged", "ids"]),
    "next_id": ({"next_id": np.array(3)}, {}, ["damaged", "ids"]),
    "next_id float": ({"next_id": np.array(np.nan)}, {}, ["damaged", "next_id", "nan"]),
    "next_id axes": ({"next_id": np.array([4, 5])}, {}, ["damaged", "next_id", "[4 5]"]),
    "geometry short": ({"geometry": np.array([2, 8, 6])}, {}, ["damaged", "geometry", "[2 8 6]"]),
    "geometry float": ({"geometry": np.array([2.0, 8, 6, 64, 10])}, {}, ["damaged", "geometry"]),
    "geometry negative": ({"geometry": np.array([2, -8, 6, 64, 10])}, {}, ["damaged", "geometry", "-8"]),
    "lengths wrap": (
        {
            "ids": np.arange(128),
            "lengths": np.full(128, 2**63 - 1),
            "page_table": np.zeros(0, int),
            "next_id": np.array(128),
        },
        {},
        ["damaged", "lengths"],
    ),
    "page negative": ({"page_table": np.array([0, 1, -1, 2])}, {}, ["damaged", "negative"]),
    "page too high": ({"page_table": np.array([0, 1, 10, 2])}, {}, ["pages up to 10", "only 10"]),
    "pages shape": ({"pages": np.zeros((3, 100), np.uint8)}, {}, ["damaged", "(3, 100)"]),
    "heads none": ({"geometry": np.array([0, 8, 6, 64, 10])}, {}, ["num_kv_heads", "0"]),
    "heads huge": ({"geometry": np.array([2**62, 8, 6, 64, 10])}, {}, ["damaged", "(3, 7168)"]),
    "num_pages huge": ({"geometry": np.array([2, 8, 6, 64, 2**62])}, {}, []),
    "dtype": ({"dtype": np.array("float64")}, {}, ["damaged", "float64"]),
    "dtype no name": ({"dtype": np.zeros(3)}, {}, ["damaged", "dtype"]),
    "pages axes": ({"pages": np.zeros((3, 1, 7168), np.uint8)}, {}, ["damaged", "(3, 1, 7168)"]),
    "pages no array": ({"pages": np.array(5, np.uint8)}, {}, ["damaged", "shape ()"]),
    "pages too few": ({"page_table": np.array([0, 1, 0, 5])}, {}, ["damaged", "3 pages", "name 6"]),
}


@pytest.mark.parametrize("case", LOAD_ERRORS)
def test_bad_load(tmp_path, case):
    fields, keywords, words = LOAD_ERRORS[case]
    path = tmp_path / "cache.npz"
    family(F32).save(path)
    damaged(path, **fields)
    assert_raises(ValueError, words, lambda: KVCache.load(path, **keywords))


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 cut off"])
def test_load_of_what_save_did_not_write(tmp_path, content):
    path = tmp_path / "other.npz"
    np.savez(path, geometry=np.zeros(5))
    assert_raises(ValueError, ["not a saved KVCache", "lacks dtype, next_id"], lambda: KVCache.load(path))
    np.save(tmp_path / "array.npy", np.zeros(5))
    assert_raises(ValueError, ["not a saved KVCache", "not a zip"], lambda: KVCache.load(tmp_path / "array.npy"))
    path.write_bytes(content)
    assert_raises(ValueError, ["not a saved KVCache"], lambda: KVCache.load(path))
    with pytest.raises(FileNotFoundError):
        KVCache.load(tmp_path / "nothing.npz")


def bytes_of_family(dtype):
    file = io.BytesIO()
    family(dtype).save(file)
    return file.getvalue()


def load_bytes(content, **keywords):
    """Load what lies in a true file, of which the system has its own opinion."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        return KVCache.load(file, **keywords)


def places_in(content):
    """Where something begins in an archive: the headers of its members, its directory and its end."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [0, *(member.header_offset for member in archive.infolist()), archive.start_dir, len(content) - 22]


DAMAGED = {dtype.name: bytes_of_family(dtype) for dtype in (F32, I8)}


@st.composite
def damages(draw):
    """Return the bytes of a saved cache, damaged in up to four places."""
    content = bytearray(DAMAGED[draw(st.sampled_from(sorted(DAMAGED)))])
    last = len(content) - 1
    near = st.builds(
        lambda begin, more: min(begin + more, last), st.sampled_from(places_in(content)), st.integers(0, 250)
    )
    for _ in range(draw(st.integers(1, 4))):
        place, kind = draw(near | st.integers(0, last)), draw(st.sampled_from(["flip", "cut", "write", "insert"]))
        if kind == "flip" and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place : draw(st.sampled_from([place + 1, place + 60, len(content)]))]
        else:
            written = draw(st.binary(min_size=1, max_size=8))
            content[place : place + (len(written) if kind == "write" else 0)] = written
    return bytes(content)


@pytest.mark.slow
@settings(max_examples=1500)
@given(content=damages())
def test_load_of_a_damaged_file_is_a_value_error_or_the_same_cache(content):
    """The same, for what is damaged may be a date."""
    try:
        loaded = load_bytes(content)
    except ValueError:
        return
    assert_same_caches(loaded, family(loaded.dtype))


DESCRIPTION = {"descr": "<i8", "fortran_order": False, "shape": (3,)}

# The header of an array of the file, which is followed by 24 bytes of data, and words of the ValueError.
HEADERS = {
    "shape huge": (str({**DESCRIPTION, "shape": (1 << 50,)}), "cannot have shape"),
    "shape beyond all": (str({**DESCRIPTION, "shape": (1 << 40, 1 << 40)}), "cannot have shape"),
    "shape negative": (str({**DESCRIPTION, "shape": (-1,)}), "damaged"),
    "shape less": (str({**DESCRIPTION, "shape": (1,)}), "more bytes"),
    "shape more": (str({**DESCRIPTION, "shape": (4,)}), "damaged"),
    "item huge": (str({**DESCRIPTION, "descr": f"|V{(1 << 31) - 1}"}), "cannot have shape"),
    "item of nothing": (str({**DESCRIPTION, "descr": "|V0", "shape": (1 << 50,)}), "damaged"),
    "objects": (str({**DESCRIPTION, "descr": "|O"}), "damaged"),
    "no dtype": (str({**DESCRIPTION, "descr": "what"}), "damaged"),
    "no dict": ("[1, 2]", "damaged"),
    "other keys": ("{'descr': '<i8'}", "damaged"),
    "open bracket": ("{'descr': (", "damaged"),
    "open quotes": ("{'descr': " + "'" * 3, "damaged"),
    "no Python": ("{'descr' $", "damaged"),
    "nested brackets": ("(" * 4000 + ")" * 4000, "damaged"),
    "nested signs": ("-" * 9000 + "1", "damaged"),
    "long": ("{" + " " * 20000 + "}", "damaged"),
    "empty": ("", "damaged"),
    "not ASCII": ("{'descr': 'é'}", "damaged"),
}


def rewritten(content, change, compression=zipfile.ZIP_STORED, **more):
    """The archive with each member, and more of them, made anew by change(name, bytes)."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(file, "w", compression) as archive:
        for member in whole.namelist():
            archive.writestr(member, change(member, whole.read(member)))
        for member, data in more.items():
            archive.writestr(f"{member}.npy", data)
    return file.getvalue()


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("name", ["lengths.npy", "pages.npy"])
def test_load_of_a_replaced_header(case, name):
    header, words = HEADERS[case]
    text = header.encode("latin1")
    start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    content = rewritten(DAMAGED["float32"], lambda member, data: start + data[-24:] if member == name else data)
    with pytest.raises(ValueError, match=words):
        load_bytes(content)


# How an archive is rewritten.
NEVER_WRITTEN = {
    "compressed": {"change": lambda _, data: data, "compression": zipfile.ZIP_DEFLATED},
    "version": {"change": lambda _, data: data[:6] + b"\x02" + data[7:]},
    "unknown": {"change": lambda _, data: data, "sinks": b""},
}


@pytest.mark.parametrize("case", NEVER_WRITTEN)
def test_load_of_an_archive_that_save_never_writes(case):
    with pytest.raises(ValueError, match=r"save (does not write|writes)"):
        load_bytes(rewritten(DAMAGED["float32"], **NEVER_WRITTEN[case]))


def test_load_of_no_file():
    with pytest.raises(TypeError, match="file must be a str, a path or a binary file, not list"):
        KVCache.load([])
    with pytest.raises(IsADirectoryError):
        KVCache.load(os.curdir)


@pytest.mark.parametrize("keywords", [{}, {"num_pages": 10}], ids=str)
def test_load_without_pages_needs_the_store(tmp_path, keywords):
    path = tmp_path / "cache.npz"
    family(F32).save(path, pages=False)
    assert_raises(ValueError, ["pages=False", "store"], lambda: KVCache.load(path, **keywords))
    small = np.zeros(2 * 7168, np.uint8)
    assert_raises(ValueError, ["pages up to", "only 2 pages"], lambda: KVCache.load(path, store=small))


def test_load_of_bfloat16_before_ml_dtypes(tmp_path):
    path = tmp_path / "cache.npz"
    family(BF16).save(path)
    printed = run_script(
        f"from fastattn.cache import KVCache\ntry: KVCache.load({str(path)!r})\nexcept TypeError as e: print(e)"
    )
    assert "bfloat16" in printed
    assert "imported" in printed


# --- threads --------------------------------------------------------------------------------------


def test_threads_that_append_to_sequences_of_their_own():
    """Readers of other sequences, and of `lengths`, run meanwhile."""
    rng = make_rng()
    cache = new_cache(200)
    prompt = tokens(rng, 40)
    parent = cache.add(*prompt)
    steps = [tokens(rng, 3) for _ in range(50)]
    start = threading.Barrier(8)

    def decode(_):
        sequence = cache.fork(parent)
        start.wait()
        for step in steps:
            cache.append(sequence, *step)
            assert cache.lengths[sequence] == cache.get(sequence)[0].shape[1]
            cache.free(cache.fork(sequence, 10))
        return sequence

    with ThreadPoolExecutor(8) as executor:
        sequences = list(executor.map(decode, range(8)))
    expected = [np.concatenate(parts, axis=1) for parts in zip(prompt, *steps, strict=True)]
    for sequence in sequences:
        assert_holds(cache, sequence, *expected)
    assert_holds(cache, parent, *prompt)
    assert cache.pages_free == 200 - 1 - 8 * 3


# --- attention ------------------------------------------------------------------------------------

Q_HEADS = 6
# (dtype of query and out, dtype of the cache)
ATTENDED = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]
ATTENDED_IDS = [f"{q.name}-{kv.name}" for q, kv in ATTENDED]
each_attended = pytest.mark.parametrize("dtypes", ATTENDED, ids=ATTENDED_IDS)
LENGTHS = [1, 64, 65, 130, 200, 37, 511]


def slopes():
    return np.linspace(0.05, 0.5, Q_HEADS).astype(F32)


KEYWORDS = {
    "plain": {},
    "not causal": {"causal": False},
    "scale": {"scale": 0.3},
    "window": {"window": (70, 0)},
    "window right": {"window": (20, 5), "causal": False},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": np.linspace(-1, 1, Q_HEADS).astype(F32)},
    "alibi": {"alibi_slopes": slopes()},
    "offset": {"query_offset": 30},
    "threads": {"num_threads": 3},
    "all": {"softcap": 3.0, "window": (90, 0), "alibi_slopes": slopes(), "sinks": np.zeros(Q_HEADS, F32)},
}
each_keywords = pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)


def filled(dtype, lengths=LENGTHS, page_size=64, head_dim_v=48):
    """A cache whose sequences were appended to in turns, so that their pages lie among each other."""
    rng = make_rng(len(lengths))
    pages = sum(-(-length // page_size) for length in lengths)
    cache = KVCache(HEADS, 32, head_dim_v=head_dim_v, dtype=dtype, page_size=page_size, num_pages=pages + 1)
    ids = [cache.add() for _ in lengths]
    while any(cache.lengths[sequence] < length for sequence, length in zip(ids, lengths, strict=True)):
        for sequence, length in zip(ids, lengths, strict=True):
            count = min(50, length - cache.lengths[sequence])
            shape = (HEADS, count, head_dim_v)
            cache.append(sequence, normal(rng, (HEADS, count, 32), F32), normal(rng, shape, F32))
    return cache, ids


def queries(seqlen_q, dtype, batch=()):
    return normal(make_rng(seqlen_q), (*batch, Q_HEADS, seqlen_q, 32), dtype)


def expected_attention(cache, sequence, query, keywords):
    return fastattn.attention(query, *cache.get(sequence), return_lse=True, **{"causal": True, **keywords})


@pytest.mark.isa
@each_attended
@each_keywords
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
def test_same_bits_as_contiguous(dtypes, keywords, seqlen_q):
    cache, ids = filled(dtypes[1])
    query = queries(seqlen_q, dtypes[0], (len(ids),))
    out, lse = cache.attention(query, ids, return_lse=True, **keywords)
    assert_same_bits(cache.attention(query, ids, **keywords), out)
    for index, sequence in enumerate(ids):
        expected, expected_lse = expected_attention(cache, sequence, query[index], keywords)
        assert_same_bits(out[index], expected, f"out of {sequence}")
        assert_same_bits(lse[index], expected_lse, f"lse of {sequence}")


@pytest.mark.isa
@each_attended
@each_keywords
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
def test_weights_have_the_same_bits_as_contiguous(dtypes, keywords, seqlen_q):
    cache, ids = filled(dtypes[1])
    query = queries(seqlen_q, dtypes[0], (len(ids),))
    keywords = {"causal": True, **keywords}
    out, lse, weights = cache.attention(query, ids, return_lse=True, return_weights=True, **keywords)
    assert weights.shape == (*query.shape[:-1], max(LENGTHS))
    for index, (sequence, length) in enumerate(zip(ids, LENGTHS, strict=True)):
        extras = {"return_lse": True, "return_weights": True}
        expected = fastattn.attention(query[index], *cache.get(sequence), **keywords, **extras)
        results = (out[index], lse[index], weights[index, ..., :length])
        for got, wanted, name in zip(results, expected, ("out", "lse", "weights"), strict=True):
            assert_same_bits(got, wanted, f"{name} of {sequence}")
        np.testing.assert_array_equal(weights[index, ..., length:], 0)
        alone = cache.attention(query[index], sequence, return_weights=True, **keywords)
        assert_same_bits(alone[0], expected[0])
        assert_same_bits(alone[1], expected[2])


def test_weights_of_an_int8_cache():
    cache, ids = filled(I8)
    query = queries(3, F32)
    out, weights = cache.attention(query, ids[4], return_weights=True)
    expected = fastattn.attention(query, *cache.get(ids[4]), causal=True, return_weights=True)
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(weights, expected[1], rtol=0, atol=1e-6)


@pytest.mark.isa
@each_attended
@each_keywords
def test_same_bits_of_packed_queries(dtypes, keywords):
    cache, ids = filled(dtypes[1])
    counts = [1, 4, 1, 0, 33, 1, 80]
    cu_seqlens_q = np.concatenate([[0], np.cumsum(counts)])
    query = normal(make_rng(), (cu_seqlens_q[-1], Q_HEADS, 32), dtypes[0])
    out, lse = cache.attention(query, ids, cu_seqlens_q=cu_seqlens_q, return_lse=True, **keywords)
    assert out.shape == (cu_seqlens_q[-1], Q_HEADS, 48)
    for sequence, begin, end in zip(ids, cu_seqlens_q, cu_seqlens_q[1:], strict=False):
        mine = query[begin:end].swapaxes(0, 1)
        expected, expected_lse = expected_attention(cache, sequence, mine, keywords)
        assert_same_bits(out[begin:end].swapaxes(0, 1), expected, f"out of {sequence}")
        assert_same_bits(lse[begin:end].swapaxes(0, 1), expected_lse, f"lse of {sequence}")


@pytest.mark.isa
@each_attended
@pytest.mark.parametrize("seqlen_q", [1, 9])
@pytest.mark.parametrize("page_size", [64, 128, 256, 4096])
def test_one_sequence(dtypes, seqlen_q, page_size):
    cache, ids = filled(dtypes[1], page_size=page_size)
    query = queries(seqlen_q, dtypes[0])
    for sequence in ids:
        out, lse = cache.attention(query, sequence, return_lse=True)
        expected, expected_lse = expected_attention(cache, sequence, query, {})
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse)
        given = np.full_like(out, 7)
        assert cache.attention(query, sequence, out=given) is given
        assert_same_bits(given, expected)
        result, lse = cache.attention(query, sequence, out=given, return_lse=True)
        assert result is given
        assert_same_bits(lse, expected_lse)


@pytest.mark.parametrize("heads", [2, 4, 16])
def test_groups_of_heads(heads):
    cache, ids = filled(F32)
    query = normal(make_rng(heads), (len(ids), heads, 1, 32), F32)
    out = cache.attention(query, ids)
    for index, sequence in enumerate(ids):
        assert_same_bits(out[index], expected_attention(cache, sequence, query[index], {})[0])


def test_a_sequence_more_than_once_and_the_same_prefix():
    cache, ids = filled(F32)
    child = cache.fork(ids[4], 150)
    several = [ids[4], child, ids[4], ids[0]]
    query = queries(1, F32, (4,))
    out = cache.attention(query, several)
    for index, sequence in enumerate(several):
        assert_same_bits(out[index], expected_attention(cache, sequence, query[index], {})[0])


@pytest.mark.parametrize("offsets", [[0, 100, 5, 129, 199, -3, 300]], ids=["each"])
def test_an_offset_for_each_sequence(offsets):
    cache, ids = filled(F32)
    query = queries(4, F32, (len(ids),))
    out = cache.attention(query, ids, query_offset=offsets)
    for index, sequence in enumerate(ids):
        expected, _ = expected_attention(cache, sequence, query[index], {"query_offset": offsets[index]})
        assert_same_bits(out[index], expected)


@each_stored
def test_sequences_of_no_tokens(dtype):
    cache, ids = filled(dtype, [0, 70, 0])
    query = queries(2, F32, (3,))
    out, lse = cache.attention(query, ids, return_lse=True)
    for index in (0, 2):
        np.testing.assert_array_equal(out[index], 0.0)
        np.testing.assert_array_equal(lse[index], -np.inf)
    assert np.isfinite(lse[1]).all()
    out, lse = cache.attention(query[0], ids[0], sinks=np.full(Q_HEADS, 2.0, F32), return_lse=True)
    np.testing.assert_array_equal(out, 0.0)
    np.testing.assert_array_equal(lse, 2.0)
    assert cache.attention(query[:0], []).shape == (0, Q_HEADS, 2, 48)


@pytest.mark.isa
@each_keywords
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
@pytest.mark.parametrize("query_dtype", [F32, F16, BF16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("head_dim_v", [48, 64])
def test_int8_is_attention_to_the_dequantised(query_dtype, keywords, seqlen_q, head_dim_v):
    """A tile unit for bfloat16 takes int8 in whole rows of it, and probabilities as bfloat16."""
    cache, ids = filled(I8, head_dim_v=head_dim_v)
    query = queries(seqlen_q, query_dtype, (len(ids),))
    out, lse = cache.attention(query, ids, return_lse=True, **keywords)
    assert out.dtype == query_dtype
    options = {"causal": True, **keywords}
    options.pop("num_threads", None)
    for index, sequence in enumerate(ids):
        arrays = (query[index].astype(F32), *cache.get(sequence))
        expected = fastattn.attention(*arrays, return_lse=True, **options)
        # Both err; and the result is rounded to query's dtype.
        met = [x.astype(query_dtype if query_dtype == BF16 else F32) for x in arrays]
        out_tol, lse_tol, _ = tolerances(*met, **options)
        rounding = ml_dtypes.finfo(query_dtype).eps * np.abs(expected[0])
        assert_close(out[index], expected[0], 2 * out_tol + rounding, "out")
        assert_close(lse[index], expected[1], 2 * lse_tol, "lse")


@each_stored
def test_what_lies_beyond_the_length_is_not_seen(dtype):
    cache, ids = filled(dtype)
    query = queries(3, F32, (len(ids),))
    before = cache.attention(query, ids)
    used = page_numbers(cache, *ids)
    for sequence, pages in zip(ids, used, strict=True):
        past = cache.lengths[sequence] % 64 or 64
        for view in filter(lambda x: x is not None, (cache.key_pages, cache.value_pages, cache.key_scales)):
            view[pages[-1], :, past:] = 127 if view.dtype == I8 else np.nan
    cache._pages[sorted(set(range(cache.num_pages)) - {page for pages in used for page in pages})] = 0xFF
    assert_same_bits(cache.attention(query, ids), before)


def test_decoding_step_by_step_is_the_causal_whole():
    """What a decoder does: one token at a time, each attending to itself and those before it."""
    rng = make_rng()
    query = normal(rng, (2, Q_HEADS, 150, 32), F32)
    key, value = normal(rng, (2, HEADS, 150, 32), F32), normal(rng, (2, HEADS, 150, 32), F32)
    cache = KVCache(HEADS, 32, page_size=64, num_pages=6)
    ids = [cache.add(key[b, :, :100], value[b, :, :100]) for b in range(2)]
    whole = fastattn.attention(query, key, value, causal=True)
    tolerance, _, _ = tolerances(query, key, value, causal=True)
    for t in range(100, 150):
        cache.append(ids, key[:, :, t : t + 1], value[:, :, t : t + 1])
        step = cache.attention(query[:, :, t : t + 1], ids)
        assert_close(step, whole[:, :, t : t + 1], 2 * tolerance[:, :, t : t + 1])


# --- documentation --------------------------------------------------------------------------------

METHODS = [
    name for name, thing in inspect.getmembers(KVCache) if callable(thing) and (name[0] != "_" or name == "__init__")
]


def test_examples():
    tests = doctest.DocTestFinder().find(KVCache, "KVCache", globs={})
    tests = [test for test in tests if test.examples]
    assert tests
    for test in tests:
        test.globs.setdefault("KVCache", KVCache)
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_described(name):
    method = getattr(KVCache, name)
    documented = inspect.getdoc(KVCache if name == "__init__" else method)
    described = documented.split("Parameters\n---", 1)[-1]
    for parameter in inspect.signature(method).parameters:
        pattern = rf"^(\w+, )*{parameter}\b"
        assert parameter == "self" or re.search(pattern, described, re.MULTILINE), f"{parameter} is not described"


def test_only_the_class_is_public():
    assert cache_module.__all__ == ["KVCache"]


def test_a_step_in_the_order_batch_seqlen_heads_is_told_the_order_of_axes():
    cache = KVCache(2, 8, num_pages=1)
    cache.add(np.zeros((2, 3, 8), F32), np.zeros((2, 3, 8), F32))
    with pytest.raises(ValueError, match=r"query has 1 and key 2: axes are \(batch, heads, seqlen, head_dim\)"):
        cache.attention(np.zeros((1, 1, 4, 8), F32), [0])


def test_packed_heads_that_do_not_divide_are_told_the_packed_order_of_axes():
    cache = KVCache(2, 8, num_pages=1)
    cache.add(np.zeros((2, 3, 8), F32), np.zeros((2, 3, 8), F32))
    with pytest.raises(ValueError, match=r"query has 1 and key 2: packed axes are \(total, heads, head_dim\)"):
        cache.attention(np.zeros((4, 1, 8), F32), [0], cu_seqlens_q=[0, 4])
