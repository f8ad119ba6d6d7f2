"""Arguments that a function does not take: what other libraries call them, and what they are here.

A function takes what is too much as ``*others``, and among ``**scores`` or as ``**unknown``, and raises `misfit` if
there is any: a wrapper that catches the interpreter's TypeError would cost every right call more. `_keywords.takes`
hides them from its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sized
from typing import Any, NamedTuple, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


class Spelling(NamedTuple):
    """Our keyword for another library's, and what is different about it."""

    ours: str | None
    meaning: str


DROPOUT = Spelling("dropout", "dropout=, with which seed= says what is dropped")
SCALE = Spelling("scale", "scale=")
SOFTCAP = Spelling("softcap", "softcap=, where None, not 0, is no cap")
SINKS = Spelling("sinks", "sinks=, one logit a head")
LENGTHS = Spelling("key_lengths", "key_lengths=")
NOT_NEEDED = Spelling(None, "it is not needed")
WEIGHTS = Spelling("return_weights", "return_weights=, with which the weights of every head are returned, too")
PAGES = Spelling(None, "pages are those of a fastattn.KVCache")

SPELLINGS = {
    # PyTorch
    "is_causal": Spelling(
        "causal",
        "causal=, with which the last query sees the last key; for PyTorch's alignment, in which query i sees keys 0 "
        "to i, add query_offset=0",
    ),
    "attn_mask": Spelling(
        "mask",
        "mask= if it is bool, where True means attend (in torch.nn.MultiheadAttention it means the reverse), and bias= "
        "if it is floats that are added to the scores",
    ),
    "key_padding_mask": Spelling(
        "mask", "mask=~key_padding_mask[:, None, None, :], for here True means attend, or the lengths as key_lengths="
    ),
    "dropout_p": DROPOUT,
    "enable_gqa": Spelling(None, "it is not needed: key and value may always have fewer heads than query"),
    "need_weights": WEIGHTS,
    "average_attn_weights": Spelling(
        None, "with return_weights= weights come for every head; weights.mean(axis=-3) is their average"
    ),
    "block_mask": Spelling("mask", "mask=, an array"),
    "score_mod": Spelling("bias", "bias=, softcap= or alibi_slopes=; functions are not taken"),
    # FlashAttention, FlashInfer, Triton's
    "softmax_scale": SCALE,
    "sm_scale": SCALE,
    "window_size": Spelling("window", "window=(left, right), where None, not -1, is unbounded"),
    "window_left": Spelling("window", "window=(window_left, None), where None, not -1, is unbounded"),
    "logits_soft_cap": SOFTCAP,
    "soft_cap": SOFTCAP,
    "s_aux": SINKS,
    "learnable_sink": SINKS,
    "attn_bias": Spelling("bias", "bias="),
    "cache_seqlens": LENGTHS,
    "seqused_k": LENGTHS,
    "seqlens_k": LENGTHS,
    "cu_seqlens_q": Spelling("cu_seqlens_q", "packed sequences go through fastattn.attention_varlen"),
    "cu_seqlens_k": Spelling("cu_seqlens_k", "packed sequences go through fastattn.attention_varlen"),
    "max_seqlen_q": NOT_NEEDED,
    "max_seqlen_k": NOT_NEEDED,
    "block_table": PAGES,
    "page_table": PAGES,
    "deterministic": Spelling(None, "it always is: results are the same to the last bit for any number of threads"),
    "return_softmax_lse": Spelling("return_lse", "return_lse="),
    "return_attn_probs": WEIGHTS,
    # Transformers
    "attention_mask": Spelling(
        "mask",
        "mask=attention_mask[:, None, None, :] as bools, where True means attend, or the lengths as key_lengths=",
    ),
    "dropout": DROPOUT,
    "scaling": SCALE,
    "sliding_window": Spelling("window", "window=(sliding_window - 1, 0), for a query's own key is not counted"),
    "output_attentions": WEIGHTS,
    "q": Spelling("query", "query="),
    "k": Spelling("key", "key="),
    "v": Spelling("value", "value="),
}


def typed_like(original: Function) -> Callable[[Callable[..., Any]], Function]:
    """Give a function the type of another, whose signature it has."""
    return lambda function: cast(Function, function)


def misfit_of(function: Callable[..., Any], count: int, keywords: Iterable[str]) -> TypeError | None:
    """Return what is wrong with that many positional arguments and these keywords; None if they are the function's."""
    parameters = inspect.signature(function).parameters
    positional = [p for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    others = range(len(positional), count)
    if others or not parameters.keys() >= set(keywords):
        return misfit(function, others, keywords)
    missing = [p.name for p in positional[count:] if p.default is p.empty and p.name not in keywords]
    if not missing:
        return None
    return TypeError(
        f"{function.__qualname__}() misses {' and '.join(missing)}; it takes "
        f"{', '.join(p.name for p in positional)}, by position or by name"
    )


def misfit(function: Callable[..., Any], others: Sized, given: Iterable[str]) -> TypeError:
    """Return the error for positional arguments beyond those of a function, or for a keyword that it does not have."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    keywords = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    if len(others):
        mask = ": a mask is given as mask=, where True means attend, floats to be added as bias="
        return TypeError(
            f"{function.__qualname__}() takes {len(positional)} positional arguments ({', '.join(positional)}), but "
            f"{len(positional) + len(others)} were given; all else goes by keyword{mask if 'mask' in keywords else ''}"
        )
    name = next(name for name in given if name not in inspect.signature(function).parameters)
    return TypeError(
        f"{function.__qualname__}() got an unexpected keyword argument {name!r}: {hint(name, [*positional, *keywords])}"
    )


def hint(name: str, accepted: list[str]) -> str:
    listed = f"accepted are {', '.join(accepted)}"
    if name not in SPELLINGS:
        import difflib  # here, where a millisecond does not matter

        similar = difflib.get_close_matches(name, accepted, 1)
        return f"did you mean {similar[0]!r}? {listed}" if similar else listed
    ours, meaning = SPELLINGS[name]
    if ours is None or ours in accepted:
        return f"here it is {meaning}" if ours else meaning
    return meaning if ours == name else f"fastattn.attention has {meaning}, but here {listed}"
