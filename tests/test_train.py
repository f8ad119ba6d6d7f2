"""examples/train.py: its gradients, and that it learns as the same model does in PyTorch."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import F32, make_rng

SOURCE = Path(os.environ.get("FASTATTN_SOURCE", Path(__file__).parent.parent))
EXAMPLE = SOURCE / "examples" / "train.py"
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not beside the tests")

STEPS = 20


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLE.parent))  # it imports another one
    try:
        spec = importlib.util.spec_from_file_location("train", EXAMPLE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLE.parent))
    return module


@pytest.fixture(scope="module")
def tokens(example):
    return example.encoded(example.documentation())


@pytest.mark.slow
def test_the_text_is_there_on_every_machine(example, tokens):
    assert len(tokens) > 500_000
    assert 0 <= tokens.min() <= tokens.max() < len(example.CHARACTERS)


@pytest.mark.slow
def test_gradients_are_those_of_the_loss(example, tokens):
    """Along the gradient itself the loss rises by its square: a step errs by a second derivative, and by float32."""
    model = example.Model()
    (batch,) = example.batches(tokens, 1)
    loss, kept = model.loss(batch)
    grads = model.gradients(kept)
    assert grads.keys() == model.parameters.keys()
    for name, parameter in model.parameters.items():
        length = float(np.linalg.norm(grads[name]))
        if length == 0:
            continue
        before, losses = parameter.copy(), []
        for step in (0.01, -0.01):
            parameter += np.float32(step / length) * grads[name]
            losses.append(model.loss(batch)[0])
            parameter[...] = before
        assert losses[0] - losses[1] == pytest.approx(0.02 * length, rel=0.05, abs=1e-5), name
    assert model.loss(batch)[0] == loss


@pytest.mark.slow
def test_what_is_written_with_a_cache_is_what_is_read_as_a_whole(example, tokens):
    model = example.Model()
    written = tokens[:40]
    heads = (example.NUM_HEADS, example.WIDTH // example.NUM_HEADS)
    caches = [example.fastattn.KVCache(*heads, num_pages=1) for _ in range(example.NUM_LAYERS)]
    sequence, *_ = [cache.add() for cache in caches]
    steps = np.stack([model.write(written[i : i + 1], caches, sequence) for i in range(len(written))])
    _, (*_, x, _, _) = model.loss(np.append(written, 0)[None])
    np.testing.assert_allclose(steps, x[0] @ model.own["embedding"].T, atol=1e-4)


# --- PyTorch --------------------------------------------------------------------------------------


def torch_loss(torch, example, weights, batch):
    """The model of the example, by PyTorch's functions."""
    functional = torch.nn.functional
    heads, dim = example.NUM_HEADS, example.WIDTH // example.NUM_HEADS
    inputs, targets = batch[:, :-1], batch[:, 1:]
    seqlen = inputs.shape[1]
    angles = torch.outer(
        torch.arange(seqlen, dtype=torch.float64), 10000.0 ** (-torch.arange(0, dim, 2) / dim).double()
    )
    cos, sin = angles.cos().float(), angles.sin().float()

    def norm(x, gain, shift):
        return functional.layer_norm(x, (example.WIDTH,), gain, shift)

    def turned(x):
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)

    x = weights["embedding"][inputs]
    for i in range(example.NUM_LAYERS):
        own = {name.removeprefix(f"{i}."): w for name, w in weights.items() if name.startswith(f"{i}.")}
        y = norm(x, own["gain_1"], own["shift_1"])
        parts = [
            (y @ own[f"{name}_weight"].T).unflatten(-1, (heads, dim)).transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        attended = functional.scaled_dot_product_attention(turned(parts[0]), turned(parts[1]), parts[2], is_causal=True)
        x = x + attended.transpose(1, 2).flatten(-2) @ own["out_weight"].T
        y = norm(x, own["gain_2"], own["shift_2"])
        hidden = functional.gelu(y @ own["up"] + own["up_bias"], approximate="tanh")
        x = x + hidden @ own["down"] + own["down_bias"]
    logits = norm(x, weights["gain"], weights["shift"]) @ weights["embedding"].T
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.slow
def test_the_losses_are_those_of_torch(example, tokens):
    """The same weights to begin with, the same data, the same steps."""
    torch = pytest.importorskip("torch")
    model = example.Model()
    weights = {n: torch.from_numpy(x.copy()).requires_grad_() for n, x in model.parameters.items()}
    adam = torch.optim.Adam(weights.values(), betas=example.DECAYS, eps=example.EPSILON)
    theirs = []
    for step, batch in enumerate(example.batches(tokens, STEPS)):
        adam.param_groups[0]["lr"] = example.learning_rate(step, example.STEPS)
        loss = torch_loss(torch, example, weights, torch.from_numpy(batch))
        adam.zero_grad()
        loss.backward()
        adam.step()
        theirs.append(loss.item())
    mine = list(example.train(model, tokens, STEPS))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
    assert mine[-1] < mine[0] - 0.5


# --- transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(example, tokens, tmp_path_factory):
    """The model after a few steps, and the folder that it is saved in."""
    pytest.importorskip("safetensors")
    pytest.importorskip("transformers", minversion="5.24")
    model, folder = example.Model(), tmp_path_factory.mktemp("saved") / "gpt"
    losses = list(example.train(model, tokens, 5))
    assert losses[-1] < losses[0]
    example.save(model, folder)
    return model, folder


def loaded(folder, implementation):
    import transformers

    import fastattn.transformers

    fastattn.transformers.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["eager", "fastattn"])
def test_transformers_load_the_model(trained, tokens, implementation):
    import torch

    model, folder = trained
    batch = np.stack([tokens[:101], tokens[5000:5101]])
    _, (*_, x, _, _) = model.loss(batch)
    with torch.no_grad():
        logits = loaded(folder, implementation)(torch.from_numpy(batch[:, :-1])).logits
    np.testing.assert_allclose(logits.numpy(), x @ model.own["embedding"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["eager", "fastattn", "fastattn-cache"])
def test_transformers_write_the_same_tokens(example, trained, tokens, implementation):
    import torch

    import fastattn.transformers

    model, folder = trained
    heads = (example.NUM_HEADS, example.WIDTH // example.NUM_HEADS)
    caches = [example.fastattn.KVCache(*heads, num_pages=2) for _ in range(example.NUM_LAYERS)]
    sequence, *_ = [cache.add() for cache in caches]
    written, unseen = list(tokens[:30]), tokens[:30]
    for _ in range(40):
        unseen = model.write(unseen, caches, sequence).argmax(keepdims=True)
        written += list(unseen)
    implementation, _, with_cache = implementation.partition("-")
    cache = fastattn.transformers.Cache() if with_cache else None
    found = loaded(folder, implementation).generate(
        torch.from_numpy(tokens[:30])[None], max_new_tokens=40, do_sample=False, cache=cache, pad_token_id=0
    )
    assert found[0].tolist() == written


def test_a_layer_norm_by_hand(example):
    x = make_rng(0).standard_normal((2, 3, 8)).astype(F32)
    y, _ = example.layer_norm(x, np.ones(8, F32), np.zeros(8, F32))
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(axis=-1), 1, atol=1e-4)
