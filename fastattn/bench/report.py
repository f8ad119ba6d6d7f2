"""Prints a run as tables."""

from __future__ import annotations

from itertools import zip_longest

from fastattn.bench.run import PeerTime, Row, Run

__all__ = ["report"]


def report(run: Run) -> str:
    """Return the run as text: what it was measured on, a line a case, and the geometric means."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    machine = f"{run.cpu}, isa {run.isa}, {run.num_threads} threads"
    if run.other_load is not None:
        machine += f", other work on {run.other_load:.2f} CPUs meanwhile"
    parts = [f"{machine}\n{versions}", rows_table(run)]
    if means := run.means():
        parts.append("Geometric means of the ratios\n\n" + means_table(means))
    if any(row.attention_share is not None for row in run.rows):
        parts.append(SHARES)
    parts += run.notes + remarks(run) + busy(run)
    return "\n\n".join(parts)


SHARES = (
    "attention, of torch: the share of a model's time that passes within attention, by fastattn and by torch, without "
    "what makes masks and fills caches. What is left of torch's time is not shortened by faster attention."
)

# CPUs' worth of other work beyond which figures are not to be trusted: a tenth moves ratios by more than they vary.
BUSY = 0.1


def busy(run: Run) -> list[str]:
    """Return a line if other work ran beside the benchmark, or if nobody can tell."""
    if run.other_load is None:
        return ["Other work on this machine is not known: ratios hold only if there was none."]
    if run.other_load <= BUSY:
        return []
    return [
        f"BUSY: other work took {run.other_load:.2f} CPUs meanwhile, so these times and ratios are not to be trusted. "
        "Measure again when nothing else runs."
    ]


def rows_table(run: Run) -> str:
    peers = list(dict.fromkeys(name for row in run.rows for name in row.peers))
    costs = any(row.baseline for row in run.rows)
    header = ["case", "B,H,Hkv,Sq,Sk,D", "dtype", "best ms", "median", "GFLOP/s"]
    header += ["of peak", "of read", "of limit", "bound"]
    header += ["time"] * costs + [f"x {name}" for name in peers]
    header += ["attention", *(f"of {name}" for name in peers)]  # its share of a model's time
    return table(*without_empty_columns(header, [row_cells(row, peers, costs) for row in run.rows]))


def without_empty_columns(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out the columns that say nothing of any row."""
    kept = [i for i in range(len(header)) if not rows or any(row[i] != "-" for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def row_cells(row: Row, peers: list[str], costs: bool) -> list[str]:
    cells = [row.name, row.shape, row.dtype, milliseconds(row.best_ms), milliseconds(row.median_ms)]
    cells += [f"{row.gflops:.1f}", f"{row.share:.0%}"]
    cells.append("-" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}")
    cells += [f"{row.limit_share:.0%}", row.bound]
    if costs:
        cells.append(cost_cell(row))
    cells += [peer_cell(row.peers[name]) for name in peers]
    shares = [row.attention_share, *(row.peers[name].attention_share for name in peers)]
    return cells + ["-" if share is None else f"{share:.0%}" for share in shares]


def cost_cell(row: Row) -> str:
    if row.baseline is None:
        return ""
    return f"{row.baseline_ratio:.3f} of {row.baseline}" + (", per flop" if row.per_flop else "")


def peer_cell(peer: PeerTime) -> str:
    return "-" if peer.ratio is None else f"{peer.ratio:.2f}"


def milliseconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def means_table(means: dict[str, dict[str, float]]) -> str:
    dtypes = list(dict.fromkeys(dtype for values in means.values() for dtype in values))
    rows = [
        [name, *(f"{values[dtype]:.2f}" if dtype in values else "-" for dtype in dtypes)]
        for name, values in means.items()
    ]
    return table(["", *dtypes], rows)


def remarks(run: Run) -> list[str]:
    """Return a line for each reason why a peer has no figure or lost a variant, with the cases it holds for."""
    where: dict[str, list[str]] = {}
    for row in run.rows:
        for name, peer in row.peers.items():
            reasons = [f"{name} has no figure ({peer.absent})"] if peer.absent else []
            reasons += [f"{name} runs without one of its variants ({rejected})" for rejected in peer.rejected]
            for reason in reasons:
                where.setdefault(reason, []).append(f"{row.name} {row.dtype}")
    if not where:
        return []
    return ["\n".join(f"{reason}: {', '.join(cases)}" for reason, cases in where.items())]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose source is aligned too: words to the left, numbers to the right."""
    columns = list(zip_longest(header, *rows, fillvalue=""))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(is_number(cell) for cell in column[1:]) for column in columns]

    def line(cells: list[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.rstrip("%").replace(".", "", 1).isdigit()
