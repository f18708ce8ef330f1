"""The page of ``benchmark kernels``: its text, its two tables, its roofline plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
PLOT = "kernels-cpu-{}.svg"
"""The plot beside the page, by the kernel that was measured."""


def kernel_table(head: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The Markdown page."""
    limits = [row["limits"] for row in rows if "limits" in row]
    measured = [row for row in rows if "shape" in row]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in limits[0]["tile_gops_of_one_core"].items())
    baselines = list(measured[0]["times"])
    best = max(limits[0]["tile_gops_of_one_core"].values())
    lines = [
        f"# Packed linears on a CPU, kernel {limits[0]['kernel']}",
        "",
        f"{head['machine']['cpu']}, torch {head['versions']['torch']}. One process, candidates interleaved, medians of "
        f"{max(len(row['seconds']) for row in measured)} rounds (of two where a candidate takes eight times as long as "
        "the fastest F.linear), fresh outputs. Integer operations of one core whose operands lie in the "
        f"first-level cache, in GOP/s: {rates}. Copying memory: {limits[0]['copy_gb_s']:.1f} GB/s.",
        f"Huge pages: {limits[0]['huge_pages']}; THP_MEM_ALLOC_ENABLE: {limits[0]['THP_MEM_ALLOC_ENABLE']}; packed "
        "linears ask for them for their outputs. One thread: its processor time; more: wall time.",
        *_peers_text(rows),
        "",
        f"    {head['command']}",
        "",
        f"| M x K - N | threads | | ms | GOP/s | of the core's | {' | '.join(f'times {name}' for name in baselines)} |",
        "|---" * (6 + len(baselines)) + "|",
    ]
    for row in measured:
        share = row["gops"] / best / row["threads"]
        times = " | ".join(f"{row['times'][name]:.2f}" for name in baselines)
        lines.append(
            f"| {row['shape']} | {row['threads']} | {row['candidate']} | {row['median_ms']:.1f} | {row['gops']:.0f} | "
            f"{share:.0%} | {times} |"
        )
    return [*lines, *_scaling_table(measured), "", f"![Roofline]({PLOT.format(limits[0]['kernel'])})"]


def _peers_text(rows: Sequence[Row]) -> Iterator[str]:
    """Which peers are in the table, and which are not and why."""
    peers = next(row["peers"] for row in rows if "peers" in row)
    if any(peers.values()):
        there = " and ".join(f"{name} {version}" for name, version in peers.items() if version)
        yield (
            f"Peers: {there}. Names say what goes in and out: bf16, or float32 where a peer or the processor has nothing "
            "else. Scales of inputs are per token in packed linears; a peer with one scale for all tokens does less work."
        )
    if not next(row["limits"]["vnni"] for row in rows if "limits" in row):
        yield (
            "This processor has no VNNI, so sums of two products of bytes saturate: torch's linear_dynamic has 7-bit inputs "
            "and ONNX Runtime's dynamic linear 7-bit weights, as they advise; torchao's compiled W8A8 has 8 bits and may be "
            "wrong. Packed linears are exact."
        )
    if missing := [name for name, version in peers.items() if version is None]:
        yield f"Not measured, because not installed (`make peers` in a clone): {' and '.join(missing)}."


def _scaling_table(measured: Sequence[Row]) -> list[str]:
    """More threads against fewer; nothing where one number was measured."""
    scaled = [row for row in measured if row["scaling"] is not None]
    if not scaled:
        return []
    lines = [
        "",
        "## More threads",
        "",
        "Wall time on few threads over wall time on more, the two calls one right after the other: median and quartiles of "
        "the rounds, and the fastest call of all on few over the fastest on more. Where other programs run, they lower these "
        "ratios: compare with F.linear's. Processors: processor time over wall time of the calls on more threads; where they "
        "are fewer than the threads, the machine had no more to give. Busiest: processor time of the call on few threads "
        "over that of the busiest thread on more; a lower bound, which others lower only where threads spin.",
        "",
        "| M x K - N | | threads | median | quartiles | fastest | processors | busiest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scaled:
        scaling = row["scaling"]
        low, high = scaling["quartiles"]
        lines.append(
            f"| {row['shape']} | {row['candidate']} | {scaling['from']} to {row['threads']} | {scaling['median']:.2f} | "
            f"{low:.2f} to {high:.2f} | {scaling['best']:.2f} | {scaling['processors']:.2f} | "
            f"{scaling['by_processor_time']:.2f} |"
        )
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """The roofline of the first number of threads: operations per byte against GOP/s.

    Each shape is a column of points: packed linears in colour, what torch has in dark grey, peers in light grey. Shapes of
    equal or close intensity stand beside each other, in the order of the table.
    """
    import matplotlib as mpl
    import matplotlib.ticker
    from matplotlib.figure import Figure

    limits = next(row["limits"] for row in rows if "limits" in row)
    measured = [row for row in rows if row.get("threads") == limits["threads"]]
    peak = max(limits["tile_gops_of_one_core"].values()) * limits["threads"]
    places = _places({row["shape"]: row["operations_per_byte"] for row in measured})
    knee = peak / limits["copy_gb_s"]
    left, right = min(*places.values(), knee) / 1.5, max(*places.values(), knee) * 1.5
    with mpl.rc_context({"svg.hashsalt": "qvgen"}):
        axes = (figure := Figure(figsize=(11, 6), layout="constrained")).subplots()
        axes.loglog([left, knee, right], [left * limits["copy_gb_s"], peak, peak], "k-", linewidth=1)
        for name, style in _styles(list(dict.fromkeys(row["candidate"] for row in measured))).items():
            points = [row for row in measured if row["candidate"] == name]
            across = [places[row["shape"]] for row in points]
            label = name.replace("_int_mm", "torch._int_mm")  # a label that begins with _ is not shown
            axes.loglog(across, [row["gops"] for row in points], linestyle="", label=label, **style)
        slowest = min(row["gops"] for row in measured)
        axes.set_ylim(slowest / 2.5, 1.3 * max(peak, *(row["gops"] for row in measured)))
        for shape, place in places.items():
            axes.text(place, slowest / 1.15, shape, rotation=90, ha="center", va="top", fontsize="x-small")
        axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.grid(axis="y", color="0.9")
        axes.set_xlabel("operations per byte (bf16 input and output, int8 weights)")
        axes.set_ylabel(f"GOP/s, {limits['threads']} thread(s)")
        axes.set_title("Line: copying memory; integer rate of a core from its first-level cache", fontsize="small")
        figure.legend(loc="outside right upper", fontsize="x-small", frameon=False)
        figure.savefig(path, metadata={"Date": None})


def _places(shapes: Mapping[str, float]) -> dict[str, float]:
    """Where each shape's column stands: at its intensity, or 15 % to the right of the column before."""
    places: dict[str, float] = {}
    last = 0.0
    for shape, intensity in sorted(shapes.items(), key=lambda item: item[1]):
        places[shape] = last = max(intensity, 1.15 * last)
    return places


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Marks by kind of candidate."""
    kinds: dict[str, list[str]] = {"packed": [], "peer": [], "torch": []}
    for name in names:
        kind = "packed" if name.startswith("packed") else "peer" if name.startswith(("torchao", "ONNX")) else "torch"
        kinds[kind].append(name)
    marks = "osD^v<>pPX*h"
    styles: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(kinds["packed"]):
        styles[name] = {"marker": marks[index % len(marks)], "color": f"C{index % 10}", "markersize": 7, "zorder": 3}
    for index, name in enumerate(kinds["torch"]):
        styles[name] = {
            "marker": marks[index % len(marks)],
            "color": "0.25",
            "markerfacecolor": "none",
            "markersize": 6,
        }
    for index, name in enumerate(kinds["peer"]):
        styles[name] = {"marker": marks[index % len(marks)], "color": "0.65", "markersize": 5}
    return styles
