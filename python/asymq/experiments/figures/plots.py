"""Draws the runs of a figure as the paper does: the range across, training steps upwards.

Colours are the captions'; lighter shades are larger learning rates. In black and white, markers
tell the parameterizations apart, open ones the largest learning rate. Of lines that lie on each
other the lower ones are wider.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from asymq.experiments.common.pictures import count_steps
from asymq.experiments.common.words import count
from asymq.experiments.figures import gradients
from asymq.experiments.figures.claims import Runs
from asymq.experiments.figures.toy_problem import VARIANTS, Run

RANGE = "range ends θmin and θmax (unit of x)"
MARKS = 9  # a line
POINTS = 700  # of a line
BAND = 0.13  # opacity
WIDEST, NARROWEST = 3.2, 1.1
EARLY = 5  # the part of the steps that a panel of its own shows: the first fifth
BEST: dict[str, Any] = {"color": "0.25", "linewidth": 0.9, "linestyle": (0, (1, 3))}


@dataclass(frozen=True)
class Style:
    """light, dark: the shades of the largest and the smallest learning rate."""

    light: str
    dark: str
    marker: str
    dashes: str = "-"


STYLES = {
    "scale_offset": Style("#f28e86", "#b3151b", "s"),
    "min_max": Style("#7db8ea", "#0b4a9e", "o"),
    "beta_gamma": Style("#7fcb85", "#14692a", "^"),
    "beta_gamma_sigmoid": Style("#7fcb85", "#14692a", "v", "--"),
    "beta_gamma_exp": Style("#f28e86", "#b3151b", ">", "-."),
    "beta_gamma_softplus": Style("#f9bd6b", "#d96c00", "<", ":"),
    "beta_gamma_clamp": Style("#7db8ea", "#0b4a9e", "p", "--"),
    "beta_gamma_dynamic": Style("#5fc9bb", "#00665c", "P", "-."),
    "min_max_plus": Style("#7db8ea", "#0b4a9e", "X", "--"),
    "min_max_frozen": Style("#7db8ea", "#0b4a9e", "D", "--"),
    "naive": Style("#5a5a5a", "#000000", "d"),
    "naive_current": Style("#5a5a5a", "#000000", "<", ":"),
    "sophisticated": Style("#c4c4c4", "#8a8a8a", ">"),
    "kscale_koffset": Style("#f9bd6b", "#d96c00", "h"),
    "symmetric_scale": Style("#f28e86", "#b3151b", "s"),
    "symmetric_max": Style("#7db8ea", "#0b4a9e", "o", "--"),
    "symmetric_gamma": Style("#7fcb85", "#14692a", "^", ":"),
}
OTHERS = Style("#d3a6e0", "#6a1b7f", "*", "-.")  # what has no style of its own


def _shade(runs: Runs, run: Run) -> tuple[float, ...]:
    """Between light and dark by the learning rate's place among those drawn; alone it is dark."""
    style, order = STYLES.get(run.curve.name, OTHERS), sorted(runs.lrs, key=float)
    place = order.index(run.curve.lr) / max(1, len(order) - 1)
    light, dark = to_rgb(style.light), to_rgb(style.dark)
    return tuple(place * a + (1 - place) * b for a, b in zip(light, dark, strict=True))


def _line(axes: Axes, runs: Runs, run: Run, place: float, across, upwards, **options) -> Line2D:
    """place: from 0 to 1, which of the lines this is."""
    style, color = STYLES.get(run.curve.name, OTHERS), _shade(runs, run)
    every = max(1, len(upwards) // MARKS)
    lighter = len(runs.lrs) > 1 and float(run.curve.lr) == max(map(float, runs.lrs))
    (line,) = axes.plot(
        across,
        upwards,
        **{
            "color": color,
            "linestyle": style.dashes,
            "linewidth": WIDEST - (WIDEST - NARROWEST) * place,
            "marker": style.marker,
            "markersize": 5.5,
            "markerfacecolor": "white" if lighter else color,
            "markevery": (int(place * every), every),
            **options,
        },
    )
    return line


def _ends(axes: Axes, runs: Runs, shown: list[Run]) -> None:
    """Both ends of every run: the first seed as a line, all seeds as a band; and the best range."""
    for i, run in enumerate(shown):
        steps = run.some_steps(POINTS)
        for end in (run.low[steps], run.high[steps]):
            if end.shape[1] > 1:
                color = _shade(runs, run)
                axes.fill_betweenx(
                    steps, end.amin(1), end.amax(1), color=color, alpha=BAND, linewidth=0
                )
            _line(axes, runs, run, i / len(shown), end[:, 0], steps)
    first = shown[0]
    widths = first.curve.data.widths(first.steps)
    best = runs.best[first.curve.target]
    for end in (best.low, best.high):
        axes.plot(end.mean() * widths, range(first.steps + 1), **BEST)
    # Ends that run away leave the picture, in which the others would be one line.
    left = min(run.low[0].min().item() for run in shown)
    right = max(run.high[0].max().item() for run in shown)
    left = min(left, (best.low.mean() * widths[-1]).item())
    right = max(right, (best.high.mean() * widths[-1]).item())
    margin = 0.3 * (right - left)
    before = axes.get_xlim()
    axes.set_xlim(max(before[0], left - margin), min(before[1], right + margin))
    axes.set(xlabel=RANGE, ylim=(0, first.steps))
    count_steps(axes, "y")


def _legend(figure: Figure, runs: Runs, ranges: bool = True) -> None:
    """One entry per parameterization and learning rate; ranges: and what _ends draws besides."""
    shown = {(run.curve.name, run.curve.lr): run for run in runs.runs.values()}
    axes = figure.axes[0]
    lines: list[Line2D | Patch] = []
    for name in runs.names:
        for lr in runs.lrs:
            line = _line(axes, runs, shown[name, lr], 0, [], [], markevery=None, linewidth=1.4)
            line.set_label(f"{VARIANTS[name].label}, lr {lr}")
            lines.append(line)
    if ranges:
        lines.append(Patch(color="black", alpha=BAND, linewidth=0, label="all seeds"))
        lines.append(Line2D([], [], **BEST, label="best range (mean)"))
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=min(4, max(2, len(runs.lrs) * 2)),
        fontsize=8.5,
        handlelength=3.2,
    )


def _panels(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure, grid = plt.subplots(
        1, columns, figsize=(max(6.5, 5.6 * columns), height), layout="constrained", squeeze=False
    )
    return figure, list(grid.flat)


def _height(runs: Runs) -> float:
    return 4.8 + 0.1 * len(runs.names) * len(runs.lrs)


def draw_ranges(title: str, runs: Runs) -> Figure:
    """A panel per bit width, of symmetric ranges one more with scaled learning rates."""
    rules = sorted({run.curve.chain_rule for run in runs.runs.values()})
    figure, axes = _panels(len(runs.bits) * len(rules), _height(runs))
    panels = [(bits, rule) for bits in runs.bits for rule in rules]
    for axis, (bits, rule) in zip(axes, panels, strict=True):
        shown = [runs.get(name, bits, lr, rule) for name in runs.names for lr in runs.lrs]
        _ends(axis, runs, shown)
        rates = ", learning rates scaled by the chain rule" if rule else ""
        axis.set_title(f"{count(bits, 'bit')}{rates}", fontsize=10.5)
    _legend(figure, runs)
    figure.suptitle(title)
    return figure


def draw_rates(title: str, runs: Runs) -> Figure:
    """A row of panels per learning rate: for every bit width all steps, and the first ones."""
    rows, columns = len(runs.lrs), 2 * len(runs.bits)
    figure, grid = plt.subplots(
        *(rows, columns), figsize=(5 * columns, 4.6 * rows), layout="constrained", squeeze=False
    )
    for lr, row in zip(runs.lrs, grid, strict=True):
        for bits, whole, early in zip(runs.bits, row[::2], row[1::2], strict=True):
            shown = [runs.get(name, bits, lr) for name in runs.names]
            for axes in (whole, early):
                _ends(axes, runs, shown)
            first = max(1, shown[0].steps // EARLY)
            early.set_ylim(0, first)
            heading = f"{count(bits, 'bit')}, lr {lr}"
            whole.set_title(heading, fontsize=10.5)
            early.set_title(f"{heading}: the first {count(first, 'step')}", fontsize=10.5)
    _legend(figure, runs)
    figure.suptitle(title)
    return figure


def draw_drift(title: str, runs: Runs) -> Figure:
    """Ranges, and errors of the first seed, while samples widen; two panels per bit width."""
    figure, axes = _panels(2 * len(runs.bits), _height(runs))
    for bits, left, right in zip(runs.bits, axes[::2], axes[1::2], strict=True):
        shown = [runs.get(name, bits, lr) for name in runs.names for lr in runs.lrs]
        _ends(left, runs, shown)
        for i, run in enumerate(shown):
            steps = run.some_steps(POINTS)
            _line(right, runs, run, i / len(shown), run.ratio[steps, 0], steps)
        right.set(xlabel="error over that of the best range", xscale="log", xlim=(0.9, 300))
        count_steps(right, "y")
        right.set_ylim(left.get_ylim())
        for axis in (left, right):
            axis.set_title(count(bits, "bit"), fontsize=10.5)
    _legend(figure, runs)
    figure.suptitle(title)
    return figure


def draw_scale_offset(title: str, runs: Runs) -> Figure:
    """Scale and offset of the first seed, two panels per bit width."""
    figure, axes = _panels(2 * len(runs.bits), _height(runs))
    for bits, left, right in zip(runs.bits, axes[::2], axes[1::2], strict=True):
        shown = [runs.get(name, bits, lr) for name in runs.names for lr in runs.lrs]
        for i, run in enumerate(shown):
            steps = run.some_steps(POINTS)
            for axis, values in ((left, run.scale), (right, run.offset)):
                _line(axis, runs, run, i / len(shown), steps, values[steps, 0])
        left.set_ylabel("scale s (unit of x)")
        right.set_ylabel("offset z (steps of the grid)")
        for axis in (left, right):
            count_steps(axis)
            axis.set_title(count(bits, "bit"), fontsize=10.5)
    _legend(figure, runs, ranges=False)
    figure.suptitle(title)
    return figure


DRAW: dict[str, Callable[[str, Runs], Figure]] = {
    "ranges": draw_ranges,
    "rates": draw_rates,
    "drift": draw_drift,
    "scale_offset": draw_scale_offset,
}

# ---- gradients ---------------------------------------------------------------------------------

# Colours and dashes of the learned parameters, first and second.
_GRADIENTS = (("#b3151b", "-"), ("#0b4a9e", "--"))


def draw_gradients(x: Tensor, found: dict[str, dict[str, Tensor]]) -> Figure:
    """A panel per parameterization: the derivatives of x̂ by its parameters."""
    figure, grid = plt.subplots(5, 2, figsize=(11, 15), layout="constrained", sharex=True)
    panels = list(grid.flat)
    first = next(iter(found.values()))
    panels[0].plot(x, first["quantized"], color="black", lw=1.2, label="x̂")
    panels[0].plot(x, first["x"], color="0.45", ls="--", lw=1.2, label="∂x̂/∂x")
    panels[0].set_title("the function, asymmetric", fontsize=10.5)
    for axes, (title, values) in zip(panels[1:], found.items(), strict=True):
        learned = [name for name in values if name not in ("quantized", "x")]
        for name, (color, dashes) in zip(learned, _GRADIENTS, strict=False):
            symbol = gradients.SYMBOLS[name]
            axes.plot(x, values[name], color=color, linestyle=dashes, lw=1.2, label=f"∂x̂/∂{symbol}")
        axes.set_title(title, fontsize=10.5)
    for axes in panels:
        low, high = gradients.LOW, gradients.HIGH
        if "symmetric" in axes.get_title() and "asymmetric" not in axes.get_title():
            low = -high
        for end in (low, high):
            axes.axvline(end, color="0.6", lw=0.8, ls=":")
        axes.legend(fontsize=9, loc="best")
        axes.grid(color="0.92")
    for axes in grid[-1]:
        axes.set_xlabel("x")
    for axes in grid[:, 0]:
        axes.set_ylabel("derivative of x̂")
    panels[0].set_ylabel("x̂ (unit of x) and ∂x̂/∂x")
    figure.suptitle(
        f"Exact gradients of the operators over x, {gradients.BITS} bits; dotted: the range"
    )
    return figure
