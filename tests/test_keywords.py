"""The keywords of attention are said once, and shown everywhere: in signatures, in help() and to type checkers."""

import ast
import inspect
import pydoc
import re

import pytest

import fastattn
from fastattn import _keywords, reference

DENSE = ("mask", "bias", "key_lengths")
ORDER = list(inspect.signature(fastattn.attention).parameters)
KEYWORDS = [*ORDER[ORDER.index("scale") : ORDER.index("out")], "num_threads"]
DROPOUT = ("dropout", "seed")
SCORES = [name for name in KEYWORDS if name not in DROPOUT]
PACKED = [name for name in SCORES if name not in DENSE]
TRAINED = [name for name in KEYWORDS if name not in DENSE]

FUNCTIONS = {
    "plan": (fastattn.plan, KEYWORDS),
    "top_keys": (fastattn.top_keys, SCORES),
    "attention_varlen": (fastattn.attention_varlen, TRAINED),
    "attention_backward": (fastattn.attention_backward, KEYWORDS),
    "attention_varlen_backward": (fastattn.attention_varlen_backward, TRAINED),
    "KVCache.attention": (fastattn.KVCache.attention, PACKED),
    "MultiHeadAttention": (
        fastattn.MultiHeadAttention.__call__,
        [name for name in KEYWORDS if name != "query_offset"],
    ),
    "reference.attention": (reference.attention, KEYWORDS),
    "reference.attention_varlen": (reference.attention_varlen, TRAINED),
    "reference.attention_backward": (reference.attention_backward, KEYWORDS),
    "reference.attention_varlen_backward": (reference.attention_varlen_backward, TRAINED),
    "reference.top_keys": (reference.top_keys, SCORES),
}
# Defaults of their own: a query in a cache is causal unless told otherwise.
CAUSAL = {"KVCache.attention": True, "MultiHeadAttention": None}

EACH = [(name, keyword) for name, (_, taken) in FUNCTIONS.items() for keyword in taken]

# The keywords of the last overload of `attention`, which has them all, and their types.
LAST = ast.parse(inspect.getsource(_keywords.AttentionFunction)).body[0].body[-1].args
TYPED = {argument.arg: ast.unparse(argument.annotation) for argument in LAST.kwonlyargs}


def entry_of(documented, name):
    """Return what a docstring says of a parameter, beyond its name and type."""
    found = re.search(rf"^(?:\w+, )*{name}\b(?:, \w+)*(?: : .*)?\n((?:    .*\n|\n)+)", documented, re.MULTILINE)
    return found and found[1].strip()


@pytest.mark.parametrize(("name", "keyword"), EACH)
def test_signatures_have_the_keyword_with_its_default(name, keyword):
    parameter = inspect.signature(FUNCTIONS[name][0]).parameters[keyword]
    assert parameter.kind == parameter.KEYWORD_ONLY
    default = inspect.signature(fastattn.attention).parameters[keyword].default
    assert parameter.default == (CAUSAL.get(name, default) if keyword == "causal" else default)
    own = "bool | None" if (name, keyword) == ("MultiHeadAttention", "causal") else None
    assert parameter.annotation == (own or TYPED[keyword])


@pytest.mark.parametrize(("name", "keyword"), EACH)
def test_help_describes_the_keyword(name, keyword):
    shown = pydoc.render_doc(FUNCTIONS[name][0], renderer=pydoc.plaintext)
    assert re.search(rf"\b{keyword}\b.*= ", shown.splitlines()[2]), "the signature"
    assert entry_of(inspect.getdoc(FUNCTIONS[name][0]), keyword)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_left_of_the_placeholder(name):
    assert "**scores" not in inspect.getdoc(FUNCTIONS[name][0])
    assert not re.search(r"\[\d\]_", entry_of(inspect.getdoc(FUNCTIONS[name][0]), "alibi_slopes") or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_come_in_the_order_of_attention(name):
    shown = [p for p in inspect.signature(FUNCTIONS[name][0]).parameters if p in KEYWORDS]
    assert shown == [keyword for keyword in KEYWORDS if keyword in FUNCTIONS[name][1]]


def test_the_types_are_of_these_keywords():
    assert list(TYPED) == ORDER[3:]
    assert sorted(SCORES) == sorted(_keywords.SCORES)
    assert sorted(PACKED) == sorted(_keywords.PACKED)
