"""Draws a run: a roofline, and fastattn beside its peers as shares of the limit."""

from __future__ import annotations

import io
import math
from statistics import median
from typing import TYPE_CHECKING, Any

from fastattn.bench.run import Row, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "draw", "draw_image"]

FORMATS = ("png", "svg", "pdf")

INK, FAINT = "#262626", "#d9d9d9"
# Told apart in any kind of colour vision, and by shape where points are small.
DTYPE_STYLES = {
    "float32": ("#0072b2", "o"),
    "bfloat16": ("#d55e00", "s"),
    "float16": ("#009e73", "^"),
    "float64": ("#7b4fa3", "D"),
    "int8": ("#b8860b", "v"),
}
BASELINE_COLORS = {
    "fastattn": "#0b5cad",
    "torch": "#e8743b",
    "onnxruntime": "#6fb07f",
    "openvino": "#a58cc9",
    "vllm": "#d9b44a",
    "numpy": "#b5b5b5",
}


def draw_image(run: Run, file_format: str) -> bytes:
    """Return the figure as a file of that format, one of `FORMATS`."""
    file = io.BytesIO()
    draw(run).savefig(file, format=file_format, dpi=160)
    return file.getvalue()


def draw(run: Run) -> Figure:
    """Return the figure.

    Parameters
    ----------
    run : Run
        What was measured; it has at least one row.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.dtype for row in run.rows))
    widest = max(sum(row.dtype == dtype for row in run.rows) for dtype in dtypes)
    with rc_context({"font.size": 9, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(8 + max(4.5, 0.85 * widest), max(5.6, 2.5 * len(dtypes))), layout="constrained")
        parts: Any = figure.subfigures(1, 2, width_ratios=(7, 1 + max(4.5, 0.85 * widest)))
        left, right = parts
        draw_roofline(left.subplots(), run)
        panels = right.subplots(len(dtypes), 1, squeeze=False)[:, 0]
        for ax, dtype in zip(panels, dtypes, strict=True):
            draw_bars(ax, dtype, [row for row in run.rows if row.dtype == dtype], widest)
        label_baselines(panels[0], run)
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        figure.suptitle(
            f"{run.cpu}, isa {run.isa}, {run.num_threads} threads; {versions}", x=0.01, ha="left", fontsize=9
        )
    return figure


# --- the roofline ---------------------------------------------------------------------------------


def intensity(row: Row) -> float:
    """FLOPs for each byte that is read or written."""
    return row.flops / row.nbytes


def draw_roofline(ax: Axes, run: Run) -> None:
    rows = [row for row in run.rows if row.nbytes and row.flops]
    ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte of queries, keys, values and results", ylabel="GFLOP/s")
    ax.set_title("Roofline: each case, and a line up to its limit", loc="left", fontsize=10)
    if not rows:
        return
    lowest, highest = min(map(intensity, rows)) / 2, 2 * max(map(intensity, rows))
    draw_roofs(ax, rows, lowest, highest)
    for row in rows:
        color, marker = DTYPE_STYLES[row.dtype]
        limit = row.flops / row.limit.seconds / 1e9
        ax.plot([intensity(row)] * 2, [row.gflops, limit], color=color, lw=0.8, alpha=0.5)
        ax.plot(intensity(row), row.gflops, marker, color=color, ms=5, mec="white", mew=0.5)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        color, marker = DTYPE_STYLES[dtype]
        ax.plot([], [], marker, color=color, label=dtype)
    ax.set_xlim(lowest, highest)
    ax.set_ylim(bottom=min(row.gflops for row in rows) / 3)
    ax.grid(True, which="major", color=FAINT, lw=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", frameon=False)


def draw_roofs(ax: Axes, rows: list[Row], lowest: float, highest: float) -> None:
    """Draw the products of each path, level, and reading where it is slowest and where it is fastest, sloped."""
    peaks = roofs(rows)
    for peak, paths in peaks:
        ax.plot([lowest, highest], [peak, peak], color=INK, lw=0.9)
        ax.text(highest, 1.03 * peak, f"{', '.join(paths)} {peak:,.0f}", ha="right", fontsize=8)
    top = max(row.peak_gflops for row in rows)
    for row in (min(rows, key=bandwidth), max(rows, key=bandwidth)):
        speed = bandwidth(row)
        end = min(highest, top / speed)
        ax.plot([lowest, end], [lowest * speed, end * speed], color=INK, lw=0.9, ls="--")
        ax.text(
            1.1 * lowest,
            1.1 * lowest * speed,
            f" reading {size(row.footprint)}: {speed:.0f} GB/s",
            va="bottom",
            fontsize=8,
            rotation=math.degrees(math.atan(speed)),  # of data, which the axes turn
            rotation_mode="anchor",
            transform_rotates_text=True,
        )


def bandwidth(row: Row) -> float:
    """GB/s at which the machine reads as much as the case."""
    return row.nbytes / row.limit.reading / 1e9


def roofs(rows: list[Row]) -> list[tuple[float, list[str]]]:
    """Return the peak of each path, of those that are nearly the same once with all their names."""
    measured: dict[str, list[float]] = {}
    for row in rows:
        if len(row.paths) == 1:
            measured.setdefault(row.paths[0], []).append(row.peak_gflops)
    found: list[tuple[float, list[str]]] = []
    for path, peak in sorted(((path, median(peaks)) for path, peaks in measured.items()), key=lambda pair: pair[1]):
        if found and peak < 1.2 * found[-1][0]:
            found[-1][1].append(path)
        else:
            found.append((peak, [path]))
    return found


def size(nbytes: int) -> str:
    power = min(3, int(math.log(nbytes, 1000)))
    return f"{nbytes / 1000**power:.0f} {('B', 'KB', 'MB', 'GB')[power]}"


# --- fastattn beside its peers --------------------------------------------------------------------


def baselines_of(rows: list[Row]) -> list[str]:
    """fastattn, and the peers that have a figure on some row."""
    timed = (name for row in rows for name, peer in row.peers.items() if peer.ratio is not None)
    return ["fastattn", *dict.fromkeys(timed)]


def share_of(row: Row, baseline: str) -> float | None:
    """A baseline's share of the limit; None if it has no figure."""
    if baseline == "fastattn":
        return row.limit_share
    peer = row.peers.get(baseline)
    return None if peer is None or peer.ratio is None else row.limit_share / peer.ratio


def draw_bars(ax: Axes, dtype: str, rows: list[Row], places: int) -> None:
    names = baselines_of(rows)
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        bars = [(x, share) for x, row in enumerate(rows) if (share := share_of(row, name)) is not None]
        at = [x - 0.4 + (place + 0.5) * width for x, _ in bars]
        drawn = ax.bar(at, [share for _, share in bars], 0.9 * width, color=BASELINE_COLORS[name])
        if name == "fastattn":
            ax.bar_label(drawn, [f"{share:.0%}" for _, share in bars], fontsize=7, padding=1)
    ax.set_title(f"{dtype}: share of the limit", loc="left", fontsize=10)
    ax.set_ylim(0, max(1.05, 1.1 * max(row.limit_share for row in rows)))
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.axhline(1, color=INK, lw=0.8, ls=":")
    ax.set_xticks(range(len(rows)), [row.name for row in rows], rotation=25, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.6, places - 0.4)
    ax.grid(True, axis="y", color=FAINT, lw=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def label_baselines(ax: Axes, run: Run) -> None:
    from matplotlib.patches import Patch

    names = baselines_of(run.rows)
    patches = [Patch(color=BASELINE_COLORS[name], label=name) for name in names]
    ax.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), frameon=False, fontsize=8)
