"""The keywords of attention: the one chain of their types, and one description of each for all that take them.

What a keyword means, its default and its place among the others is said once, by the signature and the docstring of
`_core.attention`. Functions that take ``**scores`` get both from there, by `takes`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

from numpy.typing import ArrayLike, NDArray

from fastattn import _core

Array = NDArray[Any]
Window = tuple[int | None, int | None]
Grads = tuple[Array | None, Array | None, Array | None]
Function = TypeVar("Function", bound=Callable[..., Any])

# --- types ----------------------------------------------------------------------------------------


class CommonKeywords(TypedDict, total=False):
    """Of every kind of attention, dense, packed and to a cache, and of the layer."""

    scale: float | None
    window: Window | None
    alibi_slopes: ArrayLike | None
    softcap: float | None
    sinks: ArrayLike | None
    num_threads: int | None


class DenseKeywords(TypedDict, total=False):
    """Of what has one number of keys for the whole batch."""

    mask: ArrayLike | None
    bias: ArrayLike | None
    key_lengths: ArrayLike | None


class CausalKeywords(CommonKeywords, total=False):
    """Of every kind of attention; the layer has a default of its own."""

    causal: bool


class PackedKeywords(CausalKeywords, total=False):
    """Of packed sequences, and of those in a cache."""

    query_offset: ArrayLike | None


class ScoreKeywords(PackedKeywords, DenseKeywords, total=False):
    """All that say what the scores are, and how many threads compute them."""


class LayerScores(CommonKeywords, DenseKeywords, total=False):
    """What the layer hands on as it comes."""


class DropoutKeywords(TypedDict, total=False):
    """Of what is trained with."""

    dropout: float
    seed: int | None


class GradientKeywords(DropoutKeywords, total=False):
    """Of both backward passes."""

    grad_lse: ArrayLike | None
    grads: Grads | None
    unrounded: bool


class AttentionKeywords(ScoreKeywords, DropoutKeywords, total=False):
    """Keywords of `attention` that do not change what it returns."""

    out: Array | None
    add_to: tuple[Array, Array] | None
    unrounded: bool


class VarlenKeywords(PackedKeywords, DropoutKeywords, total=False):
    """Keywords of `attention_varlen` that do not change what it returns."""

    out: Array | None
    add_to: tuple[Array, Array] | None
    unrounded: bool


class BackwardKeywords(ScoreKeywords, GradientKeywords, total=False):
    """Keywords of `attention_backward` that do not change what it returns."""


class VarlenBackwardKeywords(PackedKeywords, GradientKeywords, total=False):
    """Keywords of `attention_varlen_backward` that do not change what it returns."""


class CacheKeywords(PackedKeywords, total=False):
    """Keywords of `KVCache.attention` that do not change what it returns."""

    cu_seqlens_q: ArrayLike | None
    out: Array | None
    unrounded: bool


class AttentionFunction(Protocol):
    """The type of `attention`: what it returns depends on two of its keywords. The last overload has them all."""

    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        return_lse: Literal[False] = False,
        return_weights: Literal[False] = False,
        **scores: Unpack[AttentionKeywords],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        return_lse: Literal[True],
        return_weights: Literal[False] = False,
        **scores: Unpack[AttentionKeywords],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        return_lse: Literal[False] = False,
        return_weights: Literal[True],
        **scores: Unpack[AttentionKeywords],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        return_lse: Literal[True],
        return_weights: Literal[True],
        **scores: Unpack[AttentionKeywords],
    ) -> tuple[Array, Array, Array]: ...
    @overload
    def __call__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        *,
        scale: float | None = None,
        causal: bool = False,
        query_offset: ArrayLike | None = None,
        window: Window | None = None,
        mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        alibi_slopes: ArrayLike | None = None,
        softcap: float | None = None,
        sinks: ArrayLike | None = None,
        key_lengths: ArrayLike | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        out: Array | None = None,
        add_to: tuple[Array, Array] | None = None,
        unrounded: bool = False,
        return_lse: bool = False,
        return_weights: bool = False,
        num_threads: int | None = None,
    ) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]: ...


# --- signatures and docstrings --------------------------------------------------------------------


def names_of(keywords: type) -> frozenset[str]:
    """Return the names of the keywords of a TypedDict, and of those that it extends."""
    names: frozenset[str] = keywords.__optional_keys__  # type: ignore[attr-defined]
    return names


SCORES, PACKED, DENSE = names_of(ScoreKeywords), names_of(PackedKeywords), names_of(DenseKeywords)
LAYER = names_of(LayerScores)

ATTENTION = inspect.signature(_core.attention).parameters
ORDER = list(ATTENTION)
ENTRY = re.compile(r"^(\w+(?:, \w+)*)(?: : .*)?\n(?:[ ]+.*\n|\n)+", re.MULTILINE)
MARKER = re.compile(r"^\*\*scores\n(?:    .*\n)+", re.MULTILINE)


def parameters_section(docstring: str) -> str:
    """Return the entries of the parameters in a docstring that is not indented."""
    return docstring.partition("Parameters\n----------\n")[2].partition("\n\nReturns\n")[0] + "\n"


# What `attention` says of each parameter. References are numbered for its own docstring only.
DESCRIPTIONS = {
    entry[1]: re.sub(r" \[\d+\]_", "", entry[0])
    for entry in ENTRY.finditer(parameters_section(inspect.cleandoc(_core.attention.__doc__ or "")))
}


def place(name: str) -> float:
    """Return where a keyword stands among those of `attention`; ones that it has not come before the last."""
    return ORDER.index(name) if name in ATTENTION else len(ORDER) - 1.5


def takes(keywords: type | None = None) -> Callable[[Function], Function]:
    """Show all that a function takes in its signature and in its docstring.

    In both ``**scores`` becomes the keywords that it is given for, which are those of a TypedDict. What is annotated
    with Never, for the sake of a better error, is hidden.
    """
    names: frozenset[str] = frozenset() if keywords is None else names_of(keywords)

    def show(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.annotation != "Never" and p.kind != p.VAR_KEYWORD]
        annotations = {} if keywords is None else keywords.__annotations__
        scores = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=ATTENTION[name].default,
                annotation=getattr(annotations[name], "__forward_arg__", annotations[name]),
            )
            for name in names
        ]
        positional = [p for p in own if p.kind == p.POSITIONAL_OR_KEYWORD]
        others = sorted([*scores, *(p for p in own if p.kind == p.KEYWORD_ONLY)], key=lambda p: place(p.name))
        function.__signature__ = signature.replace(parameters=[*positional, *others])  # type: ignore[attr-defined]
        if function.__doc__:  # not under -OO
            function.__doc__ = described(inspect.cleandoc(function.__doc__), [p.name for p in others])
        return function

    return show


def described(docstring: str, names: list[str]) -> str:
    """Return a docstring in which the entry ``**scores`` is that of each keyword that has none."""
    own = {name for entry in ENTRY.finditer(parameters_section(docstring)) for name in entry[1].split(", ")}
    entries = "".join(DESCRIPTIONS[name].rstrip() + "\n" for name in names if name not in own and name in DESCRIPTIONS)
    return MARKER.sub(lambda _: entries, docstring)
