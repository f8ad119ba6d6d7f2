"""The page of a view: weights and vectors coded in few characters, and the parts of html/ put together around them."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from fastattn._checks import Array
from fastattn._part import Part
from fastattn._weights import Integers

# A page draws every token, and a browser keeps every head: beyond these it would be slow, not merely large.
MAX_PAGE_TOKENS = 1024
MAX_PAGE_WEIGHTS = 4_000_000
# The finest steps whose code has at most so many characters are taken. The coarsest are for whatever is left.
STEPS = (4095, 1023, 255)
SMALL_PAGE_WEIGHTS = 400_000

# A frame in a notebook becomes as high as its page, which tells its height when asked and whenever it changes. Each
# frame listens to its own page alone. Where this may not run, the frame scrolls.
FIT_FRAME = (
    "const frame = this; window.addEventListener('message', ({source, data}) => {"
    " if (source === frame.contentWindow && data.pageHeight > 0) frame.style.height = data.pageHeight + 'px'; });"
    " frame.contentWindow.postMessage('height', '*')"
)

# The parts of the page's script, in order.
SCRIPTS = ("page.js", "drawing.js", "share.js", "neuron.js", "start.js")


# --- weights and vectors --------------------------------------------------------------------------


def rice_code(counts: Integers, limit: float) -> tuple[int, str]:
    """Code counts in base64, each as a quotient by ``2**k`` in unary and ``k`` bits of remainder.

    The best ``k`` is found and returned, too. Counts of one row sum to about the number of steps, and so do
    the lengths of their unary parts divided by ``2**k``: that bounds the code, whatever the weights are.
    """

    def length(k: int) -> int:
        return int((counts >> k).sum(dtype=np.int64)) + (k + 1) * counts.size

    k = min(range(12), key=length)
    if length(k) > 6 * limit:
        return k, ""
    quotients = counts >> k
    ends = np.cumsum(quotients + (k + 1), dtype=np.int64)
    bits = np.ones(length(k), np.uint8)
    bits[ends - (k + 1)] = 0
    for i in range(k):
        bits[ends - (k - i)] = (counts >> (k - 1 - i)) & 1
    return k, base64.b64encode(np.packbits(bits).tobytes()).decode()


def coded(weights: Array, room: int) -> dict[str, Any]:
    """Code weights for the page, in the finest steps whose code has at most so many characters."""
    for steps in STEPS:
        counts = np.rint(weights.reshape(-1) * steps).astype(np.int32)
        k, code = rice_code(counts, math.inf if steps == STEPS[-1] else room)
        if code:
            break
    return {"steps": steps, "rice": k, "code": code}


def coded_vectors(vectors: Array) -> dict[str, Any]:
    """Code vectors for the page: a byte for each component, and for each vector what 127 stands for.

    That is coded as a 65535th of the largest component of all, in two bytes, low byte first.
    """
    largest = float(np.abs(vectors).max()) or 1.0
    units = np.ceil(np.abs(vectors).max(axis=-1, keepdims=True) / largest * 65535)
    steps = np.rint(vectors * 127 / np.maximum(units * (largest / 65535), np.finfo(np.float32).tiny))
    return {
        "largest": largest,
        "scales": base64.b64encode(np.minimum(units, 65535).astype("<u2").tobytes()).decode(),
        "code": base64.b64encode(np.clip(steps, -127, 127).astype(np.int8).tobytes()).decode(),
    }


def may_hold(heads: int, whole: Part, vectors: Sequence[Array]) -> bool:
    """Return whether a page can hold all of a text, as far as that is known before it is coded."""
    queries, keys = map(len, whole)
    # A weight takes at least one bit, and a character holds six.
    weights_fit = heads * queries * keys <= 6 * MAX_PAGE_WEIGHTS
    vectors_fit = sum(each.size for each in vectors) * 4 // 3 <= MAX_PAGE_WEIGHTS
    return max(queries, keys) <= MAX_PAGE_TOKENS and weights_fit and vectors_fit


# --- the page -------------------------------------------------------------------------------------


def page_asset(name: str) -> str:
    return files("fastattn").joinpath("html", name).read_text(encoding="utf-8")


def page_of(title: str, data: dict[str, Any]) -> bytes:
    """Return the page that shows data, whose names are those that page.js reads."""
    page = Template(page_asset("page.html")).substitute(
        title=html.escape(title),
        style=page_asset("page.css"),
        # Nothing in the data can then end the script element.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        script="\n".join(map(page_asset, SCRIPTS)),
    )
    return page.encode("utf-8", "replace")


def frame_of(page: str) -> str:
    """Return the page in a frame, where neither styles nor names can clash with those of a notebook."""
    return (
        '<iframe title="Attention" sandbox="allow-scripts allow-downloads" '
        'style="width: 100%; height: 44rem; border: 0" '
        f'onload="{html.escape(FIT_FRAME)}" srcdoc="{html.escape(page)}"></iframe>'
    )
