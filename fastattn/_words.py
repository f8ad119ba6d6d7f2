"""Tokens: how they are shown, which of them are words, and the words that they are parts of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

SPECIAL_TOKENS = (
    "[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<pad>", "<bos>", "<eos>", "<|endoftext|>", "<|begin_of_text|>",
    "<|end_of_text|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip


def checked_tokens(name: str, tokens: Sequence[str]) -> list[str]:
    if isinstance(tokens, str):
        raise TypeError(f"{name} must be a sequence of str, one for each token, not the one str {tokens!r}")
    try:
        listed = list(tokens)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of str, one for each token, not {tokens!r}") from None
    for i, token in enumerate(listed):
        if not isinstance(token, str):
            raise TypeError(f"{name}[{i}] must be a str, not {token!r}")
    return listed


def shown(token: str) -> str:
    """A token as it can be printed on one line: blanks, newlines and control characters as Python writes them."""
    return token if token.isprintable() and token.strip() else repr(token)


def is_word(token: str) -> bool:
    """Return whether a token is more than punctuation and blanks."""
    return any(character.isalnum() for character in token)


def text_of_bytes() -> dict[str, int]:
    """Return the bytes that the characters of GPT's tokenizers stand for: those that print stand for themselves."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def joined_words(tokens: Sequence[str], special: frozenset[str]) -> tuple[list[int], list[str]]:
    """Return where the words of tokens begin, and the words."""
    blank = next((mark for mark in ("Ġ", "▁") if any(token.startswith(mark) for token in tokens)), None)
    starts: list[int] = []
    for i, token in enumerate(tokens):
        before = tokens[i - 1] if i > 0 else ""
        continues = token.startswith("##") if blank is None else not token.startswith(blank)
        # Punctuation is a word of its own.
        alone = token in special or before in special or not is_word(token) or not is_word(before)
        if not continues or alone:
            starts.append(i)
    pieces = [tokens[begin:end] for begin, end in itertools.pairwise([*starts, len(tokens)])]
    return starts, [word_of(piece, blank, special) for piece in pieces]


def word_of(pieces: Sequence[str], blank: str | None, special: frozenset[str]) -> str:
    if pieces[0] in special:
        return pieces[0]
    if blank is None:
        return pieces[0] + "".join(piece.removeprefix("##") for piece in pieces[1:])
    text = "".join(pieces).removeprefix(blank)
    if blank == "▁":
        return text.replace(blank, " ") or " "
    known = text_of_bytes()
    if not all(character in known for character in text):
        return text
    return bytes(known[character] for character in text).decode("utf-8", "replace") or " "
