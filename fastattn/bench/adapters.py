"""Problems of the adapters: a call through each of them, and whole models of transformers."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.bench.limits import PathWork, Work
from fastattn.bench.shapes import Problem

__all__ = ["Model", "ModelProblem", "call_by_jax", "call_of_tensors", "torch_tensor"]

NUM_LAYERS = 12
VOCABULARY = 32000


def torch_tensor(array: NDArray[Any]) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def call_of_tensors(problem: Problem) -> Callable[[], Any]:
    """Return a call with PyTorch's tensors, of `fastattn.attention` or of the adapter's function."""
    import fastattn.torch as adapter

    query, key, value = map(torch_tensor, problem.arrays)
    if problem.case.through == "tensors":
        return partial(fastattn.attention, query, key, value, causal=problem.case.causal)
    return partial(adapter.scaled_dot_product_attention, query, key, value, is_causal=problem.case.causal)


def call_by_jax(problem: Problem) -> Callable[[], Any]:
    """Return a call of a compiled function of JAX."""
    import jax

    import fastattn.jax as adapter

    jax.config.update("jax_enable_x64", True)
    compiled = jax.jit(partial(adapter.attention, causal=problem.case.causal))
    arrays = [jax.block_until_ready(jax.numpy.asarray(x)) for x in problem.arrays]
    return lambda: jax.block_until_ready(compiled(*arrays))


class ModelProblem(Problem):
    """A model of transformers with random weights: a Llama, with a window a Mistral; a BERT where it is not causal.

    With more keys than queries it is a step of generation, whose cache holds the keys before.
    """

    @property
    def sizes(self) -> dict[str, Any]:
        """Those of the configuration: of the usual proportions, about 150 million weights at 12 heads of 64."""
        width = self.case.num_heads * self.case.head_dim
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": NUM_LAYERS,
                "num_attention_heads": self.case.num_heads, "vocab_size": VOCABULARY, "pad_token_id": 0,
                "max_position_embeddings": self.case.seqlen_k}  # fmt: skip

    @cached_property
    def model(self) -> Any:
        """The model, with weights in the problem's dtype."""
        import torch
        import transformers

        import fastattn.transformers as adapter

        adapter.register()
        case, grouped = self.case, {"num_key_value_heads": self.case.num_kv_heads}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if not case.causal:
                model = transformers.BertModel(transformers.BertConfig(**self.sizes), add_pooling_layer=False)
            elif case.window:
                sliding = (case.window[0] or 0) + 1
                config = transformers.MistralConfig(**self.sizes, **grouped, sliding_window=sliding)
                model = transformers.MistralForCausalLM(config)
            else:
                model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**self.sizes, **grouped))
        return model.eval().to(getattr(torch, self.dtype.name))

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Tokens, and which of them count, where the second half of the batch is padded on the left."""
        import torch

        case = self.case
        ids = torch.from_numpy(np.random.default_rng(1).integers(1, VOCABULARY, (case.batch, case.seqlen_q)))
        if case.extra != "left":
            return {"input_ids": ids}
        return {"input_ids": ids, "attention_mask": torch.from_numpy(self.seen.astype(np.int64))}

    @property
    def seen(self) -> NDArray[np.bool_]:
        begins = np.where(np.arange(self.case.batch) < self.case.batch / 2, 0, self.case.seqlen_k // 2)
        seen: NDArray[np.bool_] = np.arange(self.case.seqlen_k) >= begins[:, None]
        return seen

    @property
    def keywords(self) -> dict[str, Any]:
        """Of `fastattn.attention`, as the model asks for it."""
        words = dict(super().keywords)
        return words | {"mask": self.seen[:, None, None]} if self.case.extra == "left" else words

    def new_cache(self, kind: Callable[[], Any], dtype: Any) -> Any:
        """Return a cache of that kind that holds all keys but those of the queries."""
        import torch

        case, cache, generator = self.case, kind(), torch.Generator().manual_seed(2)
        shape = case.batch, case.num_kv_heads, case.seqlen_k - case.seqlen_q, case.head_dim
        for layer in range(NUM_LAYERS):
            cache.update(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)), layer)
        return cache

    @cached_property
    def result(self) -> NDArray[Any]:
        """What the same weights give in float32, by PyTorch's attention."""
        import torch
        import transformers

        wide = Model(self, "sdpa", transformers.DynamicCache, torch.float32)
        found: NDArray[Any] = wide.run().double().numpy()
        return found

    @cached_property
    def work(self) -> Work:
        """Of all layers' attention and matrices; logits are made of the last token alone."""
        import torch

        case, tokens = self.case, self.case.batch * self.case.seqlen_q
        paths = {
            path: PathWork(NUM_LAYERS * flops, NUM_LAYERS * scores, effort)
            for path, (flops, scores, effort) in self.attention_paths.items()
        }
        matrices = [(name, x) for name, x in self.model.named_modules() if isinstance(x, torch.nn.Linear)]
        flops = sum(2 * x.weight.numel() * (case.batch if name == "lm_head" else tokens) for name, x in matrices)
        path = self.dtype.name if self.dtype == np.float32 else next(iter(paths))
        attended = paths.get(path, PathWork(0, 0))
        paths[path] = attended._replace(flops=attended.flops + flops)
        nbytes = sum(x.weight.nbytes for _, x in matrices) + NUM_LAYERS * self.kv_bytes
        return Work(paths, nbytes, footprint=nbytes)

    @property
    def is_read_bound(self) -> bool:
        return False

    @property
    def tolerance(self) -> float:
        """Of twelve layers, each of which rounds some ten times."""
        return 1e-4 if self.dtype == np.float32 else 5e-2

    def error(self, out: NDArray[Any]) -> float:
        """Return the relative error of the last logits or the first token's embedding, in the Frobenius norm."""
        return float(np.linalg.norm(out - self.result) / np.linalg.norm(self.result))


@dataclass
class Model:
    """A problem's model with an implementation of attention, sharing its weights unless they are in another dtype."""

    problem: ModelProblem
    implementation: str
    cache: Callable[[], Any]
    dtype: Any = None
    model: Any = field(init=False)
    options: dict[str, Any] = field(init=False)
    filled: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        import torch

        model = self.problem.model
        shared = {id(x): x for x in (*model.parameters(), *model.buffers())} if self.dtype is None else {}
        self.model = copy.deepcopy(model, shared)
        if self.dtype is not None:
            self.model.to(self.dtype)
        self.model.set_attn_implementation(self.implementation)
        case, self.options = self.problem.case, dict(self.problem.inputs)
        if case.causal:
            self.options |= {"use_cache": case.seqlen_q < case.seqlen_k, "logits_to_keep": 1}
        if case.seqlen_q < case.seqlen_k:
            with torch.inference_mode():
                self.filled = self.problem.new_cache(self.cache, self.model.dtype)
            has_new_name = "cache" in inspect.signature(self.model.forward).parameters
            self.options["cache" if has_new_name else "past_key_values"] = self.filled

    def run(self) -> Any:
        """Return the last logits or the first token's embedding; a step of generation is then taken back."""
        import torch

        with torch.inference_mode():
            out = self.model(**self.options)
            if self.filled is not None:
                self.filled.crop(-self.problem.case.seqlen_q)
            return out.logits[:, -1] if self.problem.case.causal else out.last_hidden_state[:, 0]

    def attention_share(self) -> float:
        """Return the share of the time that passes within attention: without masks, and without the cache."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention, seconds = ALL_ATTENTION_FUNCTIONS[self.implementation], [0.0]
        shares: list[float] = []

        def timed(*args: Any, **words: Any) -> Any:
            start = time.perf_counter()
            result = attention(*args, **words)
            seconds[0] += time.perf_counter() - start
            return result

        name = f"{self.implementation}-timed"
        AttentionInterface.register(name, timed)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self.implementation])
        self.model.set_attn_implementation(name)
        end = time.perf_counter() + 1.0
        while not shares or (len(shares) < 3 and time.perf_counter() < end):
            seconds[0], start = 0.0, time.perf_counter()
            self.run()
            shares.append(seconds[0] / (time.perf_counter() - start))
        self.model.set_attn_implementation(self.implementation)
        return median(shares)
