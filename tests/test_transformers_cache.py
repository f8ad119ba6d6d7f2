"""fastattn.transformers.Cache: generation gives what it gives with DynamicCache, and no step copies the cache."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

from copies import COPIES  # noqa: E402

import fastattn.transformers as adapter  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 128, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
NAMES = {"Llama": {}, "Mistral": {"sliding_window": 6}, "Gemma2": {"sliding_window": 6, "head_dim": 8}}


@pytest.fixture(autouse=True)
def registered():
    adapter.register()


def model_of(name, seed=21, implementation="fastattn", **options):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES, **NAMES[name], **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_attn_implementation(implementation)
    return model


def prompt(batch_size=2):
    torch.manual_seed(3)
    ids = torch.randint(2, 99, (batch_size, 11))
    seen = torch.ones_like(ids)
    seen[0, :4] = 0
    return {"input_ids": ids, "attention_mask": seen}


def caches(model, with_config=True):
    config = (model.config,) if with_config else ()
    return transformers.DynamicCache(config=model.config if with_config else None), adapter.Cache(*config)


GENERATION = {
    "greedy": {"max_new_tokens": 90},
    "beams": {"num_beams": 3, "max_new_tokens": 12},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12, "length_penalty": 0.5},
    "samples": {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12},
    "lookup": {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12},
    "assisted": {"assistant": True, "max_new_tokens": 12},
}


@pytest.mark.parametrize("implementation", ["fastattn", "eager"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", GENERATION)
def test_generate(way, name, implementation):
    model = model_of(name, implementation=implementation)
    options = {"do_sample": False} | GENERATION[way]
    if options.pop("assistant", False):
        options["assistant_model"] = model_of(name, seed=22, implementation=implementation)
    batch = prompt(1 if way in ("lookup", "assisted") else 2)
    results = []
    for cache in caches(model):
        torch.manual_seed(0)
        results.append(
            model.generate(**batch, **options, cache=cache, output_logits=True, return_dict_in_generate=True)
        )
    expected, result = results
    assert torch.equal(result.sequences, expected.sequences)
    for logits, others in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, others, rtol=1e-4, atol=1e-5)


def keys_and_values(length, batch_size=2, **options):
    return [torch.randn(batch_size, 2, length, dim, **options) for dim in (8, 6)]


def assert_same(cache, other):
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)
        assert layer.get_mask_sizes(3) == expected.get_mask_sizes(3)
    assert cache.get_seq_length() == other.get_seq_length()


def both_updated(both, length, batch_size=2):
    states = keys_and_values(length, batch_size)
    for layer in range(2):
        for result, expected in zip(*(cache.update(*states, layer) for cache in both), strict=True):
            assert torch.equal(result, expected)


CHANGES = {
    "append": lambda cache: None,
    "crop": lambda cache: cache.crop(-1),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: (cache.batch_repeat_interleave(3), cache.batch_select_indices(torch.tensor([0, 5]))),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("lengths", [[5], [1, 1], [3, 1, 2], [70, 1, 1, 90, 1]], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("sliding", [False, True])
def test_changes(sliding, recorded, change, lengths):
    both = caches(model_of("Mistral" if sliding else "Llama"))
    for cache in both if recorded or change == "crop" else ():
        cache.activate_past_recording()
    for length in lengths:
        both_updated(both, length)
    for cache in both:
        CHANGES[change](cache)
    if change != "reset":
        assert_same(*reversed(both))
    for length in (1, 1, 4):
        both_updated(both, length)
    assert_same(*reversed(both))


@torch.no_grad()  # with gradients a step may not change what the one before gave
@pytest.mark.parametrize(("name", "steps"), [("Llama", 100), ("Mistral", 60)])
def test_steps_stay_in_one_place(name, steps):
    cache = caches(model_of(name))[1]
    cache.update(*keys_and_values(200), 0)
    cache.update(*keys_and_values(1), 0)
    places = [x.untyped_storage().data_ptr() for x in (cache.layers[0].keys, cache.layers[0].values)]
    for _ in range(steps):
        cache.update(*keys_and_values(1), 0)
    assert places == [x.untyped_storage().data_ptr() for x in (cache.layers[0].keys, cache.layers[0].values)]


def test_a_long_prompt_is_not_kept_for_a_window():
    cache = caches(model_of("Mistral"))[1]
    for length in (1000, 1):
        cache.update(*keys_and_values(length), 0)
    assert len(cache.layers[0].keys.untyped_storage()) < 100 * 2 * 2 * 8 * 4


def test_without_a_config():
    model = model_of("Llama")
    both = caches(model, with_config=False)
    results = [model.generate(**prompt(), max_new_tokens=8, do_sample=False, cache=cache) for cache in both]
    assert torch.equal(*results)
    assert all(isinstance(layer, adapter._GrowingLayer) for layer in both[1].layers)


@pytest.mark.parametrize("config", [5, {}, torch.nn.Linear(2, 2)], ids=str)
def test_what_is_no_config_is_refused(config):
    with pytest.raises(TypeError, match=r"config must be a transformers.PreTrainedConfig, as model.config is, not <cl"):
        adapter.Cache(config)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("lengths", [[], [5], [5, 1], [3, 70, 1, 1]], ids=str)
@pytest.mark.parametrize("way", COPIES)
@torch.no_grad()  # with gradients no step writes where another may have its tokens
def test_a_copy_of_a_prompt_is_apart(way, lengths, name):
    """Each of the two goes on as if the other were not there, also where cropped tokens are rewritten."""
    both = caches(model_of(name))
    for cache in both:
        cache.activate_past_recording()
    for length in lengths:
        both_updated(both, length)
    branches = copy.deepcopy(both[0]), COPIES[way](both[1])
    for length in (1, 3):
        both_updated(both, length)
        both_updated(branches, length)
    for pair in (both, branches):
        for cache in pair:
            cache.crop(-2)
    for length in (1, 1):
        both_updated(both, length)
        both_updated(branches, length)
    assert_same(*reversed(both))
    assert_same(*reversed(branches))


@pytest.mark.parametrize("way", COPIES)
@torch.no_grad()
def test_a_copy_of_a_layer_is_apart(way):
    cache = caches(model_of("Llama"))[1]
    for length in (5, 1):
        cache.update(*keys_and_values(length), 0)
    layer, branch = cache.layers[0], COPIES[way](cache.layers[0])
    before = layer.keys.clone()
    layer.update(*keys_and_values(1))
    assert torch.equal(branch.update(*keys_and_values(1))[0][:, :, :6], before)
    layer.crop(-3)
    layer.update(*keys_and_values(3))
    assert torch.equal(branch.keys[:, :, :6], before)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_no_room_that_nobody_uses(way):
    cache = caches(model_of("Llama"))[1]
    with torch.no_grad():
        for length in (1000, 1):
            cache.update(*keys_and_values(length), 0)
    copied = COPIES[way](cache).layers[0].keys
    assert len(copied.untyped_storage()) == copied.numel() * 4


@pytest.mark.parametrize("way", ["copy", "deepcopy"])
def test_a_copy_after_inference_mode(way):
    both = caches(model_of("Llama"))
    with torch.inference_mode():
        both_updated(both, 5)
        both_updated(both, 1)
    branches = copy.deepcopy(both[0]), COPIES[way](both[1])
    with torch.no_grad():
        both_updated(both, 1)
        both_updated(branches, 2)
    assert_same(*reversed(both))
    assert_same(*reversed(branches))


def test_views_stay_as_they_are():
    cache = adapter.Cache()
    cache.update(*keys_and_values(5), 0)
    keys = cache.update(*keys_and_values(1), 0)[0]
    before = keys.clone()
    for _ in range(100):
        cache.update(*keys_and_values(1), 0)
    assert torch.equal(keys, before)


def test_gradients_through_the_cache():
    model = model_of("Llama")
    ids = prompt()["input_ids"]
    grads = []
    for cache in caches(model):
        model.zero_grad()
        first = model(ids[:, :6], cache=cache).logits
        second = model(ids[:, 6:7], cache=cache).logits
        third = model(ids[:, 7:], cache=cache).logits
        torch.cat([first, second, third], 1).square().sum().backward()
        grads.append([x.grad.clone() for x in model.parameters()])
    for grad, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(grad, expected)


def test_after_inference_mode():
    both = caches(model_of("Llama"))
    with torch.inference_mode():
        both_updated(both, 5)
        both_updated(both, 1)
    with torch.no_grad():
        both_updated(both, 1)
        both_updated(both, 1)
    assert_same(*reversed(both))


def test_other_batches_are_refused_as_by_dynamic_cache():
    both = caches(model_of("Llama"))
    both_updated(both, 5)
    for cache in both:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            cache.update(*keys_and_values(1, batch_size=1), 0)


def test_encoder_and_decoder():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99,
                                   decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)  # fmt: skip
    torch.manual_seed(4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.set_attn_implementation("fastattn")
    tokens = []
    for kind in (transformers.DynamicCache, adapter.Cache):
        cache = transformers.EncoderDecoderCache(kind(), kind())
        tokens.append(model.generate(**prompt(), max_new_tokens=8, num_beams=2, cache=cache))
    assert torch.equal(*tokens)


def test_what_was_given_is_the_callers():
    """A prompt's keys may be a view of more, and may change."""
    cache = adapter.Cache()
    key, value = torch.ones(2, 1, 2, 3, 4)
    kept, _ = cache.update(key, value, 0)
    key.zero_()
    assert kept.sum() == 24
    assert cache.update(key, value, 0)[0].sum() == 24


def test_reordering_what_has_a_gradient():
    cache = adapter.Cache()
    key = torch.ones(2, 2, 3, 4, requires_grad=True)
    cache.update(key, torch.ones(2, 2, 3, 4), 0)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.layers[0].keys.sum().backward()
    assert torch.equal(key.grad[1], torch.full((2, 3, 4), 2.0))
