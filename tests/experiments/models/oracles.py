"""The networks again, in NumPy float64, from their papers and from run.c; and random variables."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray
BATCH_NORM_EPSILON = 1e-5


def variables_of(model: Any, *inputs: Any, seed: int = 0) -> Any:
    """Variables with no number at its initial 0 or 1; drawn by NumPy, so that nothing compiles."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(seed: int, vocabulary: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, shape), jnp.int32)


def in_double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def turned(x: Array, position: int, base: float) -> Array:
    """One head's features at one position, as complex numbers of neighbours."""
    pairs = x[0::2] + 1j * x[1::2]
    angles = position * base ** (-np.arange(0, len(x), 2) / len(x))
    pairs = pairs * np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(-1)


def llama(weights: Mapping[str, Array], heads: int, kv_heads: int, text: Array) -> Array:
    """Logits of one text: token by token, head by head, as run.c has it; matrices (out, in)."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    layers, size = len(w["wq"]), w["tok_emb"].shape[1] // heads
    keys: list[list[Array]] = [[] for _ in range(layers)]
    values: list[list[Array]] = [[] for _ in range(layers)]
    logits = []
    for position, token in enumerate(np.asarray(text)):
        x = w["tok_emb"][token]
        for i in range(layers):
            y = rms_norm(x, w["attn_norm"][i], 1e-5)
            q = (w["wq"][i] @ y).reshape(heads, size)
            k = (w["wk"][i] @ y).reshape(kv_heads, size)
            keys[i].append(np.stack([turned(head, position, 1e4) for head in k]))
            values[i].append((w["wv"][i] @ y).reshape(kv_heads, size))
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                query = turned(q[head], position, 1e4)
                scores = np.array([query @ k[shared] for k in keys[i]]) / np.sqrt(size)
                weights_of = softmax(scores)
                mixed.append(sum(a * v[shared] for a, v in zip(weights_of, values[i], strict=True)))
            x = x + w["wo"][i] @ np.concatenate(mixed)
            y = rms_norm(x, w["ffn_norm"][i], 1e-5)
            gate, up = w["w1"][i] @ y, w["w3"][i] @ y
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * up)
        logits.append(w["tok_emb"] @ rms_norm(x, w["final_norm"], 1e-5))
    return np.stack(logits)


def conv(x: Array, kernel: Array, stride: int = 1, padding: int = 0) -> Array:
    """``(n, c, h, w)`` by ``(out, in, h, w)``, where ``in`` is ``c`` or, each alone, 1."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = kernel.shape[2]
    rows, columns = ((n - size) // stride + 1 for n in x.shape[2:])
    out = np.zeros((len(x), len(kernel), rows, columns))
    for i in range(size):
        for j in range(size):
            seen = x[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
            if kernel.shape[1] == 1 and x.shape[1] > 1:
                out += seen * kernel[None, :, 0, i, j, None, None]
            else:
                out += np.einsum("nchw,oc->nohw", seen, kernel[:, :, i, j])
    return out


def batch_norm(x: Array, weight: Array, bias: Array, mean: Array, var: Array) -> Array:
    weight, bias, mean, var = (a[None, :, None, None] for a in (weight, bias, mean, var))
    return (x - mean) / np.sqrt(var + BATCH_NORM_EPSILON) * weight + bias


def torch_resnet(state_dict: Mapping[str, Array], x: Array) -> Array:
    """Logits of images ``(n, 3, h, w)``, from the arrays of a state_dict."""
    d = {name: np.asarray(array, np.float64) for name, array in state_dict.items()}

    def norm(name: str, x: Array) -> Array:
        parts = ("weight", "bias", "running_mean", "running_var")
        return batch_norm(x, *(d[f"{name}.{part}"] for part in parts))

    x = np.maximum(norm("bn1", conv(x, d["conv1.weight"], padding=1)), 0)
    for stage in (1, 2, 3):
        block = 0
        while (at := f"layer{stage}.{block}") + ".conv1.weight" in d:
            stride = 2 if stage > 1 and block == 0 else 1
            y = conv(x, d[f"{at}.conv1.weight"], stride, 1)
            y = conv(np.maximum(norm(f"{at}.bn1", y), 0), d[f"{at}.conv2.weight"], padding=1)
            y = norm(f"{at}.bn2", y)
            if stride == 2:
                new = x.shape[1] // 2
                x = np.pad(x[:, :, ::2, ::2], ((0, 0), (new, new), (0, 0), (0, 0)))
            x, block = np.maximum(y + x, 0), block + 1
    return x.mean(axis=(2, 3)) @ d["linear.weight"].T + d["linear.bias"]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def lstm(cell: Mapping[str, Any], x: Array) -> Array:
    """Outputs ``(n, t, hidden)``; gates i, f, g, o with biases at the recurrent kernels."""
    hidden = cell["hi"]["kernel"].shape[1]
    h = c = np.zeros((len(x), hidden))
    out = []
    for t in range(x.shape[1]):
        gate = {
            g: x[:, t] @ cell[f"i{g}"]["kernel"]
            + h @ cell[f"h{g}"]["kernel"]
            + cell[f"h{g}"]["bias"]
            for g in "ifgo"
        }
        c = sigmoid(gate["f"]) * c + sigmoid(gate["i"]) * np.tanh(gate["g"])
        h = sigmoid(gate["o"]) * np.tanh(c)
        out.append(h)
    return np.stack(out, axis=1)


def layer_norm(x: Array, part: Mapping[str, Array]) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * part["scale"] + part["bias"]


def erf(x: Array) -> Array:
    from math import erf as scalar

    return np.vectorize(scalar)(x)


def vit(params: Mapping[str, Any], x: Array, patch: int, layers: int) -> Array:
    """Logits of images ``(n, h, w, c)``: patches cut out one by one, then the encoder."""
    n, height, width, _ = x.shape
    kernel = params["patches"]["kernel"]
    cut = [
        x[:, i : i + patch, j : j + patch].reshape(n, -1)
        for i in range(0, height, patch)
        for j in range(0, width, patch)
    ]
    y = np.stack(cut, axis=1) @ kernel.reshape(-1, kernel.shape[-1]) + params["patches"]["bias"]
    first = np.broadcast_to(params["class_token"], (n, 1, y.shape[-1]))
    y = np.concatenate([first, y], axis=1) + params["positions"]
    for index in range(layers):
        part = params[f"layer{index}"]
        z, attention = layer_norm(y, part["attention_norm"]), part["attention"]
        q, k, v = (
            np.einsum("ntw,whd->nhtd", z, attention[name]["kernel"])
            + attention[name]["bias"][None, :, None]
            for name in ("query", "key", "value")
        )
        mixed = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v
        out = np.einsum("nhtd,hdw->ntw", mixed, attention["out"]["kernel"])
        y = y + out + attention["out"]["bias"]
        z = layer_norm(y, part["mlp_norm"]) @ part["up"]["kernel"] + part["up"]["bias"]
        z = z * 0.5 * (1 + erf(z / np.sqrt(2)))
        y = y + z @ part["down"]["kernel"] + part["down"]["bias"]
    y = layer_norm(y[:, 0], params["norm"])
    return y @ params["linear"]["kernel"] + params["linear"]["bias"]
