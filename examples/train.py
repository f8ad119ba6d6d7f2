"""Training: a small GPT learns to write documentation, a character at a time, in NumPy with attention by fastattn.

The text is that of the documentation strings of Python's standard library, which every machine has. The model has
layers of attention with rotary positions, whose gradients `fastattn.MultiHeadAttention` has, and feed-forward layers,
whose gradients are written out below, as is Adam. In a minute or so on 2 cores the loss falls from that of guessing,
log 96 = 4.56, below 2.15; then the model writes, with keys and values in caches.

    pip install fastattn matplotlib safetensors  # matplotlib only for loss.png, safetensors only to save the model
    python examples/train.py
    python examples/train.py --save gpt  # for transformers.AutoModelForCausalLM.from_pretrained("gpt")
"""

import argparse
import ast
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tiger import check

import fastattn

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
NUM_LAYERS, NUM_HEADS, WIDTH, HIDDEN, CONTEXT = 3, 4, 128, 512, 256
BATCH, STEPS, WARMUP = 4, 600, 50
LEARNING_RATE, DECAYS, EPSILON = 2e-3, (0.9, 0.95), 1e-8
STATED_LOSS = 2.15  # of text that is not trained on; in nats a character

Arrays = dict[str, np.ndarray]


# --- the text -------------------------------------------------------------------------------------


def documentation() -> str:
    """Return the documentation strings of the standard library's modules, classes and functions."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts += [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(filter(None, texts))


def encoded(text: str) -> np.ndarray:
    """Return the numbers of the characters; those that are not ASCII are left out."""
    numbers = {character: number for number, character in enumerate(CHARACTERS)}
    return np.array([numbers[character] for character in text if character in numbers])


def batches(tokens: np.ndarray, steps: int) -> Iterator[np.ndarray]:
    """Yield (BATCH, CONTEXT + 1) pieces from anywhere in the text: tokens, and one more, for what comes next."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        begins = rng.integers(0, len(tokens) - CONTEXT, BATCH)
        yield tokens[begins[:, None] + np.arange(CONTEXT + 1)]


# --- functions and their gradients ----------------------------------------------------------------


def layer_norm(x: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, tuple]:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    normal = centred * scale
    return normal * gain + shift, (normal, scale, gain)


def layer_norm_backward(grad: np.ndarray, saved: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x, gain and shift."""
    normal, scale, gain = saved
    grad_normal = grad * gain
    along = (grad_normal * normal).mean(axis=-1, keepdims=True)
    grad_x = (grad_normal - grad_normal.mean(axis=-1, keepdims=True) - normal * along) * scale
    return grad_x, (grad * normal).sum(axis=(0, 1)), grad.sum(axis=(0, 1))


SLOPE, CUBIC = (2 / np.pi) ** 0.5, 0.044715


def gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gaussian error linear unit of x, and the hyperbolic tangent in it."""
    tanh = np.tanh(SLOPE * x * (1 + CUBIC * x * x))
    return 0.5 * x * (1 + tanh), tanh


def gelu_backward(grad: np.ndarray, x: np.ndarray, tanh: np.ndarray) -> np.ndarray:
    inner = SLOPE * (1 + 3 * CUBIC * x * x)
    return grad * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * inner)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean loss, and its gradient of the logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    p = np.exp(shifted)
    total = p.sum(axis=-1, keepdims=True)
    at_targets = targets[..., None]
    losses = np.log(total) - np.take_along_axis(shifted, at_targets, axis=-1)
    p /= total
    np.put_along_axis(p, at_targets, np.take_along_axis(p, at_targets, axis=-1) - 1, axis=-1)
    return float(losses.mean(dtype=np.float64)), p / np.float32(targets.size)


# --- the model ------------------------------------------------------------------------------------


class Block:
    """Attention and a feed-forward layer, each of the normalised input and added to it."""

    def __init__(self, draw: np.random.Generator) -> None:
        def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
            return draw.normal(0, scale * rows**-0.5, (rows, columns)).astype(np.float32)

        small = (2 * NUM_LAYERS) ** -0.5  # of what is added to the input, time and again
        squares = [matrix(WIDTH, WIDTH, scale) for scale in (1.0, 1.0, 1.0, small)]
        self.attention = fastattn.MultiHeadAttention(*squares, num_heads=NUM_HEADS, rotary={})
        self.own = {
            "gain_1": np.ones(WIDTH, np.float32),
            "shift_1": np.zeros(WIDTH, np.float32),
            "gain_2": np.ones(WIDTH, np.float32),
            "shift_2": np.zeros(WIDTH, np.float32),
            "up": matrix(WIDTH, HIDDEN),
            "up_bias": np.zeros(HIDDEN, np.float32),
            "down": matrix(HIDDEN, WIDTH, small),
            "down_bias": np.zeros(WIDTH, np.float32),
        }

    @property
    def parameters(self) -> Arrays:
        return self.own | self.attention.parameters

    def write(self, x: np.ndarray, cache: fastattn.KVCache, sequence: int) -> np.ndarray:
        """Return the block's output for the next tokens of a sequence; x is (tokens, WIDTH)."""
        own = self.own
        y, _ = layer_norm(x, own["gain_1"], own["shift_1"])
        x = x + self.attention(y, cache=cache, sequences=sequence)
        y, _ = layer_norm(x, own["gain_2"], own["shift_2"])
        return x + gelu(y @ own["up"] + own["up_bias"])[0] @ own["down"] + own["down_bias"]

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, tuple]:
        own = self.own
        y, norm_1 = layer_norm(x, own["gain_1"], own["shift_1"])
        attended, attention = self.attention(y, causal=True, return_saved=True)
        x = x + attended
        y, norm_2 = layer_norm(x, own["gain_2"], own["shift_2"])
        hidden = y @ own["up"] + own["up_bias"]
        active, tanh = gelu(hidden)
        return x + active @ own["down"] + own["down_bias"], (norm_1, attention, norm_2, y, hidden, tanh, active)

    def backward(self, grad: np.ndarray, saved: tuple) -> tuple[np.ndarray, Arrays]:
        """Return the gradients of the input, and of the parameters by their names."""
        norm_1, attention, norm_2, y, hidden, tanh, active = saved
        grads = {"down": rows(active).T @ rows(grad), "down_bias": grad.sum(axis=(0, 1))}
        of_hidden = gelu_backward(grad @ self.own["down"].T, hidden, tanh)
        grads |= {"up": rows(y).T @ rows(of_hidden), "up_bias": of_hidden.sum(axis=(0, 1))}
        of_norm, grads["gain_2"], grads["shift_2"] = layer_norm_backward(of_hidden @ self.own["up"].T, norm_2)
        grad = grad + of_norm
        of_attention = self.attention.backward(grad, attention)
        of_norm, grads["gain_1"], grads["shift_1"] = layer_norm_backward(of_attention.query, norm_1)
        return grad + of_norm, grads | of_attention.parameters


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


class Model:
    """The language model, with weights drawn at random; the matrix of embeddings makes the logits, too."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.own = {
            "embedding": draw.normal(0, 0.02, (len(CHARACTERS), WIDTH)).astype(np.float32),
            "gain": np.ones(WIDTH, np.float32),
            "shift": np.zeros(WIDTH, np.float32),
        }
        self.blocks = [Block(draw) for _ in range(NUM_LAYERS)]

    @property
    def parameters(self) -> Arrays:
        """All that is learnt, as views: to write into them changes the model."""
        of_blocks = {f"{i}.{name}": x for i, block in enumerate(self.blocks) for name, x in block.parameters.items()}
        return self.own | of_blocks

    def loss(self, tokens: np.ndarray) -> tuple[float, tuple]:
        """Return the mean loss of predicting each token but the first from those before it."""
        x, saved = self.own["embedding"][tokens[:, :-1]], []
        for block in self.blocks:
            x, of_block = block.forward(x)
            saved.append(of_block)
        x, norm = layer_norm(x, self.own["gain"], self.own["shift"])
        loss, grad_logits = cross_entropy(x @ self.own["embedding"].T, tokens[:, 1:])
        return loss, (tokens, saved, x, norm, grad_logits)

    def gradients(self, kept: tuple) -> Arrays:
        """Return the gradients of a loss by the names of the parameters."""
        tokens, saved, x, norm, grad_logits = kept
        grads = {"embedding": rows(grad_logits).T @ rows(x)}
        grad, grads["gain"], grads["shift"] = layer_norm_backward(grad_logits @ self.own["embedding"], norm)
        for i, (block, of_block) in reversed(list(enumerate(zip(self.blocks, saved, strict=True)))):
            grad, of_parameters = block.backward(grad, of_block)
            grads |= {f"{i}.{name}": x for name, x in of_parameters.items()}
        np.add.at(grads["embedding"], tokens[:, :-1], grad)
        return grads

    def write(self, tokens: np.ndarray, caches: list[fastattn.KVCache], sequence: int) -> np.ndarray:
        """Return the logits of what comes after tokens that the caches have not seen."""
        x = self.own["embedding"][tokens]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.write(x, cache, sequence)
        return layer_norm(x[-1:], self.own["gain"], self.own["shift"])[0][0] @ self.own["embedding"].T


# --- learning -------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Return a rate that rises for WARMUP steps and then falls to nearly 0 along half a wave."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    return LEARNING_RATE * (0.55 + 0.45 * np.cos(np.pi * (step - WARMUP) / (steps - WARMUP)))


class Adam:
    """Steps along the mean gradient, divided by the root of its mean square."""

    def __init__(self, parameters: Arrays) -> None:
        self.parameters = parameters
        self.means = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.squares = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.count = 0

    def step(self, grads: Arrays, rate: float) -> None:
        self.count += 1
        # Both means begin at 0, which these make up for.
        of_mean, of_square = (1 - decay**self.count for decay in DECAYS)
        for name, x in self.parameters.items():
            mean, square, grad = self.means[name], self.squares[name], grads[name]
            mean += (1 - DECAYS[0]) * (grad - mean)
            square += (1 - DECAYS[1]) * (grad * grad - square)
            x -= rate / of_mean * mean / (np.sqrt(square / of_square) + EPSILON)


def train(model: Model, tokens: np.ndarray, steps: int, planned: int = STEPS) -> Iterator[float]:
    """Yield the loss before each step."""
    adam = Adam(model.parameters)
    for step, batch in enumerate(batches(tokens, steps)):
        loss, kept = model.loss(batch)
        adam.step(model.gradients(kept), learning_rate(step, planned))
        yield loss


def validation_loss(model: Model, tokens: np.ndarray) -> float:
    pieces = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    return float(np.mean([model.loss(pieces[i : i + BATCH])[0] for i in range(0, len(pieces) - BATCH, BATCH)]))


def generate(model: Model, prompt: str, count: int) -> str:
    """Return the prompt and as many characters more, each drawn from what the model expects."""
    rng = np.random.default_rng(2)
    dim = WIDTH // NUM_HEADS
    caches = [fastattn.KVCache(NUM_HEADS, dim, num_pages=-(-CONTEXT // 64), page_size=64) for _ in range(NUM_LAYERS)]
    sequence, *_ = [cache.add() for cache in caches]
    unseen, text = encoded(prompt), prompt
    for _ in range(count):
        logits = model.write(unseen, caches, sequence).astype(np.float64) / 0.7  # below 1: less daring than the text
        p = np.exp(logits - logits.max())
        unseen = rng.choice(len(p), 1, p=p / p.sum())
        text += CHARACTERS[unseen[0]]
    return text


def named_as_gpt_neox(model: Model) -> Arrays:
    """Return the weights as those of transformers' GPT-NeoX, whose layers are these: matrices are (out, in) there."""
    own = model.own
    named = {"embed_in.weight": own["embedding"]}
    named |= {"final_layer_norm.weight": own["gain"], "final_layer_norm.bias": own["shift"]}
    for i, block in enumerate(model.blocks):
        own, attention = block.own, block.attention.parameters
        # Of each head its query's rows, its key's, its value's.
        heads = [attention[f"{part}_weight"].reshape(NUM_HEADS, -1, WIDTH) for part in ("query", "key", "value")]
        of_layer = {
            "attention.query_key_value.weight": np.concatenate(heads, axis=1).reshape(-1, WIDTH),
            "attention.dense.weight": attention["out_weight"],
            "input_layernorm.weight": own["gain_1"],
            "input_layernorm.bias": own["shift_1"],
            "post_attention_layernorm.weight": own["gain_2"],
            "post_attention_layernorm.bias": own["shift_2"],
            "mlp.dense_h_to_4h.weight": own["up"].T,
            "mlp.dense_h_to_4h.bias": own["up_bias"],
            "mlp.dense_4h_to_h.weight": own["down"].T,
            "mlp.dense_4h_to_h.bias": own["down_bias"],
        }
        named |= {f"layers.{i}.{name}": x for name, x in of_layer.items()}
    return {f"gpt_neox.{name}": np.ascontiguousarray(x) for name, x in named.items()}


def save(model: Model, folder: Path) -> None:
    """Save the model in the format of Hugging Face, as a GPT-NeoX. Its tokens are the places in CHARACTERS."""
    from safetensors.numpy import save_file

    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": len(CHARACTERS),
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "max_position_embeddings": CONTEXT,
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "tie_word_embeddings": True,
        "use_parallel_residual": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named_as_gpt_neox(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"the model is in {folder}")


def plot(losses: list[float]) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.plot(losses)
    plt.xlabel("step")
    plt.ylabel("loss, in nats a character")
    plt.savefig("loss.png", dpi=150)
    print("the loss by steps is in loss.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save the model there, for transformers to load")
    options = parser.parse_args()
    tokens = encoded(documentation())
    held_out = len(tokens) // 20
    model = Model()
    size = sum(x.size for x in model.parameters.values())
    print(f"{len(tokens):,} characters; {size:,} parameters; {STEPS} steps of {BATCH} times {CONTEXT} characters")
    begin = time.perf_counter()
    losses: list[float] = []
    for loss in train(model, tokens[:-held_out], STEPS):
        losses.append(loss)
        if len(losses) % 50 == 0 or len(losses) == 1:
            seconds = time.perf_counter() - begin
            print(f"step {len(losses):4}  loss {np.mean(losses[-50:]):.3f}  {seconds:5.1f} s", flush=True)
    plot(losses)
    print(f"\n{generate(model, 'Return the ', CONTEXT - 11)}\n")
    if options.save is not None:
        save(model, options.save)
    loss = validation_loss(model, tokens[-held_out:])
    check(loss <= STATED_LOSS, f"on text that it has not seen the loss is {loss:.3f}, expected at most {STATED_LOSS}")


if __name__ == "__main__":
    main()
