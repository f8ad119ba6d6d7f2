"""What a page that AttentionView saved holds."""

import base64
import json
import re

import numpy as np


def saved(view, tmp_path, **keywords):
    view.save(tmp_path / "page.html", **keywords)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def decoded(data):
    """Rice's code, read as plainly as it can be."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(data["code"]), np.uint8)).tolist()
    columns = len(data["keys"]) + (not data["complete"])
    shape = (data["layers"], data["heads"], len(data["tokens"]), columns)
    counts, at, k = [], 0, data["rice"]
    for _ in range(np.prod(shape)):
        end = bits.index(0, at)
        remainder = int("".join(map(str, bits[end + 1 : end + 1 + k])) or "0", 2)
        counts.append(((end - at) << k) + remainder)
        at = end + 1 + k
    return np.reshape(counts, shape) / data["steps"]
