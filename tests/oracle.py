"""What every test shares: the dtypes, random input, and a comparison with the reference whose tolerance is derived."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import fastattn
from fastattn import reference

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)

# (dtype of query and out, dtype of key and value)
DTYPES = [(F32, F32), (F64, F64), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]
DTYPE_IDS = [q.name if q == kv else f"{q.name}-{kv.name}" for q, kv in DTYPES]

# Half a unit in the last place at 1: the relative error of one rounding.
UNIT = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}

rng_seed = 20240607


def make_rng(*seed):
    return np.random.default_rng([rng_seed, *seed])


def normal(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def qkv(rng, shape, dtypes=(F32, F32), head_dim_v=None):
    """Return standard normal query, key, value for shape = (B, H, Hkv, Sq, Sk, D)."""
    batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim = shape
    query = normal(rng, (batch, heads, seqlen_q, head_dim), dtypes[0])
    key = normal(rng, (batch, kv_heads, seqlen_k, head_dim), dtypes[1])
    value = normal(rng, (batch, kv_heads, seqlen_k, head_dim if head_dim_v is None else head_dim_v), dtypes[1])
    return query, key, value


def _largest(x):
    """The largest finite magnitude in x, 0 if there is none."""
    x = np.abs(np.asarray(x).astype(np.float64))
    return float(np.max(x, initial=0.0, where=np.isfinite(x)))


def _largest_norm(x):
    x = x.astype(np.float64)
    return float(np.max(np.sqrt((x * x).sum(axis=-1)), initial=0.0))


def score_error(query, key, *, scale=None, query_offset=None, bias=None, alibi_slopes=None, sinks=None, **_):
    """Return a bound on the error of any score, s' - s, when it is computed with rounding unit u.

    A dot product of D terms errs by at most D u Σ|q||k|, and Σ|q||k| <= ‖q‖‖k‖. Scaling, the cap, each sum,
    the change to base 2 (two roundings) and the subtraction of the maximum (up to twice the magnitude) add a
    few units of the magnitude: 16 covers them. The cap has slope <= 1, so it does not enlarge what it is given.
    """
    head_dim = query.shape[-1]
    scale = 1.0 / np.sqrt(max(head_dim, 1)) if scale is None else scale
    magnitude = abs(scale) * _largest_norm(query) * _largest_norm(key) + _largest(0 if bias is None else bias)
    magnitude += _largest(0 if sinks is None else sinks)
    if alibi_slopes is not None:
        span = query.shape[-2] + key.shape[-2] + _largest(0 if query_offset is None else query_offset)
        magnitude += _largest(alibi_slopes) * span
    return (head_dim + 16) * magnitude


def exact(query, key, value, **keywords):
    """Return the reference's result before it is rounded to query's dtype."""
    return reference.attention(*(x.astype(np.float64) for x in (query, key, value)), **keywords)


def formula(query, key, value, dtype):
    """What a careful user writes in NumPy; every operation rounds to dtype."""
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scale = np.array(1 / np.sqrt(query.shape[-1]), dtype)
    scores = (query @ key.swapaxes(-1, -2)) * scale
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True, dtype=dtype)) @ value


def tolerances(query, key, value, **keywords):
    """Return bounds on the errors of out, lse and weights.

    With δ the error of a score, u the unit of the accumulator, u_p the unit p is rounded to before it meets V
    (bfloat16 where the dot instruction takes it, else none):

        p'   = p (1 + δ + 4u)            exp is good to a few units
        w'   = w (1 + 2δ + (Sk + 16) u)  numerator and denominator; a sum of Sk terms and the rescales between blocks
        out' = Σ w v, each term off by 2δ + (2 Sk + 32) u + 2 u_p relative, so in units of Σ w|v|; then one
               rounding to out's dtype, or half its smallest subnormal.

    A p below 2^-126 (2^-960 in float64) is 0; so is, but for float64, any other number below 2^-126: a value, a
    product, a sum.

    Σ w|v| is the reference's own result for |v|. Bounds linear in δ hold while δ is well under 1.
    """
    out_dtype, kv_dtype = query.dtype, key.dtype
    unit = UNIT[F64] if out_dtype == F64 else UNIT[F32]
    # In float64 the reference errs as much as the kernel does.
    sides = 2.0 if out_dtype == F64 else 1.0
    unit_p = UNIT[BF16] if out_dtype == kv_dtype == BF16 else 0.0
    seqlen_k = key.shape[-2]

    delta = score_error(query, key, **keywords) * unit
    assert delta < 0.1, "the linear bound does not hold for such scores; compare otherwise"
    relative = sides * (2.2 * delta + (2 * seqlen_k + 32) * unit)

    finite_value = np.where(np.isfinite(value.astype(np.float64)), value, np.zeros((), value.dtype))
    spread, lse, weights = exact(
        query, key, np.abs(finite_value.astype(np.float64)), **keywords, return_lse=True, return_weights=True
    )

    subnormal = float(ml_dtypes.finfo(out_dtype).smallest_subnormal)
    flushed = (2.0**-960 if out_dtype == F64 else 2.0**-126) * max(seqlen_k, 1)
    flushed_sums = 0.0 if out_dtype == F64 else 4 * flushed  # a value, its product, the sum, the result
    out_tol = (relative + 2 * unit_p + UNIT[out_dtype]) * spread + subnormal + flushed * _largest(value) + flushed_sums
    weights_tol = (relative + unit_p + UNIT[out_dtype]) * weights + subnormal + flushed
    magnitude = np.abs(np.where(np.isfinite(lse), lse, 0.0))
    lse_tol = sides * (1.1 * delta + (seqlen_k + 16) * unit + 4 * unit * magnitude)
    return out_tol, lse_tol, weights_tol


def formula_backward(grad_out, query, key, value, dtype):
    """What a careful user writes in NumPy for the gradients of `formula`; every operation rounds to dtype."""
    grad_out, query, key, value = (x.astype(dtype) for x in (grad_out, query, key, value))
    batch, kv_heads, seqlen_k, _ = key.shape
    group = query.shape[1] // kv_heads
    keys, values = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scale = np.array(1 / np.sqrt(np.longdouble(query.shape[-1])), dtype)
    scores = (query @ keys.swapaxes(-1, -2)) * scale
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True, dtype=dtype)
    delta = (grad_out * (p @ values)).sum(axis=-1, keepdims=True, dtype=dtype)
    grad_scores = p * (grad_out @ values.swapaxes(-1, -2) - delta) * scale

    def of_groups(grads):
        return grads.reshape(batch, kv_heads, group, seqlen_k, -1).sum(axis=2, dtype=dtype)

    transposed = grad_scores.swapaxes(-1, -2)
    return grad_scores @ keys, of_groups(transposed @ query), of_groups(p.swapaxes(-1, -2) @ grad_out)


def backward_tolerances(grad_out, query, key, value, out, lse, *, grad_lse=None, **keywords):
    """Return bounds on the errors of the gradients of query, key, value, bias and sinks, given the same out and lse.

    With δ and u as in `tolerances`, p' = p (1 + ε), where ε = δ + 4 u |lse| + 16 u for what is subtracted and for
    exp. The sums that make dL/dp and delta are off by (Dv + 4) u of the sums of magnitudes; what dL/ds is made of is,
    in magnitudes,

        A = p (|grad_out| |V|ᵀ + Σ |grad_out| |out| + |grad_lse|),

    which is the reference's gradient of the bias for these magnitudes, with the signs that do not cancel. dL/ds' is
    thus off by A (ε + (2 Dv + 16) u), and by A u_p where it is rounded before it meets K and Q; the cap's slope,
    1 - (s/c)², by 2 δ / c + 8 u. The gradients sum these in the magnitudes of K, Q or grad_out, with as many roundings
    as terms, and are rounded once. What is below 2^-126 (2^-960 in float64) may be 0.
    """
    dtypes = {"query": query.dtype, "key": key.dtype, "value": value.dtype}
    unit = UNIT[F64] if query.dtype == F64 else UNIT[F32]
    sides = 2.0 if query.dtype == F64 else 1.0
    unit_p = UNIT[BF16] if query.dtype == key.dtype == BF16 else 0.0
    smallest = 2.0**-950 if query.dtype == F64 else 2.0**-120
    grad_out, query, key, value, out, lse = (x.astype(np.float64) for x in (grad_out, query, key, value, out, lse))
    grad_lse = np.zeros_like(lse) if grad_lse is None else np.abs(grad_lse.astype(np.float64))

    delta = score_error(query, key, **keywords) * unit
    assert delta < 0.1, "the linear bound does not hold for such scores; compare otherwise"
    relative = 1.1 * delta + (4 * _largest(lse) + 2 * value.shape[-1] + 40) * unit
    if keywords.get("softcap") is not None:
        relative += 2.2 * delta / keywords["softcap"] + 8 * unit

    full = (*lse.shape, key.shape[-2])
    bias = keywords.get("bias")
    full_bias = np.broadcast_to(0.0 if bias is None else bias.astype(np.float64), full)
    sinks = keywords.get("sinks")
    magnitudes = (np.abs(grad_out), query, key, np.abs(value), -np.abs(out), lse)
    _, _, of_value, of_scores, *of_sinks = reference.attention_backward(
        *magnitudes,
        **{**keywords, "bias": full_bias},
        grad_lse=grad_lse,
        return_grad_bias=True,
        return_grad_sinks=sinks is not None,
    )
    scale = abs(1 / np.sqrt(max(query.shape[-1], 1)) if keywords.get("scale") is None else keywords["scale"])
    of_heads = scale * of_scores.swapaxes(-1, -2) @ np.abs(query)
    keys = np.abs(key)
    if query.ndim > 2 and key.shape[-3]:
        kv_heads, group = key.shape[-3], query.shape[-3] // key.shape[-3]
        keys = np.repeat(keys, group, axis=-3)
        of_heads = of_heads.reshape(*of_heads.shape[:-3], kv_heads, group, *of_heads.shape[-2:]).sum(axis=-3)
    spreads = {
        "query": reference.summed_to(query.shape, scale * of_scores @ keys),
        "key": reference.summed_to(key.shape, of_heads),
        "value": of_value,
    }
    if bias is not None:
        spreads["bias"], dtypes["bias"] = reference.summed_to(bias.shape, of_scores), bias.dtype
    if sinks is not None:
        spreads["sinks"], dtypes["sinks"] = of_sinks[0], np.asarray(sinks).dtype

    terms = 16 + max(lse.size, key.shape[-2])
    flushed = smallest * terms * (1 + _largest(grad_out)) * (1 + _largest(value)) * (1 + _largest(out))
    flushed *= (
        (1 + max(_largest(query), _largest(key))) * (1 + scale) * (1 + value.shape[-1]) * (1 + _largest(grad_lse))
    )
    bounds = {}
    for name, spread in spreads.items():
        rounding = UNIT.get(dtypes[name], UNIT[F64])
        subnormal = float(ml_dtypes.finfo(dtypes[name]).smallest_subnormal)
        bounds[name] = (sides * (relative + terms * unit) + 2 * unit_p + rounding) * spread + flushed + subnormal
    return bounds


def check_backward(backward, query, key, value, grad_out, *, grad_lse=None, **keywords):
    """Compare what a function returns for the gradients with the reference, given the same out and lse; return them.

    The results are those that fastattn.attention gives.
    """
    asked = {f"return_grad_{name}": True for name in ("bias", "sinks") if keywords.get(name) is not None}
    out, lse = fastattn.attention(query, key, value, **keywords, return_lse=True)
    arrays = (grad_out, query, key, value, out, lse)
    wide = {name: x.astype(np.float64) if name == "bias" else x for name, x in keywords.items()}
    expected = reference.attention_backward(*(x.astype(np.float64) for x in arrays), **wide, grad_lse=grad_lse, **asked)
    allowed = backward_tolerances(*arrays, grad_lse=grad_lse, **keywords)
    actual = backward(*arrays, **keywords, grad_lse=grad_lse, **asked)
    inputs = {"query": query, "key": key, "value": value, **keywords}
    assert len(actual) == len(expected) == len(allowed)
    for a, e, (name, tolerance) in zip(actual, expected, allowed.items(), strict=True):
        assert a.dtype == np.asarray(inputs[name]).dtype, name
        assert_close(a, e, tolerance, f"grad_{name}")
    return actual


def described(values):
    """Return a line for each array, shape, number and dict of keywords among a test's variables, and one for the isa.

    conftest.py prints it with whatever fails, so that no assertion of a numeric test needs to say it.
    """
    lines = [f"isa: {fastattn.show_config(mode='dicts')['isa']}"]
    for name, value in values.items():
        said = summary(value)
        if said is not None:
            lines.append(f"{name}: {said}")
    return "\n".join(lines)


def summary(value):
    """Return what a value is, in a few words, or None of what does not matter to a numeric test."""
    if isinstance(value, np.ndarray):
        listed = f" = {value.tolist()}" if value.size <= 8 else ""
        strides = "" if value.flags.c_contiguous else f" strides {value.strides}"
        return f"{value.dtype} {value.shape}{strides}{listed}"
    if value is None or isinstance(value, (bool, int, float, str, np.generic, np.dtype)):
        return repr(value) if not isinstance(value, str) or len(value) < 200 else None
    if isinstance(value, dict) and len(value) <= 20:
        parts = {key: summary(x) for key, x in value.items()}
        return "{" + ", ".join(f"{key}: {x}" for key, x in parts.items() if x is not None) + "}"
    if isinstance(value, (tuple, list)) and len(value) <= 20:
        parts = [summary(x) for x in value]
        return f"({', '.join(parts)})" if all(x is not None for x in parts) else None
    return repr(value) if type(value).__name__ == "Case" else None


def assert_close(actual, expected, tolerance, what="out"):
    """Assert |actual - expected| <= tolerance, and the same NaN and infinities in the same places."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        # NaN compares false, so one on one side only is bad; so is an infinity.
        close = same | ((np.abs(actual - expected) <= tolerance) & np.isfinite(expected))
    if not close.all():
        bad = np.argwhere(~close)
        where = tuple(bad[0])
        allowed = np.broadcast_to(tolerance, actual.shape)[where]
        raise AssertionError(
            f"{what}: {len(bad)} of {actual.size} differ; at {where} got {actual[where]!r}, expected "
            f"{expected[where]!r}, difference {abs(actual[where] - expected[where]):.3g} > {allowed:.3g}"
        )


def check(query, key, value, **keywords):
    """Call fastattn.attention and compare out, lse and weights with the reference; return them."""
    return check_planted((query, key, value), (query, key, value), **keywords)


def check_planted(clean, planted, **keywords):
    """As check, on planted arrays, with the tolerance of the clean ones."""
    expected = exact(*planted, **keywords, return_lse=True, return_weights=True)
    allowed = tolerances(*clean, **keywords)
    names = ("out", "lse", "weights")
    actual = fastattn.attention(*planted, **keywords, return_lse=True, return_weights=True)
    dtype = clean[0].dtype
    assert [x.dtype for x in actual] == [dtype, F64 if dtype == F64 else F32, dtype]
    for a, e, tolerance, name in zip(actual, expected, allowed, names, strict=True):
        assert_close(a, e, tolerance, name)
    # Without weights the kernel may take another path; it is held to the same bound.
    without = fastattn.attention(*planted, **keywords, return_lse=True)
    for a, e, tolerance, name in zip(without, expected[:2], allowed[:2], names[:2], strict=True):
        assert_close(a, e, tolerance, f"{name} without weights")
    return actual


def assert_same_bits(actual, expected, what="out"):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    a, e = np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits)
    assert np.array_equal(a, e), f"{what}: {np.count_nonzero(a != e)} of {a.size} elements differ in their bits"


# No test fails for a slow machine: only what hangs takes so long.
HANG_SECONDS = 3600


def python(*arguments, standard_input=None, **environment):
    """Start Python on the same fastattn in a process of its own and return the finished process."""
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    # -P: the current directory may hold the source tree, which is not what is under test.
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def run_script(source, **environment):
    """Run source in a process of its own, assert that it succeeds, and return what it printed."""
    done = python("-X", "faulthandler", "-c", source, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
