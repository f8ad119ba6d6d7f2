"""What attention costs on ranks of which each has a part of the tokens: a model, not a measurement.

    python bench/model_scale.py --tokens 10000000 --rate 1e12 --bandwidth 12.5e9

Counts bytes and flops of a rank, says from how many tokens a rank on a ring's messages are hidden, and simulates rings
of up to 1,024 ranks step by step. A rank computes `rate` flops a second, and a message goes at `bandwidth` bytes a
second after `latency`; each rank has a link of its own in and one out, and nothing else is on them. measure_scale.py
compares it with rings on this machine.
"""

import argparse
from typing import NamedTuple

import numpy as np


class Work(NamedTuple):
    """An attention layer: of one sequence, or of several."""

    tokens: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2
    causal: bool = True
    backward: bool = False

    @property
    def flops_of_score(self) -> int:
        """Two products forward, five backward; a multiply-add is two flops."""
        return (10 if self.backward else 4) * self.head_dim


class Machine(NamedTuple):
    """What a rank has: flops and bytes a second, and seconds until a message moves."""

    rate: float
    bandwidth: float
    latency: float = 20e-6


def scores(layout: str, work: Work, ranks: int, step: int) -> np.ndarray:
    """Return how many scores of a head and sequence each rank computes in a step, in which it has rank r - step's keys.

    Whole numbers of tokens are not looked at: a rank has tokens / ranks, and half of a square is below its diagonal.
    """
    square = (work.tokens / ranks) ** 2
    if not work.causal:
        return np.full(ranks, square)
    if layout == "contiguous":
        own = np.arange(ranks)
        holder = (own - step) % ranks
        return np.where(holder < own, square, np.where(holder == own, square / 2, 0))
    return np.full(ranks, square / 2)  # zigzag: two of four quarters, or one and two halves; striped: a triangle


def flops(layout: str, work: Work, ranks: int) -> np.ndarray:
    """Return the flops of each rank."""
    each = sum(scores(layout, work, ranks, step) for step in range(ranks))
    return np.asarray(each) * work.batch * work.heads * work.flops_of_score


def message_bytes(work: Work, ranks: int) -> float:
    """Return how many bytes a rank sends in a step of a ring: keys and values; backward their gradients in float32."""
    keys = 2 * work.batch * work.kv_heads * work.tokens / ranks * work.head_dim
    return keys * (work.itemsize + (4 if work.backward else 0))


def ring_bytes(work: Work, ranks: int) -> float:
    """Return how many bytes a rank sends in all: sums of gradients go one step farther, back to their rank."""
    if ranks == 1:
        return 0.0
    keys = 2 * work.batch * work.kv_heads * work.tokens / ranks * work.head_dim
    return (ranks - 1) * keys * work.itemsize + (ranks * keys * 4 if work.backward else 0)


def ulysses_bytes(work: Work, ranks: int) -> float:
    """Return how many bytes a rank sends to have all tokens of its heads, and back (forward only)."""
    values = 2 * work.heads + 2 * max(
        work.kv_heads, ranks
    )  # query and out, keys and values: each kv head to who needs it
    own = work.batch * work.tokens / ranks * work.head_dim * work.itemsize
    return values * own * (ranks - 1) / ranks


def tokens_that_hide(work: Work, machine: Machine) -> float:
    """Return from how many tokens a rank on computing a step takes as long as its message, without latency.

    flops of a step / rate = bytes of a step / bandwidth, in which tokens stand squared on the left.
    """
    share = 0.5 if work.causal else 1.0
    flops_of_pair = share * work.batch * work.heads * work.flops_of_score
    return message_bytes(work._replace(tokens=1), 1) / machine.bandwidth * machine.rate / flops_of_pair


def simulate(layout: str, work: Work, ranks: int, machine: Machine) -> tuple[float, float]:
    """Return the seconds of the slowest rank, and those that it computes, step by step.

    A rank posts its messages when a step begins. They move when both sides have posted theirs, and the next step begins
    when they have come and the present one is computed.
    """
    to_seconds = work.batch * work.heads * work.flops_of_score / machine.rate
    message = machine.latency + message_bytes(work, ranks) / machine.bandwidth
    begin, computed = np.zeros(ranks), np.zeros(ranks)
    for step in range(ranks):
        seconds = scores(layout, work, ranks, step) * to_seconds
        computed += seconds
        done = begin + seconds
        if step < ranks - 1:
            posted = np.maximum(begin, np.roll(begin, 1))  # from the left; to the right is sent meanwhile
            arrived = np.maximum(posted, np.roll(posted, -1)) + message
            done = np.maximum(done, arrived)
        begin = done
    if work.backward and ranks > 1:
        begin = begin + machine.latency + (message_bytes(work, ranks) * 4 / (work.itemsize + 4)) / machine.bandwidth
    return float(begin.max()), float(computed.max())


def table(work: Work, machine: Machine, counts: list[int]) -> list[str]:
    ideal = flops("zigzag", work, 1)[0] / machine.rate
    lines = [
        f"{work.tokens} tokens, {work.heads} heads on {work.kv_heads}, head_dim {work.head_dim}, "
        f"{'causal' if work.causal else 'full'}, {'backward' if work.backward else 'forward'}; "
        f"{machine.rate:.3g} flop/s, {machine.bandwidth:.3g} byte/s and {machine.latency:.3g} s a rank",
        f"messages are hidden from {tokens_that_hide(work, machine):.0f} tokens a rank on",
        "",
        "| ranks | tokens a rank | GB sent | zigzag, s | of it computing | efficiency | contiguous, efficiency |",
        "| ----- | ------------- | ------- | --------- | --------------- | ---------- | ---------------------- |",
    ]
    for ranks in counts:
        seconds, computing = simulate("zigzag", work, ranks, machine)
        other, _ = simulate("contiguous", work, ranks, machine)
        lines.append(
            f"| {ranks} | {work.tokens // ranks} | {ring_bytes(work, ranks) / 1e9:.1f} | {seconds:.4g} | "
            f"{computing / seconds:.0%} | {ideal / ranks / seconds:.0%} | {ideal / ranks / other:.0%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="A model of attention on many ranks.")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--rate", type=float, default=2e12, help="flops a second of a rank; default: 2e12")
    parser.add_argument("--bandwidth", type=float, default=12.5e9, help="bytes a second of a link; default: 12.5e9")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds; default: 2e-5")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--full", action="store_true", help="not causal")
    given = parser.parse_args()
    work = Work(given.tokens, causal=not given.full, backward=given.backward)
    machine = Machine(given.rate, given.bandwidth, given.latency)
    print("\n".join(table(work, machine, [1, 4, 16, 64, 256, 1024])))


if __name__ == "__main__":
    main()
