"""Attention over keys on disk that memory has no room for, chunk by chunk, with dask.

Writes keys and values of float16 to files, attends over them with dask's progress bar, and tells how much memory that
took: with --keys 1000000 the files have 2 GB, and the process less than 1. Then some rows are compared with what NumPy
makes of all keys.

    pip install 'fastattn[dask]'
    python examples/disk.py --keys 1000000
"""

import argparse
import sys
import tempfile
from pathlib import Path

import dask.array as da
import numpy as np
from dask.diagnostics import ProgressBar

import fastattn.dask

HEADS, ROWS, HEAD_DIM, CHUNK = 8, 64, 64, 8192
MOST_MEMORY = 1 << 30


def write(folder: Path, name: str, num_keys: int, seed: int) -> da.Array:
    """Return an array that is in files, one for each chunk of keys."""
    draw = da.random.default_rng(seed)
    array = draw.standard_normal((HEADS, num_keys, HEAD_DIM), dtype="float32", chunks=(HEADS, CHUNK, HEAD_DIM))
    da.to_npy_stack(folder / name, array.astype("float16"), axis=1)
    return da.from_npy_stack(folder / name, mmap_mode="r")


def peak_memory() -> int:
    """Return the most memory that this process had, in bytes; 0 where that is not told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def expected(query: np.ndarray, key: da.Array, value: da.Array) -> np.ndarray:
    """Return the attention of one head's rows in float64, as its formula has it."""
    scores = np.asarray(key[0], np.float64) @ query.T.astype(np.float64) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(axis=0))
    return (weights / weights.sum(axis=0)).T @ np.asarray(value[0], np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention over keys on disk.")
    parser.add_argument("--keys", type=int, default=100_000, help="default: 100000")
    num_keys = parser.parse_args().keys
    query = np.random.default_rng(0).standard_normal((HEADS, ROWS, HEAD_DIM), np.float32)
    with tempfile.TemporaryDirectory(prefix="fastattn-") as folder:
        print(f"writing {num_keys} keys and values of {HEADS} heads:")
        with ProgressBar():
            key, value = (write(Path(folder), name, num_keys, seed) for seed, name in enumerate(("key", "value")))
        out = fastattn.dask.attention(query, key, value)
        print(f"attending over {(key.nbytes + value.nbytes) / 1e9:.1f} GB in {len(key.chunks[1])} chunks:")
        with ProgressBar():
            result = out.compute(num_workers=2)
        memory = peak_memory()
        print(f"the most memory that it took: {memory / 1e9:.2f} GB")
        error = np.abs(result[0, :4] - expected(query[0, :4], key, value)).max()
    print(f"the largest error of four rows against float64: {error:.1e}")
    if memory > MOST_MEMORY or error > 1e-4:
        sys.exit("more than is allowed")


if __name__ == "__main__":
    main()
