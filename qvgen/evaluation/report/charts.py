"""Training curves: metrics.csv -> inline SVG.

    thin line   each logged step          thick line   running mean, to see the trend under the noise
    dashed      the step from which Phi has rank 0

Left out: interaction, and any number that is not in metrics.csv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvgen.evaluation.metric_rows import read_metric_rows
from qvgen.evaluation.report.canvas import FIRST, SECOND, SERIES, TEXT, Canvas, Chart, Series, use_log_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NORMS = ["train/gradient_norm", "train/gradient_norm_weights", "train/gradient_norm_phi"]
SMALL_SHARE_TITLE = "Share of Phi's singular values below a tenth of the largest"
CLIP_TITLES = {
    "low": "Factor on the minimum of inputs, from timestep T on",
    "high": "Factor on the maximum of inputs, from timestep T on",
}


def read_history(path: Path) -> dict[str, Series]:
    """Read the curves of a run.

    A logger writes one row per group of metrics, so cells may be empty. A run that was resumed may hold a step twice;
    the later row counts.

    Args:
        path: metrics.csv with a column "step". A file that does not exist holds no curve; rows that are damaged are
            left out with a warning (:mod:`qvgen.evaluation.metric_rows`).

    Returns:
        column name -> (steps, values), for columns with at least one number, NaN included.
    """
    points: dict[str, dict[int, float]] = {}
    for row in read_metric_rows(path)[0]:
        for name, cell in row.items():
            if name != "step" and cell:
                points.setdefault(name, {})[int(row["step"])] = float(cell)
    return {
        name: (np.array(sorted(series)), np.array([series[step] for step in sorted(series)]))
        for name, series in points.items()
    }


def running_mean(values: np.ndarray, *, window: int) -> np.ndarray:
    """Centred mean over ``window`` neighbours, fewer at the ends: float64 [n] -> [n].

    >>> running_mean(np.array([0.0, 3.0, 6.0]), window=3)
    array([1.5, 3. , 4.5])
    """
    half = window // 2
    # cumulative[i] = sum of the first i values, so that any window is one subtraction.
    cumulative = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (cumulative[last] - cumulative[first]) / (last - first)


def draw_charts(history: Mapping[str, Series], *, ptq_error: float | None) -> tuple[Chart, ...]:
    """Draw what was logged; a curve that was not logged is left out.

    Args:
        history: The history that :func:`read_history` returns.
        ptq_error: held-out error before training, drawn as the line to beat; None for none.

    Returns:
        Loss, held-out error, rank and gate of Phi, gradient norms, share of Phi's small singular values, learning rate, clips
        of inputs by noise level, then all metrics of the group "quant".
    """
    rates = sorted(name for name in history if name.startswith("train/learning_rate"))
    clips = {side: [name for name in history if name.startswith(f"clip/{side}_t")] for side in CLIP_TITLES}
    quant = sorted(name for name in history if name.startswith("quant/"))
    wanted = [
        _draw_lines(history, ["train/loss"], title="Training loss, mean |v - v_teacher|²", log=True, smooth=True),
        _draw_held_out(history, ptq_error=ptq_error),
        _draw_phi(history),
        _draw_lines(history, NORMS, title="Gradient norm, before clipping: all, weights, Phi", log=True, smooth=True),
        _draw_lines(history, ["phi/small_share"], title=SMALL_SHARE_TITLE, log=False, smooth=False),
        _draw_lines(history, rates, title="Learning rate", log=False, smooth=False),
        *(
            _draw_lines(history, clips[side], title=title, log=False, smooth=False)
            for side, title in CLIP_TITLES.items()
        ),
        *(_draw_lines(history, [name], title=name, log=False, smooth=False) for name in quant),
    ]
    return tuple(chart for chart in wanted if chart is not None)


def phi_removed_step(history: Mapping[str, Series]) -> int | None:
    """First logged step at which Phi has rank 0 after it had some; None if there is none."""
    if "phi/rank" not in history:
        return None
    steps, ranks = history["phi/rank"]
    gone = np.flatnonzero((ranks == 0) & (np.maximum.accumulate(ranks) > 0))
    return int(steps[gone[0]]) if len(gone) else None


def _canvas(title: str, history: Mapping[str, Series]) -> Canvas:
    """An empty drawing; all drawings of a run share one range of steps, so that they can be read across."""
    return Canvas(title, last_step=max(int(steps[-1]) for steps, _ in history.values()))


def _draw_lines(
    history: Mapping[str, Series], names: list[str], *, title: str, log: bool, smooth: bool
) -> Chart | None:
    """Draw columns against the step; ``log`` leaves out what is not positive, ``smooth`` adds the running mean."""
    drawn = {name: history[name] for name in names if name in history and np.isfinite(history[name][1]).any()}
    if not drawn:
        return None
    log = log and all(_positive(values).any() for _, values in drawn.values())
    with _canvas(title, history) as canvas:
        note = ""
        for color, (name, (steps, values)) in zip(SERIES * len(drawn), drawn.items(), strict=False):
            values = np.where(_positive(values) if log else np.isfinite(values), values, np.nan)
            window = max(1, len(values) // 25) | 1
            if smooth and window > 1 and np.isfinite(values).all():
                canvas.axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.4)
                canvas.axes.plot(steps, running_mean(values, window=window), color=color, linewidth=1.8, label=name)
                note = f"Thin: each logged step. Thick: running mean of {window}."
            else:
                marker = "o" if len(values) <= 20 else ""
                canvas.axes.plot(
                    steps, values, color=color, linewidth=1.8, marker=marker, markersize=3, label=name, clip_on=False
                )
        if len(drawn) > 1:
            canvas.axes.legend(loc="best")
        if log:
            use_log_axis(canvas.axes)
        note = _mark_phi_removed(canvas.axes, history, note)
        return canvas.chart(note)


def _draw_held_out(history: Mapping[str, Series], *, ptq_error: float | None) -> Chart | None:
    name = "val/relative_error"
    if name not in history or not np.isfinite(history[name][1]).any():
        return None
    steps, values = history[name]
    log = bool(_positive(values).any())
    values = np.where(_positive(values) if log else np.isfinite(values), values, np.nan)
    with _canvas("Held-out relative error", history) as canvas:
        canvas.axes.plot(steps, values, color=FIRST, linewidth=1.8, marker="o", markersize=3, clip_on=False)
        note = ""
        if ptq_error is not None and math.isfinite(ptq_error) and ptq_error > 0:
            canvas.axes.axhline(ptq_error, color=SECOND, linewidth=1.2, linestyle="--")
            note = f"Horizontal: PTQ before training, {ptq_error:.3g}."
        if log:
            use_log_axis(canvas.axes)
        return canvas.chart(_mark_phi_removed(canvas.axes, history, note))


def _draw_phi(history: Mapping[str, Series]) -> Chart | None:
    if "phi/rank" not in history:
        return None
    steps, ranks = history["phi/rank"]
    with _canvas("Rank of Phi and gate of its decaying columns", history) as canvas:
        canvas.axes.plot(steps, ranks, color=FIRST, linewidth=1.8, drawstyle="steps-post")
        canvas.axes.set_ylabel("rank", color=FIRST)
        canvas.axes.set_ylim(bottom=0)
        note = ""
        if "phi/gamma_min" in history:
            right = canvas.axes.twinx()
            right.plot(*history["phi/gamma_min"], color=SECOND, linewidth=1.2)
            right.set_ylabel("smallest gate gamma", color=SECOND)
            right.set_ylim(0, 1.05)
            right.grid(visible=False)
            note = "The gate of the weakest columns falls from 1 to 0 in each phase; then they are dropped."
        return canvas.chart(_mark_phi_removed(canvas.axes, history, note))


def _positive(values: np.ndarray) -> np.ndarray:
    """Where a logarithmic axis can show a value; what float32 sums cannot tell from 0 would stretch it to nothing."""
    return np.isfinite(values) & (values > 1e-30)


def _mark_phi_removed(axes: Axes, history: Mapping[str, Series], note: str) -> str:
    """Draw the dashed line at the step from which Phi has rank 0; return the note that explains it."""
    step = phi_removed_step(history)
    if step is None:
        return note
    axes.axvline(step, color=TEXT, linewidth=1.0, linestyle=(0, (3, 3)))
    return f"{note} Dashed: Phi is gone from step {step}.".strip()
